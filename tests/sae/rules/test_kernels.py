"""Every selection kernel against Python's sort: random, tied, empty, infinite and NaN scores, chunk by chunk."""

import naive_selection as naive
import pytest
import torch
from torch import Tensor

from sae import SparseCode, kernels
from sae.kernels import scores as score_chunks

SHAPES = [(9, 700), (40, 64), (7, 5), (1, 1), (33, 130)]


def scores(kind: str, n: int, d_sae: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if kind == "random":
        return torch.randn(n, d_sae, generator=generator)
    if kind == "tied":
        return torch.randint(-2, 3, (n, d_sae), generator=generator).float()
    if kind == "equal":
        return torch.ones(n, d_sae)
    if kind == "negative":
        return -torch.rand(n, d_sae, generator=generator)
    return -0.0 * torch.rand(n, d_sae, generator=generator)


KINDS = ["random", "tied", "equal", "negative", "zero"]


@pytest.fixture(params=[False, True], ids=["whole", "chunks"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is and once with a buffer of a few rows."""
    if request.param:
        monkeypatch.setattr(score_chunks, "CPU_BUFFER_ENTRIES", 200)
        monkeypatch.setattr(score_chunks, "CPU_MIN_ROWS", 2)


def identity(d: int) -> tuple[Tensor, Tensor]:
    """Encoder and bias with which pre-activations are the inputs."""
    return torch.eye(d), torch.zeros(d)


def assert_same(code: SparseCode, expected: Tensor) -> None:
    assert torch.equal(code.to_dense(), expected)
    token, feature, values = code.entries()
    assert len(values) == int((expected != 0).sum())
    assert torch.equal(token * code.d_sae + feature, torch.sort(token * code.d_sae + feature).values)
    assert code.offsets is not None
    assert int(code.offsets[-1]) == len(code.values) == len(values)
    assert torch.equal(code.l0(), (expected != 0).sum(dim=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_absolute_topk_keeps_signs(shape: tuple[int, int], kind: str) -> None:
    z = scores(kind, *shape)
    for k in {1, min(4, shape[1]), shape[1]}:
        values, indices = kernels.topk_encode(z, *identity(shape[1]), k, absolute=True)
        assert torch.equal(SparseCode(values, indices, shape[1]).to_dense(), naive.topk(z.abs(), k, z))
        assert not indices[values == 0].any()
        magnitudes = values.abs()
        assert torch.equal(magnitudes, magnitudes.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_topk(shape: tuple[int, int], kind: str, absolute: bool) -> None:
    z = scores(kind, *shape)
    for n_entries in {1, shape[0], 3 * shape[0], z.numel()}:
        code = kernels.batch_topk_encode(z, *identity(shape[1]), n_entries, absolute=absolute)
        assert_same(code, naive.batch_topk(z.abs() if absolute else z, n_entries, z))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_feature_topk(shape: tuple[int, int], kind: str) -> None:
    z = scores(kind, *shape)
    budgets = torch.randint(1, shape[0] + 1, (shape[1],), generator=torch.Generator().manual_seed(0))
    code = kernels.feature_topk_encode(z, *identity(shape[1]), budgets)
    assert_same(code, naive.feature_topk(z, budgets.tolist()))
    assert torch.equal((code.to_dense() != 0).sum(dim=0), torch.minimum(budgets, (z > 0).sum(dim=0)))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_threshold(shape: tuple[int, int], kind: str, absolute: bool) -> None:
    z = scores(kind, *shape)
    threshold = torch.randint(0, 2, (shape[1],), generator=torch.Generator().manual_seed(1)).float()
    code = kernels.threshold_encode(z, *identity(shape[1]), threshold, absolute=absolute)
    assert_same(code, torch.where((z.abs() if absolute else z) > threshold, z, 0))


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_topk(shape: tuple[int, int], kind: str, beta: float) -> None:
    n, d_sae = shape
    z = scores(kind, n, d_sae)
    generator = torch.Generator().manual_seed(2)
    # Halves: every product and sum is exact, whatever its order.
    W_dec = torch.randint(-2, 3, (d_sae, d_sae), generator=generator) / 2
    g = torch.randint(-2, 3, (n, d_sae), generator=generator) / 2
    k = min(4, d_sae)
    values, indices = kernels.gradient_topk_encode(z, *identity(d_sae), W_dec, g, k, beta)
    weight = (g @ W_dec.T).abs()
    ranked = torch.addcmul(z, z, weight, value=beta)
    assert torch.equal(SparseCode(values, indices, d_sae).to_dense(), naive.topk(ranked, k, z))
    torch.testing.assert_close(kernels.mean_influence(W_dec, g), weight.mean(), rtol=1e-6, atol=0)


def test_beta_zero_is_topk_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    x, W = torch.randn(300, 20, generator=generator), torch.randn(20, 900, generator=generator)
    b, W_dec = torch.randn(900, generator=generator), torch.randn(900, 20, generator=generator)
    ours = kernels.gradient_topk_encode(x, W, b, W_dec, torch.randn(300, 20, generator=generator), 7, 0.0)
    theirs = kernels.topk_encode(x, W, b, 7)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def with_nan() -> tuple[Tensor, Tensor, Tensor]:
    """A NaN input would spread over its row through the product, so it enters by the bias."""
    bias = torch.linspace(-1, 1, 60)
    bias[[5, 50]] = torch.nan
    bias[7] = torch.inf
    bias[8] = -torch.inf
    return torch.zeros(3, 4), torch.zeros(4, 60), bias


@pytest.mark.parametrize("absolute", [False, True])
def test_nan_is_seen_by_every_kernel(absolute: bool) -> None:
    x, W, b = with_nan()
    for code in (
        kernels.batch_topk_encode(x, W, b, 12, absolute=absolute),
        kernels.threshold_encode(x, W, b, torch.full((60,), 2.0), absolute=absolute),
        SparseCode(*kernels.topk_encode(x, W, b, 3, absolute=absolute), 60),
    ):
        assert code.values.isnan().sum() == 6
        assert code.to_dense()[:, [5, 50]].isnan().all()
    code = kernels.feature_topk_encode(x, W, b, torch.full((60,), 2))
    assert code.values.isnan().sum() == 4


def test_no_tokens() -> None:
    x, W, b = torch.zeros(0, 4), torch.zeros(4, 60), torch.zeros(60)
    for code in (
        kernels.batch_topk_encode(x, W, b, 0),
        kernels.threshold_encode(x, W, b, b),
        kernels.feature_topk_encode(x, W, b, torch.ones(60, dtype=torch.int64)),
    ):
        assert code.n_tokens == 0
        assert code.to_dense().shape == (0, 60)


def test_float64_inputs_are_selected_in_float64() -> None:
    x = 1 + torch.arange(6, dtype=torch.float64).reshape(2, 3) * 1e-12
    W, b = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert kernels.batch_topk_encode(x, W, b, 2).entries()[1].tolist() == [1, 2]
    assert kernels.batch_topk_encode(x, W, b, 2).values.dtype == torch.float64
    assert kernels.feature_topk_encode(x, W, b, torch.ones(3, dtype=torch.int64)).entries()[0].tolist() == [1, 1, 1]
