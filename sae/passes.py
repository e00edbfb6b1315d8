"""One forward and backward pass of an SAE: its loss and the gradients of every parameter, without autograd.

What a transcoder predicts is y; an SAE predicts x, and y is x there. A skip is a part of the prediction like b_dec.

`code_pass` takes a code that a rule has chosen and goes through its entries alone.

`threshold_pass` is for rules that compare every pre-activation with a threshold, of which thousands may be active for
a token early in training:

1. Scores of a chunk of rows. A chunk in which more than 1 entry in 32 counts - is active, or within the threshold's
   window, where the threshold's gradient comes from - is decoded and differentiated at once, with matrix products.
2. The entries of the other chunks are collected, and go through the sparse kernels together.

No [n, d_sae] matrix exists in either; the sums are the same bits on every repeat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels, losses
from sae.code import SparseCode
from sae.crosscoder import block_norms
from sae.kernels import Gradients
from sae.model import SAE
from sae.ranks import ALONE, Ranks
from sae.rules.base import ActiveSums
from sae.source import Part
from sae.transcoder import Transcoder

DENSE_SHARE = 1 / 32
"""Share of entries above which matrix products are faster than gathering."""


@dataclass(frozen=True)
class Pass:
    """What a pass gives the trainer."""

    loss: Float[Tensor, ""]
    """What training minimises, without the auxiliary loss."""
    fit: losses.Reconstruction
    gradients: Gradients
    firings: Int[Tensor, "d_sae"]
    """Tokens on which each feature is active."""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """Gradients of the rule's own tensors."""


@torch.no_grad()
def code_pass(
    sae: SAE,
    code: SparseCode,
    y: Float[Tensor, "n d_out"],
    x_centred: Float[Tensor, "n d_in"],
    *,
    widths: tuple[int, ...] = (),
    decoder: bool = True,
    out: Gradients | None = None,
    first: int = 0,
    ranks: Ranks = ALONE,
) -> Pass:
    """Loss and gradients of a code.

    Args:
        y: what is predicted, x for an SAE.
        x_centred: what the encoder multiplies: x - b_dec, x for a transcoder.
        widths: prefixes of the Matryoshka loss, increasing up to d_sae; none for the plain error.
        decoder: whether the decoder's gradient is wanted.
        out: as for `kernels.gradients`.
        first: the first of this rank's features among all.
        ranks: those that have the features. b_dec's gradient is this rank's part, the ranks' sum is the whole.
    """
    firings = _firings(code)
    skipped = _skipped(sae, x_centred)
    if not widths:
        y_hat = ranks.sum_(kernels.decode(code, sae.W_dec, sae.b_dec if ranks.leads else None))
        if skipped is not None:
            y_hat += skipped
        fit = losses.reconstruction(y, y_hat)
        gradients = kernels.gradients(
            code, x_centred, fit.grad_x_hat, sae.W_enc, sae.W_dec, decoder=decoder, centred=sae.subtracts_b_dec, out=out
        )
        _keep_part(gradients, fit.grad_x_hat, ranks)
        return Pass(fit.loss, fit, _with_skip(gradients, skipped, fit.grad_x_hat, x_centred), firings)
    start = sae.b_dec if skipped is None else sae.b_dec + skipped
    nested = losses.prefixes(y, code, sae.W_dec, start, widths, first, ranks)
    sums, place = [], 0
    for block, grad in zip(nested.blocks, nested.grad_x_hat, strict=True):
        grad_values = kernels.entry_gradients(block, grad, sae.W_dec[place : place + block.d_sae])
        sums.append(kernels.sum_entries(block, grad_values, x_centred, grad, decoder=decoder))
        place += block.d_sae
    bias = torch.cat([part.bias for part in sums])
    gradients = Gradients(
        W_enc=torch.cat([part.encoder for part in sums]).T,
        W_dec=torch.cat([part.decoder for part in sums if part.decoder is not None]) if decoder else None,
        b_enc=bias,
        # b_dec and a skip are in every prefix, as the features of the first block are.
        b_dec=kernels.bias_gradient(nested.grad_x_hat[0], sae.W_enc, bias, centred=sae.subtracts_b_dec),
    )
    _keep_part(gradients, nested.grad_x_hat[0], ranks)
    gradients = _with_skip(gradients, skipped, nested.grad_x_hat[0], x_centred)
    return Pass(nested.loss, nested.fit, gradients, firings)


def _keep_part(gradients: Gradients, grad_y_hat: Float[Tensor, "n d_out"], ranks: Ranks) -> None:
    """Leaves in b_dec's gradient what goes through this rank's features; the first rank's has the rest."""
    if not ranks.leads:
        gradients.b_dec.sub_(grad_y_hat.sum(0))


def _skipped(sae: SAE, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"] | None:
    """What a transcoder's skip adds; None where there is none."""
    return x @ sae.W_skip.T if isinstance(sae, Transcoder) and sae.W_skip is not None else None


def _with_skip(
    gradients: Gradients, skipped: Tensor | None, grad_y_hat: Float[Tensor, "n d_out"], x: Float[Tensor, "n d_in"]
) -> Gradients:
    return gradients if skipped is None else replace(gradients, W_skip=grad_y_hat.T @ x)


def _firings(code: SparseCode) -> Int[Tensor, "d_sae"]:
    active = code.values != 0
    # Inactive slots point at feature 0 and must not count as its firing: they are counted in an extra place.
    slots = torch.where(active, code.indices, code.d_sae).reshape(-1)
    counts = torch.zeros(code.d_sae + 1, dtype=torch.int64, device=slots.device)
    return counts.index_add_(0, slots, torch.ones_like(slots))[:-1]


@dataclass(frozen=True)
class ThresholdPass:
    """What `threshold_pass` returns; the rule makes its penalty and its own gradients of it."""

    fit: losses.Reconstruction
    gradients: Gradients
    firings: Int[Tensor, "d_sae"]
    sums: ActiveSums


@torch.no_grad()
def threshold_pass(
    sae: SAE,
    y: Float[Tensor, "n d_out"],
    x_centred: Float[Tensor, "n d_in"],
    encoded: Float[Tensor, "n d_in"],
    threshold: Float[Tensor, "d_sae"],
    *,
    bandwidth: float = 0.0,
    shrinkage: float | Tensor = 0.0,
    parts: Sequence[Part] = (),
    decoder: bool = True,
    d_sae: int | None = None,
    ranks: Ranks = ALONE,
) -> ThresholdPass:
    """Error and gradients of a = z 1[z > threshold] for thresholds that are not negative.

    Args:
        y: what is predicted, x for an SAE.
        x_centred: what the encoder multiplies: x - b_dec, x for a transcoder.
        encoded: the same in the precision the encoder multiplies in.
        bandwidth: width of the window around the thresholds; 0 for none.
        shrinkage: added, over n, to the gradient of every active entry (an L1 penalty's).
        parts: a crosscoder's, whose penalty counts a feature by the sum of its decoder norms in the parts.
        decoder: whether the decoder's gradient is wanted.
        d_sae: features of all ranks; None where this SAE has all.
        ranks: those that have the features. b_dec's gradient is this rank's part, the ranks' sum is the whole.
    """
    norms = block_norms(sae.W_dec, parts) if parts else None
    shrink = shrinkage / y.shape[0]
    each = shrink if norms is None else shrink * norms.sum(0)
    work = _Accumulator(
        sae, y, x_centred, threshold, bandwidth, each, decoder, by_feature=norms is not None, ranks=ranks
    )
    entries = sae.d_sae if d_sae is None else d_sae
    for first, z in kernels.Encoder.of(encoded, sae.W_enc, sae.b_enc).chunks(-(-entries // ranks.size)):
        support = kernels.is_above(z, threshold - bandwidth / 2)
        # Waits for the device once a chunk: which of the two ways is faster is not known before.
        if int(ranks.sum_(support.sum())) > DENSE_SHARE * entries * z.shape[0]:
            work.add_dense(first, z)
        else:
            work.collect(first, z, support)
    done = work.finish()
    if norms is not None:
        done = _weighed(done, work.magnitude, sae.W_dec, parts, norms, shrink)
    sums = replace(done.sums, active=ranks.sum_(done.sums.active), magnitude=ranks.sum_(done.sums.magnitude))
    return replace(done, sums=sums)


def _weighed(
    done: ThresholdPass,
    magnitude: Float[Tensor, "d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    parts: Sequence[Part],
    norms: Float[Tensor, "parts d_sae"],
    shrink: float | Tensor,
) -> ThresholdPass:
    """A pass whose penalty is shrink * sum_i magnitude_i sum_m ||w_i^m||, with its gradient in the decoder."""
    if done.gradients.W_dec is not None:
        widths = [part.width for part in parts]
        lengths = norms.clamp_min(torch.finfo(norms.dtype).tiny)
        for block, gradient, length in zip(
            W_dec.split(widths, 1), done.gradients.W_dec.split(widths, 1), lengths, strict=True
        ):
            gradient.add_(block / length[:, None] * (shrink * magnitude)[:, None])
    return replace(done, sums=replace(done.sums, magnitude=(magnitude * norms.sum(0)).sum()))


class _Accumulator:
    def __init__(
        self,
        sae: SAE,
        y: Tensor,
        x_centred: Tensor,
        threshold: Tensor,
        bandwidth: float,
        shrink: float | Tensor,
        decoder: bool,
        *,
        by_feature: bool,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.sae, self.y, self.x_centred, self.skipped = sae, y, x_centred, _skipped(sae, x_centred)
        self.threshold, self.bandwidth, self.shrink, self.decoder = threshold, bandwidth, shrink, decoder
        self.step = 2 / losses.total_variance(y)
        self.y_hat = torch.empty_like(y)
        self.encoder, self.bias = torch.zeros_like(sae.W_enc.T), torch.zeros_like(sae.b_enc)
        self.dictionary = torch.zeros_like(sae.W_dec) if decoder else None
        self.firings = torch.zeros(sae.d_sae, dtype=torch.int64, device=y.device)
        self.window, self.window_gradient = torch.zeros_like(sae.b_enc), torch.zeros_like(sae.b_enc)
        self.by_feature = by_feature
        self.magnitude = torch.zeros(sae.d_sae if by_feature else (), dtype=y.dtype, device=y.device)
        self.collected: list[tuple[Tensor, Tensor, Tensor]] = []
        self.sparse_rows: list[Tensor] = []

    def add_dense(self, first: int, z: Float[Tensor, "rows d_sae"]) -> None:
        """A chunk with many entries, by matrix products."""
        sae, rows = self.sae, slice(first, first + z.shape[0])
        active = kernels.is_above(z, self.threshold)
        a = torch.where(active, z, 0)
        bias = sae.b_dec if self.ranks.leads else torch.zeros_like(sae.b_dec)
        y_hat = self._started(self.ranks.sum_(torch.addmm(bias, a, sae.W_dec)), rows)
        grad_y_hat = (y_hat - self.y[rows]) * self.step
        grad = grad_y_hat @ sae.W_dec.T
        if self.bandwidth:
            window = (z - self.threshold).abs() < self.bandwidth / 2
            self.window += window.sum(dim=0)
            self.window_gradient += torch.where(window, grad, 0).sum(dim=0)
        grad = torch.where(active, grad + self.shrink, 0)
        self.encoder.addmm_(grad.T, self.x_centred[rows])
        self.bias += grad.sum(dim=0)
        if self.dictionary is not None:
            self.dictionary.addmm_(a.T, grad_y_hat)
        self.y_hat[rows] = y_hat
        self.firings += active.sum(dim=0)
        self.magnitude += a.sum(dim=0) if self.by_feature else a.sum()

    def _started(self, decoded: Float[Tensor, "rows d_out"], rows: Any) -> Float[Tensor, "rows d_out"]:
        return decoded if self.skipped is None else decoded + self.skipped[rows]

    def collect(self, first: int, z: Float[Tensor, "rows d_sae"], support: Tensor) -> None:
        """A chunk with few entries, for later."""
        token, feature = torch.nonzero(support, as_tuple=True)
        self.collected.append((token + first, feature, z[token, feature]))
        self.sparse_rows.append(torch.arange(first, first + z.shape[0], device=z.device))

    def _add_collected(self) -> None:
        sae = self.sae
        token, feature, z = (torch.cat(parts) for parts in zip(*self.collected, strict=True))
        rows = torch.cat(self.sparse_rows)
        # Tokens are renumbered among those whose chunks were sparse.
        place = torch.empty(self.y.shape[0], dtype=torch.int64, device=z.device)
        place[rows] = torch.arange(len(rows), device=z.device)
        theta = self.threshold[feature]
        active = ~(z <= theta)
        code = kernels.ragged_code(place[token], feature, torch.where(active, z, 0), len(rows), sae.d_sae)
        decoded = kernels.decode(code, sae.W_dec, sae.b_dec if self.ranks.leads else None)
        y_hat = self._started(self.ranks.sum_(decoded), rows)
        grad_y_hat = (y_hat - self.y[rows]) * self.step
        grad = kernels.entry_gradients(code, grad_y_hat, sae.W_dec)
        if self.bandwidth:
            window = (z - theta).abs() < self.bandwidth / 2
            pairs = torch.stack([torch.where(window, 1.0, 0.0).to(grad.dtype), torch.where(window, grad, 0)], dim=1)
            sums = _sum_by_feature(feature, pairs, sae.d_sae)
            self.window += sums[:, 0]
            self.window_gradient += sums[:, 1]
        shrink = torch.as_tensor(self.shrink).expand(sae.d_sae)[feature] if self.by_feature else self.shrink
        grad = torch.where(active, grad + shrink, 0)
        sums_of = kernels.sum_entries(code, grad, self.x_centred[rows], grad_y_hat, decoder=self.decoder)
        self.encoder += sums_of.encoder
        self.bias += sums_of.bias
        if self.dictionary is not None and sums_of.decoder is not None:
            self.dictionary += sums_of.decoder
        self.y_hat[rows] = y_hat
        self.firings += _firings(code)
        if self.by_feature:
            self.magnitude += _sum_by_feature(code.indices, code.values[:, None], sae.d_sae)[:, 0]
        else:
            self.magnitude += code.values.sum()

    def finish(self) -> ThresholdPass:
        """Adds what was collected."""
        if self.collected:
            self._add_collected()
        fit = losses.reconstruction(self.y, self.y_hat)
        gradients = Gradients(
            W_enc=self.encoder.T,
            W_dec=self.dictionary,
            b_enc=self.bias,
            b_dec=kernels.bias_gradient(fit.grad_x_hat, self.sae.W_enc, self.bias, centred=self.sae.subtracts_b_dec),
        )
        _keep_part(gradients, fit.grad_x_hat, self.ranks)
        gradients = _with_skip(gradients, self.skipped, fit.grad_x_hat, self.x_centred)
        sums = ActiveSums(
            self.y.shape[0],
            self.firings.sum().to(self.y.dtype),
            self.magnitude.sum(),
            self.window,
            self.window_gradient,
        )
        return ThresholdPass(fit, gradients, self.firings, sums)


def _sum_by_feature(feature: Tensor, rows: Float[Tensor, "entries m"], d_sae: int) -> Float[Tensor, "d_sae m"]:
    """Sums of rows by feature, in the order of the entries."""
    order, offsets = kernels.by_feature(feature, d_sae)
    return torch.nn.functional.embedding_bag(order, rows, offsets, mode="sum", include_last_offset=True)
