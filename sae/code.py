"""SparseCode: the active features of a batch of tokens, the one data type between encoder and everything else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index as index_of
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, repr=False)
class SparseCode:
    """Active features of `n_tokens` tokens, which `batch` may arrange in more dimensions than one.

    It is indexed as a tensor [*batch, d_sae] is: `code[3]`, `code[2:5]`, `code[:, -1]` and `code[mask]` are codes of
    some of the tokens, `code[..., 123]` a tensor [*batch] of one feature's activations.

    Two layouts share the fields:

    - fixed k: `values` and `indices` are [n_tokens, k] and `offsets` is None. A token with fewer than k active
      features fills the rest with value 0 and index 0.
    - ragged: `values` and `indices` are [nnz]; token t owns the entries `offsets[t]:offsets[t + 1]`.
    """

    values: Tensor
    """Activations, [n_tokens, k] or [nnz]; signed rules give signed values."""
    indices: Tensor
    """Feature of each value, of the same shape; int64."""
    d_sae: int
    """Number of features."""
    offsets: Int[Tensor, "n_tokens+1"] | None = None
    batch: tuple[int, ...] | None = None
    """Leading dimensions of what was encoded; None for (n_tokens,). Tokens lie in their order, the last fastest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the full matrix: [*batch, d_sae]."""
        return (*((self.n_tokens,) if self.batch is None else self.batch), self.d_sae)

    def arranged(self, batch: tuple[int, ...]) -> "SparseCode":
        """The same tokens in leading dimensions `batch`."""
        return replace(self, batch=None if len(batch) == 1 else tuple(batch))

    def __len__(self) -> int:
        if len(self.shape) == 1:
            raise TypeError("the code of a single token has no length: it has .values and .indices")
        return self.shape[0]

    @overload
    def __getitem__(self, at: int | slice | Tensor | Sequence[int]) -> "SparseCode": ...
    @overload
    def __getitem__(self, at: tuple[Any, ...]) -> Any: ...
    def __getitem__(self, at: Any) -> Any:
        batch = self.shape[:-1]
        index = list(at) if isinstance(at, tuple) else [at]
        taken = sum(_dims(one) for one in index)
        for place, one in enumerate(index):
            if one is Ellipsis:
                index[place : place + 1] = [slice(None)] * (len(self.shape) - taken)
                taken = len(self.shape)
                break
        if taken > len(self.shape):
            raise IndexError(f"{taken} indices for a code of shape {list(self.shape)}")
        feature = index.pop() if taken == len(self.shape) else slice(None)
        if len(index) == 1 and isinstance(index[0], slice) and index[0].indices(batch[0])[2] == 1:
            start, stop, _ = index[0].indices(batch[0])
            each = math.prod(batch[1:])
            chosen = self.tokens(start * each, max(start, stop) * each).arranged((max(stop - start, 0), *batch[1:]))
        else:
            numbers = torch.arange(self.n_tokens, device=self.values.device).view(batch)[tuple(index)]
            chosen = self._gathered(numbers.flatten()).arranged(tuple(numbers.shape))
        if isinstance(feature, slice) and feature == slice(None):
            return chosen
        try:
            number = index_of(feature)  # type: ignore[arg-type]
        except TypeError:
            message = f"features are indexed by one number, got {feature!r}: code.to_dense() takes any index"
            raise IndexError(message) from None
        return chosen.feature(number)

    def feature(self, number: int) -> Float[Tensor, "*batch"]:
        """Activations of one feature, 0 where it is not active. Raises IndexError for one that there is not."""
        if not -self.d_sae <= number < self.d_sae:
            raise IndexError(f"there is no feature {number} among {self.d_sae}")
        column = self.values.new_zeros(self.n_tokens)
        here = ((self.indices == number % self.d_sae) & (self.values != 0)).flatten()
        column[self.token_ids()[here]] = self.values.flatten()[here]
        return column.view(self.shape[:-1])

    def _gathered(self, tokens: Int[Tensor, "n"]) -> "SparseCode":
        """The codes of some tokens, in one row."""
        if self.offsets is None:
            return SparseCode(self.values[tokens], self.indices[tokens], self.d_sae)
        counts = self.offsets.diff()[tokens]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        # Where each kept entry lies: the start of its token, and its place among that token's.
        place = torch.arange(int(offsets[-1]), device=tokens.device) - offsets[:-1].repeat_interleave(counts)
        entries = self.offsets[tokens].repeat_interleave(counts) + place
        return SparseCode(self.values[entries], self.indices[entries], self.d_sae, offsets)

    def __repr__(self) -> str:
        mean = f", L0 {self.l0().double().mean():.1f}" if self.n_tokens else ""
        where = "" if self.values.device.type == "cpu" else f", {self.values.device}"
        return f"SparseCode({list(self.shape)}{mean}{where})"

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return self.values.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    def token_ids(self) -> Int[Tensor, "entries"]:
        """Token of every entry, in storage order."""
        device = self.values.device
        if self.offsets is None:
            n, k = self.values.shape
            return torch.arange(n, device=device).repeat_interleave(k, output_size=n * k)
        counts = self.offsets.diff()
        return torch.repeat_interleave(
            torch.arange(self.n_tokens, device=device), counts, output_size=self.values.shape[0]
        )

    def entries(self) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Float[Tensor, "nnz"]]:
        """(token, feature, value) of the entries that are not zero, token by token."""
        values = self.values.reshape(-1)
        active = torch.nonzero(values).squeeze(1)
        return self.token_ids()[active], self.indices.reshape(-1)[active], values[active]

    def l0(self) -> Int[Tensor, "n_tokens"]:
        """Number of active features of each token."""
        if self.offsets is None:
            return (self.values != 0).sum(dim=1)
        counted = torch.cat([self.offsets.new_zeros(1), (self.values != 0).cumsum(0)])
        return counted[self.offsets[1:]] - counted[self.offsets[:-1]]

    def largest(self, k: int) -> "SparseCode":
        """The `k` entries of each token that are largest in size, in the layout of fixed k, the largest first; all of
        them where a token has no more."""
        values, indices = self.values, self.indices
        if self.offsets is not None:
            counts = self.offsets.diff()
            shape = self.n_tokens, int(counts.max()) if len(counts) else 0
            token = self.token_ids()
            place = torch.arange(len(token), device=token.device) - self.offsets[token]
            values, indices = values.new_zeros(shape), indices.new_zeros(shape)
            values[token, place], indices[token, place] = self.values, self.indices
        order = values.abs().topk(min(k, values.shape[1]), dim=1).indices
        values = values.gather(1, order)
        return replace(self, values=values, indices=indices.gather(1, order) * (values != 0), offsets=None)

    def to_dense(self) -> Float[Tensor, "*batch d_sae"]:
        """The full matrix; for small batches and tests."""
        dense = self.values.new_zeros(self.n_tokens, self.d_sae)
        token, feature, value = self.entries()
        dense[token, feature] = value
        return dense.view(self.shape)

    def tokens(self, first: int, last: int) -> "SparseCode":
        """The codes of tokens first ... last - 1, counted in one row."""
        if self.offsets is None:
            return SparseCode(self.values[first:last], self.indices[first:last], self.d_sae)
        offsets = self.offsets[first : last + 1]
        start, stop = int(offsets[0]), int(offsets[-1])
        return SparseCode(self.values[start:stop], self.indices[start:stop], self.d_sae, offsets - start)

    def to(self, device: torch.device | str) -> "SparseCode":
        """The same code on another device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return replace(self, values=self.values.to(device), indices=self.indices.to(device), offsets=offsets)


def _dims(index: Any) -> int:
    """Dimensions that one part of an index takes."""
    if index is None or index is Ellipsis:
        return 0
    is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index.ndim if is_mask else 1
