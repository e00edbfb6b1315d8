"""Attribution graphs of a workspace: stored, read again, as JSON and back, on the command line."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.errors import InputError
from sae.rules import TopK
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench.catalog.notes import Notes
from workbench.circuits.graph_json import from_document, read_document, store_document, supernodes_of, to_document
from workbench.circuits.graph_schema import check_document
from workbench.circuits.graphs import GRAPH, attribute, intervene_on, make_graph, open_graph, transcoders_for
from workbench.cli.main import run
from workbench.models.load import LoadedModel
from workbench.workspace import Workspace

PROMPT = "def add(self, x):\n    self."


def coders_of(model: LoadedModel, name: str) -> TranscoderSet:
    """Random transcoders of every layer."""
    width, coders = model.info.d_model, {}
    for layer in range(model.info.n_layers):
        coder = Transcoder(
            width, width, 40, TopK(3), hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name=name,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(layer)
        for parameter in coder.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        coders[layer] = coder.requires_grad_(False)
    return TranscoderSet(coders)


@pytest.fixture(scope="module")
def graphs(small: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("graphs") / "w")
    workspace.add_transcoders("mine", coders_of(small, small.info.name), [{}, {}])
    workspace.graph("add", small, PROMPT)
    return workspace


def test_a_stored_graph_adds_up_and_is_the_part_of_the_graph_that_it_says(
    graphs: Workspace, small: LoadedModel
) -> None:
    whole = attribute(small, PROMPT, graphs.transcoders("mine"))
    assert "".join(whole.texts[1:]) == PROMPT
    stored = open_graph(graphs, "add")
    assert stored.texts == whole.texts
    assert stored.logit_texts == whole.logit_texts
    wanted = whole.prune(0.95, 0.99)
    assert stored.nodes.names == wanted.nodes.names
    torch.testing.assert_close(stored.edges, wanted.edges.double())
    z = stored.nodes.z[stored.targets]
    assert (stored.edges.sum(dim=1) + stored.rest + stored.bias - z).abs().max() < 1e-4
    result = graphs.results.open(GRAPH, "add")
    kept = set(result.table("nodes").query("kept")["node"])
    assert kept == set(whole.prune().nodes.names)
    answer = graphs.sql('SELECT count(*) AS n FROM "graph.add".edges WHERE kept')
    assert answer.rows == [(int((whole.prune().edges != 0).sum()),)]
    assert list(result.table("scores")["graph"]) == ["whole", "stored", "pruned"]
    assert len(stored.figure(0.8).data) >= 4


def test_asked_for_again_it_is_opened_and_not_made(graphs: Workspace, small: LoadedModel) -> None:
    first = graphs.results.open(GRAPH, "add").path.stat().st_mtime_ns
    assert make_graph(graphs, "add", small, PROMPT).path.stat().st_mtime_ns == first


def test_another_graph_of_a_name_leaves_the_first_with_what_was_written_of_it(
    small: LoadedModel, tmp_path: Path
) -> None:
    space = Workspace(tmp_path / "w")
    space.add_transcoders("mine", coders_of(small, small.info.name), [{}, {}])
    space.graph("add", small, PROMPT)
    Notes(space.path).set_supernodes("add", {"tokens": ["token/1"]})
    made = make_graph(space, "add", small, "x = y")
    assert made.name == "add-2"
    assert Notes(space.path).supernodes("add-2") == {}
    assert open_graph(space, "add").texts != open_graph(space, "add-2").texts
    file = tmp_path / "add.json"
    file.write_text(json.dumps(to_document(open_graph(space, "add"), "add", "demo")), encoding="utf-8")
    with pytest.raises(InputError, match="there is a graph 'add' already"):
        store_document(space, "add", read_document(file), file.name)


def test_it_begins_as_the_contexts_did_that_the_transcoders_were_trained_on(small: LoadedModel, tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    record = {"harvest": {"config": {"model": small.info.name, "bos": False}}}
    space.add_transcoders("bare", coders_of(small, small.info.name), [record, record])
    made = make_graph(space, "add", small, PROMPT)
    graph = open_graph(space, "add")
    assert "".join(graph.texts) == PROMPT
    assert graph.settings["bos"] is None
    logits = small.hf(torch.tensor([small.encode(PROMPT)])).logits[0, -1]
    assert graph.nodes.token[graph.n_sources].item() == logits.argmax().item()
    assert graph.nodes.activation[graph.n_sources].item() == pytest.approx(logits.softmax(0).max().item(), rel=1e-4)
    with pytest.raises(InputError, match="'add' is no result: say its kind and its name, as graph/add"):
        space.gc(results=["add"])
    assert run(["gc", "--result", "graph/add", "--workspace", str(space.path)]) == 0
    assert not made.path.exists()
    assert run(["gc", "--result", "graph/add", "--workspace", str(space.path)]) == 2


def test_a_set_that_leaves_out_the_last_layer_stands_for_no_model(small: LoadedModel, tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    whole = coders_of(small, small.info.name)
    part = TranscoderSet({layer: whole[layer] for layer in range(small.info.n_layers - 1)})
    space.add_transcoders("part", part, [{"model": small.info.name}] * len(part))
    with pytest.raises(InputError, match=f"has {len(part)} of the {small.info.n_layers} layers"):
        make_graph(space, "add", small, PROMPT, transcoders="part")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("def f(x):\n    return x\n" * 40, encoding="utf-8")
    with pytest.raises(InputError, match=f"has {len(part)} of the {small.info.n_layers} layers"):
        space.evaluate_transcoders("part", model=small, corpus=str(tmp_path / "texts"))


def test_the_document_is_valid_and_comes_back(graphs: Workspace) -> None:
    graph = open_graph(graphs, "add").prune()
    features = [name for name in graph.nodes.names if name.startswith("f")][:2]
    document = json.loads(json.dumps(to_document(graph, "add", "demo", supernodes={"both": features}, pinned=features)))
    check_document(document)
    kinds = {node["feature_type"] for node in document["nodes"]}
    assert {"embedding", "logit", "cross layer transcoder"} <= kinds
    logit = next(node for node in document["nodes"] if node["feature_type"] == "logit")
    assert logit["clerp"].startswith('Output "')
    assert "(p=" in logit["clerp"]
    back = from_document(document)
    assert back.nodes.names == graph.nodes.names
    torch.testing.assert_close(back.edges, graph.edges)
    assert back.logit_texts == graph.logit_texts
    assert supernodes_of(document) == {"both": features}
    assert (
        to_document(back, "add", "demo", supernodes={"both": features}, pinned=features)["links"] == document["links"]
    )


def test_the_document_has_what_the_published_schema_asks_for(graphs: Workspace) -> None:
    """Types and required keys as in Neuronpedia's graph-schema.json, written out."""
    document = to_document(open_graph(graphs, "add"), "add", "demo")
    assert all(isinstance(document["metadata"][key], str) for key in ("slug", "scan", "prompt"))
    assert all(isinstance(token, str) for token in document["metadata"]["prompt_tokens"])
    for node in document["nodes"]:
        assert isinstance(node["feature"], int)
        assert isinstance(node["layer"], str)
        assert isinstance(node["ctx_idx"], int)
        assert all(isinstance(node[key], str) for key in ("node_id", "feature_type", "jsNodeId", "clerp"))
        assert node["influence"] is None or 0 < node["influence"] <= 1 + 1e-9
        assert node["activation"] is None or isinstance(node["activation"], float)
    for link in document["links"]:
        assert isinstance(link["source"], str)
        assert isinstance(link["target"], str)
        assert isinstance(link["weight"], float)


def test_foreign_and_damaged_documents_are_refused_with_the_place(graphs: Workspace, tmp_path: Path) -> None:
    good = to_document(open_graph(graphs, "add").prune(), "add", "demo")

    def broken(change: str) -> dict:
        document = json.loads(json.dumps(good))
        exec(change, {"d": document})
        return document

    for change, said in (
        ("del d['links']", "lacks 'links'"),
        ("del d['metadata']['slug']", "metadata lacks 'slug'"),
        ("del d['nodes'][3]['clerp']", r"nodes\[3\] lacks 'clerp'"),
        ("d['nodes'][3]['feature_type'] = 'lorsa'", r"nodes\[3\] is a 'lorsa'"),
        ("d['nodes'][3]['ctx_idx'] = 999", "position 999"),
        ("d['nodes'][3]['node_id'] = d['nodes'][2]['node_id']", "of a node before it"),
        ("d['links'][0]['source'] = 'nowhere'", "no node"),
        ("d['links'][0]['source'] = []", "no node"),
        ("d['nodes'][3]['node_id'] = ['x']", "node_id"),
        ("d['nodes'][3]['clerp'] = None", "clerp"),
        ("d['nodes'][3]['activation'] = 'much'", "'much'"),
        ("d['nodes'][-1]['node_id'] = 'E_1_2'; d['links'] = []", "expected LAYER_FEATURE_POSITION"),
        ("d['metadata']['prompt_tokens'] = 5", "prompt_tokens"),
        ("d['nodes'] = [n for n in d['nodes'] if n['feature_type'] != 'logit']", "no logit"),
        ("d['links'][0]['weight'] = 'heavy'", "'heavy'"),
        ("d['links'][0]['target'] = d['nodes'][0]['node_id']", "edges lead to later layers"),
        ("d['links'][0]['weight'] = 10 ** 400", "a finite number"),
        ("d['links'][0]['weight'] = True", "a finite number"),
        ("d['links'].append(d['links'][0])", "as a link before it"),
        ("d['links'] = []", "no links"),
        ("d['metadata']['prompt'] = 5", "metadata has prompt = 5"),
        ("d['metadata']['scan'] = {}", "metadata has scan"),
        ("d['metadata']['prompt_tokens'][0] = None", "no list of texts"),
        ("d['nodes'][3]['ctx_idx'] = True", "position True"),
        ("d['nodes'][3]['ctx_idx'] = (d['nodes'][3]['ctx_idx'] + 1) % 5", "by its ctx_idx"),
        ("d['nodes'][3]['activation'] = float('inf')", "finite"),
        ("d['nodes'][-1]['token_prob'] = None", "a probability"),
        ("d['nodes'][-1]['token_prob'] = -1", "a probability"),
        ("d['nodes'][-1]['token_prob'] = float('nan')", "finite"),
        ("d['nodes'][-1]['node_id'] = '9' * 30 + '_5_1'", "expected LAYER_FEATURE_POSITION"),
        ("d['nodes'][-1]['node_id'] = f\"0_-5_{d['nodes'][-1]['ctx_idx']}\"", "expected LAYER_FEATURE_POSITION"),
        ("d['nodes'][-1]['node_id'] = f\"99999_5_{d['nodes'][-1]['ctx_idx']}\"", "which no model has"),
        ("d['nodes'][0]['node_id'] = 'E_7_1'; d['nodes'][0]['ctx_idx'] = 1", "where a node before it does"),
        ("d['qParams']['supernodes'] = 'abc'", "supernodes is 'abc'"),
        ("d['qParams']['supernodes'] = [5]", r"supernodes\[0\] is 5"),
        ("d['qParams']['supernodes'] = [[]]", r"supernodes\[0\] is \[\]"),
        ("d['qParams']['supernodes'] = [['a', {}]]", "a title and ids"),
        ("d['qParams']['supernodes'] = [[' ']]", "has no title"),
        ("d['qParams']['supernodes'] = [['a', 'self']]", "no node's id"),
        ("i = d['nodes'][0]['node_id']; d['qParams']['supernodes'] = [['a', i], ['b', i]]", "a second time"),
    ):
        with pytest.raises(InputError, match=said):
            from_document(broken(change))
    file = tmp_path / "no.json"
    for text in ("", "{", "[" * 100_000, "\xff", json.dumps(good).replace('"slug": "', '"slug": "\\ud800')):
        file.write_text(text, encoding="latin-1")
        assert run(["graph", "import", str(file), "--name", "no", "--workspace", str(graphs.path)]) == 2
    file.write_text(json.dumps(good), encoding="utf-8-sig")
    store_document(graphs, "marked", read_document(file), file.name)


def test_what_a_node_says_beside_its_id_does_not_deny_it(graphs: Workspace) -> None:
    good = to_document(open_graph(graphs, "add"), "add", "demo")
    names = from_document(good).nodes.names

    def changed(kind: str, key: str, value: object) -> dict:
        document = json.loads(json.dumps(good))
        node = [node for node in document["nodes"] if node["feature_type"] == kind][-1]
        node[key] = value(node) if callable(value) else value
        return document

    feature, error = "cross layer transcoder", "mlp reconstruction error"
    for key, value, said in (
        ("feature", 10**30, "is another feature, 1000"), ("feature", True, "is another feature, True"),
        ("feature", None, "is another feature, None"), ("feature", "9", "is another feature, '9'"),
        ("layer", "x", "layer 'x' by its layer"), ("layer", -5, "layer -5 by its layer"),
        ("layer", "99999999999", "by its layer"), ("layer", {}, "by its layer"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said) as refused:
            from_document(changed(feature, key, value))
        assert "\n" not in str(refused.value)
        if key == "layer":
            with pytest.raises(InputError, match=said):
                from_document(changed(error, key, value))

    def index(node: dict) -> int:
        return int(node["node_id"].split("_")[1])

    # Other writers: the index alone, the layer's digits before it, layers as numbers, tokens as -1.
    for kind, key, value in (
        (feature, "feature", index), (feature, "feature", lambda node: int(node["layer"]) * 10**5 + index(node)),
        (feature, "layer", lambda node: int(node["layer"])), (error, "feature", None), ("embedding", "feature", 100),
        ("embedding", "layer", -1), ("logit", "layer", "36"), ("logit", "feature", -1),
    ):  # fmt: skip
        assert from_document(changed(kind, key, value)).nodes.names == names


def test_a_prompt_that_is_no_text_is_refused(graphs: Workspace, small: LoadedModel) -> None:
    for wrong in (123, None, ["a"]):
        with pytest.raises(InputError, match="a prompt is a text, not"):
            attribute(small, wrong, graphs.transcoders("mine"))  # type: ignore[arg-type]


def test_errors_in_the_older_form_are_read(graphs: Workspace) -> None:
    document = to_document(open_graph(graphs, "add"), "add", "demo")
    new = {}
    for node in document["nodes"]:
        if node["feature_type"] == "mlp reconstruction error":
            new[node["node_id"]] = f"0_{node['layer']}_{node['ctx_idx']}"
            # As written there, an id may collide with a feature of layer 0: those are left as they are.
    taken = {node["node_id"] for node in document["nodes"]}
    new = {old: name for old, name in new.items() if name not in taken}
    assert new
    renamed = json.loads(json.dumps(document))
    for node in renamed["nodes"]:
        node["node_id"] = new.get(node["node_id"], node["node_id"])
    for link in renamed["links"]:
        link["source"] = new.get(link["source"], link["source"])
    assert from_document(renamed).nodes.names == from_document(document).nodes.names


def test_sets_of_other_models_and_models_without_one_are_refused(
    graphs: Workspace, small: LoadedModel, demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="of another model"):
        transcoders_for(graphs, demo, "mine")
    with pytest.raises(InputError, match="no set of transcoders"):
        transcoders_for(graphs, small, "other")
    with pytest.raises(InputError, match="train one"):
        transcoders_for(Workspace(tmp_path / "w"), small)

    def missing() -> Path:
        raise InputError("missing")

    monkeypatch.setattr("workbench.circuits.graphs.demo_transcoders_dir", missing)
    with pytest.raises(InputError, match="train one"):
        transcoders_for(Workspace(tmp_path / "w"), demo)
    with pytest.raises(InputError, match="shorten it"):
        attribute(small, "x = 1\n" * 200, graphs.transcoders("mine"))


def test_the_set_written_last_is_taken_and_no_baseline(small: LoadedModel, tmp_path: Path) -> None:
    space, coders = Workspace(tmp_path / "w"), coders_of(small, small.info.name)
    baseline = [{"training": {"frozen_decoder": True}}, {}]
    for second, (name, records) in enumerate((("b", [{}, {}]), ("a", [{}, {}]), ("a-random-decoder", baseline))):
        space.add_transcoders(name, coders, records)
        os.utime(space.transcoder_folder(name) / "transcoders.json", (second, second))
    (space.transcoder_folder("broken")).mkdir()
    (space.transcoder_folder("broken") / "transcoders.json").write_text("{")
    assert transcoders_for(space, small)[0] == "a"
    other = [{"harvest": {"model": {"weights_sha256": "0" * 64}}}, {}]
    space.add_transcoders("other", coders, other)
    with pytest.raises(InputError, match="other weights"):
        transcoders_for(space, small, "other")


def test_an_imported_graph_is_stored_whole_and_logits_have_their_own_text(graphs: Workspace, tmp_path: Path) -> None:
    graph = open_graph(graphs, "add")
    file = tmp_path / "add.json"
    file.write_text(json.dumps(to_document(graph, "add", "demo")))
    space = Workspace(tmp_path / "w")
    store_document(space, "add", read_document(file), file.name)
    assert open_graph(space, "add").nodes.names == graph.nodes.names
    torch.testing.assert_close(open_graph(space, "add").edges, graph.edges)
    table = graphs.results.open(GRAPH, "add").table("nodes").query("kind == 'logit'")
    assert tuple(table["text"]) == graph.logit_texts
    assert set(graph.table().query("kind == 'logit'")["text"]) == set(graph.logit_texts)


def test_the_command_line_makes_shows_prunes_changes_and_exports(
    graphs: Workspace, small: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--workspace", str(graphs.path)]
    assert run(["graph", "x = [1, 2", "--name", "list", "--model", small.info.name, *place]) == 0
    assert "Stored as graph result 'list'" in capsys.readouterr().out
    assert run(["graph", "show", "list", "--json", *place]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    feature = next(node["node"] for node in nodes if node["kind"] == "feature")
    assert run(["graph", "show", "list", "--node", feature, *place]) == 0
    assert f"inputs of {feature}" in capsys.readouterr().out
    assert run(["graph", "prune", "list", "--nodes", "0.6", *place]) == 0
    assert "replacement" in capsys.readouterr().out
    change = ["--change", f"{feature}=0", "--generate", "2", "--device", "cpu"]
    assert run(["graph", "intervene", "list", *change, "--json", *place]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["generated"]) == 2
    assert found["nodes"]
    other = next(node["node"] for node in nodes if node["kind"] == "feature" and node["node"] != feature)
    assert run(["graph", "group", "list", "both", feature, other, *place]) == 0
    assert run(["graph", "note", "list", "copies", "--node", feature, *place]) == 0
    capsys.readouterr()
    assert run(["graph", "show", "list", *place]) == 0
    shown = capsys.readouterr().out
    assert f"both: {feature}, {other}" in shown
    assert f"Note on {feature}: copies" in shown
    assert run(["graph", "note", "list", "", "--node", feature, *place]) == 0
    assert capsys.readouterr().out == f"{feature} has no note now\n"
    assert run(["graph", "note", "list", " ", *place]) == 0
    assert capsys.readouterr().out == "list has no note now\n"
    run(["graph", "intervene", "list", "--change", "both=0", "--device", "cpu", "--json", *place])
    together = json.loads(capsys.readouterr().out)["nodes"]
    run(["graph", "intervene", "list", "--hold", f"{feature}=0", "--change", f"{other}=0", "--device", "cpu", "--json",
         *place])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["nodes"] == together
    assert run(["graph", "group", "list", "a=b", feature, other, *place]) == 0
    assert f"no longer in both: {feature}, {other}" in capsys.readouterr().out
    assert run(["graph", "intervene", "list", "--change", "a=b=0", "--device", "cpu", "--json", *place]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"] == together
    assert run(["graph", "group", "list", "both", feature, other, *place]) == 0
    assert run(["graph", "group", "list", "input", "token/1", *place]) == 0
    assert run(["graph", "intervene", "list", "--change", "input=0", *place]) == 2
    assert "supernode 'input' has none of the graph's features" in capsys.readouterr().err
    assert run(["graph", "group", "list", "input", *place]) == 0
    assert run(["graph", "group", "list", "input", *place]) == 2
    assert "no supernode 'input': it has both" in capsys.readouterr().err
    assert run(["graph", "group", "list", feature, other, *place]) == 2
    assert f"{feature} is a node" in capsys.readouterr().err
    for wrong, said in ((["--hold", "token/1=2"], "cannot be held"), (["--change", "both=0", "--hold", f"{other}=1"],
                        "changed twice"), ([], "at least one")):  # fmt: skip
        assert run(["graph", "intervene", "list", *wrong, *place]) == 2
        assert said in capsys.readouterr().err
    logit = next(node["node"] for node in nodes if node["kind"] == "logit")
    assert run(["graph", "heads", "list", feature, logit, "--json", *place]) == 0
    found = json.loads(capsys.readouterr().out)
    graph = open_graph(graphs, "list")
    edge = float(graph.edges[graph.row[graph.node(logit)], graph.node(feature)])
    assert found["edge"] == pytest.approx(edge, rel=1e-4)
    assert sum(row["weight"] for row in found["heads"]) == pytest.approx(edge, rel=1e-4)
    assert run(["graph", "heads", "list", feature, logit, *place]) == 0
    assert "position that each looks at" in capsys.readouterr().out
    assert run(["graph", "look", "list", "a1.h0", "3", "2", "--json", *place]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(row["weight"] for row in found["kinds"]) == pytest.approx(found["score"], rel=1e-4)
    assert run(["graph", "look", "list", "a1.h0", "3", "2", *place]) == 0
    assert "all pairs by kind" in capsys.readouterr().out
    assert run(["graph", "look", "list", "a1.h0", "2", "3", *place]) == 2
    assert "lies ahead" in capsys.readouterr().err
    file = tmp_path / "list.json"
    assert run(["graph", "export", "list", str(file), *place]) == 0
    assert run(["graph", "import", str(file), "--name", "again", *place]) == 0
    assert set(Notes(graphs.path).supernodes("again")) <= {"both"}
    document = json.loads(file.read_text())
    document["qParams"]["supernodes"] = [["lost", "0_999_1"]]
    file.write_text(json.dumps(document))
    capsys.readouterr()
    assert run(["graph", "import", str(file), "--name", "third", *place]) == 0
    assert "lost lacks 1 nodes that the file does not have: 0_999_1" in capsys.readouterr().out
    assert run(["info", *place]) == 0
    assert re.search(r"graph +add, again, list, .*third", capsys.readouterr().out)
    assert run(["graph", "intervene", "again", *change, *place]) == 2
    assert "was imported" in capsys.readouterr().err
    assert run(["graph", "intervene", "list", *change, "--change", f"{feature}=2", *place]) == 2
    assert "is changed twice, by 0 and by 2" in capsys.readouterr().err
    assert run(["graph", "intervene", "list", "--change", feature, *place]) == 2
    assert "NODE=FACTOR" in capsys.readouterr().err


def test_what_people_wrote_of_a_graph_goes_when_it_does(small: LoadedModel, tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    space.add_transcoders("mine", coders_of(small, small.info.name), [{}, {}])
    for name in ("add", "other"):
        space.graph(name, small, PROMPT)
    notes = Notes(space.path)
    notes.set_supernodes("add", {"tokens": ["token/1"]})
    notes.set_graph_note("other", "", "kept as long as it is there")
    notes.set_graph_note("gone", "", "of a file that somebody deleted")
    assert [item.what for item in space.gc(dry_run=True)] == ["supernodes and notes of the graph gone"]
    assert notes.graphs() == ["add", "gone", "other"]
    space.gc()
    assert notes.graphs() == ["add", "other"]
    space.gc(transcoders=["mine"])
    assert notes.graphs() == []


def test_a_model_without_bos_has_graphs_too(small: LoadedModel, tmp_path: Path) -> None:
    small = replace(small, bos_id=None)
    space = Workspace(tmp_path / "w")
    space.add_transcoders("mine", coders_of(small, small.info.name), [{}, {}])
    space.graph("add", small, PROMPT)
    graph = open_graph(space, "add")
    assert "".join(graph.texts) == PROMPT
    assert graph.settings["bos"] is None
    first = next(name for name in graph.nodes.names if name.startswith("f"))
    found, *_ = intervene_on(space, "add", {first: 0.0}, model=small)
    assert found.nodes["observed"].abs().max() > 0
    document = to_document(graph, "add", "demo")
    assert document["metadata"]["prompt"] == PROMPT
    assert to_document(from_document(document), "add", "demo")["metadata"]["prompt"] == PROMPT


def test_an_intervention_on_replaced_transcoders_is_refused(graphs: Workspace, small: LoadedModel) -> None:
    feature = next(name for name in open_graph(graphs, "add").nodes.names if name.startswith("f"))
    found, *_ = intervene_on(graphs, "add", {feature: 0.0}, model=small)
    assert found.nodes["observed"].abs().max() > 0
    file = graphs.transcoder_folder("mine") / "layer_0" / "sae_weights.safetensors"
    before = file.read_bytes()
    try:
        other = coders_of(small, small.info.name)
        other[0].b_enc.data += 1
        other[0].save(file.parent)
        with pytest.raises(InputError, match="have been replaced"):
            intervene_on(graphs, "add", {feature: 0.0}, model=small)
    finally:
        file.write_bytes(before)
