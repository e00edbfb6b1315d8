"""Transcoders as features: what they fire on, what they write, prompts, steering, concepts, explanations, comparison.

Transcoders with a skip are trained on every layer of a tiny model; identities hold on models of three architectures.
"""

import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.effective_weights import effective_unembedding
from circuits.splice import splice_between
from sae import InputError, TopK, TrainConfig, Transcoder
from workbench.circuits.graph_json import to_document
from workbench.circuits.graphs import attribute
from workbench.circuits.named import graph_names
from workbench.cli.main import run
from workbench.features.concepts.alignment import held_out_half
from workbench.features.concepts.report import align_sae, truth_of
from workbench.features.index.on_text import activations_on_text
from workbench.features.steering import Edit, EditKind, edited, steer
from workbench.harvest.plan import HarvestConfig
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.models.prompt_text import encode_prompt
from workbench.workspace import Workspace

TEXT = "def f(x):\n    return json"
READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
UNIT = 2.5
SET = {"hook": "blocks.*.mlp.hook_in", "target_hook": "blocks.*.hook_mlp_out"}
LAYERS = 3


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, gpt2_model: LoadedModel) -> Workspace:
    """A set `mlps` of transcoders with a skip, trained on a small harvest `h`; every layer indexed."""
    root = tmp_path_factory.mktemp("transcoders")
    (root / "texts").mkdir()
    for number in range(12):
        text = f"def f{number}(x):\n    # more {number}\n    return json.loads(x, {number})\n" * 4
        (root / "texts" / f"{number}.py").write_text(text)
    made = Workspace(root / "w")
    config = HarvestConfig(str(tiny_gpt2), str(root / "texts"), tuple(SET.values()), context_len=32, max_tokens=1600)
    harvest = made.harvest("h", config, model=gpt2_model)
    assert harvest.hooks == [hook.replace("*", str(layer)) for hook in SET.values() for layer in range(LAYERS)]
    config = TrainConfig(name="mlps", rule=TopK(4), d_sae=40, batch_size=64, total_tokens=1280, skip=True)
    made.train("r", "h", [config], **SET, device="cpu")
    for layer in range(LAYERS):
        made.build_index(f"mlps.layer_{layer}", model=gpt2_model, device="cpu")
    return made


@pytest.fixture
def coder(space: Workspace) -> Transcoder:
    found = space.coder("mlps.layer_1")
    assert isinstance(found, Transcoder)
    return found


def random_coder(model: LoadedModel) -> Transcoder:
    """A transcoder with a skip of random weights, all of them large enough to matter."""
    width = model.info.d_model
    made = Transcoder(
        width, width, 40, TopK(6), skip=True, hook_name=READ, target_hook_name=WRITTEN, model_name=model.info.name
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(width)
    return made.requires_grad_(False)


def prompt_tokens(model: LoadedModel) -> Tensor:
    return torch.tensor([[model.bos_id, *encode_prompt(model, TEXT)[0]]])


def values(model: LoadedModel, *hooks: str) -> list[Tensor]:
    """Values at hook points, BOS left out."""
    found = capture(model, prompt_tokens(model), [resolve_hook(model, hook) for hook in hooks]).activations
    return [found[hook][0, 1:] for hook in hooks]


def busiest(model: LoadedModel, coder: Transcoder) -> int:
    """The feature with the largest activations on the prompt, so that edits show."""
    (x,) = values(model, coder.hook_name)
    return int(coder.encode(x).to_dense().sum(0).argmax())


@contextmanager
def streams_recorded(model: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """The residual stream after every block in the passes inside."""
    found: dict[str, Tensor] = {}
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.info.n_layers)]

    def record(value: Tensor, hook: Any, name: str) -> None:
        found[name] = value[0].clone()

    hooks = [(name, lambda value, hook, name=name: record(value, hook, name)) for name in names]
    with model.bridge.hooks(fwd_hooks=hooks):
        yield found


def test_steering_adds_strength_times_the_decoder_row_to_the_residual_stream(tiny_model: LoadedModel) -> None:
    coder = random_coder(tiny_model)
    feature, strength = busiest(tiny_model, coder), -1.5
    tokens = prompt_tokens(tiny_model)
    with streams_recorded(tiny_model) as streams:
        tiny_model.bridge(tokens)
        before = dict(streams)
        with edited(tiny_model, coder, Edit(feature, "add", strength), UNIT):
            tiny_model.bridge(tokens)
    change = streams["blocks.1.hook_resid_post"] - before["blocks.1.hook_resid_post"]
    torch.testing.assert_close(change[1:], (strength * UNIT * coder.W_dec[feature]).expand_as(change[1:]))
    # BOS keeps its values, and what lies before the transcoder does not see it.
    assert not change[0].any()
    assert torch.equal(streams["blocks.0.hook_resid_post"], before["blocks.0.hook_resid_post"])


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("kind", ["add", "clamp", "ablate"])
def test_an_edited_forward_pass_equals_a_hook_written_by_hand(
    tiny_model: LoadedModel, kind: EditKind, keep_error: bool
) -> None:
    coder = random_coder(tiny_model)
    edit = Edit(busiest(tiny_model, coder), kind, 1.5, keep_error=keep_error)
    x, y = (value.double() for value in values(tiny_model, READ, WRITTEN))
    a = coder.encode(x.float()).to_dense().double()
    new = a.clone()
    at = a[:, edit.feature]
    new[:, edit.feature] = {"add": at + 1.5 * UNIT, "clamp": at * 0 + 1.5 * UNIT, "ablate": at * 0}[kind]
    predicted, changed = (
        code @ coder.W_dec.double() + coder.b_dec.double() + x @ coder.get_parameter("W_skip").double().T
        for code in (a, new)
    )
    written = y - predicted + changed if keep_error else changed

    def by_hand(value: Tensor, hook: object) -> Tensor:
        return torch.cat([value[:, :1], written[None].to(value)], dim=1)

    tokens = prompt_tokens(tiny_model)
    expected = tiny_model.bridge.run_with_hooks(tokens, fwd_hooks=[(WRITTEN, by_hand)])
    with edited(tiny_model, coder, edit, UNIT):
        found = tiny_model.bridge(tokens)
    assert torch.allclose(found, expected, atol=2e-4)
    assert not torch.allclose(found, tiny_model.bridge(tokens), atol=1e-2)
    with edited(tiny_model, coder, Edit(edit.feature, "add", 0.0), UNIT):
        assert torch.equal(tiny_model.bridge(tokens), tiny_model.bridge(tokens))


def test_generation_by_tokens_equals_reading_everything_again(tiny_model: LoadedModel) -> None:
    coder = random_coder(tiny_model)
    edit = Edit(busiest(tiny_model, coder), "add", 2.0)
    text, expected = prompt_tokens(tiny_model), []
    for _ in range(6):
        with edited(tiny_model, coder, edit, UNIT):
            token = int(tiny_model.bridge(text)[0, -1].argmax())
        expected.append(token)
        text = torch.cat([text, torch.tensor([[token]])], dim=1)
    assert steer(tiny_model, coder, edit, TEXT, unit=UNIT, new_tokens=6).steered == tiny_model.text(expected)


def test_a_prompts_contributions_are_the_output_less_bias_and_skip(space: Workspace, gpt2_model: LoadedModel) -> None:
    """In the logits of a token, and with bias, skip and error all that the MLP writes to them."""
    reading = space.prompt("mlps.layer_1", TEXT, model=gpt2_model)
    coder = space.coder("mlps.layer_1")
    assert isinstance(coder, Transcoder)
    assert (reading.hook, reading.target_hook) == (READ, WRITTEN)
    x, y = values(gpt2_model, READ, WRITTEN)
    scale = gpt2_model.bridge.run_with_cache(prompt_tokens(gpt2_model))[1]["ln_final.hook_scale"][0, 1:].double()
    U = effective_unembedding(gpt2_model.bridge).double()
    predicted = coder.predict(x).double()
    rest = (coder.b_dec.double() + coder.skip(x).double()).detach()
    for position, target in ((2, 7), (5, 100)):
        readout = (U[:, target] - U.mean(dim=1)) / scale[position]
        by_features = reading.attribution(position + gpt2_model.n_bos, target).sum()
        assert by_features == pytest.approx(float((predicted - rest)[position] @ readout), abs=1e-4)
        error = (y.double() - predicted)[position]
        total = by_features + float((rest[position] + error) @ readout)
        assert total == pytest.approx(float(y.double()[position] @ readout), abs=1e-4)
    dense = coder.encode(x).to_dense().numpy()
    assert all(np.array_equal(reading.activations(feature)[1:], dense[:, feature]) for feature in range(coder.d_sae))
    html = reading._repr_html_()
    assert f"{READ} → {WRITTEN}" in html


def test_an_index_tells_what_a_feature_writes(space: Workspace, gpt2_model: LoadedModel, coder: Transcoder) -> None:
    with closing(space.index("mlps.layer_1")) as index:
        table = index.table()
        number = int(table.sort_values("firings")["feature"].iloc[-1])
        feature = index.feature(number)
    effect = (coder.W_dec[number].double() @ effective_unembedding(gpt2_model.bridge).double()).detach()
    effect -= effect.mean()
    assert feature.promotes[0].token == int(effect.argmax())
    assert feature.promotes[0].effect == pytest.approx(float(effect.max()), rel=1e-4)
    assert feature.suppresses[0].token == int(effect.argmin())
    assert (feature.hook, feature.target_hook, feature.heads) == (READ, WRITTEN, [])
    assert f"{READ} → {WRITTEN}" in feature.to_html()
    live = activations_on_text(gpt2_model, coder, number, TEXT)
    assert live.example.activations == coder.encode(values(gpt2_model, READ)[0]).to_dense()[:, number].tolist()
    assert live.example.effects is not None
    assert any(live.example.effects)


def test_a_search_goes_through_the_layers_and_a_layer_has_a_name(space: Workspace, capsys: Any) -> None:
    where = ["--workspace", str(space.path)]
    assert space.indexes() == [f"mlps.layer_{layer}" for layer in range(LAYERS)]
    assert run(["feature", "--search", "json", *where, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["sae"] for item in found} == set(space.indexes())
    assert run(["feature", "mlps", "--search", "json", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert run(["feature", "mlps.layer_2", str(found[0]["feature"]), *where]) == 0
    # Indexing the set again finds every layer indexed.
    assert run(["index", "mlps", *where]) == 0
    assert capsys.readouterr().out.count("indexed before") == LAYERS


def test_concepts_and_explanations_name_a_transcoders_features(
    space: Workspace, gpt2_model: LoadedModel, coder: Transcoder
) -> None:
    truth = truth_of(space, "h", language="text", model=gpt2_model)
    report = align_sae(space, "mlps.layer_1", concepts=truth)
    held_out = truth.rows[held_out_half(truth)]
    code = coder.encode(space.open_harvest("h").vectors(READ).rows(held_out).float())
    assert report.alignment.firings.tolist() == (code.to_dense() != 0).sum(dim=0).tolist()

    class Saying:
        name = "saying"

        def complete(self, prompt: str, max_tokens: int) -> str:
            return "calls" if "<<" in prompt else "yes"

    with closing(space.index("mlps.layer_1")) as index:
        number = int(index.table().sort_values("firings")["feature"].iloc[-1])
    space.explain("mlps.layer_1", [number], Saying(), texts=2)
    feature = space.feature("mlps.layer_1", number)
    assert feature.explanation is not None
    assert feature.explanation.explanation == "calls"
    assert feature.concepts


def test_layers_stand_side_by_side_and_share_directions_of_what_they_write(space: Workspace, capsys: Any) -> None:
    table = space.compare(["mlps"])
    assert table["sae"].tolist() == [f"mlps.layer_{layer}" for layer in range(LAYERS)]
    assert table["target_hook"].tolist() == [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)]
    assert space.compare()["sae"].tolist() == table["sae"].tolist()
    assert [item.layer for item in space.coders()] == list(range(LAYERS))
    assert {item.member_of for item in space.coders()} == {"mlps"}
    found = space.overlap("mlps.layer_0", "mlps.layer_1")
    a, b = (torch.nn.functional.normalize(space.coder(f"mlps.layer_{i}").W_dec, dim=1) for i in range(2))
    assert found.cosine_a == pytest.approx((a @ b.T).amax(dim=1).detach().numpy(), abs=1e-6)
    assert run(["compare", "mlps", "--workspace", str(space.path)]) == 0
    assert "mlps.layer_2" in capsys.readouterr().out


def test_what_cannot_hold_for_a_transcoder_is_refused_in_one_line(
    space: Workspace, gpt2_model: LoadedModel, capsys: Any
) -> None:
    where = ["--workspace", str(space.path)]
    for arguments, said in (
        (["prompt", "mlps", "x"], "'mlps' is a set of 3 transcoders: say which layer, as mlps.layer_0"),
        (["prompt", "gone", "x"], "it has mlps.layer_0 to layer_2"),
        (["concepts", "mlps"], "say which layer"),
        (["feature", "mlps", "3"], "say which layer"),
        (["sparsity", "sae", "s", "mlps.layer_1"], "is a transcoder, which predicts another"),
    ):
        assert run([*arguments, *where]) == 2, arguments
        errors = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(errors) == 1
        assert said in errors[0]
    for refused in (
        lambda: space.dfa("mlps.layer_1", TEXT, gpt2_model),
        lambda: space.head_features("mlps.layer_1", gpt2_model),
        lambda: space.circuit(gpt2_model, "induction", "features", saes=["mlps.layer_1"]),
    ):
        with pytest.raises(InputError, match=r"back where it was read and needs an SAE.* `Workspace.coder` loads one"):
            refused()


def test_what_is_written_before_it_is_read_is_refused(gpt2_model: LoadedModel) -> None:
    with (
        splice_between(gpt2_model.bridge, "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out", lambda x, y: x),
        pytest.raises(InputError, match=r"computes blocks.1.hook_attn_out before blocks.1.hook_mlp_out"),
    ):
        gpt2_model.bridge(prompt_tokens(gpt2_model))


def test_a_graph_calls_features_what_their_index_calls_them(space: Workspace, gpt2_model: LoadedModel) -> None:
    graph = attribute(gpt2_model, TEXT, space.transcoders("mlps"))
    found = graph_names(space, "mlps", graph)
    assert set(found) == {name for name in graph.nodes.names if name.startswith("f")}
    for node in (min(found), max(found)):
        layer, number, _ = node[1:].split("/")
        with closing(space.index(f"mlps.layer_{layer}")) as index:
            assert found[node] == index.names([int(number)])[int(number)]
    assert graph_names(space, None, graph) == {}
    clerps = {node["node_id"]: node["clerp"] for node in to_document(graph, "why", "tiny", labels=found)["nodes"]}
    layer, number, at = max(found)[1:].split("/")
    assert clerps[f"{layer}_{number}_{at}"] == found[max(found)]
