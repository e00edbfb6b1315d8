"""AbsTopK: every token keeps its k pre-activations of largest magnitude, with their signs (arXiv 2510.00404).

The proximal step of the l0 ball: argmin ||a - z||^2 over all a with at most k entries. A feature may fire in both
directions, so one direction serves a concept and its opposite.
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
class AbsTopK(CodeRule):
    """Keeps the `k` entries of each token with the largest |z|; activations are signed."""

    name: ClassVar[str] = "abstopk"
    signed: ClassVar[bool] = True
    saelens: ClassVar[str | None] = "abstopk"

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
        values, indices = topk_encode(x, W_enc, b_enc, self.k, absolute=True)
        return SparseCode(values, indices, W_enc.shape[1])

    def among(self, code: SparseCode, n_tokens: int, ranks: Ranks) -> SparseCode:
        """Every token's k best of all ranks' lists."""
        return SparseCode(*best_of_shards(code.values, code.indices, ranks), code.d_sae)

    def fused_encoder(self, inputs: FusedInputs) -> FusedEncoder:
        """The kernel that selects row by row, by magnitude."""
        from sae.kernels.triton import topk_rule

        return FusedEncoder(topk_rule(self.k, absolute=True, sizes=inputs.sizes), by_rows=True)
