"""Core neurons, the low-rank predictor, shared dimensions, calibration and robustness, against naive references."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from sae.errors import InputError
from workbench.models.contexts import ContextBatch, context_batches
from workbench.models.load import LoadedModel
from workbench.sparsity.calibration import Calibration, calibrate
from workbench.sparsity.core import TOKEN_SHARE, core, measure_cores, second_half_loss
from workbench.sparsity.dimensions import DimensionSums, shared_dimensions
from workbench.sparsity.enforce import mean_loss
from workbench.sparsity.methods import topk
from workbench.sparsity.predictor import activations_of, fits_of, mlp_inputs, predictor_recall
from workbench.sparsity.reliability import BINS, CalibrationBins, corrupt, reliability
from workbench.text.corpora import Corpus

CONTEXT = 32


@pytest.fixture(scope="module")
def relu(gpt2_model: LoadedModel) -> LoadedModel:
    return gpt2_model


@pytest.fixture(scope="module")
def thresholds(relu: LoadedModel, corpus: Corpus) -> Calibration:
    return calibrate(relu, corpus, tokens=256, context_len=CONTEXT)


@pytest.fixture(scope="module")
def batches(relu: LoadedModel, corpus: Corpus) -> list[ContextBatch]:
    return list(context_batches(relu, corpus, "heldout", max_tokens=128, context_len=CONTEXT))


def captured(model: LoadedModel, batch: ContextBatch, layer: int) -> torch.Tensor:
    """The activations h of one MLP, [batch, pos, d_mlp]."""
    found: list[torch.Tensor] = []
    module: Any = model.hf.get_submodule(f"transformer.h.{layer}.mlp.c_proj")
    with module.register_forward_pre_hook(lambda _, args: found.append(args[0])), torch.no_grad():
        model.hf(batch.tokens)
    return found[0]


def test_cores_and_their_overlap_are_those_of_counted_sets(
    relu: LoadedModel, thresholds: Calibration, batches: list[ContextBatch]
) -> None:
    table = measure_cores(relu, thresholds, batches).overlap
    width, share, layer = thresholds.mlps[1].d_mlp, 0.4, 1
    halves: list[tuple[set[int], set[int]]] = []
    for batch in batches:
        h = captured(relu, batch, layer)
        for row in range(len(h)):
            sets = []
            for start, stop in ((0, CONTEXT // 2), (CONTEXT // 2, CONTEXT)):
                count: Counter[int] = Counter()
                for position in range(start, stop):
                    if batch.ordinary[row, position]:
                        sizes = h[row, position].abs()
                        best = sorted(range(width), key=lambda i: -sizes[i])[: round(TOKEN_SHARE * width)]
                        count.update(i for i in best if sizes[i] > 0)
                ordered = sorted(range(width), key=lambda i: (-count[i], i))
                sets.append(set(ordered[: round(share * width)]))
            halves.append((sets[0], sets[1]))
    own = [len(one & two) / len(one | two) for one, two in halves]
    others = [halves[number - 1][0] for number in range(len(halves))]
    other = [len(one & two) / len(one | two) for one, (_, two) in zip(others, halves, strict=True)]
    row = table[(table["layer"] == layer) & (table["share"] == share)].iloc[0]
    assert row["own"] == pytest.approx(sum(own) / len(own))
    assert row["other"] == pytest.approx(sum(other) / len(other))
    assert row["chance"] == pytest.approx(0.25)


def test_a_core_costs_what_zeroing_the_other_neurons_of_second_halves_costs(
    relu: LoadedModel, thresholds: Calibration, batches: list[ContextBatch]
) -> None:
    contexts = sum(len(batch.tokens) for batch in batches)
    generator = torch.Generator().manual_seed(0)
    cores = [core(torch.rand(contexts, mlp.d_mlp, generator=generator), 0.3) for mlp in thresholds.mlps]
    clean = second_half_loss(relu, thresholds, batches, None, lambda _: None)
    found = second_half_loss(relu, thresholds, batches, cores, lambda _: None) - clean
    added, count, number = 0.0, 0, 0
    for batch in batches:
        for row in range(len(batch.tokens)):
            tokens, handles, losses = batch.tokens[row : row + 1], [], []
            late = [p for p in range(CONTEXT // 2, CONTEXT) if batch.ordinary[row, p]]
            for restricted in (False, True):
                if restricted:
                    for layer, of_layer in enumerate(cores):

                        def cut(_: Any, args: Any, kept: torch.Tensor = of_layer[number]) -> Any:
                            h = args[0].clone()
                            for position in late:  # noqa: B023
                                h[0, position, ~kept] = 0.0
                            return (h,)

                        module: Any = relu.hf.get_submodule(f"transformer.h.{layer}.mlp.c_proj")
                        handles.append(module.register_forward_pre_hook(cut))
                with torch.no_grad():
                    log_q = relu.hf(tokens).logits[0].double().log_softmax(-1)
                scored = [p for p in late if p + 1 in late]
                losses.append(-sum(log_q[p, tokens[0, p + 1]].item() for p in scored))
            for handle in handles:
                handle.remove()
            added, count, number = added + losses[1] - losses[0], count + len(scored), number + 1
    assert found == pytest.approx(added / count, abs=1e-5)
    whole = [torch.ones_like(part) for part in cores]
    assert second_half_loss(relu, thresholds, batches, whole, lambda _: None) == clean


def test_cores_need_two_contexts(relu: LoadedModel, thresholds: Calibration, batches: list[ContextBatch]) -> None:
    with pytest.raises(InputError, match="cores need two contexts"):
        measure_cores(relu, thresholds, [batches[0].part(slice(0, 1))])


def test_a_predictor_of_full_rank_finds_every_neuron(
    model: LoadedModel, calibration: Calibration, corpus: Corpus, held_out: list[ContextBatch]
) -> None:
    sample = list(context_batches(model, corpus, "train", max_tokens=256, context_len=CONTEXT))
    table = predictor_recall(model, calibration, sample, held_out)
    for _, rows in table.groupby("layer"):
        assert rows["recall"].iloc[-1] == pytest.approx(1.0, abs=1e-3)
        assert rows["recall"].iloc[0] < 0.95
        assert rows["recall"].between(0, 1).all()
        assert rows["frequent"].between(0, 1).all()


def test_a_low_rank_predictor_is_least_squares_at_that_rank(
    relu: LoadedModel, thresholds: Calibration, batches: list[ContextBatch]
) -> None:
    """Of z = W x + b on the fitted tokens the best rank r is z cut to its r largest principal components."""
    x = mlp_inputs(relu, thresholds.mlps, batches)[1].double()
    mlp = thresholds.mlps[1]
    layer: Any = relu.hf.get_submodule("transformer.h.1.mlp.c_fc")
    z = x @ layer.weight.double() + layer.bias.double()
    mean = z.mean(dim=0)
    left, sizes, right = torch.linalg.svd(z - mean, full_matrices=False)
    wanted = (left[:, :5] * sizes[:5]) @ right[:5] + mean
    torch.testing.assert_close(activations_of(mlp, x, fits_of(mlp, x), 5), wanted.relu(), atol=1e-8, rtol=1e-6)


def test_dimensions_are_counted_as_a_loop_counts_them(relu: LoadedModel, batches: list[ContextBatch]) -> None:
    found = shared_dimensions(relu, batches).query("layer == 1 and basis == 'own'").iloc[0]
    active: list[tuple[int, int, set[int]]] = []
    values: list[list[float]] = []
    for number, batch in enumerate(batches):
        seen: list[torch.Tensor] = []
        hook = relu.hf.get_submodule("transformer.h.1").register_forward_hook(lambda _, __, out: seen.append(out))  # noqa: B023
        with hook, torch.no_grad():
            relu.hf(batch.tokens)
        stream = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        for row in range(len(batch.tokens)):
            for position in range(CONTEXT):
                if batch.ordinary[row, position]:
                    x = stream[row, position].double().tolist()
                    bound = 0.1 * max(map(abs, x))
                    place = (number * 1000 + row) * CONTEXT + position
                    active.append((place, position, {i for i, value in enumerate(x) if abs(value) > bound}))
                    values.append(x)
    width, n = len(values[0]), len(active)
    p = [sum(i in chosen for *_, chosen in active) / n for i in range(width)]
    assert found["active"] == pytest.approx(sum(p) / width)
    assert found["shared"] == pytest.approx(sum(value > 0.5 for value in p) / width)
    pairs = [(one, two) for (a, _, one), (b, _, two) in pairwise(active) if b == a + 1]
    assert found["jaccard"] == pytest.approx(sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs))
    kurtosis = []
    for column in zip(*values, strict=True):
        mean = sum(column) / n
        variance = sum((value - mean) ** 2 for value in column) / n
        kurtosis.append(sum((value - mean) ** 4 for value in column) / n / variance**2 - 3)
    assert found["largest"] == pytest.approx(max(kurtosis), rel=1e-4)


def test_a_rotation_of_normal_rows_changes_no_number_of_their_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 100, 24, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    rows = []
    for value in (x, x @ rotation):
        sums = DimensionSums(24, torch.device("cpu"))
        sums.add(value, torch.ones(40, 100, dtype=torch.bool))
        rows.append(sums.row())
    for column in ("active", "shared", "jaccard", "chance"):
        assert rows[0][column] == pytest.approx(rows[1][column], abs=0.01)
    assert abs(rows[0]["kurtosis"]) < 0.1
    # Independent entries share what chance gives.
    assert rows[0]["jaccard"] == pytest.approx(rows[0]["chance"], abs=0.01)


def test_the_calibration_error_is_that_of_a_loop(relu: LoadedModel, batches: list[ContextBatch]) -> None:
    bins = CalibrationBins(relu.device)
    held: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for batch in batches:
        with torch.no_grad():
            logits = relu.hf(batch.tokens).logits * 4
        bins.add(batch, logits)
        chances = logits.double().softmax(-1)
        for row in range(len(batch.tokens)):
            for position in range(CONTEXT - 1):
                if batch.counted[row, position]:
                    best = chances[row, position].max().item()
                    right = int(chances[row, position].argmax()) == int(batch.tokens[row, position + 1])
                    held[min(int(best * BINS), BINS - 1)].append((best, right))
    n = sum(map(len, held))
    error = sum(abs(sum(right for _, right in part) - sum(best for best, _ in part)) for part in held) / n
    assert bins.result()["ece"] == pytest.approx(error, rel=1e-5)


def test_at_level_zero_reliability_is_the_clean_model_s(
    relu: LoadedModel, thresholds: Calibration, batches: list[ContextBatch]
) -> None:
    table = reliability(relu, thresholds, batches, share=0.2)
    assert table["level"].tolist() == list(topk.METHOD.levels)
    assert table["loss"].iloc[0] == mean_loss(relu, batches)
    changed = corrupt(batches, 0.2, 0)
    total, count = 0.0, 0
    for batch, (other, kept) in zip(batches, changed, strict=True):
        assert bool((other.tokens[kept] == batch.tokens[kept]).all())
        assert bool(kept[~batch.ordinary].all())
        scored = replace(batch, ordinary=batch.ordinary & kept).counted
        with torch.no_grad():
            logs = [relu.hf(tokens).logits.double().log_softmax(-1) for tokens in (batch.tokens, other.tokens)]
        for row, position in scored.nonzero().tolist():
            target = batch.tokens[row, position + 1]
            total += (logs[0][row, position, target] - logs[1][row, position, target]).item()
            count += 1
    assert table["corrupted_nats"].iloc[0] == pytest.approx(total / count, abs=1e-5)
    share = sum(int((~kept).sum()) for _, kept in changed) / sum(int(batch.ordinary.sum()) for batch in batches)
    assert share == pytest.approx(0.2, abs=0.1)
