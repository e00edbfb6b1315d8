"""Choices among the features of all ranks, each of which has a shard of them: the same as one rank would make that had
them all, ties included.

Shards are spans of the features in the order of the ranks, so that of equal scores the earlier rank's come first.

k entries a token, from each shard's k best in the canonical order (`sae.kernels.topk`), among which the whole's k best
are for certain:

1. All ranks' scores are gathered, k numbers a token and rank; as integers that order as the scores do, NaN first.
2. tau is the k-th largest. Of those above it, g in number, every rank keeps its own; of those that equal tau the first
   k - g are kept, in the order of the ranks.
3. A rank's list is in order, so what it keeps is the beginning of it.

The M largest entries of a batch, from each shard's M largest (`sae.kernels.batch_topk`):

1. tau, digit by digit from the top: every rank counts its entries that reach each value of the next 11 bits, and the
   counts are added up.
2. Of the entries that equal tau the first are kept, in the order of tokens and then of features: each token's number of
   them is gathered from all ranks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.ranks import Ranks

DIGIT = 11
"""Bits that one round of the search for the batch's threshold settles."""


def rank_keys(scores: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Integers that order as |scores| do, NaN above all, 0 for zero; of as many bits as the scores."""
    dtype = torch.int64 if scores.dtype == torch.float64 else torch.int32
    keys = scores.abs().view(dtype)
    return torch.where(scores.isnan(), torch.iinfo(dtype).max, keys)


def kept_of_lists(keys: Int[Tensor, "n m"], k: int, ranks: Ranks) -> Int[Tensor, "n"]:
    """How many of each row of this rank's keys, which fall, are among the k largest of all ranks' that are not 0."""
    gathered = ranks.gather(keys)
    together = gathered.transpose(0, 1).flatten(1)
    tau = together.topk(min(k, together.shape[1]), dim=1).values[:, -1:].clamp_min(1)
    above = (gathered > tau).sum(2)
    equal = (gathered == tau).sum(2)
    missing = k - above.sum(0) - equal[: ranks.rank].sum(0)
    return above[ranks.rank] + equal[ranks.rank].minimum(missing.clamp_min(0))


def best_of_shards(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], ranks: Ranks
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """This rank's entries among the k of each token that are the best of all ranks'; other slots hold 0 and 0.

    Args:
        values: each token's best of this rank's features in the canonical order, that of their magnitudes.
    """
    kept = kept_of_lists(rank_keys(values), values.shape[1], ranks)
    inside = torch.arange(values.shape[1], device=values.device) < kept[:, None]
    return torch.where(inside, values, 0), torch.where(inside, indices, 0)


def best_of_columns(a: Float[Tensor, "n m"], k: int, listed: int, ranks: Ranks) -> Float[Tensor, "n m"]:
    """The k entries of largest magnitude of each row over all ranks' columns, the others 0.

    Args:
        listed: how many every rank names; at least as many as it has of the best.
    """
    if ranks.size == 1:
        kept = a.abs().topk(k, dim=1, sorted=False).indices
        return torch.zeros_like(a).scatter_(1, kept, a.gather(1, kept))
    magnitudes, places = a.abs().topk(min(listed, a.shape[1]), dim=1)
    keys = rank_keys(torch.nn.functional.pad(magnitudes, (0, listed - magnitudes.shape[1])))
    n_kept = kept_of_lists(keys, k, ranks)
    inside = torch.arange(places.shape[1], device=a.device) < n_kept[:, None]
    return torch.zeros_like(a).scatter_(1, places, torch.where(inside, a.gather(1, places), 0))


def largest_of_shards(code: SparseCode, n_entries: int, ranks: Ranks) -> SparseCode:
    """This rank's entries among the `n_entries` of largest magnitude of all ranks' codes; other values are 0.

    Args:
        code: ragged, a token's entries by feature ascending; the `n_entries` largest of this rank's features.
    """
    keys = rank_keys(code.values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))
    tau, missing = _threshold(keys, n_entries, ranks)
    # Slots behind the last token's entries hold 0, which no threshold is.
    equal = keys == tau
    assert code.offsets is not None
    token = torch.searchsorted(code.offsets, torch.arange(len(keys), device=keys.device), right=True) - 1
    token = token.clamp_max(code.n_tokens - 1)
    counts = torch.zeros(code.n_tokens, dtype=torch.int64, device=keys.device).index_add_(0, token, equal.long())
    by_token = ranks.gather(counts).T.reshape(-1)
    before = (by_token.cumsum(0) - by_token).view(-1, ranks.size)[:, ranks.rank]
    within = equal.cumsum(0) - (counts.cumsum(0) - counts)[token]
    kept = (keys > tau) | (equal & (before[token] + within <= missing))
    return SparseCode(torch.where(kept, code.values, 0), code.indices, code.d_sae, code.offsets)


def _threshold(keys: Int[Tensor, "entries"], wanted: int, ranks: Ranks) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """The `wanted`-th largest of all ranks' keys, at least 1, and how many that equal it are among the largest."""
    bits = torch.iinfo(keys.dtype).bits - 1
    ordered = torch.sort(keys).values
    found = torch.zeros((), dtype=keys.dtype, device=keys.device)
    for shift in reversed(range(0, bits, DIGIT)):
        digits = torch.arange(1 << min(DIGIT, bits - shift), dtype=keys.dtype, device=keys.device)
        reached = ranks.sum_(len(keys) - torch.searchsorted(ordered, found + (digits << shift)))
        # The largest digit that enough keys reach; 0 where there are fewer than wanted.
        found = found + ((reached >= wanted).sum().sub(1).clamp_min(0).to(keys.dtype) << shift)
    found = found.clamp_min(1)
    return found, wanted - ranks.sum_((keys > found).sum())
