"""Graphs of a task's prompts laid over each other are the single graphs counted, beside EAP-IG's heads."""

import json
from pathlib import Path

import pytest

import circuits.graph
from circuits.eap import attribute_edges
from circuits.graph.heads import STRAIGHT, head_shares, sources_again
from sae.errors import InputError
from workbench.circuits.graph_tasks import STEPS, STRONGEST
from workbench.circuits.task import Task
from workbench.cli.main import run
from workbench.models.load import LoadedModel
from workbench.workspace import Workspace

from .test_graphs import coders_of

N = 3


@pytest.fixture(scope="module")
def space(small: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("tasks") / "w")
    workspace.add_transcoders("mine", coders_of(small, small.info.name), [{}, {}])
    workspace.graph_task("induced", small, Task("induction", N))
    return workspace


def test_features_heads_and_prompts_are_those_of_the_single_graphs(space: Workspace, small: LoadedModel) -> None:
    result = space.results.open("task-graphs", "induced")
    prompts = Task("induction", N).prompts(small)
    coders = space.transcoders("mine")
    counted: dict[tuple[int, int], set[int]] = {}
    influence: dict[tuple[int, int], float] = {}
    through: dict[str, float] = {}
    said = []
    for number in range(N):
        tokens = prompts.clean[number, : int(prompts.last[number]) + 1]
        graph = circuits.graph.attribute(small.bridge, tokens, coders, bos_id=small.bos_id, max_features=2000)
        table = graph.prune().table().query("kind == 'feature'")
        for layer, feature, value in zip(table["layer"], table["feature"], table["influence"], strict=True):
            counted.setdefault((layer, feature), set()).add(number)
            influence[layer, feature] = influence.get((layer, feature), 0.0) + value / N
        answer = graph.nodes.names[graph.n_sources]
        said.append(small.text([int(graph.nodes.token[graph.n_sources])]))
        sources = sources_again(small.bridge, graph, coders)
        sizes: dict[str, float] = {}
        for name in graph.inputs(answer, STRONGEST)["source"]:
            for _, part in head_shares(graph, sources, name, answer).iterrows():
                sizes[part["head"]] = sizes.get(part["head"], 0.0) + abs(part["weight"])
        for head, size in sizes.items():
            through[head] = through.get(head, 0.0) + size / sum(sizes.values()) / N
    features = result.table("features")
    assert {(row.layer, row.feature): row.prompts for row in features.itertuples()} == {
        key: len(numbers) for key, numbers in counted.items()
    }
    for row in features.itertuples():
        assert row.influence == pytest.approx(influence[row.layer, row.feature])
        assert row.share == pytest.approx(row.prompts / N)
    assert features["prompts"].is_monotonic_decreasing
    heads = result.table("heads").set_index("head")
    for head, share in through.items():
        if head != STRAIGHT:
            assert heads["graph"][head] == pytest.approx(share, rel=1e-5)
    edges = attribute_edges(small.bridge, prompts, steps=STEPS, metric=Task("induction", N).measure(prompts)).table()
    for head in heads.index:
        outgoing = edges[[edge.startswith(f"{head}->") for edge in edges["edge"]]]
        assert heads["eap_ig"][head] == pytest.approx(float(outgoing["score"].abs().sum()), rel=1e-5)
    assert list(result.table("prompts")["says"]) == said
    assert -1 <= result.table("summary")["agreement"][0] <= 1


def test_the_command_prints_it_and_refuses_unknown_tasks(
    space: Workspace, small: LoadedModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = ["--model", small.info.name, "--workspace", str(space.path)]
    asked = ["graph", "task", "induction", "--name", "induced", "--prompts", str(N), *place]
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["prompts"]) == N
    assert run(asked) == 0
    made = capsys.readouterr().out
    assert "features" in made
    assert run(["graph", "show", "induced", "--task", "--workspace", str(space.path)]) == 0
    assert capsys.readouterr().out == made
    assert run(["graph", "show", "induced", "--task", "--node", "f0/1/1", "--workspace", str(space.path)]) == 2
    assert "leave --task out" in capsys.readouterr().err
    assert run(["graph", "task", "nothing", "--name", "x", *place]) == 2
    assert "unknown task" in capsys.readouterr().err
    with pytest.raises(InputError, match="train one"):
        Workspace(tmp_path / "w").graph_task("x", small, "induction")
