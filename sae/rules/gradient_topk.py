"""Gradient TopK, the gradient SAE (arXiv 2411.10397): what matters to the model's loss is kept first.

With g the gradient of the unmodified model's loss at x, every token keeps z at the k largest of

    s = z + beta z |W_dec g|,    g scaled so that |W_dec g| has mean 1 over tokens and features

The paper gives the term; the exact sum and its scaling are "reconstructed". beta = 0 is TopK. In training the scale
is taken from the first tokens of each batch, which is shuffled.

A finished SAE encodes in two ways: as TopK where there are no gradients, and with gradients by the formula above with
the scale stored when training finished, so that a code does not depend on its batch.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.kernels import gradient_topk_encode, mean_influence, topk_encode
from sae.rules.base import NO_TENSORS, Batch, CodeRule, FusedEncoder, FusedInputs, Tensors

SCALE_ROWS = 512
"""Tokens of a training batch by which its gradients are scaled: the product with all of them is as dear as encoding."""

NO_GRADIENTS = "the rule gradient_topk needs gradients: harvest with --gradients and train on that harvest"


@dataclass(frozen=True)
class GradientTopK(CodeRule):
    """Keeps `k` positive entries of each token, weighing pre-activations with the gradient."""

    beta: float = 1.0
    """Weight of the gradient."""
    name: ClassVar[str] = "gradient_topk"
    needs_gradients: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    saelens: ClassVar[str | None] = "topk"

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Raises InputError for an impossible k or beta."""
        super().check(d_sae, batch_size)
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta = {self.beta} must be 0 (plain TopK) or larger")

    def select(self, batch: Batch) -> SparseCode:
        """The k best by the batch's own scale of gradients."""
        gradients = _given(batch)
        scale = self.scale(batch.W_dec, gradients[:SCALE_ROWS])
        return self.encode_with_gradients(
            batch.x, batch.W_enc, batch.b_enc, batch.W_dec, gradients, {"gradient_scale": scale}
        )

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """Plain TopK."""
        values, indices = topk_encode(x, W_enc, b_enc, self.k)
        return SparseCode(values, indices, W_enc.shape[1])

    def encode_with_gradients(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        W_dec: Float[Tensor, "d_sae d_in"],
        gradients: Float[Tensor, "n d_in"],
        state: Tensors,
    ) -> SparseCode:
        """The k best by the formula above, with the stored scale of gradients."""
        g = gradients.to(W_enc.dtype) * state["gradient_scale"]
        values, indices = gradient_topk_encode(x, W_enc, b_enc, W_dec, g, self.k, self.beta)
        return SparseCode(values, indices, W_enc.shape[1])

    def fused_encoder(self, inputs: FusedInputs) -> FusedEncoder:
        """The kernel that selects row by row from two products, scaled by the batch's own gradients.

        Raises:
            InputError: batches without gradients.
        """
        from sae.kernels.triton import paired_topk_encode

        gradients, shadows = inputs.gradients, inputs.shadows
        if gradients is None:
            raise InputError(NO_GRADIENTS)

        def encode(
            x: Float[Tensor, "n d_in"], W_enc: Float[Tensor, "d_in padded"], b_enc: Float[Tensor, "d_sae"]
        ) -> SparseCode:
            scale = self.scale(shadows[1, : inputs.d_sae], gradients[:SCALE_ROWS])
            pair = torch.stack((x, (gradients * scale).to(x.dtype)))
            values, indices = paired_topk_encode(pair, shadows, b_enc, self.k, self.beta, sizes=inputs.sizes)
            return SparseCode(values, indices, inputs.d_sae)

        return FusedEncoder(encode)

    def new_state(self, d_sae: int) -> dict[str, Tensor]:
        """What gradients are multiplied with."""
        return {"gradient_scale": torch.ones(())}

    def calibrate(self, sample: Batch) -> dict[str, Tensor]:
        """The scale of the sample's gradients."""
        return {"gradient_scale": self.scale(sample.W_dec, _given(sample))}

    def scale(self, W_dec: Float[Tensor, "d_sae d_in"], gradients: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
        """1 / mean |W_dec g|, in W_dec's precision; 0 without any gradient: then the rule is TopK."""
        mean = mean_influence(W_dec, gradients.to(W_dec.dtype))
        return torch.where(mean == 0, 0, 1 / mean)


def _given(batch: Batch) -> Float[Tensor, "n d_in"]:
    if batch.gradients is None:
        raise InputError(NO_GRADIENTS)
    return batch.gradients
