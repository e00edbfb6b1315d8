"""An SAE as SAEBench and other evaluations of custom SAEs take one: dense codes, and a description as a dataclass.

encode(x)    the code as a full tensor [..., d_sae], in x's precision
decode(a)    reconstructions of such a tensor, likewise
cfg          model, hook point and widths under the names that SAEBench reads
"""

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.description import DenseConfig
from sae.errors import InputError
from sae.model import SAE


class DenseSAE(nn.Module):
    """An SAE whose codes are full tensors; the SAE itself is shared, not copied.

    Args:
        sae: one that writes what it reads.

    Raises:
        InputError: a transcoder, or an SAE whose hook point has no layer in its name.
    """

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        if sae.written_hook != sae.hook_name:
            raise InputError(f"it reads {sae.hook_name} and writes {sae.written_hook}: this is for SAEs alone")
        if sae.cfg.hook_layer is None:
            raise InputError(f"the hook point {sae.hook_name!r} has no layer in its name: expected blocks.LAYER....")
        self.sae = sae

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder."""
        return self.sae.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder; rows of unit norm."""
        return self.sae.W_dec

    @property
    def b_enc(self) -> Float[Tensor, "d_sae"]:
        """The encoder's bias."""
        return self.sae.b_enc

    @property
    def b_dec(self) -> Float[Tensor, "d_in"]:
        """The decoder's bias."""
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.sae.dtype

    @property
    def cfg(self) -> DenseConfig:
        """What it says of itself."""
        return self.sae.cfg

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The code as a full tensor, in x's precision. Raises InputError as `SAE.encode`."""
        return self.sae.encode(x).to_dense().to(x.dtype)

    def decode(self, code: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstructions, in the code's precision. Raises InputError as `SAE.decode`."""
        return self.sae.decode(code).to(code.dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of x, in its precision."""
        return self.sae(x)

    def to(self, *arguments: Any, **named: Any) -> Self:
        """Moves the SAE that it shows, as `torch.nn.Module.to`."""
        self.sae.to(*arguments, **named)
        return self
