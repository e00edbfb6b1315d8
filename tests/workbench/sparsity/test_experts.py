"""What a mixture's experts are used for, and its sparsity as one wide MLP, against naive loops."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.families import save_tiny
from sae import InputError
from workbench.cli.main import run
from workbench.features.concepts.alignment import held_out_half
from workbench.features.concepts.truth import from_contexts
from workbench.models.capture import capture
from workbench.models.contexts import ContextBatch, context_batches
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.calibration import calibrate
from workbench.sparsity.enforce import enforce
from workbench.sparsity.experts import Experts, measure_experts
from workbench.sparsity.measure import measure
from workbench.sparsity.methods import METHODS
from workbench.sparsity.neurons import view_neuron
from workbench.text.corpora import Corpus

CONTEXT, TOKENS, LAYER = 32, 1024, 1
D_EXPERT, EXPERTS, CHOSEN = 16, 4, 2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_tiny("Qwen2MoeForCausalLM", tmp_path_factory.mktemp("experts"))), device="cpu")


@pytest.fixture(scope="module")
def batches(mixture: LoadedModel, corpus: Corpus) -> list[ContextBatch]:
    return list(context_batches(mixture, corpus, "train", max_tokens=TOKENS, context_len=CONTEXT))


@pytest.fixture(scope="module")
def routed(mixture: LoadedModel, batches: list[ContextBatch]) -> list[tuple[int, list[int], list[float]]]:
    """(token, its experts, their gates) of ordinary tokens in layer 1, by the router's own weight."""
    router: Any = mixture.hf.get_submodule(f"model.layers.{LAYER}.mlp.gate")
    hook = resolve_hook(mixture, f"blocks.{LAYER}.mlp.hook_in")
    found = []
    for batch in batches:
        x = capture(mixture, batch.tokens, [hook]).activations[hook.name]
        p = (x @ router.weight.T).double().softmax(-1)
        for row, pos in batch.ordinary.nonzero().tolist():
            best = p[row, pos].topk(CHOSEN)
            found.append((int(batch.tokens[row, pos]), best.indices.tolist(), best.values.tolist()))
    return found


@pytest.fixture(scope="module")
def measured(mixture: LoadedModel, corpus: Corpus) -> Experts:
    return measure_experts(mixture, corpus, max_tokens=TOKENS, context_len=CONTEXT)


def test_load_entropies_and_pairs_are_counted(
    measured: Experts, routed: list[tuple[int, list[int], list[float]]]
) -> None:
    n = len(routed)
    assert measured.tokens == n
    load = Counter(expert for _, experts, _ in routed for expert in experts)
    table = measured.experts[measured.experts["layer"] == LAYER].set_index("expert")
    for expert in range(EXPERTS):
        assert table.loc[expert, "load"] == pytest.approx(load[expert] / n)
        gates = [gate for _, experts, gates in routed for e, gate in zip(experts, gates, strict=True) if e == expert]
        assert table.loc[expert, "gate"] == pytest.approx(np.mean(gates), rel=1e-5)
    row = measured.layers.set_index("layer").loc[LAYER]
    shares = [load[expert] / (CHOSEN * n) for expert in load]
    entropy = -sum(share * math.log2(share) for share in shares)
    assert (row["experts"], row["chosen"], row["d_expert"], row["d_shared"]) == (EXPERTS, CHOSEN, D_EXPERT, 16)
    assert row["load_entropy"] == pytest.approx(entropy)
    assert row["in_use"] == pytest.approx(2**entropy)
    of_gates = [-sum(g / sum(gates) * math.log2(g / sum(gates)) for g in gates) for _, _, gates in routed]
    assert row["gate_entropy"] == pytest.approx(np.mean(of_gates), rel=1e-5)
    pairs = Counter(tuple(sorted(experts)) for _, experts, _ in routed)
    for pair in measured.pairs[measured.pairs["layer"] == LAYER].itertuples():
        together = pairs[pair.expert, pair.other] / n
        assert pair.together == pytest.approx(together)
        assert pair.lift == pytest.approx(together / (load[pair.expert] * load[pair.other] / n**2))


def test_an_experts_concept_is_the_one_it_tells_best(
    measured: Experts, mixture: LoadedModel, corpus: Corpus, batches: list[ContextBatch],
    routed: list[tuple[int, list[int], list[float]]],
) -> None:  # fmt: skip
    columns = [torch.cat([getattr(batch, name)[batch.ordinary] for batch in batches]) for name in
               ("tokens", "doc", "doc_pos")]  # fmt: skip
    truth = from_contexts(*(column.numpy() for column in columns), corpus, "train", mixture.tokenizer)
    dense, held = truth.dense(0, len(truth.rows)), held_out_half(truth)
    table = measured.experts[measured.experts["layer"] == LAYER]
    for row in table.itertuples():
        said = np.array([row.expert in routed[place][1] for place in truth.rows])
        scores = []
        for half in (~held, held):
            hits = (dense[half] & said[half, None]).sum(axis=0)
            scores.append(2 * hits / (said[half].sum() + dense[half].sum(axis=0)))
        best = int(np.argmax(scores[0]))
        assert row.concept == truth.names[best]
        assert row.f1 == pytest.approx(scores[1][best])
        p, q = said[held].mean(), dense[held, best].mean()
        assert row.chance == pytest.approx(2 * p * q / (p + q))


def test_a_mixture_is_measured_and_thinned_as_one_wide_mlp(mixture: LoadedModel, corpus: Corpus) -> None:
    found = measure(mixture, corpus, max_tokens=TOKENS, context_len=CONTEXT)
    width = EXPERTS * D_EXPERT + 16
    # Two of four experts of 16 neurons are not chosen; no others are exactly zero.
    assert found.layers["exact_zero"].tolist() == pytest.approx([2 * D_EXPERT / width] * 3, abs=1e-4)
    view = view_neuron(mixture, corpus, LAYER, 5, max_tokens=TOKENS, context_len=CONTEXT)
    density = found.neurons.set_index(["layer", "neuron"]).loc[(LAYER, 5), "density"]
    assert view.zero <= 1 - density
    calibration = calibrate(mixture, corpus, tokens=256, context_len=CONTEXT)
    held = list(context_batches(mixture, corpus, "heldout", max_tokens=256, context_len=CONTEXT))
    curves = enforce(mixture, calibration, held, methods=[METHODS["zero"], METHODS["threshold"]])
    points = curves.table()
    assert points[points["method"] == "zero"]["added_nats"].abs().max() < 1e-5
    assert points[points["level"] == 0.99]["kl"].item() > 1e-3
    assert points["flops_saved"].isna().all()
    with pytest.raises(InputError, match="CATS looks at single matrices"):
        enforce(mixture, calibration, held, methods=[METHODS["CATS"]])


def test_the_command_stores_and_prints_what_experts_do(
    mixture: LoadedModel, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_gpt2: Path
) -> None:
    def arguments(model: str) -> list[str]:
        return ["sparsity", "experts", "r", "--model", model, "--corpus", str(text_folder), "--tokens", "256",
                "--context", "32", "--device", "cpu", "--workspace", str(tmp_path), "--json"]  # fmt: skip

    assert run(arguments(mixture.info.name)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["experts"]) == 3 * EXPERTS
    assert printed["layers"][0]["chosen"] == CHOSEN
    assert run(["sparsity", "compare", "--workspace", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    for column, wanted in (("experts_in_use", "in_use"), ("busiest_expert", "max_load")):
        assert row[column] == pytest.approx(np.mean([layer[wanted] for layer in printed["layers"]]))
    assert row["unused_experts"] == sum(layer["unused"] for layer in printed["layers"])
    assert run(arguments(str(tiny_gpt2))) == 2
    assert "GPT2LMHeadModel has no mixture of experts" in capsys.readouterr().err.strip().splitlines()[-1]
