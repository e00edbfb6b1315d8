"""How many directions a head looks with: the least rank of its query-key form that finds the keys it looks at.

Over the queries q and keys k (after rotation) of a sample of text, per head:

1. Keys are centred: a constant in all keys adds the same to a query's scores and moves no attention.
2. C_q = sum q q^T, C_k = sum k k^T, and C_q^1/2 C_k^1/2 = U S V^T: S are the singular values of the matrix of all
   products q . k, so that cutting it off at r is the best approximation of rank r to the scores on this text.
3. Rank r: every query is replaced by q C_q^-1/2 U_r U_r^T C_q^1/2.
4. recall at r: the attention on the 16 keys of largest score at rank r over that on the query's 16 largest, mean over
   ordinary queries with more than 16 keys. dims_95 is the least r with a recall of HELD; at r = d_head it is 1.

Heads whose attention does not follow q . k alone (distances added to the scores, as ALiBi does) get no number.
(Attention found again in few dimensions of the query-key form: RTPurbo.)
"""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.passes import activations
from sae.errors import InputError
from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel

KEYS = 16
HELD = 0.95
SAME = 0.999
"""Recall at full rank below which attention does not follow q . k."""


@torch.no_grad()
def looking_ranks(model: LoadedModel, batches: Sequence[ContextBatch]) -> pd.DataFrame:
    """One row a head: layer, head, d_head and dims_95, missing where attention does not follow q . k.

    Raises:
        InputError: contexts of no more than KEYS tokens.
    """
    if batches[0].tokens.shape[1] <= KEYS:
        raise InputError(f"ranks are told from queries with more than {KEYS} keys: give longer contexts")
    parts = _passed(model, batches[0])
    rows = []
    for layer in range(model.info.n_layers):
        seen = [_looked(model, layer, batch, parts) for batch in batches]
        q, k, attention = (torch.cat(parts) for parts in zip(*seen, strict=True))
        ordinary = torch.cat([batch.ordinary for batch in batches])
        for head in range(model.info.n_heads):
            shared = head * k.shape[2] // q.shape[2]
            found = least_rank(q[:, :, head], k[:, :, shared], attention[:, head], ordinary)
            rows.append({"layer": layer, "head": head, "d_head": q.shape[-1], "dims_95": found})
    return pd.DataFrame(rows).astype({"dims_95": "Int64"})


def _passed(model: LoadedModel, batch: ContextBatch) -> tuple[str, ...]:
    """The hook points that hold a layer's rotated queries and keys, or what makes them; told once, on one context.

    Not every architecture has hook points behind its rotation, and one that is listed may not be passed.
    """
    for parts in (("rot_q", "rot_k"), ("q", "k", "cos", "sin")):
        names = [f"blocks.0.attn.hook_{part}" for part in parts]
        if all(name in model.bridge.hook_dict for name in names):
            try:
                activations(model.bridge, batch.tokens[:1], names)
            except InputError:
                continue
            return parts
    return "q", "k"


def _looked(
    model: LoadedModel, layer: int, batch: ContextBatch, parts: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [batch, pos, heads, d_head] after rotation, and the attention of one layer."""
    names = [f"blocks.{layer}.attn.hook_{part}" for part in (*parts, "pattern")]
    taken = activations(model.bridge, batch.tokens, names)
    q, k, *rotation, pattern = (taken[name] for name in names)
    if rotation:
        q, k = (_rotated(value, *rotation) for value in (q, k))
    return q, k, pattern


def _rotated(
    vectors: Float[Tensor, "batch pos heads d_head"],
    cos: Float[Tensor, "1 pos rotary"],
    sin: Float[Tensor, "1 pos rotary"],
) -> Float[Tensor, "batch pos heads d_head"]:
    """The first dimensions, as many as `cos` has, turned in pairs that stand half of them apart."""
    n = cos.shape[-1]
    turned, rest = vectors[..., :n], vectors[..., n:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
    return torch.cat([turned, rest], dim=-1)


def least_rank(
    q: Float[Tensor, "batch pos d_head"],
    k: Float[Tensor, "batch pos d_head"],
    attention: Float[Tensor, "batch query key"],
    ordinary: Bool[Tensor, "batch pos"],
) -> int | None:
    """The least rank with a recall of HELD; None where full rank does not find the keys.

    Args:
        ordinary: the positions whose vectors and queries count.
    """
    recall = RankRecall(q, k, attention, ordinary)
    if recall.whole() < SAME:
        return None
    return next(rank for rank, value in enumerate(recall.by_rank(), start=1) if value >= HELD)


class RankRecall:
    """The recall of one head on a sample; see the module's description and `least_rank`."""

    def __init__(
        self,
        q: Float[Tensor, "batch pos d_head"],
        k: Float[Tensor, "batch pos d_head"],
        attention: Float[Tensor, "batch query key"],
        ordinary: Bool[Tensor, "batch pos"],
    ) -> None:
        q, k = q.double(), k.double()
        self._q, self._k = q, k - k[ordinary].mean(dim=0)
        forward, backward = _root(q[ordinary]), _root(self._k[ordinary])
        directions = torch.linalg.svd(forward @ backward).U
        self._turned = q @ torch.linalg.pinv(forward, hermitian=True, rtol=1e-10) @ directions
        self._back = self._k @ (directions.T @ forward).T
        position = torch.arange(attention.shape[-1], device=q.device)
        self._counted = ordinary & (position >= KEYS)
        self._rows = attention[self._counted]
        self._ahead = (position[None, :] > position[:, None]).expand(len(attention), -1, -1)[self._counted]
        self._best = self._rows.topk(KEYS, dim=-1).values.sum(dim=-1)

    def by_rank(self) -> Iterator[float]:
        """Recall at rank 1, 2, ... up to d_head."""
        scores = torch.zeros_like(self._rows, dtype=torch.float64)
        for rank in range(self._q.shape[-1]):
            # The scores are a sum over directions: one more is added.
            scores += (self._turned[:, :, rank, None] * self._back[:, None, :, rank])[self._counted]
            yield self._recall(scores)

    def whole(self) -> float:
        """Recall with the queries as they are."""
        return self._recall((self._q @ self._k.transpose(1, 2))[self._counted])

    def _recall(self, scores: Float[Tensor, "rows key"]) -> float:
        chosen = scores.masked_fill(self._ahead, -torch.inf).topk(KEYS, dim=-1).indices
        return (self._rows.gather(1, chosen).sum(dim=-1) / self._best).double().mean().item()


def _root(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """The symmetric root of the sum of outer products."""
    values, directions = torch.linalg.eigh(vectors.T @ vectors)
    return (directions * values.clamp(min=0).sqrt()) @ directions.T
