"""Exact top tokens of every feature, without the [n, d_sae] matrix (feature choice).

Order within a feature: score descending, then token ascending; NaN ranks as infinity; scores that are not
positive never count.

1. Features are taken in the order of their budgets, so that those of a chunk need about equally many tokens.
2. The scores of a chunk of features on all tokens, a feature a row; torch.topk gives each feature's m-th best score.
3. All scores above it are kept, and of those equal to it the first tokens until the budget is full.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.scores import Encoder
from sae.kernels.sparse import ragged_code


def feature_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    budgets: Int[Tensor, "d_sae"],
) -> SparseCode:
    """Every feature's `budgets[i]` largest positive pre-activations; fewer where fewer are positive.

    Args:
        x: inputs with b_dec subtracted; fp32, or bf16/fp16 on CUDA.
        budgets: tokens of each feature, each between 1 and n.

    Returns:
        A ragged code; the entries of a token by feature ascending.
    """
    encoder = Encoder.of(x, W_enc, b_enc)
    if encoder.n == 0:
        nothing = encoder.empty(0, dtype=torch.int64)
        return ragged_code(nothing, nothing, encoder.empty(0), 0, encoder.d_sae)
    budgets, order = torch.sort(budgets, stable=True)
    places, values = [], []
    for first, last, scores in encoder.feature_chunks(order):
        budget = budgets[first:last]
        key = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best = key.topk(int(budget[-1]), dim=1).values
        lowest = best.gather(1, budget.unsqueeze(1) - 1)
        above, equal = key > lowest, key == lowest
        missing = budget - above.sum(dim=1)
        tied = torch.nonzero(equal.sum(dim=1) > missing).squeeze(1)
        if tied.numel():
            equal[tied] &= equal[tied].cumsum(dim=1) <= missing[tied].unsqueeze(1)
        row, token = torch.nonzero((above | equal) & (key > 0), as_tuple=True)
        places.append(token * encoder.d_sae + order[first:last][row])
        values.append(scores[row, token])
    place, by_place = torch.sort(torch.cat(places))
    token = torch.div(place, encoder.d_sae, rounding_mode="floor")
    return ragged_code(token, place - token * encoder.d_sae, torch.cat(values)[by_place], encoder.n, encoder.d_sae)
