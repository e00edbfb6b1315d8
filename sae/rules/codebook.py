"""Codebook: the k codes nearest to a row by cosine, each with the same weight (Tamkin et al. 2023, arXiv 2310.17230).

    S = the k codes of the largest cosine with x         (those of one length: W_enc has the codes' directions)
    x_hat = 1/k sum of c_i over S                        the mean of the raw codes

A code is there or not, and how strongly it is there the row does not say: a feature's activation is always its code's
length / k. `lengths` is the state, W_dec has the directions. Cosines are of the row less the decoder's bias.

With `heads`, the paper's form for attention: x has the heads' outputs side by side and every head codes of its own, an
equal share, the first head's first; a code is zero outside its head's coordinates, and each head chooses k.

The paper puts a LayerNorm before the choice, which but for the mean over dimensions changes no cosine, and has no bias.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.kernels.scores import Encoder
from sae.rules.base import NO_TENSORS, AuxKind, Batch, CodeRule, Tensors

NOT_TRAINED = "a codebook is fitted, not trained by gradients through its choice: use `workbench codebook`"


@dataclass(frozen=True)
class Codebook(CodeRule):
    """Keeps the `k` codes of largest cosine, of each of `heads`, each at its own fixed activation."""

    heads: int = 1
    name: ClassVar[str] = "codebook"
    default_aux: ClassVar[AuxKind] = "none"

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Raises InputError unless every head has as many codes, k or more, and where it is to be trained: see
        `sae.codebook`."""
        if batch_size is not None:
            raise InputError(NOT_TRAINED)
        if self.heads < 1 or d_sae % self.heads:
            raise InputError(
                f"{d_sae:,} codes cannot be shared equally by {self.heads:,} heads: use a multiple of them"
            )
        super().check(d_sae // self.heads)

    def select(self, batch: Batch) -> SparseCode:
        """Raises InputError: see `sae.codebook`."""
        raise InputError(NOT_TRAINED)

    def new_state(self, d_sae: int) -> dict[str, Tensor]:
        """Lengths of the codes, [d_sae]."""
        return {"lengths": torch.zeros(d_sae)}

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """Codes of inputs from which b_dec has been subtracted; no gradients."""
        d_sae = W_enc.shape[1]
        chosen = [
            best_of_heads(scores.unflatten(1, (self.heads, -1)), self.k)
            for _, scores in Encoder.of(x, W_enc, torch.zeros_like(b_enc)).chunks()
        ]
        indices = (
            torch.cat(chosen) if chosen else torch.zeros(0, self.heads * self.k, dtype=torch.int64, device=x.device)
        )
        return SparseCode(state["lengths"][indices] / self.k, indices, d_sae)


def best_of_heads(scores: Float[Tensor, "n heads codes"], k: int) -> Int[Tensor, "n chosen"]:
    """The k codes of largest score of every head, numbered through all heads, head by head."""
    heads, codes = scores.shape[1:]
    first = codes * torch.arange(heads, device=scores.device)[:, None]
    return (scores.topk(k, dim=2).indices + first).flatten(1)
