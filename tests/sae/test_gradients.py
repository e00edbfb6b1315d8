"""Sparse gradients against autograd through the dense formulas in float64."""

import torch
from torch import Tensor

from sae import SparseCode, TopK, kernels, losses

N, D, F, K = 48, 12, 300, 6
TIGHT = {"rtol": 1e-11, "atol": 1e-13}


def parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (N, D), "W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=name != "x")
        for name, shape in shapes.items()
    }


def dense_topk(z: Tensor, k: int) -> Tensor:
    kept = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, kept.indices, kept.values).relu()


def sparse_gradients(p: dict[str, Tensor], *, decoder: bool = True) -> tuple[losses.Reconstruction, kernels.Gradients]:
    p = {name: tensor.detach() for name, tensor in p.items()}
    x_centred = p["x"] - p["b_dec"]
    code = TopK(K).encode(x_centred, p["W_enc"], p["b_enc"])
    fit = losses.reconstruction(p["x"], kernels.decode(code, p["W_dec"], p["b_dec"]))
    return fit, kernels.gradients(code, x_centred, fit.grad_x_hat, p["W_enc"], p["W_dec"], decoder=decoder)


def test_gradients_of_the_normalised_error_equal_dense_autograd() -> None:
    p = parameters()
    a = dense_topk((p["x"] - p["b_dec"]) @ p["W_enc"] + p["b_enc"], K)
    x_hat = a @ p["W_dec"] + p["b_dec"]
    loss = (p["x"] - x_hat).square().sum() / (p["x"] - p["x"].mean(dim=0)).square().sum()
    loss.backward()
    fit, ours = sparse_gradients(p)
    torch.testing.assert_close(fit.loss, loss.detach(), **TIGHT)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours, name), p[name].grad, **TIGHT)


def test_gradients_of_a_ragged_code_equal_those_of_the_same_fixed_code() -> None:
    p = {name: tensor.detach() for name, tensor in parameters(1).items()}
    x_centred = p["x"] - p["b_dec"]
    # A bias this low leaves tokens with fewer than k active features.
    fixed = TopK(K).encode(x_centred, p["W_enc"], p["b_enc"] - 8)
    assert fixed.l0().min() < K
    _, feature, value = fixed.entries()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), fixed.l0().cumsum(0)])
    ragged = SparseCode(value, feature, F, offsets)
    torch.testing.assert_close(kernels.decode(ragged, p["W_dec"]), fixed.to_dense() @ p["W_dec"], **TIGHT)
    torch.testing.assert_close(kernels.decode(fixed, p["W_dec"]), fixed.to_dense() @ p["W_dec"], **TIGHT)
    g = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one, two = (kernels.gradients(code, x_centred, g, p["W_enc"], p["W_dec"]) for code in (fixed, ragged))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), **TIGHT)


def test_a_feature_that_did_not_fire_gets_no_gradient() -> None:
    p = {name: tensor.detach() for name, tensor in parameters().items()}
    code = TopK(K).encode(p["x"] - p["b_dec"], p["W_enc"], p["b_enc"])
    silent = torch.ones(F, dtype=torch.bool).index_fill_(0, code.entries()[1], False)
    assert silent.any()
    _, ours = sparse_gradients(p)
    assert not ours.W_dec[silent].any()
    assert not ours.W_enc[:, silent].any()
    assert not ours.b_enc[silent].any()


def test_a_frozen_decoder_has_no_gradient_and_leaves_the_others_as_they_are() -> None:
    p = parameters()
    _, full = sparse_gradients(p)
    _, frozen = sparse_gradients(p, decoder=False)
    assert frozen.W_dec is None
    for name in ("W_enc", "b_enc", "b_dec"):
        assert torch.equal(getattr(frozen, name), getattr(full, name))


def test_gradients_are_the_same_bits_on_every_repeat() -> None:
    p = {name: tensor.detach().float() for name, tensor in parameters().items()}
    _, first = sparse_gradients(p)
    for _ in range(5):
        _, again = sparse_gradients(p)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(getattr(again, name), getattr(first, name))


def aux_reference(p: dict[str, Tensor], dead: Tensor, residual: Tensor, k_aux: int) -> Tensor:
    """L_aux by its definition, with autograd."""
    z = (p["x"] - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    among_dead = torch.full_like(z, -torch.inf).index_copy(1, dead, z[:, dead])
    kept = among_dead.topk(k_aux, dim=1)
    a = torch.zeros_like(z).scatter(1, kept.indices, kept.values.relu())
    e_hat = a @ p["W_dec"]
    return (residual - e_hat).square().sum() / (residual - residual.mean(dim=0)).square().sum()


def check_aux_k(dead: Tensor, k_aux: int) -> None:
    p = parameters(3)
    fit, ours = sparse_gradients(p)
    _, before = sparse_gradients(p)
    loss = aux_reference(p, dead, fit.residual, k_aux)
    (loss / 32).backward()
    frozen = {name: tensor.detach() for name, tensor in p.items()}
    aux = losses.add_aux_k(
        ours, dead, fit.residual, frozen["x"] - frozen["b_dec"], frozen["W_enc"], frozen["b_enc"], frozen["W_dec"]
    )
    torch.testing.assert_close(aux, loss.detach(), **TIGHT)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours, name) - getattr(before, name), p[name].grad, rtol=1e-9, atol=1e-12)


def test_aux_k_equals_its_definition_when_more_are_dead_than_it_uses() -> None:
    check_aux_k(torch.arange(5, F, 3), D // 2)


def test_aux_k_equals_its_definition_when_few_are_dead() -> None:
    check_aux_k(torch.tensor([4, 100, 299]), 3)


def test_aux_k_in_chunks_of_rows_equals_its_definition(monkeypatch) -> None:
    monkeypatch.setattr(losses, "DENSE_ENTRIES", 1)
    monkeypatch.setattr(losses, "MIN_ROWS", 7)
    check_aux_k(torch.arange(5, F, 3), D // 2)


def test_aux_k_gradients_reach_the_encoder_of_dead_features() -> None:
    """Published code loses them: there, dead features learn through the decoder alone and stay dead."""
    p = {name: tensor.detach() for name, tensor in parameters(3).items()}
    dead = torch.arange(0, F, F // (D // 2))  # as many as aux-k selects
    blocked = {**p, "b_enc": p["b_enc"].index_fill(0, dead, -1e3)}
    fit, ours = sparse_gradients(blocked)
    assert not ours.W_enc[:, dead].any()
    losses.add_aux_k(ours, dead, fit.residual, p["x"] - p["b_dec"], p["W_enc"], p["b_enc"], p["W_dec"])
    could_fire = ((p["x"] - p["b_dec"]) @ p["W_enc"] + p["b_enc"] > 0)[:, dead].any(dim=0)
    assert could_fire.sum() >= 5
    assert torch.equal(ours.W_enc[:, dead].any(dim=0), could_fire)
    assert torch.equal(ours.b_enc[dead] != 0, could_fire)
