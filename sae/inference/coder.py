"""An SAE that encodes by searching under its decoder: whatever measures or splices an SAE takes it as one."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.model import SAE, check_tensor

Infer: TypeAlias = "Callable[[Float[Tensor, 'n d_in'], Float[Tensor, 'd_sae d_in']], SparseCode]"
"""(rows less b_dec, W_dec) -> their codes."""


def check_searched(sae: SAE) -> None:
    """Raises InputError for a transcoder or a crosscoder."""
    if sae.parts or not sae.subtracts_b_dec:
        raise InputError("its decoder writes something else than it reads: sparse inference is of SAEs alone")


class InferredSAE(SAE):
    """The SAE with another way to its codes; the weights are the same tensors, not copies.

    Args:
        sae: one that writes what it reads.
        infer: finds the codes, such as `lambda x, W_dec: matching_pursuit(x, W_dec, [k])[0]`.

    Raises:
        InputError: a transcoder or a crosscoder: their codes are of another activation than their decoder writes.
    """

    def __init__(self, sae: SAE, infer: Infer) -> None:
        check_searched(sae)
        super().__init__(
            sae.d_in, sae.d_sae, sae.rule, hook_name=sae.hook_name, model_name=sae.model_name, device="meta"
        )
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
        for name, tensor in sae.state.items():
            self.register_buffer(name, tensor)
        self.infer = infer

    @torch.no_grad()
    def encode(
        self, x: Float[Tensor, "*batch d_in"], gradients: Float[Tensor, "*batch d_out"] | None = None
    ) -> SparseCode:
        """Codes of every token, in float32 or wider.

        Raises:
            InputError: no tensor, the last dimension is not d_in, or gradients, of which no search makes use.
        """
        check_tensor(x, f"activations, a tensor of shape [..., {self.d_in}]")
        if x.shape[-1] != self.d_in or gradients is not None:
            raise InputError(f"this reads activations of width {self.d_in} without gradients, got {list(x.shape)}")
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        rows = self.centred(x.reshape(-1, self.d_in).to(wide))
        return self.infer(rows, self.W_dec.to(wide)).arranged(x.shape[:-1])
