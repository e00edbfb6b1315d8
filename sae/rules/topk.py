"""TopK: every token keeps the k largest of relu(z) (Gao et al. 2024, arXiv 2406.04093, eq. 3).

The proximal step of the non-negative l0 ball: argmin ||a - z||^2 over a >= 0 with at most k entries.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.kernels import best_of_shards, topk_encode
from sae.ranks import Ranks
from sae.rules.base import NO_TENSORS, Batch, CodeRule, FusedEncoder, FusedInputs, Tensors


@dataclass(frozen=True)
class TopK(CodeRule):
    """Keeps the `k` largest positive pre-activations of each token; fewer when fewer are positive."""

    name: ClassVar[str] = "topk"
    saelens: ClassVar[str | None] = "topk"

    def select(self, batch: Batch) -> SparseCode:
        """The same as `encode`."""
        return self.encode(batch.x, batch.W_enc, batch.b_enc)

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """Codes of inputs from which b_dec has been subtracted; no gradients."""
        values, indices = topk_encode(x, W_enc, b_enc, self.k)
        return SparseCode(values, indices, W_enc.shape[1])

    def among(self, code: SparseCode, n_tokens: int, ranks: Ranks) -> SparseCode:
        """Every token's k best of all ranks' lists."""
        return SparseCode(*best_of_shards(code.values, code.indices, ranks), code.d_sae)

    def fused_encoder(self, inputs: FusedInputs) -> FusedEncoder:
        """The kernel that selects row by row."""
        from sae.kernels.triton import topk_rule

        return FusedEncoder(topk_rule(self.k, sizes=inputs.sizes), by_rows=True)
