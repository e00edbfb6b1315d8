"""Selection by Python's sort, from the definitions: the reference for every kernel."""

import math

import torch
from torch import Tensor


def rank(score: float) -> tuple[int, float]:
    """Sorts NaN first, then descending."""
    return (0, 0.0) if math.isnan(score) else (1, -score)


def topk(scores: Tensor, k: int, values: Tensor | None = None) -> Tensor:
    """Dense [n, d_sae]: per token the k largest positive scores; what is kept is `values` (the scores if None)."""
    kept = scores if values is None else values
    dense = torch.zeros_like(kept)
    for token, line in enumerate(scores.tolist()):
        for i in sorted(range(len(line)), key=lambda i: (rank(line[i]), i))[:k]:
            if not line[i] <= 0:
                dense[token, i] = kept[token, i]
    return dense


def batch_topk(scores: Tensor, n_entries: int, values: Tensor | None = None) -> Tensor:
    """Dense: the n_entries largest positive scores of all, ties to the first token, then the first feature."""
    kept = scores if values is None else values
    dense = torch.zeros_like(kept)
    flat = scores.flatten().tolist()
    for i in sorted(range(len(flat)), key=lambda i: (rank(flat[i]), i))[:n_entries]:
        if not flat[i] <= 0:
            dense.view(-1)[i] = kept.reshape(-1)[i]
    return dense


def feature_topk(scores: Tensor, budgets: list[int]) -> Tensor:
    """Dense: every feature's largest positive scores, ties to the first token."""
    return torch.stack([topk(scores[:, [f]].T, m)[0] for f, m in enumerate(budgets)], dim=1)
