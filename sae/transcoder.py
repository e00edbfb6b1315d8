"""Transcoders: SAEs whose decoder writes another activation than their encoder reads (Dunefsky et al. 2024,
arXiv 2406.11944), with a linear skip where wanted (Paulo et al. 2025, arXiv 2501.18823).

    z = x W_enc + b_enc                       pre-activations
    a = rule(z)                               sparse code, by any of the rules
    y_hat = a W_dec + b_dec (+ x W_skip^T)    prediction of y

x is what an MLP reads, say, and y what it adds to the residual stream. b_dec lies in y's space: nothing is subtracted
from x. Decoder rows have unit norm, so an activation is the length of a feature's contribution in the units of y.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.code import SparseCode
from sae.errors import InputError
from sae.model import SAE
from sae.rules import Rule


class Transcoder(SAE):
    """A sparse map from activations of width `d_in` to activations of width `d_out`.

    Args:
        d_in: width of what it reads.
        d_out: width of what it predicts.
        d_sae: number of features.
        rule: which features fire.
        skip: whether it has a linear path beside the features.
        hook_name: TransformerLens name of the hook point it reads.
        target_hook_name: of the one it predicts.
        model_name, metadata, device, dtype: as for an SAE.

    Attributes:
        W_skip: [d_out, d_in], or None.

    Raises:
        InputError: as for an SAE, or no width to predict.
    """

    W_skip: nn.Parameter | None
    subtracts_b_dec = False

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        rule: Rule,
        *,
        skip: bool = False,
        hook_name: str = "",
        target_hook_name: str = "",
        model_name: str = "",
        metadata: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            d_in, d_sae, rule, hook_name=hook_name, model_name=model_name, metadata=metadata, device=device, dtype=dtype
        )
        if d_out < 1:
            raise InputError(f"a transcoder needs at least one output, got d_out {d_out}")
        self.target_hook_name = target_hook_name
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out, **options))
        self.b_dec = nn.Parameter(torch.zeros(d_out, **options))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(d_out, d_in, **options)) if skip else None)

    @property
    def written_hook(self) -> str:
        """The hook point it predicts."""
        return self.target_hook_name

    @torch.no_grad()
    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """x W_skip^T; zeros without a skip."""
        if self.W_skip is None:
            return x.new_zeros(*x.shape[:-1], self.d_out)
        precision = self._precision(x)
        return (x.to(precision) @ self.W_skip.to(precision).T).to(x.dtype)

    def predict(self, x: Float[Tensor, "*batch d_in"], code: SparseCode | None = None) -> Float[Tensor, "*batch d_out"]:
        """Prediction of y, the skip included, in x's precision; no gradients. `decode` leaves the skip out.

        Args:
            code: of x, where it is known, or one that was edited.
        """
        y_hat = self.decode(self.encode(x) if code is None else code).reshape(*x.shape[:-1], self.d_out)
        if self.W_skip is not None:
            y_hat = y_hat + self.skip(x).to(y_hat.dtype)
        return y_hat.to(x.dtype)

    def _described(self) -> dict[str, Any]:
        return {"transcoder": super()._described()}

    def extra_repr(self) -> str:
        """What `repr` shows of it."""
        skip = ", skip=True" if self.W_skip is not None else ""
        return (
            f"d_in={self.d_in}, d_out={self.d_out}, d_sae={self.d_sae}, rule={self.rule}{skip}, "
            f"hook_name={self.hook_name!r}, target_hook_name={self.target_hook_name!r}"
        )
