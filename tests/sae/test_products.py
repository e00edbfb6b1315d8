"""Products by oneDNN are torch's, in every layout the encoder hands over, and only what it can multiply goes to it."""

import pytest
import torch

from sae.kernels import products
from sae.kernels.scores import multiply_add

N, D, M = 96, 48, 130


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_torchs(by_column: bool, strided: bool, with_bias: bool) -> None:
    x, W, bias = torch.randn(2 * N, D), torch.randn(M, D), torch.randn(M) if with_bias else None
    x = x[::2] if strided else x[:N]
    W = W.T.contiguous().T if by_column else W
    assert products.served(x, W)
    exact = torch.nn.functional.linear(x.double(), W.double(), None if bias is None else bias.double())
    assert (products.times(x, W) == products.linear(x, W)).all()
    assert (products.times(x.double(), W.double()) == x.double() @ W.double().T).all()
    torch.testing.assert_close(products.linear(x, W, bias).double(), exact, rtol=1e-5, atol=1e-5)
    # As where features are padded to whole groups.
    out = torch.full((N, M + 6), 7.0)
    multiply_add(x, W.T, bias, out[:, :M])
    torch.testing.assert_close(out[:, :M].double(), exact, rtol=1e-5, atol=1e-5)
    assert (out[:, M:] == 7).all()


def test_other_precisions_few_rows_and_single_vectors_stay_torchs() -> None:
    x, W = torch.randn(N, D), torch.randn(M, D)
    assert not products.served(x.double(), W.double())
    assert not products.served(x.bfloat16(), W.bfloat16())
    assert not products.served(x, W.double())
    assert not products.served(x[: products.LEAST_ROWS - 1], W)
    assert not products.served(x[0], W)
    assert not products.served(x[:, :0], W[:, :0])


def test_what_only_torch_multiplies_and_gradients_stay_torchs() -> None:
    x, W, bias = torch.randn(N, D), torch.randn(M, D), torch.randn(M)
    assert products.served(x, W, bias)
    for broadcast in (bias[0], bias[:1], bias[None]):
        assert not products.served(x, W, broadcast)
    assert not products.served(x, W, bias.double())
    assert not products.served(x, W[0])
    assert not products.served(x, W[:, 1:])
    assert not products.served(x, W.to_sparse())
    for one in (x, W, bias):
        one.requires_grad_()
        assert not products.served(x, W, bias)
        with torch.no_grad():
            assert products.served(x, W, bias)
        one.requires_grad_(False)
