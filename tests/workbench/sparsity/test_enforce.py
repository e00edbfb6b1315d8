"""Methods enforced while models run: what they cost, against passes computed another way."""

import math

import pandas as pd
import pytest
import torch

from sae.errors import InputError
from workbench.models.capture import capture
from workbench.models.contexts import ContextBatch, context_batches, logits_of, losses
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.calibration import Calibration, calibrate
from workbench.sparsity.enforce import Curves, Tally, enforce, enforced, flops_saved, generate
from workbench.sparsity.layers import mlps, projections
from workbench.sparsity.methods import METHODS
from workbench.sparsity.ppl import ppl_sparsity
from workbench.text.corpora import Corpus, open_corpus

LEVELS = {"zero": 0.0, "CETT": 0.3}


@pytest.fixture(scope="session")
def curves(model: LoadedModel, calibration: Calibration, held_out: list[ContextBatch]) -> Curves:
    return enforce(model, calibration, held_out)


@pytest.mark.parametrize("name", ["gpt2", "reglu"])
def test_zero_threshold_leaves_a_relu_models_loss_exactly_as_it_is(
    name: str, request: pytest.FixtureRequest, corpus: Corpus
) -> None:
    relu_model: LoadedModel = request.getfixturevalue(f"{name}_model")
    calibration = calibrate(relu_model, corpus, tokens=256, context_len=32)
    held = list(context_batches(relu_model, corpus, "heldout", max_tokens=512, context_len=32))
    found = enforce(relu_model, calibration, held, methods=[METHODS["zero"]])
    (point,) = found.points
    assert point.loss == found.clean_loss
    assert point.added_nats == 0.0
    assert point.kl == 0.0
    assert 0.3 < point.sparsity < 0.7


def test_every_curve_starts_at_the_clean_loss(curves: Curves) -> None:
    starts = [point for point in curves.points if point.level == 0]
    assert {point.method for point in starts} == set(METHODS)
    for point in starts:
        assert point.loss == curves.clean_loss
        assert point.kl == 0.0


def test_more_sparsity_is_reached_level_by_level_and_costs_something(curves: Curves) -> None:
    for name, points in curves.table().groupby("method"):
        assert points.sort_values("level")["sparsity"].is_monotonic_increasing, name
        if name != "zero":
            assert points.sort_values("level")["kl"].iloc[-1] > 1e-3
        assert (points["perplexity"] - points["loss"].map(math.exp)).abs().max() < 1e-9


def test_the_clean_loss_is_the_models_own(curves: Curves, model: LoadedModel, held_out: list[ContextBatch]) -> None:
    total = count = 0.0
    for batch in held_out:
        log_p = model.hf(batch.tokens).logits.double().log_softmax(-1)
        for row in range(len(batch.tokens)):
            for pos in range(batch.tokens.shape[1] - 1):
                if batch.ordinary[row, pos] and batch.ordinary[row, pos + 1]:
                    total -= log_p[row, pos, batch.tokens[row, pos + 1]].item()
                    count += 1
    assert curves.tokens == count
    assert curves.clean_loss == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_thinned_activations_are_the_clean_ones_or_zero_and_bos_is_spared(
    model: LoadedModel, calibration: Calibration, held_out: list[ContextBatch], name: str
) -> None:
    method, batch = METHODS[name], held_out[0]
    # Only the first block's input is the same in both passes, and only MLP methods leave what leads to it alone.
    hook = resolve_hook(model, "blocks.0.mlp.hook_post")
    clean = capture(model, batch.tokens, [hook]).activations[hook.name]
    keeps = {key: keep for key, keep in method.keeps(LEVELS.get(name, 0.6), calibration).items() if "mlp" in key}
    keeps = {calibration.mlps[0].out.name: keeps[calibration.mlps[0].out.name]}
    tally = Tally()
    seen: list[torch.Tensor] = []
    with enforced(model, calibration, keeps, tally):
        handle = calibration.mlps[0].out.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits_of(model, batch)
        handle.remove()
    thinned = seen[0]
    assert torch.equal(thinned[~batch.ordinary], clean[~batch.ordinary])
    rows, kept = clean[batch.ordinary], thinned[batch.ordinary]
    assert ((kept == rows) | (kept == 0)).all()
    share = (kept == 0).double().mean().item()
    assert tally.sparsity() == pytest.approx(share, abs=1e-12)
    assert share >= (0.25 if name not in ("zero", "CETT") else 0.0)


def test_hooks_are_gone_afterwards_even_after_an_error(
    model: LoadedModel, calibration: Calibration, held_out: list[ContextBatch]
) -> None:
    before = logits_of(model, held_out[0])
    keeps = METHODS["WINA"].keeps(0.9, calibration)

    def fail() -> None:
        with enforced(model, calibration, keeps):
            assert not torch.allclose(logits_of(model, held_out[0]), before)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(logits_of(model, held_out[0]), before)


def test_flops_are_counted_by_matrix(model: LoadedModel, calibration: Calibration) -> None:
    info = model.info
    gated = info.name.endswith(("llama", "reglu"))
    heads, in_and_gate = (1, 2) if gated else (2, 1)
    attention = 2 * info.d_model * info.d_model + heads * info.d_model * info.d_model
    mlp = info.d_model * info.d_mlp
    per_block = attention + (1 + in_and_gate) * mlp
    assert sum(matrix.flops for matrix in projections(model)) == 2 * info.n_layers * per_block
    shares = {block.out.name: 0.75 for block in mlps(model)}
    assert flops_saved(calibration, shares) == pytest.approx(0.75 * mlp / per_block)
    gate_known = 0.75 * mlp * in_and_gate / per_block
    assert flops_saved(calibration, shares, skips_up=True) == pytest.approx(gate_known)
    everything = flops_saved(calibration, shares, skips_up=True, skips_drive=True)
    assert everything == pytest.approx(0.75 * mlp * (1 + in_and_gate) / per_block)
    assert flops_saved(calibration, {matrix.name: 1.0 for matrix in projections(model)}) == pytest.approx(1.0)


@pytest.fixture(scope="session", params=["demo", "stories260k"])
def trained(request: pytest.FixtureRequest, corpus: Corpus) -> tuple[LoadedModel, Calibration, list[ContextBatch]]:
    """A trained ReLU model and a trained gated one: a random model's loss does not mind losing its MLPs."""
    if request.param == "demo":
        model, texts = load_model("demo", device="cpu"), corpus
    else:
        folder = request.getfixturevalue("shared_data")
        model = load_model(str(folder / "stories260k"), device="cpu")
        texts = open_corpus(str(folder / "corpora" / "tinystories_train_sample.txt"))
    held = list(context_batches(model, texts, "heldout", max_tokens=512, context_len=64))
    return model, calibrate(model, texts, tokens=128, context_len=64), held


@pytest.mark.parametrize("p", [0.01, 0.1])
def test_ppl_sparsity_satisfies_its_definition_when_run_again(
    trained: tuple[LoadedModel, Calibration, list[ContextBatch]], p: float
) -> None:
    model, calibration, held_out = trained
    (found,) = ppl_sparsity(model, calibration, held_out, [p])

    def added(target: float) -> tuple[float, float]:
        tally = Tally()
        total = clean = count = 0.0
        for batch in held_out:
            clean += losses(batch, logits_of(model, batch))[0]
            with enforced(model, calibration, METHODS["CETT"].keeps(target, calibration), tally):
                total += losses(batch, logits_of(model, batch))[0]
            count += int(batch.counted.sum())
        return (total - clean) / count, tally.sparsity()

    again, sparsity = added(found.cett)
    assert found.allowed_nats == pytest.approx(math.log(1 + p))
    assert again <= found.allowed_nats
    assert again == pytest.approx(found.added_nats, abs=1e-9)
    assert sparsity == pytest.approx(found.sparsity, abs=1e-12)
    # A step of the search further, and the allowance is exceeded.
    assert added(found.cett + 1 / 1024)[0] > found.allowed_nats


def test_a_p_that_no_threshold_reaches_is_one_line(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    calibration = calibrate(gpt2_model, corpus, tokens=64, context_len=32)
    held = list(context_batches(gpt2_model, corpus, "heldout", max_tokens=128, context_len=32))
    with pytest.raises(InputError, match=r"no threshold reaches p = 1e\+09.*ask for a smaller p"):
        ppl_sparsity(gpt2_model, calibration, held, [1e9])
    with pytest.raises(InputError, match="p must be a positive share"):
        ppl_sparsity(gpt2_model, calibration, held, [0.0])


def test_generation_at_level_0_is_the_models_own_and_changes_with_sparsity(
    model: LoadedModel, calibration: Calibration
) -> None:
    prompt = "def encode(self):"
    ids = [model.bos_id, *model.tokenizer.encode(prompt, add_special_tokens=False)]
    tokens = torch.tensor([ids])
    for _ in range(8):
        tokens = torch.cat([tokens, model.hf(tokens).logits[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == model.tokenizer.eos_token_id:
            break
    own = model.tokenizer.decode(tokens[0, len(ids) :])
    assert generate(model, calibration, prompt, METHODS["TEAL"], 0.0, new_tokens=8) == own
    assert generate(model, calibration, prompt, METHODS["TEAL"], 0.9, new_tokens=8) != own
    with pytest.raises(InputError, match="holds no token"):
        generate(model, calibration, "", METHODS["TEAL"], 0.0)


def test_progress_counts_to_the_total(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    calibration = calibrate(gpt2_model, corpus, tokens=64, context_len=32)
    held = list(context_batches(gpt2_model, corpus, "heldout", max_tokens=64, context_len=32))
    calls: list[tuple[int, int]] = []
    found = enforce(gpt2_model, calibration, held, methods=[METHODS["topk"]], on_progress=lambda *c: calls.append(c))
    assert calls[-1][0] == calls[-1][1] == 64 * (len(METHODS["topk"].levels) + 1)
    assert isinstance(found.shares, pd.DataFrame)
    assert set(found.shares["matrix"]) == {mlp.out.name for mlp in mlps(gpt2_model)}
