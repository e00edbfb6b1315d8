"""Foreign SAEs as SAEs of this project, and the way back.

A format's reader gives `Weights`: matrices in this project's shapes, the decoder's bias subtracted from the input,
the selection rule, and its threshold for every feature where it has them. `build` makes the SAE:

1. Formats that do not subtract b_dec from the input have b_enc + b_dec W_enc in b_enc's place (`subtracting`):
       x W_enc + b_enc = (x - b_dec) W_enc + (b_enc + b_dec W_enc).
2. Decoder rows get unit norm. With n the norm of row f, its activation, and so column f of W_enc, b_enc[f] and
   threshold[f], is multiplied by n: every contribution a W_dec stays what it was.

Folding keeps a threshold's selection but not TopK's, which compares features: where the norms of a TopK SAE's rows
differ, they are kept as they are, and `metadata["decoder_norms"]` says so. Rows whose norm is 1 up to the rounding of
their number format are left alone, so that a round trip gives the same bits.

3. Whatever is computed is kept in float32 at least: rounded to half precision, a folded encoder fires elsewhere. A
   half-precision SAE in which nothing is computed stays in half precision, bit for bit.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae import rules
from sae.errors import InputError
from sae.formats.reading import check_numbers
from sae.model import SAE
from sae.transcoder import Transcoder


@dataclass(frozen=True)
class Weights:
    """A foreign SAE: pre-activations (x - b_dec) W_enc + b_enc, the rule's selection, then a W_dec + b_dec."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, "d_out"]
    rule: rules.Rule
    threshold: Float[Tensor, "d_sae"] | None = None
    """For rules that compare pre-activations with a threshold."""
    is_transcoder: bool = False
    """Whether it predicts another activation: nothing is subtracted from the input then."""
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    """A transcoder's, added as x W_skip^T."""

    def check(self, where: str) -> None:
        """Raises InputError when shapes or number formats do not fit together, or numbers are none; `where` begins the
        message."""
        tensors = {"encoder": self.W_enc, "encoder bias": self.b_enc, "decoder": self.W_dec, "decoder bias": self.b_dec}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold
        if self.W_skip is not None:
            tensors["skip"] = self.W_skip
        check_numbers(tensors, where)
        if self.W_enc.ndim != 2:
            raise InputError(f"{where}: the encoder has shape {list(self.W_enc.shape)}: expected two dimensions")
        d_in, d_sae = self.W_enc.shape
        d_out = self.W_dec.shape[-1] if self.is_transcoder else d_in
        expected = {"encoder bias": [d_sae], "decoder": [d_sae, d_out], "decoder bias": [d_out], "threshold": [d_sae]}
        expected["skip"] = [d_out, d_in]
        for name, tensor in tensors.items():
            if list(tensor.shape) != expected.get(name, [d_in, d_sae]):
                raise InputError(
                    f"{where}: the {name} has shape {list(tensor.shape)}, the encoder ({d_in} to {d_sae}) asks for "
                    f"{expected[name]}: the file is damaged or of another format"
                )


def subtracting(weights: Weights) -> Weights:
    """`weights` of an encoder that reads x itself, for one that reads x - b_dec."""
    return _shifted(weights, 1)


def not_subtracting(weights: Weights) -> Weights:
    """The inverse of `subtracting`, up to rounding."""
    return _shifted(weights, -1)


def _shifted(weights: Weights, sign: int) -> Weights:
    shift = weights.b_dec.double() @ weights.W_enc.double()
    return replace(weights, b_enc=(weights.b_enc.double() + sign * shift).to(_precision(weights.b_enc)))


def gated(
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, "d_in"],
    *,
    gate: Float[Tensor, "d_sae"],
    magnitude: Float[Tensor, "d_sae"],
    scale: Float[Tensor, "d_sae"],
) -> Weights:
    """A gated SAE, whose gate and magnitude share directions, as thresholds (Rajamanoharan et al. 2024, arXiv
    2404.16014).

    With y = (x - b_dec) W_enc it fires where y + gate > 0, at relu(e^scale y + magnitude). With
    z = e^scale y + magnitude that is z where z > max(0, magnitude - e^scale gate).
    """
    factor = scale.double().exp()
    threshold = (magnitude.double() - factor * gate.double()).clamp_min(0)
    return Weights(_times(W_enc, factor), magnitude, W_dec, b_dec, rules.JumpReLU(), threshold.to(_precision(W_enc)))


def build(
    weights: Weights, *, hook_name: str, model_name: str, metadata: dict[str, Any], target_hook_name: str = ""
) -> SAE:
    """The SAE, or transcoder, of these weights, decoder rows of unit norm where that changes nothing else."""
    norms, tolerance = _norms(weights), _tolerance(weights)
    # Such a rule compares features with each other, and scaling them apart changes what it selects.
    compares = isinstance(weights.rule, rules.CodeRule) and weights.threshold is None
    if not has_unit_rows(weights):
        if not compares or norms.max() <= norms.min() * (1 + tolerance):
            weights = fold(weights)
        else:
            metadata = {**metadata, "decoder_norms": f"kept, {norms.min():.4g} to {norms.max():.4g}"}
    d_in, d_sae = weights.W_enc.shape
    options: dict[str, Any] = {"hook_name": hook_name, "model_name": model_name, "metadata": metadata}
    tensors = [weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec]
    tensors += [each for each in (weights.threshold, weights.W_skip) if each is not None]
    options["dtype"] = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    if weights.is_transcoder:
        widths, skip = (d_in, weights.W_dec.shape[1], d_sae), weights.W_skip is not None
        sae: SAE = Transcoder(*widths, weights.rule, skip=skip, target_hook_name=target_hook_name, **options)
    else:
        sae = SAE(d_in, d_sae, weights.rule, **options)
    with torch.no_grad():
        sae.W_enc.copy_(weights.W_enc)
        sae.b_enc.copy_(weights.b_enc)
        sae.W_dec.copy_(weights.W_dec)
        sae.b_dec.copy_(weights.b_dec)
        if weights.threshold is not None:
            sae.state["threshold"].copy_(weights.threshold)
        if weights.W_skip is not None:
            sae.get_parameter("W_skip").copy_(weights.W_skip)
    return sae


def fold(weights: Weights) -> Weights:
    """The same contributions from decoder rows of unit norm; a rule that compares features then compares these."""
    norms = _norms(weights)
    return replace(
        weights,
        W_enc=_times(weights.W_enc, norms),
        b_enc=_times(weights.b_enc, norms),
        W_dec=_times(weights.W_dec, 1 / norms[:, None]),
        threshold=None if weights.threshold is None else _times(weights.threshold, norms),
    )


def has_unit_rows(weights: Weights) -> bool:
    """Whether the decoder's rows have norm 1, up to the rounding of their number format; rows of zeros count."""
    return bool((_norms(weights) - 1).abs().max() <= _tolerance(weights))


def _tolerance(weights: Weights) -> float:
    return max(1e-5, torch.finfo(weights.W_dec.dtype).eps)


def _norms(weights: Weights) -> Float[Tensor, "d_sae"]:
    norms = torch.linalg.vector_norm(weights.W_dec.double(), dim=1)
    # A row of zeros contributes nothing, whatever its activation.
    return torch.where(norms > 0, norms, 1.0)


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    return (tensor.double() * factor).to(_precision(tensor))


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def weights_of(sae: SAE) -> Weights:
    """The weights of an SAE, on the CPU, for an export."""
    parts = {name: getattr(sae, name).detach().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    threshold, skip = sae.state.get("threshold"), sae.W_skip if isinstance(sae, Transcoder) else None
    return Weights(
        **parts,
        rule=sae.rule,
        threshold=None if threshold is None else threshold.detach().cpu(),
        is_transcoder=isinstance(sae, Transcoder),
        W_skip=None if skip is None else skip.detach().cpu(),
    )


def topk_of(rule: rules.Rule) -> int | None:
    """k of a rule that encodes as TopK, else None."""
    return rule.k if isinstance(rule, rules.CodeRule) and rule.saelens == "topk" else None


def refuse(sae: SAE, format_name: str, expressible: str) -> InputError:
    """The error for a rule that a format cannot express."""
    return InputError(f"{format_name} cannot express the rule {sae.rule.name}: it can express {expressible}")
