"""What artefacts were made from: the records there have been are read, and removal follows them."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from sae import SAE, TopK, Transcoder, TranscoderSet
from sae.errors import InputError
from sae.rules import AbsTopK
from workbench import Workspace
from workbench.catalog.origin import Origin
from workbench.cli.main import run

HARVEST = {
    "name": "h",
    "config": {"model": "gpt2", "corpus": "texts/", "text_field": "body", "context_len": 64},
    "model": {"name": "gpt2", "weights_sha256": "ab"},
    "corpus": {"name": "texts/", "fingerprint": "cd"},
}
TRAINED = {"run": "r", "harvest": HARVEST, "hook": "blocks.0.hook_resid_post", "versions": {},
           "training": {"rule": {"name": "topk", "k": 4}, "frozen_decoder": True, "seed": 1}}  # fmt: skip


def add(space: Workspace, name: str, rule: TopK | AbsTopK | None = None, seed: int = 0) -> SAE:
    sae = SAE(6, 12, rule or TopK(2), hook_name="blocks.0.hook_resid_post", model_name="m")
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(12, 6, generator=torch.Generator().manual_seed(seed)))
    space.add_sae(name, sae, {"imported": {"rule": {"name": "topk", "k": 2}}, "hook": sae.hook_name})
    return sae


def test_a_trained_saes_record_is_read() -> None:
    origin = Origin.of_sae(TRAINED)
    assert (origin.model, origin.weights_sha256) == ("gpt2", "ab")
    assert (origin.corpus, origin.text_field, origin.fingerprint) == ("texts/", "body", "cd")
    assert (origin.harvest, origin.hook, origin.context_len, origin.run) == ("h", TRAINED["hook"], 64, "r")
    assert origin.rule == {"name": "topk", "k": 4}
    assert origin.frozen_decoder


def test_an_imported_sae_falls_back_on_its_own_configuration(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    add(space, "a")
    origin = space.origin("a")
    assert (origin.model, origin.hook, origin.harvest) == ("m", "blocks.0.hook_resid_post", None)
    assert origin.rule == {"name": "topk", "k": 2}
    assert not origin.frozen_decoder


@pytest.mark.parametrize(
    ("record", "parameters"),
    [
        ({}, {"sae": "a"}),
        ({"sae": "a"}, {}),
        ({"model": {"name": "m"}, "saes": {"a": "12"}}, {}),
        ({"model": {"name": "m"}}, {"saes": {"a": "12"}}),
        ({"model": {"name": "m"}}, {"saes": ["a"]}),
    ],
)
def test_the_saes_of_results_are_found_wherever_a_version_kept_them(record: dict, parameters: dict) -> None:
    assert Origin.of_result(record, parameters).saes == ("a",)


@pytest.mark.parametrize(
    ("record", "parameters"),
    [
        ({"model": "gpt2", "corpus": "x", "harvest": "demo"}, {}),
        ({"model": {"name": "m"}, "corpus": ["x"]}, {"saes": 3}),
        ({}, {"saes": "abc", "a": "b"}),
        ({"harvest": {"config": "?", "model": None}}, {"sae": 4}),
    ],
)
def test_records_of_another_shape_say_nothing(record: dict, parameters: dict) -> None:
    assert Origin.of_result(record, parameters).saes == ()


def test_removing_an_sae_takes_what_was_measured_on_it_and_nothing_else(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    for seed, name in enumerate(("demo", "other")):
        add(space, name, seed=seed)
    table = {"t": pd.DataFrame([{"a": 1}])}
    model = {"model": {"name": "m", "weights_sha256": "ab"}}
    # A report on the model that only shares the SAE's name, and a measurement of the SAE under another name.
    space.results.save("sparsity-mlp", "demo", parameters={}, provenance=model, tables=table)
    space.results.save("circuit-dfa", "x", parameters={}, provenance={**model, "saes": {"demo": "1"}}, tables=table)
    space.results.save("circuit-dfa", "y", parameters={}, provenance={**model, "saes": {"other": "1"}}, tables=table)
    space.results.save("mine", "z", parameters={"a": "demo"}, provenance={"model": "gpt2"}, tables=table)
    space.match("demo", "other")
    space.gc(saes=["demo"])
    left = {(result.kind, result.name) for result in space.results.find()}
    assert left == {("sparsity-mlp", "demo"), ("circuit-dfa", "y"), ("mine", "z")}
    assert [summary.name for summary in space.saes()] == ["other"]


def test_removing_a_set_of_transcoders_takes_what_was_measured_on_it(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    hooks = {"hook_name": "blocks.0.mlp.hook_in", "target_hook_name": "blocks.0.hook_mlp_out", "model_name": "m"}
    coders = TranscoderSet({0: Transcoder(6, 6, 12, TopK(2), **hooks)})
    for name in ("demo", "other"):
        space.add_transcoders(name, coders, [{}])
    table = {"t": pd.DataFrame([{"a": 1}])}
    model = {"model": {"name": "m", "weights_sha256": "ab"}}
    of_demo, of_other = ({"transcoders": {"name": name, "fingerprint": "1"}} for name in ("demo", "other"))
    space.results.save("graph", "x", parameters={}, provenance={**model, **of_demo}, tables=table)
    space.results.save("graph", "demo", parameters={}, provenance={**model, **of_other}, tables=table)
    # As it was recorded before.
    old = {**model, "transcoders": {"demo": "1"}}
    space.results.save("replacement", "y", parameters={"transcoders": "demo"}, provenance=old, tables=table)
    space.results.save("evaluation", "z", parameters={"saes": ["demo.layer_0"]}, provenance=model, tables=table)
    for index in ("demo.layer_0", "demo", "other.layer_0"):
        space.index_path(index).parent.mkdir(exist_ok=True)
        space.index_path(index).touch()
    assert run(["gc", "--transcoders", "demo", "--workspace", str(space.path)]) == 0
    assert [(result.kind, result.name) for result in space.results.find()] == [("graph", "demo")]
    assert [summary.name for summary in space.transcoder_sets()] == ["other"]
    assert space.indexes() == ["demo", "other.layer_0"]
    with pytest.raises(InputError, match="no set of transcoders 'demo'"):
        space.gc(transcoders=["demo"])


def test_a_damaged_result_does_not_keep_an_sae_from_being_removed(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    add(space, "a")
    broken = space.results.path("evaluation", "b")
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no database")
    space.gc(saes=["a"])
    assert space.saes() == []
    assert broken.exists()


def test_a_result_is_made_once_for_the_same_origin_and_again_for_another(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    made = []

    def make() -> tuple[dict, dict]:
        made.append(len(made))
        return {"t": pd.DataFrame([{"n": len(made)}])}, {}

    def get(k: int, weights: str) -> int:
        origin = Origin.of_result({"model": {"name": "m", "weights_sha256": weights}, "tuple": (1, 2)}, {})
        result = space.results.get_or_make("kind", "name", parameters={"k": k}, origin=origin, make=make)
        return int(result.table("t")["n"].item())

    assert [get(1, "a"), get(1, "a"), get(2, "a"), get(2, "a"), get(2, "b")] == [1, 1, 2, 2, 3]
    with pytest.raises(InputError, match="cannot be a file name"):
        space.results.get_or_make("kind", "a/b", parameters={}, origin=Origin({}), make=make)
    assert len(made) == 3


def test_overlap_and_stability_are_one_matching_also_between_signed_and_unsigned(tmp_path: Path) -> None:
    """A signed feature and a direction opposite to it are the same line, whichever of the two SAEs is signed."""
    space = Workspace(tmp_path / "w")
    signed, plain = add(space, "signed", AbsTopK(2)), add(space, "plain", seed=1)
    shown = space.overlap("signed", "plain").table()
    space.match("signed", "plain")
    stored = space.results.open("stability", "signed+plain")
    pd.testing.assert_frame_equal(stored.table("features"), shown, check_dtype=False)
    left, right = (sae.W_dec.double() / sae.W_dec.double().norm(dim=1, keepdim=True) for sae in (signed, plain))
    best = (left @ right.T).abs().amax(dim=1)
    assert shown["cosine"].tolist() == pytest.approx(best.tolist(), abs=1e-6)
    assert stored.table("summary")["mean_max_cosine"].item() == pytest.approx(best.mean().item(), abs=1e-6)


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    origin = Origin.of_sae(TRAINED).measured_with(evaluated_on={"name": "texts/", "fingerprint": "cd"})
    assert json.loads(json.dumps(origin.record))["evaluated_on"]["fingerprint"] == "cd"
    assert origin.harvest == "h"
