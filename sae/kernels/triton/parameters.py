"""What a step trains, feature by feature, with Adam's moments and constants, and what products read of it."""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.encode import padded_pair
from sae.kernels.triton.sparse import alignment
from sae.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Moments:
    """Adam's two moments of one parameter of any shape."""

    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> "Moments":
        """Zeros, as before the first step of a parameter of any shape."""
        return cls(torch.zeros_like(parameter), torch.zeros_like(parameter))


@dataclass(frozen=True)
class Parameters:
    """What is trained, feature by feature, with its moments and shadows; all updated in place."""

    W_enc: Float[Tensor, "d_sae d"]
    """Encoder, a row per feature."""
    W_dec: Float[Tensor, "d_sae d"]
    b_enc: Float[Tensor, "d_sae"]
    b_dec: Float[Tensor, "d"]
    m_W_enc: Moments
    m_W_dec: Moments
    m_b_enc: Moments
    m_b_dec: Moments
    shadows: Float[Tensor, "2 padded d"]
    """W_enc and W_dec in the precision of products, with rows of zeros up to a multiple of 64."""
    subtracts_b_dec: bool = True
    """Whether the encoder reads x - b_dec: a transcoder's reads x."""
    W_skip: Float[Tensor, "d d"] | None = None
    """[d_out, d_in] of a linear path beside the features, where there is one."""
    m_W_skip: Moments | None = None
    norms: Float[Tensor, "d_sae"] | None = None
    """What W_dec's rows are still to be divided by, where a step may leave that to the next; None where it may not.
    The shadow is always that of unit rows."""
    ranks: Ranks = ALONE
    """Those that have the features, of which these are one rank's; b_dec and a skip are the same on all."""

    @property
    def padded_enc(self) -> Float[Tensor, "padded d"]:
        """W_enc as the encoder's product reads it."""
        return self.shadows[0]

    @property
    def shadow_enc(self) -> Float[Tensor, "d_sae d"]:
        """W_enc as products read it, without the padding."""
        return self.shadows[0, : self.W_enc.shape[0]]

    @property
    def shadow_dec(self) -> Float[Tensor, "d_sae d"]:
        """W_dec as products read it, without the padding."""
        return self.shadows[1, : self.W_dec.shape[0]]

    def settle(self) -> None:
        """Divides W_dec's rows by what they are still to be divided by; no bit of later steps depends on it."""
        if self.norms is not None:
            # Who reads a state need not have made its device the current one, on which Triton launches.
            with torch.cuda.device_of(self.W_dec):
                self._divided(None, self.W_dec, self.norms)
            self.norms.fill_(1)

    def rows_of_W_dec(self, features: Int[Tensor, "some"]) -> Float[Tensor, "some d"]:
        """Some features' unit rows of W_dec."""
        if self.norms is None:
            return self.W_dec[features]
        return self._divided(features, self.W_dec.new_empty(len(features), self.W_dec.shape[1]), self.norms)

    def _divided(self, features: Tensor | None, out: Tensor, norms: Tensor) -> Tensor:
        rows, d = out.shape
        columns = min(1024, triton.next_power_of_2(d))
        _divided_kernel[(rows, triton.cdiv(d, columns))](
            self.W_dec, norms, norms if features is None else features, out, d // alignment(d), ALIGN=alignment(d),
            CHOSEN=features is not None, SLICE=columns, num_warps=max(1, columns // 256),
        )  # fmt: skip
        return out

    @classmethod
    def starting(
        cls,
        W_enc: Float[Tensor, "d_sae d"],
        W_dec: Float[Tensor, "d_sae d"],
        b_enc: Float[Tensor, "d_sae"],
        b_dec: Float[Tensor, "d"],
        dtype: torch.dtype,
    ) -> "Parameters":
        """These parameters before their first step, with shadows in `dtype`."""
        moments = (Moments.of(W_enc), Moments.of(W_dec), Moments.of(b_enc), Moments.of(b_dec))
        return cls.with_shadows(W_enc, W_dec, b_enc, b_dec, *moments, dtype)

    @classmethod
    def with_shadows(
        cls,
        W_enc: Float[Tensor, "d_sae d"],
        W_dec: Float[Tensor, "d_sae d"],
        b_enc: Float[Tensor, "d_sae"],
        b_dec: Float[Tensor, "d"],
        m_W_enc: Moments,
        m_W_dec: Moments,
        m_b_enc: Moments,
        m_b_dec: Moments,
        dtype: torch.dtype,
    ) -> "Parameters":
        """These parameters and moments, which are kept, with new shadows in `dtype`."""
        moments = (m_W_enc, m_W_dec, m_b_enc, m_b_dec)
        return cls(W_enc, W_dec, b_enc, b_dec, *moments, padded_pair(W_enc, W_dec, dtype))


@dataclass(frozen=True)
class AdamStep:
    """Adam's constants, and this step's two scalars [lr / (1 - beta1^t), sqrt(1 - beta2^t)] on the device."""

    scalars: Float[Tensor, "2"]
    beta1: float
    beta2: float
    eps: float

    @property
    def constants(self) -> tuple[float, float, float, float, float]:
        """beta1, beta2, 1 - beta1, 1 - beta2 and eps; in fp32, 1 - 0.999 would lose five digits."""
        return self.beta1, self.beta2, 1 - self.beta1, 1 - self.beta2, self.eps


def step_scalars(lr: float, step: int, betas: tuple[float, float]) -> tuple[float, float]:
    """The two scalars of step `step`, counted from 1."""
    return lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5


@triton.jit
def _divided_kernel(
    W_dec, norms, features, out, units, ALIGN: tl.constexpr, CHOSEN: tl.constexpr, SLICE: tl.constexpr
):  # fmt: skip
    """Some columns of a row of W_dec divided by its norm, as the other kernels do it, to the bit."""
    d = units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    f = row
    if CHOSEN:
        f = tl.load(features + row)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    w = tl.load(W_dec + f * d + columns, mask=columns < d, other=0.0) / tl.load(norms + f)
    tl.store(out + row * d + columns, w, mask=columns < d)
