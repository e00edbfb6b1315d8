"""Building an index: what it holds against a dense computation, killed builds, rebuilds, signed codes, bad input."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from sae import SAE, TopK
from sae.errors import InputError
from sae.rules import BatchAbsTopK
from workbench import Workspace
from workbench.features.index import segments as segments_module
from workbench.features.index.build import build_index, read_meta
from workbench.features.index.segments import Segments, write_segments
from workbench.features.index.workers import in_order
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel

HOOK = "blocks.1.hook_resid_post"
SAE_NAME, D_SAE, CONTEXT = "s", 40, 16


def random_sae(width: int, hook: str = HOOK, seed: int = 0) -> SAE:
    sae = SAE(width, D_SAE, TopK(4), hook_name=hook, model_name="tiny")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.b_enc[3] = -1e6
    return sae


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, gpt2_model: LoadedModel) -> Path:
    """A workspace with a harvest of two hook points and an SAE on each; tests copy it."""
    root = tmp_path_factory.mktemp("index")
    texts = root / "texts"
    texts.mkdir()
    for number in range(12):
        body = f"def value_{number}(x):\n    return x * {number} + len('<b>{number}</b>')\n" * (1 + number % 3)
        (texts / f"{number}.txt").write_text(body)
    space = Workspace(root / "w")
    hooks = (HOOK, "blocks.0.attn.hook_z")
    config = HarvestConfig(gpt2_model.info.name, str(texts), hooks, context_len=CONTEXT, max_tokens=900)
    space.harvest("h", config, model=gpt2_model)
    random_sae(gpt2_model.info.d_model).save(space.path / "saes" / SAE_NAME)
    random_sae(gpt2_model.info.d_attention, hooks[1]).save(space.path / "saes" / "z")
    return space.path


@pytest.fixture
def space(source: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(source, tmp_path / "w")
    return Workspace(tmp_path / "w")


def dense_codes(space: Workspace, sae: SAE) -> tuple[np.ndarray, np.ndarray]:
    """(rows, activations [rows, d_sae]) of the ordinary rows, one encoding of everything."""
    harvest = space.open_harvest("h")
    rows = np.flatnonzero(harvest.flags == 0)
    return rows, sae.encode(harvest.vectors(sae.hook_name).rows(rows).float()).to_dense().numpy()


def test_the_index_holds_every_activation_sorted_by_feature(space: Workspace, gpt2_model: LoadedModel) -> None:
    summary = build_index(space, SAE_NAME, harvest="h", model=gpt2_model, device="cpu")
    rows, dense = dense_codes(space, space.sae(SAE_NAME))
    token, feature = np.nonzero(dense)
    order = np.lexsort((token, feature))
    with duckdb.connect(str(summary.path), read_only=True) as connection:
        found = connection.execute("SELECT * FROM feature_activations").fetchnumpy()
        stats = connection.execute("SELECT * FROM feature_stats ORDER BY feature").df()
        tokens = connection.execute("SELECT count(*), max(row) FROM tokens").fetchone()
    assert (found["feature"] == feature[order]).all()
    assert (found["row"] == rows[token[order]]).all()
    np.testing.assert_allclose(found["activation"], dense[token, feature][order], rtol=1e-5)
    assert (stats["firings"] == (dense != 0).sum(0)).all()
    np.testing.assert_allclose(stats["density"], (dense != 0).mean(0))
    assert stats["mean"].isna()[3]
    assert stats["quantiles"].isna()[3]
    assert (summary.tokens, summary.activations) == (len(rows), len(token))
    n_rows = space.open_harvest("h").n_rows
    assert tokens == (n_rows, n_rows - 1)
    assert not summary.path.with_suffix(".partial").exists()


def test_only_the_first_rows_are_indexed_when_asked(space: Workspace, gpt2_model: LoadedModel) -> None:
    summary = build_index(space, SAE_NAME, harvest="h", max_rows=100, model=gpt2_model, device="cpu")
    rows, dense = dense_codes(space, space.sae(SAE_NAME))
    assert summary.tokens == (rows < 100).sum()
    assert summary.activations == (dense[rows < 100] != 0).sum()


def test_a_repeated_build_returns_at_once_and_a_changed_sae_is_indexed_anew(
    space: Workspace, gpt2_model: LoadedModel
) -> None:
    first = build_index(space, SAE_NAME, harvest="h", model=gpt2_model, device="cpu")
    made = first.path.stat().st_mtime_ns
    again = build_index(space, SAE_NAME, harvest="h", model=gpt2_model, device="cpu")
    assert again.seconds == {}
    assert first.path.stat().st_mtime_ns == made
    random_sae(gpt2_model.info.d_model, seed=1).save(space.path / "saes" / SAE_NAME)
    changed = build_index(space, SAE_NAME, harvest="h", model=gpt2_model, device="cpu")
    assert changed.seconds
    _, dense = dense_codes(space, space.sae(SAE_NAME))
    assert changed.activations == (dense != 0).sum()


def test_pieces_on_several_threads_fill_the_same_tables(
    space: Workspace, gpt2_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(threads: int) -> dict[str, list[str]]:
        monkeypatch.setattr("workbench.features.index.build.workers", lambda pieces: threads)
        made = build_index(space, SAE_NAME, harvest="h", model=gpt2_model, device="cpu")
        found = tables(made.path)
        made.path.unlink()
        return found

    monkeypatch.setattr("workbench.features.index.build.ENTRIES_AT_ONCE", 100)
    assert built(4) == built(1)


def tables(path: Path) -> dict[str, list[str]]:
    """The rows of every table but `meta`, which says when it was made."""
    with duckdb.connect(str(path), read_only=True) as connection:
        names = [row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
        found = {name: connection.execute(f"FROM {name}").fetchall() for name in names if name != "meta"}
    return {name: [repr(row) for row in rows] for name, rows in found.items()}


def test_work_on_threads_comes_in_order_and_its_errors_reach_the_caller() -> None:
    def slow_first(piece: int) -> int:
        time.sleep(0.05 if piece == 0 else 0)
        if piece == 7:
            raise InputError("seven")
        return piece * piece

    assert list(in_order(slow_first, range(7), 3)) == [0, 1, 4, 9, 16, 25, 36]
    with pytest.raises(InputError, match="seven"):
        list(in_order(slow_first, range(9), 3))


KILLED = """
import os, sys, torch
import workbench.features.index.segments as segments
from workbench import Workspace
from workbench.features.index.build import build_index
segments.SPAN_ROWS = 128
torch.set_num_threads(1)
written = []
save = segments.save_file
def stop_at_third(columns, path):
    save(columns, path)
    written.append(path)
    if len(written) == 3:
        os._exit(9)
segments.save_file = stop_at_third
build_index(Workspace(sys.argv[1]), "s", harvest="h", device="cpu")
"""


def test_a_killed_build_shows_nothing_and_goes_on_where_it_stopped(
    space: Workspace, gpt2_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Path(__file__).resolve().parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(space.path)], cwd=repository, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert killed.returncode == 9
    path = space.index_path(SAE_NAME)
    assert not path.exists()
    segments = path.with_suffix(".partial") / "segments"
    kept = {file: file.stat().st_mtime_ns for file in segments.glob("*.safetensors")}
    assert len(kept) == 2
    monkeypatch.setattr(segments_module, "SPAN_ROWS", 128)
    encoded = []
    original = segments_module._encode
    monkeypatch.setattr(
        segments_module, "_encode", lambda *arguments: encoded.append(arguments[3]) or original(*arguments)
    )
    summary = build_index(space, SAE_NAME, harvest="h", model=gpt2_model, device="cpu")
    assert encoded == list(range(256, space.open_harvest("h").n_rows, 128))
    _, dense = dense_codes(space, space.sae(SAE_NAME))
    assert summary.activations == (dense != 0).sum()


@pytest.mark.parametrize(("span", "group"), [(65_536, 1 << 22), (64, 300), (48, 1)])
def test_segments_join_to_the_dense_code_for_signed_ragged_rules(
    span: int, group: int, space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "SPAN_ROWS", span)
    harvest = space.open_harvest("h")
    sae = SAE(harvest.vectors(HOOK).width, D_SAE, BatchAbsTopK(4), hook_name=HOOK)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(0)))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.state["threshold"].fill_(4.0)
        # Columns shrink, so that some features fire nowhere and a token may have no active feature.
        sae.W_enc.mul_(torch.linspace(0.001, 1, D_SAE))
    write_segments(harvest.vectors(HOOK), harvest.ordinary, sae, tmp_path / "segments", harvest.n_rows)
    found = Segments(tmp_path / "segments", D_SAE)
    rows, dense = dense_codes(space, sae)
    assert (dense < 0).any()
    assert (dense > 0).any()
    assert (found.firings == (dense != 0).sum(0)).all()
    covered = []
    for first, last in found.groups(group):
        entries = found.features(first, last)
        assert len(entries.row) <= group or np.count_nonzero(entries.counts) == 1
        covered += list(range(first, last))
        for local, feature in enumerate(range(first, last)):
            part = slice(entries.starts[local], entries.starts[local] + entries.counts[local])
            here = np.flatnonzero(dense[:, feature])
            assert (entries.row[part] == rows[here]).all()
            np.testing.assert_allclose(entries.activation[part], dense[here, feature], rtol=1e-4)
    assert covered == list(range(D_SAE))
    tokens, starts, active = found.by_token(tmp_path / "active")
    assert (tokens == rows).all()
    assert (starts == np.concatenate([[0], (dense != 0).sum(1).cumsum()])).all()
    assert (active == np.nonzero(dense)[1]).all()


def test_an_attention_sae_has_heads_and_another_has_none(space: Workspace, gpt2_model: LoadedModel) -> None:
    heads = {}
    for name in (SAE_NAME, "z"):
        path = build_index(space, name, harvest="h", model=gpt2_model, device="cpu").path
        with duckdb.connect(str(path), read_only=True) as connection:
            heads[name] = connection.execute("SELECT count(*), sum(share) FROM feature_heads").fetchone()
    assert heads[SAE_NAME] == (0, None)
    assert heads["z"] == (D_SAE * gpt2_model.info.n_heads, pytest.approx(D_SAE))


def test_without_its_model_an_sae_is_indexed_all_the_same(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise InputError("no model folder at elsewhere")

    monkeypatch.setattr("workbench.models.load.reload_model", missing)
    summary = build_index(space, SAE_NAME, harvest="h", device="cpu")
    assert summary.missing == "no model folder at elsewhere"
    assert read_meta(summary.path)["missing"] == summary.missing
    assert build_index(space, SAE_NAME, harvest="h", device="cpu").seconds == {}
    monkeypatch.undo()
    assert build_index(space, SAE_NAME, harvest="h", device="cpu").missing is None


def test_what_cannot_be_indexed_is_refused_in_one_line(space: Workspace, gpt2_model: LoadedModel) -> None:
    width = gpt2_model.info.d_model
    random_sae(width, "blocks.0.hook_resid_pre").save(space.path / "saes" / "elsewhere")
    random_sae(width + 8).save(space.path / "saes" / "wide")
    cases = {
        ("nothing", "h"): "no SAE 'nothing'",
        (SAE_NAME, "nothing"): "no finished harvest 'nothing'",
        (SAE_NAME, None): "which harvest it was trained on",
        ("elsewhere", "h"): "does not hold 'blocks.0.hook_resid_pre'",
        ("wide", "h"): f"width {width + 8}, harvest 'h' has {width}",
    }
    for (name, harvest), message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            build_index(space, name, harvest=harvest, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="are BOS and padding"):
        build_index(space, SAE_NAME, harvest="h", max_rows=1, device="cpu")
    assert not space.index_path(SAE_NAME).exists()


def test_rows_of_other_weights_than_an_sae_was_trained_on_are_said(
    tmp_path: Path, space: Workspace, gpt2_model: LoadedModel
) -> None:
    record = {"harvest": {"model": {"weights_sha256": "0" * 64}, "config": {"model": "elsewhere"}}}
    space.add_sae("foreign", random_sae(gpt2_model.info.d_model), record)
    note = build_index(space, "foreign", harvest="h", model=gpt2_model, device="cpu").note
    assert "whose weights are not those of elsewhere that 'foreign' was trained on" in note
    assert build_index(space, SAE_NAME, harvest="h", model=gpt2_model, device="cpu").note == ""
