"""A transcoder's fused step: its gradients, read from Adam's first moments, against float64 autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae import optim
from sae.config import TrainConfig
from sae.fused_step import FusedStep
from sae.kernels import triton as fast
from sae.rules import BatchTopK, JumpReLU, ReLU, Rule, TopK
from sae.source import Pair
from sae.state import TrainingState

N, D, F, K = 13, 6, 18, 3
PREFIXES = (7, F)
SHARES_ALWAYS_DENSE, SHARES_NEVER_DENSE = 10**6, 1


def activations(rule: Rule, z: Tensor, threshold: Tensor | float) -> Tensor:
    """The dense code of pre-activations."""
    if isinstance(rule, TopK):
        best = z.relu().topk(K, dim=1)
        return torch.zeros_like(z).scatter(1, best.indices, best.values)
    if isinstance(rule, BatchTopK):
        best = z.relu().flatten().topk(K * N)
        return torch.zeros_like(z).flatten().scatter(0, best.indices, best.values).view_as(z)
    return torch.where(z > threshold, z, 0)


def autograd(state: TrainingState, batch: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64 of y_hat = a W_dec + b_dec + x W_skip^T, of W_dec's the part across its rows."""
    rule, config = state.config.rule, state.config
    named = {name: p.detach().double().cpu().requires_grad_() for name, p in state.sae.named_parameters()}
    x = batch.double().cpu() * state.input_scale.double().cpu()
    y = target.double().cpu() * state.output_scale.double().cpu()
    threshold: Tensor | float = 0.0
    if isinstance(rule, JumpReLU):
        threshold = rule.threshold(state.own, state.sae.W_enc.detach()).double().cpu()
    a = activations(rule, x @ named["W_enc"] + named["b_enc"], threshold)
    linear = x @ named["W_skip"].T if config.skip else 0
    widths = config.widths or (F,)
    errors = [(y - a[:, :w] @ named["W_dec"][:w] - named["b_dec"] - linear).square().sum() for w in widths]
    loss = sum(errors) / len(errors) / (y - y.mean(0)).square().sum()
    made = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    optim.remove_parallel_(made["W_dec"], named["W_dec"].detach())
    return loss.detach(), {**made, "W_enc": made["W_enc"].T}


CASES: list[tuple[Rule, dict[str, Any], int]] = [
    (TopK(K), {}, 1),
    (TopK(K), {"skip": True, "clip_grad_norm": 1e9}, 1),
    (TopK(K), {"skip": True, "matryoshka": PREFIXES}, 1),
    (BatchTopK(K), {"skip": True}, 1),
    (BatchTopK(K), {"matryoshka": PREFIXES, "clip_grad_norm": 1e9}, 1),
    (ReLU(), {"skip": True, "sparsity_coefficient": 0.0}, SHARES_ALWAYS_DENSE),
    (ReLU(), {"skip": True, "sparsity_coefficient": 0.0}, SHARES_NEVER_DENSE),
    (JumpReLU(), {"skip": True, "sparsity_coefficient": 0.0}, SHARES_NEVER_DENSE),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "settings", "share"), CASES)
def test_gradients_are_those_of_float64(rule: Rule, settings: dict[str, Any], share: int, device: torch.device) -> None:
    config = TrainConfig(name="a", total_tokens=10 * N, batch_size=N, d_sae=F, rule=rule, aux="none", **settings)
    state = TrainingState(config, Pair("in", "out", D, D), device)
    batch, target = (torch.randn(N, D) + 3).to(device), (0.2 * torch.randn(N, D) - 5).to(device)
    state.initialise(batch, target)
    with torch.no_grad():
        # Far from the start, where the skip is zero and the encoder small.
        for name, parameter in state.sae.named_parameters():
            if name != "W_dec":
                parameter += 0.1 * torch.randn(parameter.shape, device=device)
        # Always on, and never.
        state.sae.b_enc[3], state.sae.b_enc[5] = 3, -50
    loss, expected = autograd(state, batch, target)
    sizes = fast.KernelSizes(window=4, min_rows=7, scores=1, candidates=8, dense_share=share)
    FusedStep(state, precision=torch.float32, sizes=sizes)(batch, 0, None, target)
    assert state.read_totals().loss == pytest.approx(float(loss), rel=1e-5)
    for name, gradient in expected.items():
        mean = state.adam.state[state.trained[name]]["exp_avg"].double().cpu() / (1 - config.betas[0])
        assert float((mean - gradient).norm() / gradient.norm()) < 2e-5, name
