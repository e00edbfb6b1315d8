"""Sparsity of SAE codes and terms per token, against naive loops and exact cases."""

import itertools

import numpy as np
import pytest
import torch

from sae.errors import InputError
from sae.model import SAE
from sae.rules import TopK
from workbench.models.capture import capture
from workbench.models.contexts import context_batches
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.sparsity.sae_codes import SAESparsity, fit_zipf, measure_saes
from workbench.sparsity.terms import Basis, bases, errors_in_basis, errors_in_sae, terms_needed, terms_table
from workbench.text.corpora import Corpus

HOOK = "blocks.1.hook_resid_post"


def random_sae(d_in: int = 32, d_sae: int = 64, k: int = 8, seed: int = 0, hook: str = HOOK) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(d_in, d_sae, TopK(k), hook_name=hook)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(torch.randn(d_in) * 0.1)
    return sae


@pytest.fixture(scope="module")
def report(gpt2_model: LoadedModel, corpus: Corpus) -> SAESparsity:
    saes = {"a": random_sae(), "b": random_sae(k=4, seed=1)}
    return measure_saes(gpt2_model, saes, corpus, max_tokens=512, context_len=32)


def test_an_exact_power_law_gives_its_exponent_back() -> None:
    density = 0.3 * torch.arange(1, 501, dtype=torch.float64) ** -1.3
    shuffled = density[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    fit = fit_zipf(torch.cat([shuffled, torch.zeros(50, dtype=torch.float64)]))
    assert fit.exponent == pytest.approx(1.3, abs=1e-12)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-12)


def test_the_zipf_fit_is_the_weighted_least_squares_line() -> None:
    density = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rank = np.arange(1, 201)
    # numpy's weights multiply residuals, not their squares.
    slope, _ = np.polyfit(np.log(rank), np.log(np.sort(density.numpy())[::-1]), 1, w=rank**-0.5)
    assert fit_zipf(density).exponent == pytest.approx(-slope, rel=1e-9)


def test_codes_are_counted_as_a_naive_loop_does(report: SAESparsity, gpt2_model: LoadedModel, corpus: Corpus) -> None:
    hook, sae = resolve_hook(gpt2_model, HOOK), random_sae()
    l0, position, fired = [], [], np.zeros(64)
    for batch in context_batches(gpt2_model, corpus, "heldout", max_tokens=512, context_len=32):
        x = capture(gpt2_model, batch.tokens, [hook]).activations[HOOK]
        for row, pos in batch.ordinary.nonzero().tolist():
            code = sae.encode(x[row, pos][None]).to_dense()[0]
            l0.append(int((code != 0).sum()))
            position.append(pos)
            fired += (code != 0).numpy()
    summary = report.summary.set_index("sae").loc["a"]
    density = fired / len(l0)
    assert report.tokens == len(l0)
    assert summary["l0"] == pytest.approx(np.mean(l0))
    assert summary["dead_share"] == pytest.approx((density == 0).mean())
    assert summary["dense_share"] == pytest.approx((density > 0.1).mean())
    assert summary["l0_p50"] == np.sort(l0)[round(0.5 * (len(l0) - 1))]
    spectrum = report.spectrum.query("sae == 'a'")
    np.testing.assert_allclose(spectrum["density"], np.sort(density[density > 0])[::-1])
    np.testing.assert_allclose(density[spectrum["feature"]], spectrum["density"])
    at = report.positions.query("sae == 'a'").set_index("pos")
    assert at.loc[5, "l0"] == pytest.approx(np.mean([n for n, pos in zip(l0, position, strict=True) if pos == 5]))


def test_errors_in_a_basis_are_those_of_the_best_subset() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 5, dtype=torch.float64)
    for basis in bases(x):
        errors = errors_in_basis(x, basis)
        directions = torch.eye(5, dtype=torch.float64) if basis.rows is None else basis.rows
        torch.testing.assert_close(directions @ directions.T, torch.eye(5, dtype=torch.float64))
        centred = x[3] - x.mean(0)
        for m in range(6):
            subsets = [list(chosen) for chosen in itertools.combinations(range(5), m)]
            best = min(
                (centred - (centred @ directions[chosen].T) @ directions[chosen]).square().sum().item()
                for chosen in subsets
            )
            assert errors[3, m].item() == pytest.approx(best / centred.square().sum().item(), abs=1e-12)


def test_pca_explains_most_with_its_largest_directions() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([5.0, 1, 1, 1, 1, 0.1], dtype=torch.float64)
    pca = next(basis for basis in bases(x) if basis.name == "PCA")
    assert pca.rows is not None
    values = np.linalg.eigvalsh(np.cov(x.T.numpy()))
    np.testing.assert_allclose(((x - pca.mean) @ pca.rows.T).var(0).numpy(), values, rtol=1e-9)


def test_errors_in_an_sae_are_those_of_its_largest_terms() -> None:
    sae = random_sae()
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(32, dtype=torch.float64)
    errors = errors_in_sae(x, sae, mean)
    dense = sae.encode(x).to_dense().double()
    assert errors.shape == (7, 9)
    for token in range(7):
        order = dense[token].abs().argsort(descending=True)
        for m in range(9):
            part = torch.zeros(64, dtype=torch.float64)
            part[order[:m]] = dense[token, order[:m]]
            left = x[token].double() - sae.b_dec.double() - part @ sae.W_dec.double()
            expected = left.square().sum() / x[token].double().square().sum()
            assert errors[token, m].item() == pytest.approx(expected.item(), rel=1e-6)
    whole = (x - sae(x)).square().sum(1) / x.square().sum(1)
    torch.testing.assert_close(errors[:, -1].float(), whole, rtol=1e-4, atol=1e-5)


def test_an_sae_of_orthogonal_axes_needs_as_many_terms_as_that_basis() -> None:
    sae = SAE(6, 6, TopK(6))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(6))
        sae.W_enc.copy_(torch.eye(6))
    x = torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(errors_in_sae(x, sae, zero), errors_in_basis(x, Basis("neurons", zero, None)))


def test_terms_needed_are_the_first_that_reach_the_error() -> None:
    errors = torch.tensor([[1.0, 0.4, 0.1], [1.0, 0.9, 0.6], [0.0, 0.0, 0.0]])
    assert terms_needed(errors, 0.4).tolist() == [1, -1, 0]
    table = terms_table(torch.eye(6), bases(torch.randn(50, 6)), {}).set_index(["dictionary", "error"])
    assert (table["reached"] == 1.0).all()


def test_terms_are_reported_for_every_dictionary(report: SAESparsity) -> None:
    assert set(report.terms["dictionary"]) == {"neurons", "PCA", "random rotation", "a", "b"}
    for _, rows in report.terms.groupby("dictionary"):
        assert rows.sort_values("error", ascending=False)["reached"].is_monotonic_decreasing
    random = report.terms.query("dictionary == 'random rotation'")["terms_mean"]
    pca = report.terms.query("dictionary == 'PCA'")["terms_mean"]
    assert (pca.to_numpy() <= random.to_numpy()).all()


def test_saes_that_do_not_belong_together_are_one_line(gpt2_model: LoadedModel, corpus: Corpus) -> None:
    with pytest.raises(InputError, match="read different hook points"):
        measure_saes(gpt2_model, {"a": random_sae(), "b": random_sae(hook="blocks.0.hook_resid_post")}, corpus)
    with pytest.raises(InputError, match=r"SAE a reads 16 values and .* has 32: it belongs to another model"):
        measure_saes(gpt2_model, {"a": random_sae(d_in=16)}, corpus)
