"""Contexts with their losses: what evaluation and sparsity show on one corpus is the same clean pass."""

import copy

import pytest
import torch

from sae import SAE, InputError, TopK
from workbench.models.contexts import ContextBatch, context_batches, logits_of, losses
from workbench.models.load import LoadedModel
from workbench.saes.evaluation import evaluate_sae
from workbench.sparsity.calibration import calibrate
from workbench.sparsity.enforce import enforce
from workbench.sparsity.methods import method_named
from workbench.text.corpora import Corpus, open_corpus

CONTEXT, TOKENS = 16, 320


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    return open_corpus(str(folder))


def test_evaluation_and_sparsity_see_the_same_tokens_and_the_same_clean_loss(
    tiny_model: LoadedModel, corpus: Corpus
) -> None:
    options = {"max_tokens": TOKENS, "context_len": CONTEXT}
    held = list(context_batches(tiny_model, corpus, "heldout", **options))
    curves = enforce(tiny_model, calibrate(tiny_model, corpus, tokens=64, context_len=CONTEXT), held,
                     methods=[method_named("zero")])  # fmt: skip
    sae = SAE(tiny_model.info.d_model, 64, TopK(6), hook_name="blocks.1.hook_resid_post")
    found = evaluate_sae(tiny_model, [sae], corpus, **options)[0]
    assert found.tokens == sum(int(batch.ordinary.sum()) for batch in held)
    assert curves.tokens == sum(int(batch.counted.sum()) for batch in held)
    # One runs the bare module, the other the bridge. A copy in float64 decides: float32 puts either mean off by 1e-8
    # of it (measured on the three architectures); a token more or less would be 1e-3.
    expected = loss_in_float64(tiny_model, held)
    assert found.ce_clean == pytest.approx(expected, rel=1e-6)
    assert curves.clean_loss == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def loss_in_float64(model: LoadedModel, batches: list[ContextBatch]) -> float:
    """Mean cross-entropy of the counted positions, weights and every product in float64."""
    wide = copy.deepcopy(model.hf).double()
    per_token = []
    for batch in batches:
        log_q = wide(batch.tokens, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
        assert log_q.dtype == torch.float64
        per_token.append(-log_q.gather(2, batch.tokens[:, 1:, None]).squeeze(2)[batch.counted])
    return torch.cat(per_token).mean().item()


def test_losses_are_those_of_a_naive_loop(tiny_model: LoadedModel, corpus: Corpus) -> None:
    batch = next(context_batches(tiny_model, corpus, "heldout", max_tokens=TOKENS, context_len=CONTEXT)).part(slice(4))
    logits, clean = logits_of(tiny_model, batch), torch.randn(4, CONTEXT, tiny_model.info.d_vocab)
    loss = divergence = 0.0
    for row in range(4):
        for at in range(CONTEXT - 1):
            if batch.ordinary[row, at] and batch.ordinary[row, at + 1]:
                log_q, log_p = (logit[row, at].double().log_softmax(dim=0) for logit in (logits, clean))
                loss -= log_q[batch.tokens[row, at + 1]].item()
                divergence += (log_p.exp() * (log_p - log_q)).sum().item()
    found = [value.item() for value in losses(batch, logits, clean)]
    assert found == pytest.approx([loss, divergence], rel=1e-5)
    assert losses(batch, logits)[1] == 0


def test_what_does_not_fit_a_model_is_one_line(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    with pytest.raises(InputError, match=r"context length 65 is not between 2 .* and 64"):
        next(context_batches(gpt2_model, corpus, "heldout", max_tokens=TOKENS, context_len=65))
    with pytest.raises(InputError, match="31 tokens do not fill one context of 32"):
        next(context_batches(gpt2_model, corpus, "heldout", max_tokens=31, context_len=32))
