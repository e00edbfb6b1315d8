"""Pre-activations z = x W_enc + b_enc in one reused buffer of bounded size, a chunk of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import products
from sae.shown import Shown

# Entries of the buffer: enough rows to keep the matrix product efficient, few enough for a CPU's caches.
CPU_BUFFER_ENTRIES = 3 * 2**20
CPU_MIN_ROWS = 128
CUDA_BUFFER_ENTRIES = 2**26


@dataclass(frozen=True, repr=False)
class Encoder(Shown):
    """Factors of the product in the precision it is computed in, and the precision of the scores.

    Only CUDA multiplies in low precision with sums in fp32; on a CPU low-precision inputs are converted first.
    Weights are converted once, not for every chunk.
    """

    x: Float[Tensor, "n d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]

    @classmethod
    def of(
        cls, x: Float[Tensor, "n d_in"], W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, "d_sae"]
    ) -> "Encoder":
        """Scores are fp64 for fp64 inputs and fp32 for all others."""
        score_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        factor_dtype = x.dtype if x.is_cuda else score_dtype
        return cls(x.to(factor_dtype), W_enc.to(factor_dtype), b_enc.to(score_dtype))

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.x.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor [*shape] on the scores' device, in their precision unless told."""
        return torch.empty(shape, dtype=dtype or self.b_enc.dtype, device=self.x.device)

    def rows_at_once(self) -> int:
        """Rows of a chunk."""
        return _at_once(self.d_sae, self.x.is_cuda)

    def rows(self, first: int, out: Float[Tensor, "rows d_sae"]) -> None:
        """Writes the scores of the rows from `first` on, as many as `out` has."""
        multiply_add(self.x[first : first + out.shape[0]], self.W_enc, self.b_enc, out)

    def chunks(self, width: int | None = None) -> Iterator[tuple[int, Float[Tensor, "rows d_sae"]]]:
        """(first row, scores) of all rows in turn; each chunk's scores lie in the same memory.

        Args:
            width: features by which a chunk's rows are chosen, where others must cut theirs alike.
        """
        step = _at_once(width or self.d_sae, self.x.is_cuda)
        buffer = self.empty(min(step, self.n), self.d_sae)
        for first in range(0, self.n, step):
            scores = buffer[: min(step, self.n - first)]
            self.rows(first, scores)
            yield first, scores

    def feature_chunks(
        self, features: Int[Tensor, "features"] | None = None
    ) -> Iterator[tuple[int, int, Float[Tensor, "features n"]]]:
        """(first, last, scores of the features first ... last - 1 on all rows), a feature a row.

        Args:
            features: the features in the order to take them; `first` and `last` count in it.
        """
        W, b = self.W_enc.T, self.b_enc
        step = _at_once(max(self.n, 1), self.x.is_cuda)
        for first in range(0, self.d_sae, step):
            last = min(first + step, self.d_sae)
            of = slice(first, last) if features is None else features[first:last]
            scores = self.empty(last - first, self.n)
            multiply_add(W[of], self.x.T, None, scores)
            yield first, last, scores.add_(b[of].unsqueeze(1))


def multiply_add(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "d m"],
    bias: Float[Tensor, "m"] | None,
    out: Float[Tensor, "n m"],
) -> None:
    """Writes left @ right + bias to `out`, accumulated in out's precision."""
    if products.served(left, right.T, bias):
        out.copy_(products.linear(left, right.T, bias))
    elif left.dtype == out.dtype:
        if bias is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(bias, left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias


def _at_once(width: int, on_cuda: bool) -> int:
    return max(1, CUDA_BUFFER_ENTRIES // width) if on_cuda else max(CPU_MIN_ROWS, CPU_BUFFER_ENTRIES // width)
