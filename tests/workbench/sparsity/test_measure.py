"""The measuring pass against naive loops over activations captured another way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.errors import InputError
from workbench.models import contexts
from workbench.models.capture import capture
from workbench.models.contexts import context_batches
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.sparsity.layers import has_exact_zeros, mlps
from workbench.sparsity.measure import Measurement, measure
from workbench.sparsity.mlp_stats import SAMPLE_EVERY
from workbench.text.corpora import Corpus, open_corpus

CONTEXT, TOKENS = 32, 1024


@pytest.fixture(scope="session")
def measured(model: LoadedModel, corpus: Corpus) -> Measurement:
    return measure(model, corpus, max_tokens=TOKENS, context_len=CONTEXT)


@pytest.fixture(scope="session")
def activations(model: LoadedModel, corpus: Corpus) -> list[tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]]:
    """Per layer: h of the ordinary tokens in float64, their (document, position, token), neighbouring rows."""
    hooks = [resolve_hook(model, f"blocks.{layer}.mlp.hook_post") for layer in range(model.info.n_layers)]
    h: list[list[np.ndarray]] = [[] for _ in hooks]
    origin: list[tuple[int, int, int]] = []
    places: list[tuple[int, int]] = []
    context = 0
    for batch in context_batches(model, corpus, "train", max_tokens=TOKENS, context_len=CONTEXT):
        found = capture(model, batch.tokens, hooks).activations
        for row in range(len(batch.tokens)):
            for pos in range(CONTEXT):
                if batch.ordinary[row, pos]:
                    origin.append((int(batch.doc[row, pos]), int(batch.doc_pos[row, pos]), int(batch.tokens[row, pos])))
                    places.append((context, pos))
                    for layer, hook in enumerate(hooks):
                        h[layer].append(found[hook.name][row, pos].double().numpy())
            context += 1
    pairs = [i for i in range(len(places) - 1) if places[i + 1] == (places[i][0], places[i][1] + 1)]
    return [(np.stack(rows), np.array(origin), [(i, i + 1) for i in pairs]) for rows in h]


def test_layer_numbers_equal_naive_loops(
    model: LoadedModel, measured: Measurement, activations: list[tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]]
) -> None:
    for mlp, (h, _, pairs) in zip(mlps(model), activations, strict=True):
        row = measured.layers.iloc[mlp.layer]
        size = np.abs(h)
        largest = size.max(axis=1, keepdims=True)
        fires = h != 0 if has_exact_zeros(mlp) else size > 0.01 * largest
        assert row["tokens"] == len(h)
        assert row["exact_zero"] == pytest.approx((h == 0).mean(), abs=1e-12)
        assert row["active"] == pytest.approx(fires.mean(), abs=2e-5)
        density = fires.mean(axis=0)
        assert row["dead"] == pytest.approx((density == 0).mean(), abs=1e-12)
        assert row["shared"] == pytest.approx((density > 0.5).mean(), abs=0.02)
        assert row["specialised"] == pytest.approx(((density < 0.01) & (density > 0)).mean(), abs=0.02)
        centred = h - h.mean()
        assert row["kurtosis"] == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2 - 3, rel=1e-4)
        jaccard = [(fires[i] & fires[j]).sum() / (fires[i] | fires[j]).sum() for i, j in pairs]
        assert row["jaccard"] == pytest.approx(np.mean(jaccard), abs=1e-5)
        # Every SAMPLE_EVERYth token: one batch holds them all here.
        sample = size[::SAMPLE_EVERY]
        for name, share in (("below_0_1_percent", 0.001), ("below_1_percent", 0.01), ("below_10_percent", 0.1)):
            expected = (sample < share * sample.max(axis=1, keepdims=True)).mean()
            assert row[name] == pytest.approx(expected, abs=2e-4)
        weight = mlp.out.weight.double().numpy()
        parts = sample * np.sqrt((weight**2).sum(axis=0))
        for name, mass in (("mass_50", 0.5), ("mass_90", 0.9), ("mass_99", 0.99)):
            needed = []
            for values in parts:
                reached, count = 0.0, 0
                for value in sorted(values, reverse=True):
                    if reached >= mass * values.sum():
                        break
                    reached, count = reached + value, count + 1
                needed.append(count / len(values))
            assert row[name] == pytest.approx(np.mean(needed), abs=1e-3)


def test_neurons_know_their_density_and_where_their_largest_activation_was(
    model: LoadedModel, measured: Measurement, activations: list[tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]]
) -> None:
    for layer, (h, origin, _) in enumerate(activations):
        table = measured.neurons[measured.neurons["layer"] == layer]
        size = np.abs(h)
        np.testing.assert_allclose(table["max_abs"], size.max(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(table["mean_abs"], size.mean(axis=0), rtol=1e-4, atol=1e-6)
        clear = size.max(axis=0) > 1.001 * np.sort(size, axis=0)[-2]
        where = origin[size.argmax(axis=0)]
        np.testing.assert_array_equal(table[["doc", "doc_pos", "token"]].to_numpy()[clear], where[clear])


def test_positions_add_up_to_the_layers_mean(measured: Measurement, model: LoadedModel) -> None:
    for layer, table in measured.positions.groupby("layer"):
        assert table["tokens"].sum() == measured.tokens
        mean = (table["active"] * table["tokens"]).sum() / measured.tokens / model.info.d_mlp
        assert mean == pytest.approx(measured.layers["active"].iloc[layer], abs=1e-9)


def test_the_largest_residual_entry_is_found_with_its_token(
    model: LoadedModel, measured: Measurement, corpus: Corpus
) -> None:
    hook = resolve_hook(model, "blocks.1.hook_resid_post")
    found = (-1.0, 0, 0, 0)
    for batch in context_batches(model, corpus, "train", max_tokens=TOKENS, context_len=CONTEXT):
        value = capture(model, batch.tokens, [hook]).activations[hook.name].abs()
        row, pos, dimension = np.unravel_index(int(value.argmax()), value.shape)
        if value.max() > found[0]:
            found = (value.max().item(), int(dimension), int(pos), int(batch.tokens[row, pos]))
    measured_row = measured.residual.iloc[1]
    assert measured_row["max_abs"] == pytest.approx(found[0], rel=1e-5)
    assert (measured_row["dimension"], measured_row["pos"]) == found[1:3]
    assert measured_row["token"] == model.token_texts[found[3]]


def test_a_massive_activation_is_called_one(neox_model: LoadedModel, corpus: Corpus) -> None:
    block = neox_model.bridge.adapter.get_component(neox_model.hf, "blocks.1")

    def plant(module: torch.nn.Module, args: object, output: object) -> object:
        value = output[0] if isinstance(output, tuple) else output
        value[:, 0, 7] = 1e5
        return output

    handle = block.register_forward_hook(plant)
    try:
        residual = measure(neox_model, corpus, max_tokens=64, context_len=CONTEXT).residual
    finally:
        handle.remove()
    assert residual["massive"].tolist()[:2] == [False, True]
    assert residual.loc[1, ["dimension", "pos", "at_bos"]].tolist() == [7, 0, True]


def test_two_runs_agree_and_batches_do_not_matter(
    gpt2_model: LoadedModel, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(gpt2_model, corpus, max_tokens=TOKENS, context_len=CONTEXT)
    monkeypatch.setitem(contexts.BATCH_TOKENS, "cpu", 3 * CONTEXT)
    parts = measure(gpt2_model, corpus, max_tokens=TOKENS, context_len=CONTEXT)
    exact = ["tokens", "exact_zero", "active", "dead", "shared", "specialised"]
    assert whole.layers[exact].equals(parts.layers[exact])
    np.testing.assert_allclose(whole.layers.to_numpy(), parts.layers.to_numpy(), rtol=1e-4)


def test_bad_input_is_one_line(gpt2_model: LoadedModel, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"context length 65 is not between 2 .* and 64"):
        measure(gpt2_model, corpus, context_len=65)
    with pytest.raises(InputError, match="31 tokens do not fill one context of 32"):
        measure(gpt2_model, corpus, max_tokens=31, context_len=32)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(InputError, match="holds no text: its files are empty"):
        measure(gpt2_model, open_corpus(str(empty)), context_len=32, max_tokens=64)
