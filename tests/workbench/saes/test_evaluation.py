"""Evaluation against a naive float64 computation, token by token, on tiny models."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from circuits.effective_weights import effective_unembedding
from sae import SAE, InputError, TopK
from workbench.models.load import LoadedModel, load_model
from workbench.saes.evaluation import Evaluation, evaluate_sae
from workbench.text.corpora import Corpus, open_corpus
from workbench.text.packing import pack

HOOK, CONTEXT, TOKENS = "blocks.1.hook_resid_post", 16, 320


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    return folder


def make_sae(model: LoadedModel, hook: str, seed: int = 0, width: int | None = None) -> SAE:
    """A random SAE with unit decoder rows; nothing in it is zero."""
    torch.manual_seed(seed)
    d_in = width or {"z": model.info.d_attention}.get(hook.rsplit("_", 1)[-1], model.info.d_model)
    sae = SAE(d_in, 64, TopK(6), hook_name=hook)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, d_in), dim=1))
        sae.W_enc.copy_(sae.W_dec.T + 0.1 * torch.randn(d_in, 64))
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
    return sae


def naive(model: LoadedModel, sae: SAE, folder: Path, *, count_bos: bool = False) -> dict[str, float]:
    """Everything one position at a time, with the bridge's own caching and plain hooks."""
    documents = open_corpus(str(folder)).documents("heldout")
    packed = list(pack(documents, model.tokenizer, model.bos_id, CONTEXT, 1))[: TOKENS // CONTEXT]
    tokens = torch.from_numpy(np.concatenate([batch.tokens for batch in packed])).long()
    flags = torch.from_numpy(np.concatenate([batch.flags for batch in packed]))
    ordinary = (flags & 2) == 0 if count_bos else flags == 0

    def losses(replacement: torch.Tensor | None) -> tuple[list[float], torch.Tensor]:
        def replace(value: torch.Tensor, hook: object) -> torch.Tensor:
            new = value.clone()
            new[ordinary] = replacement.to(value.dtype).view(-1, *value.shape[2:])
            return new

        hooks = [] if replacement is None else [(sae.hook_name, replace)]
        with torch.no_grad():
            logits = model.bridge.run_with_hooks(tokens, fwd_hooks=hooks).double()
        found, distributions = [], []
        for row in range(len(tokens)):
            for pos in range(CONTEXT - 1):
                if ordinary[row, pos] and ordinary[row, pos + 1]:
                    distribution = logits[row, pos].softmax(dim=0)
                    found.append(-distribution[tokens[row, pos + 1]].log().item())
                    distributions.append(distribution)
        return found, torch.stack(distributions)

    with torch.no_grad():
        value = model.bridge.run_with_cache(tokens)[1][sae.hook_name]
        x = value.flatten(2)[ordinary].double() if value.ndim == 4 else value[ordinary].double()
        z = (x - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
        a = torch.zeros_like(z)
        for row, scores in enumerate(z.relu()):
            best = scores.topk(6).indices
            a[row, best] = scores[best]
        x_hat = a @ sae.W_dec.double() + sae.b_dec.double()
    clean, p = losses(None)
    spliced, q = losses(x_hat)
    zero, ablated = losses(torch.zeros_like(x))
    mean, _ = losses(x.mean(dim=0).expand_as(x))
    h, h_star, h_zero, h_mean = (sum(values) / len(values) for values in (clean, spliced, zero, mean))
    kl, kl_zero = ((p * (p / other).log()).sum(dim=1).mean().item() for other in (q, ablated))
    error, centred = ((x - x_hat) ** 2).sum(dim=1), ((x - x.mean(dim=0)) ** 2).sum(dim=1)
    squares = (x**2).sum(dim=1).mean()
    cosines = sae.W_dec.double() @ sae.W_dec.double().T - 2 * torch.eye(64)
    return {
        "tokens": len(x),
        "l0": (a != 0).sum().item() / len(x),
        "fvu": ((x - x_hat) ** 2).sum().item() / ((x - x.mean(dim=0)) ** 2).sum().item(),
        "explained_variance": 1 - ((x - x_hat) ** 2).sum().item() / ((x - x.mean(dim=0)) ** 2).sum().item(),
        "cosine": torch.cosine_similarity(x, x_hat).mean().item(),
        "relative_norm": (x_hat.norm(dim=1) / x.norm(dim=1)).mean().item(),
        "dead_share": (~(a != 0).any(dim=0)).double().mean().item(),
        "dense_share": ((a != 0).double().mean(dim=0) > 0.1).double().mean().item(),
        "ce_clean": h,
        "ce_spliced": h_star,
        "ce_zero": h_zero,
        "ce_mean": h_mean,
        "added_nats": h_star - h,
        "loss_recovered_zero": (h_zero - h_star) / (h_zero - h),
        "loss_recovered_mean": (h_mean - h_star) / (h_mean - h),
        "kl": kl,
        "kl_zero": kl_zero,
        "kl_score": (kl_zero - kl) / kl_zero,
        "explained_variance_per_token": (1 - error / centred).mean().item(),
        "explained_variance_uncentred": (1 - error.mean() / (squares - (x**2).mean() ** 2)).item(),
        "reconstruction_bias": ((x_hat**2).sum(dim=1).mean() / (x * x_hat).sum(dim=1).mean()).item(),
        "decoder_cosine_max": cosines.amax(dim=1).mean().item(),
    }


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"])
def test_evaluation_equals_the_naive_computation(tiny_model: LoadedModel, corpus_folder: Path, hook: str) -> None:
    sae = make_sae(tiny_model, hook)
    found = evaluate_sae(tiny_model, [sae], open_corpus(str(corpus_folder)), max_tokens=TOKENS, context_len=CONTEXT)[
        0
    ].to_dict()
    expected = naive(tiny_model, sae, corpus_folder)
    histogram = found.pop("density_histogram")
    note = found.pop("note")
    assert found.pop("skip_share") == 0
    # Random weights predict nothing.
    assert ("worse than guessing among" in note) == (found["ce_clean"] > math.log(tiny_model.info.d_vocab))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The loss-recovered ratios divide small differences of float32 losses.
        assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    assert sum(item["features"] for item in histogram) == round(64 * (1 - found["dead_share"]))


def test_bos_is_counted_where_that_is_asked_for(gpt2_model: LoadedModel, corpus_folder: Path) -> None:
    sae, corpus = make_sae(gpt2_model, HOOK), open_corpus(str(corpus_folder))
    found = evaluate_sae(gpt2_model, [sae], corpus, max_tokens=TOKENS, context_len=CONTEXT, count_bos=True)[0]
    expected = naive(gpt2_model, sae, corpus_folder, count_bos=True)
    assert found.tokens == expected["tokens"] > naive(gpt2_model, sae, corpus_folder)["tokens"]
    for name in ("l0", "fvu", "explained_variance_per_token", "ce_clean", "ce_spliced", "kl_score"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=2e-4), name


def test_losses_of_a_model_that_predicts_something_else_are_not_printed_without_a_word(
    tiny_gpt2: Path, corpus_folder: Path
) -> None:
    """One gives every wrong token a high logit, the other has logits for three classes."""
    corpus, options = open_corpus(str(corpus_folder)), {"max_tokens": TOKENS, "context_len": CONTEXT}
    good = load_model(str(tiny_gpt2), device="cpu")
    sae = make_sae(good, HOOK)
    wrong = load_model(str(tiny_gpt2), device="cpu")
    with torch.no_grad():
        wrong.hf.lm_head.weight.mul_(200)
    found = evaluate_sae(wrong, [sae], corpus, **options)[0]
    assert found.ce_clean > math.log(wrong.info.d_vocab)
    assert found.note.startswith(f"the model's own loss, {found.ce_clean:.3g} nats, is worse than guessing among")
    classes = load_model(str(tiny_gpt2), device="cpu")
    with torch.no_grad():
        head = classes.hf.lm_head.weight[:3].clone()
    unembed = classes.bridge.unembed.original_component
    unembed.weight, unembed.bias = torch.nn.Parameter(head), None
    found = evaluate_sae(classes, [sae], corpus, **options)[0]
    assert "the model gives 3 logits for a vocabulary of" in found.note
    assert all(math.isnan(value) for value in (found.ce_clean, found.added_nats, found.loss_recovered_zero))
    assert found.kl > 0
    assert found.l0 == pytest.approx(6)


def test_held_out_text_that_ends_early_is_said(gpt2_model: LoadedModel) -> None:
    documents = [list(range(1, 41)) for _ in range(60)]
    corpus = Corpus.of_tokens("short", lambda: documents)
    rows = sum(len(document.tokens) + 1 for document in corpus.documents("heldout"))
    whole = rows // CONTEXT * CONTEXT
    assert whole, "a context is filled"
    for asked, said in ((whole, False), (whole + CONTEXT - 1, False), (100_000, True)):
        found = evaluate_sae(gpt2_model, [make_sae(gpt2_model, HOOK)], corpus, max_tokens=asked, context_len=CONTEXT)[0]
        assert (f"of {asked:,} tokens" in found.note) is said, asked


def test_an_evaluation_of_before_still_opens() -> None:
    old = {
        "tokens": 10, "l0": 3.0, "fvu": 0.1, "explained_variance": 0.9, "cosine": 0.9, "relative_norm": 1.0,
        "dead_share": 0.0, "dense_share": 0.0, "ce_clean": 2.0, "ce_spliced": 2.1, "ce_zero": 9.0, "ce_mean": 5.0,
        "added_nats": 0.1, "loss_recovered_zero": 0.98, "loss_recovered_mean": 0.96, "kl": 0.1,
        "decoder_cosine_max": 0.3,
    }  # fmt: skip
    found = Evaluation(**old, density_histogram=[])
    assert found.note == ""
    assert math.isnan(found.kl_score)


def test_several_saes_share_the_clean_pass_and_do_not_disturb_each_other(
    gpt2_model: LoadedModel, corpus_folder: Path
) -> None:
    saes = [make_sae(gpt2_model, HOOK, 0), make_sae(gpt2_model, "blocks.0.hook_mlp_out", 1)]
    corpus = open_corpus(str(corpus_folder))
    options = {"max_tokens": TOKENS, "context_len": CONTEXT}
    together = evaluate_sae(gpt2_model, saes, corpus, **options)
    alone = [evaluate_sae(gpt2_model, [sae], corpus, **options)[0] for sae in saes]
    assert together == alone


def test_progress_ends_at_the_total(gpt2_model: LoadedModel, corpus_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_sae(
        gpt2_model, [make_sae(gpt2_model, HOOK)], open_corpus(str(corpus_folder)), max_tokens=TOKENS,
        context_len=CONTEXT, on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (TOKENS, TOKENS)


def test_what_does_not_fit_the_model_is_refused(gpt2_model: LoadedModel, corpus_folder: Path) -> None:
    corpus = open_corpus(str(corpus_folder))
    with pytest.raises(InputError, match="belongs to another model"):
        evaluate_sae(gpt2_model, [make_sae(gpt2_model, HOOK, width=20)], corpus)
    with pytest.raises(InputError, match="3 layers"):
        evaluate_sae(gpt2_model, [make_sae(gpt2_model, "blocks.5.hook_resid_post")], corpus)
    with pytest.raises(InputError, match="do not fill one context"):
        evaluate_sae(gpt2_model, [make_sae(gpt2_model, HOOK)], corpus, max_tokens=10, context_len=CONTEXT)
    with pytest.raises(InputError, match=r"context length 65 is not between 2 .* and 64"):
        evaluate_sae(gpt2_model, [make_sae(gpt2_model, HOOK)], corpus, context_len=65)


def test_a_bfloat16_model_is_close_to_the_float32_one(
    gpt2_model: LoadedModel, tiny_gpt2: Path, corpus_folder: Path
) -> None:
    half = load_model(str(tiny_gpt2), device="cpu", dtype="bfloat16")
    corpus, options = open_corpus(str(corpus_folder)), {"max_tokens": TOKENS, "context_len": CONTEXT}
    exact = evaluate_sae(gpt2_model, [make_sae(gpt2_model, HOOK)], corpus, **options)[0]
    found = evaluate_sae(half, [make_sae(half, HOOK)], corpus, **options)[0]
    assert found.ce_clean == pytest.approx(exact.ce_clean, rel=0.02)
    assert found.ce_spliced == pytest.approx(exact.ce_spliced, rel=0.02)
    assert found.fvu == pytest.approx(exact.fvu, rel=0.02)
    assert effective_unembedding(half.bridge).dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu_the_result_is_that_of_the_cpu_and_the_sae_stays_where_it_was(
    gpt2_model: LoadedModel, tiny_gpt2: Path, corpus_folder: Path
) -> None:
    sae, corpus = make_sae(gpt2_model, HOOK), open_corpus(str(corpus_folder))
    options = {"max_tokens": TOKENS, "context_len": CONTEXT}
    expected = evaluate_sae(gpt2_model, [sae], corpus, **options)[0]
    found = evaluate_sae(load_model(str(tiny_gpt2), device="cuda"), [sae], corpus, **options)[0]
    assert sae.W_dec.device.type == "cpu"
    for name in ("l0", "fvu", "cosine", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl"):
        # Tokens whose k-th and next pre-activation nearly tie may choose the other on another device.
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3), name
