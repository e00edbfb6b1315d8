"""SparseCode: the active features of a batch of tokens, the one data type between encoder and everything else."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SparseCode:
    """Active features of `n_tokens` tokens.

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

    def to_dense(self) -> Float[Tensor, "n_tokens d_sae"]:
        """The full matrix; for small batches and tests."""
        dense = self.values.new_zeros(self.n_tokens, self.d_sae)
        token, feature, value = self.entries()
        dense[token, feature] = value
        return dense

    def tokens(self, first: int, last: int) -> "SparseCode":
        """The codes of tokens first ... last - 1."""
        if self.offsets is None:
            return SparseCode(self.values[first:last], self.indices[first:last], self.d_sae)
        offsets = self.offsets[first : last + 1]
        start, stop = int(offsets[0]), int(offsets[-1])
        return SparseCode(self.values[start:stop], self.indices[start:stop], self.d_sae, offsets - start)

    def to(self, device: torch.device | str) -> "SparseCode":
        """The same code on another device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return SparseCode(self.values.to(device), self.indices.to(device), self.d_sae, offsets)
