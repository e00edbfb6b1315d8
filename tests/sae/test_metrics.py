"""Metrics against their definitions, computed naively in float64."""

import pytest
import torch

from sae import SAE, SparseCode, TopK
from sae.directions import ROWS_AT_ONCE
from sae.metrics import ReconstructionMetrics, decoder_cosine_maxima, density_histogram
from sae.optim import random_unit_rows


def make_sae(d_in: int = 10, d_sae: int = 50, k: int = 3) -> SAE:
    sae = SAE(d_in, d_sae, TopK(k))
    with torch.no_grad():
        sae.W_dec.copy_(random_unit_rows(d_sae, d_in, 0, "cpu", torch.float32))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.copy_(torch.linspace(-6.0, 0.5, d_sae))
        sae.b_dec.fill_(100.0)
    return sae


def test_metrics_over_batches_equal_their_definitions_over_all_tokens() -> None:
    sae = make_sae()
    # A common offset of 100 standard deviations would cost a careless variance its digits.
    x = torch.randn(700, 10, generator=torch.Generator().manual_seed(0)) + 100
    metrics = ReconstructionMetrics(10, 50)
    for batch in x.split([256, 256, 188]):
        code = sae.encode(batch)
        metrics.update(batch, code, sae.decode(code))
    got = metrics.result()
    dense, wide, x_hat = sae.encode(x).to_dense(), x.double(), sae(x).double()
    fires = dense != 0
    assert got.tokens == 700
    assert got.l0 == pytest.approx(fires.sum(1).double().mean().item(), rel=1e-12)
    fvu = ((wide - x_hat).square().sum() / (wide - wide.mean(0)).square().sum()).item()
    assert got.fvu == pytest.approx(fvu, rel=1e-9)
    assert got.explained_variance == pytest.approx(1 - fvu, rel=1e-9)
    error, centred, squares = (wide - x_hat).square().sum(1), wide - wide.mean(0), wide.square().sum(1).mean()
    per_token = (1 - error / centred.square().sum(1)).mean().item()
    known = ReconstructionMetrics(10, 50, mean=wide.mean(0))
    known.update(x, sae.encode(x), sae(x))
    assert known.result().explained_variance_per_token == pytest.approx(per_token, rel=1e-9)
    # Without a mean each batch has its own, as SAEBench has it.
    by_batch = [
        1 - (part - seen).square().sum(1) / (part - part.mean(0)).square().sum(1)
        for part, seen in zip(wide.split([256, 256, 188]), x_hat.split([256, 256, 188]), strict=True)
    ]
    assert got.explained_variance_per_token == pytest.approx(torch.cat(by_batch).mean().item(), rel=1e-9)
    assert abs(got.explained_variance_per_token - per_token) > 1e-4
    uncentred = 1 - error.mean() / (squares - wide.square().mean() ** 2)
    assert got.explained_variance_uncentred == pytest.approx(uncentred.item(), rel=1e-9)
    bias = x_hat.square().sum(1).mean() / (wide * x_hat).sum(1).mean()
    assert got.reconstruction_bias == pytest.approx(bias.item(), rel=1e-12)
    assert got.cosine == pytest.approx(torch.cosine_similarity(wide, x_hat, dim=1).mean().item(), rel=1e-12)
    assert got.relative_norm == pytest.approx((x_hat.norm(dim=1) / wide.norm(dim=1)).mean().item(), rel=1e-12)
    assert torch.equal(got.density, fires.double().mean(0))
    assert got.dead_share == (~fires.any(0)).double().mean().item() > 0
    assert got.dense_share == (fires.double().mean(0) > 0.1).double().mean().item() > 0


def test_negative_activations_count_as_firing() -> None:
    code = SparseCode(torch.tensor([[-1.0, 0.0], [2.0, -3.0]]), torch.tensor([[4, 0], [1, 4]]), 6)
    metrics = ReconstructionMetrics(3, 6)
    metrics.update(torch.eye(2, 3), code, torch.eye(2, 3))
    got = metrics.result()
    assert got.density.tolist() == [0.0, 0.5, 0.0, 0.0, 1.0, 0.0]
    assert got.l0 == 1.5


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        ReconstructionMetrics(3, 6).result()


def test_density_histogram_counts_every_feature_that_fires_once() -> None:
    density = torch.tensor([0.0, 0.001, 0.01, 0.0101, 0.5, 1.0], dtype=torch.float64)
    bins = density_histogram(density, tokens=1000)
    assert sum(entry["features"] for entry in bins) == 5
    counts = {round(entry["log10_density"], 2): entry["features"] for entry in bins}
    assert counts[-3.0] == 1
    assert counts[-2.0] == 2
    assert counts[-0.5] == 1  # 0.5
    assert counts[-0.25] == 1  # 1 closes the last bin


def test_decoder_cosine_maxima_ignore_the_feature_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", 32)
    W_dec = torch.randn(70, 8, generator=torch.Generator().manual_seed(4))
    W_dec[69] = -2 * W_dec[0]
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    torch.testing.assert_close(decoder_cosine_maxima(W_dec), cosines.amax(1))
    # Under a signed rule the opposed row is the same feature again.
    absolute = cosines.abs().fill_diagonal_(-2).amax(1)
    torch.testing.assert_close(decoder_cosine_maxima(W_dec, signed=True), absolute)
    assert absolute[0] == pytest.approx(1)
