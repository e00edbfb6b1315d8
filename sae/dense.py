"""An SAE as SAEBench and other evaluations of custom SAEs take one: dense codes, and a description as a dataclass.

encode(x)    the code as a full tensor [..., d_sae], in x's precision
decode(a)    reconstructions of such a tensor, likewise
cfg          model, hook point and widths under the names that SAEBench reads
"""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.errors import InputError
from sae.model import SAE


@dataclass
class DenseConfig:
    """What a custom SAE says of itself; the names are SAEBench's."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    dtype: str
    device: str
    context_size: int | None = None
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    """Not known to the SAE itself."""
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None


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
        parts = sae.hook_name.split(".")
        if len(parts) < 3 or not parts[1].isdecimal():
            raise InputError(f"the hook point {sae.hook_name!r} has no layer in its name: expected blocks.LAYER....")
        self.sae = sae
        self.hook_layer = int(parts[1])

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
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.sae.W_dec.dtype

    @property
    def cfg(self) -> DenseConfig:
        """What it says of itself."""
        return DenseConfig(
            model_name=self.sae.model_name, d_in=self.sae.d_in, d_sae=self.sae.d_sae, hook_layer=self.hook_layer,
            hook_name=self.sae.hook_name, architecture=self.sae.rule.name,
            dtype=str(self.dtype).removeprefix("torch."), device=str(self.device),
        )  # fmt: skip

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
