"""Transcoders in the place of MLPs: alone and all at once, against passes made by hand."""

import pytest
import torch

from sae import InputError, TopK, Transcoder
from workbench.models.contexts import ContextBatch, context_batches
from workbench.models.load import LoadedModel
from workbench.saes.evaluation import evaluate_sae
from workbench.saes.replacement import evaluate_replacement
from workbench.text.corpora import Corpus, open_corpus

CONTEXT, TOKENS = 16, 160


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    return open_corpus(str(folder))


def make_coder(model: LoadedModel, layer: int, *, skip: bool = True) -> Transcoder:
    d = model.info.d_model
    coder = Transcoder(
        d, d, 64, TopK(6), skip=skip, hook_name=f"blocks.{layer}.mlp.hook_in",
        target_hook_name=f"blocks.{layer}.hook_mlp_out",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return coder


def exact_mlp(model: LoadedModel, layer: int) -> Transcoder:
    """The ReLU MLP itself as a transcoder of all its neurons."""
    d, mlp = model.info.d_model, model.hf.transformer.h[layer].mlp
    coder = Transcoder(
        d, d, 4 * d, TopK(4 * d), hook_name=f"blocks.{layer}.mlp.hook_in",
        target_hook_name=f"blocks.{layer}.hook_mlp_out",
    )  # fmt: skip
    with torch.no_grad():
        coder.W_enc.copy_(mlp.c_fc.weight)
        coder.b_enc.copy_(mlp.c_fc.bias)
        coder.W_dec.copy_(mlp.c_proj.weight)
        coder.b_dec.copy_(mlp.c_proj.bias)
    return coder


def batches(model: LoadedModel, corpus: Corpus) -> list[ContextBatch]:
    return list(context_batches(model, corpus, "heldout", max_tokens=TOKENS, context_len=CONTEXT))


def naive_loss(model: LoadedModel, corpus: Corpus, coders: list[Transcoder], constant: str | None = None) -> float:
    """Mean cross-entropy with all targets replaced, by TransformerLens' own hooks, in float64 sums."""
    total, count = 0.0, 0
    for batch in batches(model, corpus):
        hooks = []
        for coder in coders:
            seen: list[torch.Tensor] = []

            def record(value, hook, seen=seen):
                seen[:] = [value]

            def write(value, hook, seen=seen, coder=coder, batch=batch):
                new = torch.zeros_like(value) if constant == "zero" else coder.predict(seen[0])
                return torch.where(batch.ordinary[..., None], new, value)

            hooks += [(coder.hook_name, record), (coder.target_hook_name, write)]
        with torch.no_grad():
            log_q = model.bridge.run_with_hooks(batch.tokens, fwd_hooks=hooks).double().log_softmax(-1)
        nll = -log_q[:, :-1].gather(2, batch.tokens[:, 1:, None]).squeeze(2)
        total += float(nll[batch.counted].sum())
        count += int(batch.counted.sum())
    return total / count


def test_all_layers_at_once_equal_passes_made_by_hand(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    coders = [make_coder(gpt2_model, layer) for layer in range(3)]
    found = evaluate_replacement(gpt2_model, coders, corpus, max_tokens=TOKENS, context_len=CONTEXT)
    assert found.ce_clean == pytest.approx(naive_loss(gpt2_model, corpus, []), abs=1e-5)
    assert found.ce_replaced == pytest.approx(naive_loss(gpt2_model, corpus, coders), abs=1e-5)
    assert found.ce_zero == pytest.approx(naive_loss(gpt2_model, corpus, coders, "zero"), abs=1e-5)
    assert found.added_nats == pytest.approx(found.ce_replaced - found.ce_clean)
    assert found.layers == 3
    assert min(found.kl, found.kl_zero, found.kl_mean) > 0


def test_the_mlps_themselves_as_transcoders_cost_nothing(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    coders = [exact_mlp(gpt2_model, layer) for layer in range(3)]
    found = evaluate_replacement(gpt2_model, coders, corpus, max_tokens=TOKENS, context_len=CONTEXT)
    assert found.added_nats == pytest.approx(0, abs=1e-5)
    assert found.kl == pytest.approx(0, abs=1e-5)
    alone = evaluate_sae(gpt2_model, coders, corpus, max_tokens=TOKENS, context_len=CONTEXT)
    for evaluation in alone:
        assert evaluation.fvu == pytest.approx(0, abs=1e-8)
        assert evaluation.added_nats == pytest.approx(0, abs=1e-5)
        assert evaluation.ce_zero > evaluation.ce_clean - 1
        assert evaluation.skip_share == 0


def test_one_layer_alone_is_measured_on_its_target(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    coder = make_coder(gpt2_model, 1)
    (found,) = evaluate_sae(gpt2_model, [coder], corpus, max_tokens=TOKENS, context_len=CONTEXT)
    assert found.ce_spliced == pytest.approx(naive_loss(gpt2_model, corpus, [coder]), abs=1e-5)
    assert found.ce_zero == pytest.approx(naive_loss(gpt2_model, corpus, [coder], "zero"), abs=1e-5)
    xs, ys = [], []
    for batch in batches(gpt2_model, corpus):
        with torch.no_grad():
            cache = gpt2_model.bridge.run_with_cache(batch.tokens)[1]
        xs.append(cache[coder.hook_name][batch.ordinary].double())
        ys.append(cache[coder.target_hook_name][batch.ordinary].double())
    x, y = torch.cat(xs), torch.cat(ys)

    def variance(rows: torch.Tensor) -> float:
        return float((rows - rows.mean(0)).square().sum())

    assert found.fvu == pytest.approx(float((y - coder.predict(x)).square().sum()) / variance(y), rel=1e-4)
    assert coder.W_skip is not None
    expected = 1 - variance(y - x @ coder.W_skip.detach().double().T) / variance(y)
    assert found.skip_share == pytest.approx(expected, rel=1e-4)


def test_a_transcoder_of_another_model_is_refused(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    coder = Transcoder(
        gpt2_model.info.d_model, 7, 64, TopK(6), hook_name="blocks.0.mlp.hook_in",
        target_hook_name="blocks.0.hook_mlp_out",
    )  # fmt: skip
    for evaluate in (lambda: evaluate_sae(gpt2_model, [coder], corpus),
                     lambda: evaluate_replacement(gpt2_model, [coder], corpus)):  # fmt: skip
        with pytest.raises(InputError, match=r"writes 7 values and blocks\.0\.hook_mlp_out of .* has 32"):
            evaluate()
