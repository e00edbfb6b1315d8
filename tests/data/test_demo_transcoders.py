"""The demo model's bundled transcoders: small enough to travel, of this model, and close to its MLPs."""

import json
from pathlib import Path

import torch

from sae import TopK, load_transcoders
from workbench import Workspace
from workbench.circuits.named import feature_names
from workbench.disk.names import layer_name
from workbench.models.bundled import demo_transcoders_dir
from workbench.models.load import load_model
from workbench.saes.replacement import evaluate_replacement
from workbench.text.corpora import open_corpus

MOST_BYTES = 12_000_000


def test_they_are_a_small_set_of_the_demo_model_as_it_is() -> None:
    folder, model = demo_transcoders_dir(), load_model("demo", device="cpu")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= MOST_BYTES
    made = json.loads((folder / "training.json").read_text())
    assert made["model_weights_sha256"] == model.info.weights_sha256
    coders = load_transcoders(folder)
    assert coders.model_name == "demo"
    assert len(coders) == model.info.n_layers
    for layer, coder in coders.coders.items():
        assert (coder.hook_name, coder.target_hook_name) == (
            f"blocks.{layer}.mlp.hook_in",
            f"blocks.{layer}.hook_mlp_out",
        )
        assert isinstance(coder.rule, TopK)
        torch.testing.assert_close(coder.W_dec.float().norm(dim=1), torch.ones(coder.d_sae), rtol=0, atol=1e-3)


def test_their_features_have_names_where_nobody_indexed_them(tmp_path: Path) -> None:
    space, names = Workspace(tmp_path / "w"), set()
    for layer, coder in load_transcoders(demo_transcoders_dir()).coders.items():
        called = feature_names(space, layer_name("bundled", layer), range(-1, coder.d_sae + 1))
        assert list(called) == list(range(coder.d_sae))
        assert all(name.startswith(('fires on "', 'rare · promotes "')) for name in called.values())
        names |= set(called.values())
    assert len(names) > 4000
    assert feature_names(space, "bundled.layer_9", [0]) == feature_names(space, "mine.layer_0", [0]) == {}


def test_all_mlps_replaced_at_once_cost_at_most_half_a_nat() -> None:
    coders = [coder.float() for coder in load_transcoders(demo_transcoders_dir()).coders.values()]
    measured = evaluate_replacement(
        load_model("demo", device="cpu"), coders, open_corpus("python-stdlib"), max_tokens=4096
    )
    assert 0 < measured.added_nats < 0.5
    assert measured.ce_zero - measured.ce_clean > 5
