"""Logistic regression for many concepts at once, and the threshold of a score with the best F1.

    minimise over W, b   sum_c mean_n log(1 + exp(-s_nc (x_n . W_c + b_c))) + l2 / 2 |W_c|^2,    s = +1 or -1

The concepts do not interact; they share the matrix products. Inputs are standardised, L-BFGS in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

L2 = 1e-3
"""Ridge on standardised inputs, for a loss that is a mean over tokens."""
STEPS = 200
TOLERANCE = 1e-7


class Probe(NamedTuple):
    """A linear score of inputs: x @ weight + bias."""

    weight: Float[Tensor, "d concepts"]
    bias: Float[Tensor, "concepts"]

    def score(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n concepts"]:
        """Log-odds of every concept."""
        return x.to(self.weight) @ self.weight + self.bias


class Scores(NamedTuple):
    """How well scores tell concepts on held-out tokens, one value a concept; F1 and recall are NaN for concepts that no
    held-out token has."""

    f1: Float[Tensor, "concepts"]
    precision: Float[Tensor, "concepts"]
    recall: Float[Tensor, "concepts"]
    correlation: Float[Tensor, "concepts"]
    """Pearson's, between score and concept; 0 where one does not vary."""


def fit(x: Float[Tensor, "n d"], labels: Bool[Tensor, "n concepts"], l2: float = L2) -> Probe:
    """The probe that minimises the loss above."""
    x, target = x.double(), labels.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    scale = torch.where(std > 0, 1 / std.clamp_min(torch.finfo(std.dtype).tiny), 0.0)
    inputs = (x - mean) * scale
    weight = torch.zeros(x.shape[1], labels.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    # Concepts that always or never hold would send their bias to infinity.
    odds = target.mean(dim=0).clamp(1 / (2 * len(x)), 1 - 1 / (2 * len(x))).logit()
    bias = odds.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=TOLERANCE, tolerance_change=1e-12,
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weight + bias, target, reduction="none")
        total = loss.mean(dim=0).sum() + l2 / 2 * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(closure)
    raw = weight.detach() * scale[:, None]
    return Probe(raw, bias.detach() - mean @ raw)


def difference_in_means(x: Float[Tensor, "n d"], labels: Bool[Tensor, "n concepts"]) -> Probe:
    """Scores along mean(x with the concept) - mean(x without)."""
    x, target = x.double(), labels.double()
    n = target.sum(dim=0)
    with_it = x.T @ target / n.clamp_min(1)
    without = (x.sum(dim=0)[:, None] - x.T @ target) / (len(x) - n).clamp_min(1)
    return Probe(with_it - without, torch.zeros_like(n))


def best_threshold(score: Float[Tensor, "n concepts"], labels: Bool[Tensor, "n concepts"]) -> Float[Tensor, "concepts"]:
    """The score from which on, inclusively, saying the concept has the best F1; exact over all thresholds."""
    ordered, order = score.sort(dim=0, descending=True)
    hits = labels.gather(0, order).long().cumsum(dim=0)
    said = torch.arange(1, len(score) + 1, device=score.device)[:, None]
    f1 = 2 * hits / (said + hits[-1])
    # Equal scores go together: only the last of them is a threshold.
    ends = torch.ones_like(f1, dtype=torch.bool)
    ends[:-1] = ordered[1:] < ordered[:-1]
    best: Int[Tensor, "concepts"] = torch.where(ends, f1, -1.0).argmax(dim=0)  # noqa: UP037
    return ordered.gather(0, best[None])[0]


def judge(
    score: Float[Tensor, "n concepts"], labels: Bool[Tensor, "n concepts"], threshold: Float[Tensor, "concepts"]
) -> Scores:
    """Scores of held-out tokens against their concepts."""
    said = score >= threshold
    hits, n_said, n_true = (part.sum(dim=0).double() for part in (said & labels, said, labels))
    target = labels.double()
    score = score.double() - score.double().mean(dim=0)
    target = target - target.mean(dim=0)
    norms = score.norm(dim=0) * target.norm(dim=0)
    return Scores(
        f1=torch.where(n_true > 0, 2 * hits / (n_said + n_true).clamp_min(1), torch.nan),
        precision=hits / n_said.clamp_min(1),
        recall=torch.where(n_true > 0, hits / n_true.clamp_min(1), torch.nan),
        correlation=torch.where(norms > 0, (score * target).sum(dim=0) / norms, 0.0),
    )
