"""Matching pursuit of a batch by its scores and the directions' Gram matrix, all steps in one Triton kernel.

A program keeps its row's scores in registers, so that a step reads one row of the Gram matrix and writes two numbers.
Step by step in torch, the scores of all rows would be read and written several times a step: six times the bytes.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

WARPS = 8


@triton.jit
def _pursue(scores, gram, features, values, n_features, K: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < n_features
    left = tl.load(scores + row * n_features + column, mask=inside, other=-float("inf"))
    for step in range(K):
        value, feature = tl.max(left, axis=0, return_indices=True)
        value = tl.maximum(value, 0.0)
        tl.store(features + row * K + step, feature.to(tl.int64))
        tl.store(values + row * K + step, value)
        left -= value * tl.load(gram + feature.to(tl.int64) * n_features + column, mask=inside, other=0.0)
    tl.store(scores + row * n_features + column, left, mask=inside)


def pursue(
    scores: Float[Tensor, "n features"], gram: Float[Tensor, "features features"], k: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """What is chosen and the values, step by step; `scores`, contiguous, become those of what is left."""
    n, n_features = scores.shape
    features = torch.empty(n, k, dtype=torch.int64, device=scores.device)
    values = torch.empty(n, k, device=scores.device)
    width = triton.next_power_of_2(n_features)
    _pursue[(n,)](scores, gram, features, values, n_features, K=k, WIDTH=width, num_warps=WARPS)
    return features, values
