"""TopK: every token keeps the k largest of relu(z) (Gao et al. 2024, arXiv 2406.04093, eq. 3)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.kernels import topk_encode


@dataclass(frozen=True)
class TopK:
    """Keeps the `k` largest positive pre-activations of each token; fewer when fewer are positive."""

    k: int
    name: ClassVar[str] = "topk"

    def check(self, d_sae: int) -> None:
        """Raises InputError unless 1 <= k <= d_sae."""
        if not 1 <= self.k <= d_sae:
            raise InputError(f"k = {self.k} must lie between 1 and the number of features, {d_sae}")

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
    ) -> SparseCode:
        """Codes of inputs from which b_dec has been subtracted; no gradients."""
        values, indices = topk_encode(x, W_enc, b_enc, self.k)
        return SparseCode(values, indices, W_enc.shape[1])
