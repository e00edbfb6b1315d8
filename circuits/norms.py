"""What a norm does to the residual stream, measured on the module itself.

Both kinds are

    N(x) = (x - c mean(x)) / scale(x) * gain + shift        scale(x) = sqrt(mean((x - c mean(x))^2) + eps)

with c = 1 for LayerNorm and 0 for RMSNorm; a model without norms has N(x) = x, with scale 1. Families store the gain as
it is, less one, or not at all; so nothing is read from weights or configurations, it is measured (reconstructed):

1. shift = N(0);
2. gain from x = 32 (+1, -1, +1, ...), whose mean is 0 and whose scale is 32, eps apart;
3. c from adding a constant to that x, eps from a thousandth of it, then the gain again with that eps;
4. N(x) of random x must come out, or the module is no such norm.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError

LARGE, SMALL = 32.0, 1e-3
"""Of the probes: eps does not count beside the one's square and does beside the other's."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm, an RMSNorm, or none; see the module's description."""

    gain: Float[Tensor, "d_model"]
    shift: Float[Tensor, "d_model"]
    centred: bool
    eps: float
    divides: bool = True
    """False where there is no norm: the scale is 1."""

    def scale(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n"]:
        """What it divides by."""
        if not self.divides:
            return x.new_ones(x.shape[:-1])
        return (self._centred(x).square().mean(dim=-1) + self.eps).sqrt()

    def through(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """N(x)."""
        return self.unscaled(x) / self.scale(x)[..., None] + self.shift

    def unscaled(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """(N(x) - shift) scale(x), which is linear in x."""
        return self._centred(x) * self.gain

    def into(self, W: Float[Tensor, "d_model d_out"]) -> Float[Tensor, "d_model d_out"]:
        """C diag(gain) W: what reads (x / scale(x)) as W reads N(x), the shift apart."""
        scaled = self.gain.to(W.dtype)[:, None] * W
        return scaled - scaled.mean(dim=0) if self.centred else scaled

    def _centred(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x


@torch.no_grad()
def measured_norm(component: Any, like: Float[Tensor, "d_model"]) -> Norm:
    """The norm of a TransformerBridge's component.

    Args:
        component: such as `bridge.ln_final`.
        like: any vector of the residual stream's width, in the precision and on the device of the model.

    Raises:
        InputError: there is no module, or it is neither LayerNorm nor RMSNorm.
    """
    module = getattr(component, "original_component", None)
    if module is None:
        raise InputError("this model has no norm there, so no weights can be read through it")

    def normed(x: Tensor) -> Tensor:
        value: Tensor = module(x.to(like)[None])[0]
        return value.to(torch.promote_types(value.dtype, torch.float32))

    width, precision = like.shape[0], torch.promote_types(like.dtype, torch.float32)
    x = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(like.device, precision) + 0.5
    if torch.equal(normed(x), x.to(like).to(normed(x).dtype)):
        return Norm(torch.ones_like(x), torch.zeros_like(x), centred=False, eps=0.0, divides=False)
    signs = torch.ones(width, device=like.device, dtype=precision)
    signs[1::2] = -1.0
    if width % 2:
        # Mean 0 all the same: three entries 1, 1, -2 in place of the last three.
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0], device=like.device, dtype=precision)
    unit = signs / signs.square().mean().sqrt()
    shift = normed(torch.zeros_like(signs))
    large = normed(LARGE * signs) - shift
    gain = large / unit
    centred = bool((normed(LARGE * (signs + 1)) - shift - large).abs().max() <= 0.05 * large.abs().max())
    used = gain.abs() > gain.abs().mean() * 1e-2
    shrunk = ((normed(SMALL * signs) - shift) / (gain * unit))[used].median().item()
    small = SMALL**2 * signs.square().mean().item()
    eps = max(0.0, small * (1 / shrunk**2 - 1)) if shrunk > 0 else 0.0
    gain = gain * (1 + eps / (LARGE**2 * signs.square().mean().item())) ** 0.5
    found = Norm(gain, shift, centred, eps)
    error = (normed(x) - found.through(x.to(gain))).norm() / normed(x).norm()
    if not error <= max(1e-3, 16 * torch.finfo(like.dtype).eps):
        raise InputError(f"{type(module).__name__} is neither LayerNorm nor RMSNorm: weights are not read through it")
    return found
