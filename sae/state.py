"""One SAE, transcoder or crosscoder in training: parameters, Adam's moments, counters, running sums; how it starts
and how it is finished.

How a step is made is `sae.plain_step`'s and `sae.fused_step`'s business: both work on a `TrainingState`, which is all
that a checkpoint holds.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import kernels, losses, optim
from sae.code import SparseCode
from sae.config import TrainConfig
from sae.crosscoder import Crosscoder
from sae.model import SAE
from sae.ranks import ALONE, Ranks
from sae.rules import Batch, ThresholdRule
from sae.source import Pair, Part, Rows
from sae.transcoder import Transcoder

# Running sums between two reports, and how many features the last one found that the auxiliary loss would revive.
LOSS, SQUARED_ERROR, VARIANCE, ACTIVE, AUX, STEPS, REVIVABLE = range(7)


ENCODER_SEED = 2**62
"""Added to the seed for a transcoder's encoder, whose directions are not those of its decoder."""
SPREAD_ROWS = 1024
STARTING_SPREAD = 0.01
"""Squared norm of what a transcoder's features first write, as a share of the target's variance."""


@dataclass(frozen=True)
class Totals:
    """Means over the steps since the last report."""

    loss: float
    fvu: float
    l0: float
    aux_loss: float
    dead_share: float


class TrainingState:
    """Everything one SAE's training carries from step to step.

    Args:
        config: what to train.
        d_in: width of the activations; for a transcoder the pair of hook points it goes between, for a crosscoder its
            parts.
        device: where it lives.
        shards: the ranks over which its features are shared out, each of which has a state of its own with a span of
            them; what all have in common is equal on all.

    Attributes:
        sae: the SAE as it trains, with this rank's features: for activations multiplied by `input_scale`, a
            transcoder's target by `output_scale`; for a crosscoder that of the parts' scaled activations.
        parts: a crosscoder's; empty for others.
        first: the first of these among all.
        tokens_since_fired: [d_sae], tokens since each feature was last active.
        density: [d_sae], running share of tokens on which each feature is active.
        trained: what Adam moves, by name: parameters and the rule's own tensors, W_enc as [d_sae, d_in].
        adam: the moments of all these.
        n_revivable: features that the last report found for the auxiliary loss; None where no report is known.
        error: why it trains no longer; None while it does.
        settle: makes the parameters what the steps so far have made of them; a step may leave the division of W_dec's
            rows by their norms to the next one. No bit of what follows depends on when it is called.
    """

    def __init__(
        self,
        config: TrainConfig,
        d_in: int | Pair | Sequence[Part],
        device: torch.device,
        shards: Ranks = ALONE,
    ) -> None:
        self.config, self.shards = config, shards
        self.first, last = shards.span(config.d_sae)
        d_sae = last - self.first
        self.error: str | None = None
        self.last_lr = 0.0
        self.parts: tuple[Part, ...] = () if isinstance(d_in, int | Pair) else tuple(d_in)
        self._reads = d_in
        self.sae = self._new_sae(d_sae, device)
        self.input_scale = torch.ones((), device=device)
        # An SAE's two are one tensor.
        self.output_scale = torch.ones((), device=device) if self.is_transcoder else self.input_scale
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.density = torch.zeros(d_sae, device=device)
        self.totals = torch.zeros(7, dtype=torch.float64, device=device)
        rule = config.rule
        own = rule.trained_tensors(d_sae, self.sae.d_out) if isinstance(rule, ThresholdRule) else {}
        self.own = {name: tensor.to(device) for name, tensor in own.items()}
        # W_enc's memory is [d_sae, d_in]; Adam sees it that way round, since it copies what is not contiguous.
        self.trained = {
            name: parameter.data.T if name == "W_enc" else parameter.data
            for name, parameter in self.sae.named_parameters()
            if not (config.frozen_decoder and name == "W_dec")
        } | self.own
        self.adam = optim.Adam(list(self.trained.values()), config.betas)
        self.n_revivable: int | None = None
        self.settle: Callable[[], None] = lambda: None

    def _new_sae(self, d_sae: int, device: torch.device) -> SAE:
        """Of so many features, all zero."""
        config, reads = self.config, self._reads
        if isinstance(reads, Pair):
            return Transcoder(
                reads.d_in, reads.d_out, d_sae, config.rule, skip=config.skip, hook_name=reads.hook_name,
                target_hook_name=reads.target_hook_name, device=device,
            )  # fmt: skip
        width = reads if isinstance(reads, int) else sum(part.width for part in reads)
        return SAE(width, d_sae, config.rule, device=device)

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another activation than it reads."""
        return isinstance(self.sae, Transcoder)

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.sae.W_dec.device

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, of any shape, by the name it has in checkpoints."""
        self.settle()
        named = {name: parameter.data for name, parameter in self.sae.named_parameters()}
        if self.is_transcoder:
            named["output_scale"] = self.output_scale
        for name in ("input_scale", "tokens_since_fired", "density", "totals"):
            named[name] = getattr(self, name)
        named.update({f"own.{name}": tensor for name, tensor in self.own.items()})
        for name, tensor in self.trained.items():
            named.update({f"adam.{name}.{key}": value for key, value in self.adam.state[tensor].items()})
        return named

    def saved_tensors(self) -> dict[str, Tensor]:
        """`tensors` as a checkpoint has them: the sums that each rank keeps of its own features are added up."""
        named = self.tensors()
        if self.shards.size > 1:
            named["totals"] = self.totals.clone()
            named["totals"][ACTIVE] = self.shards.sum_(self.totals[ACTIVE].clone())
        return named

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Takes what `saved_tensors` gave, on this or another number of ranks."""
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        if not self.shards.leads:
            self.totals[ACTIVE] = 0
        self.n_revivable = None

    def feature_dim(self, name: str) -> int | None:
        """The dimension along which the features of a tensor of `tensors` lie; None for one without."""
        kind = name.removeprefix("adam.").split(".")[0] if name.endswith((".exp_avg", ".exp_avg_sq")) else name
        if kind == "W_enc":
            return 0 if name.startswith("adam.") else 1
        of_features = kind in ("W_dec", "b_enc", "tokens_since_fired", "density", *self.own) or kind.startswith("own.")
        return 0 if of_features else None

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "m d_in"], target: Float[Tensor, "m d_out"] | None = None) -> None:
        """Starting values from a sample: random unit decoder rows, b_dec from what is predicted.

        An SAE's encoder is the decoder's transpose. A transcoder's has random directions of its own; b_enc makes the
        mean pre-activation zero, the skip is zero, and encoder and thresholds are so small that what the features
        first write has a tenth of the target's spread: at full size, training spends its first thousand steps on
        making the error smaller than that of predicting the mean.

        The input scale is the inverse of the tokens' mean norm over sqrt(d_in), so that learning rates mean the
        same whatever the model's activations measure; the output scale likewise.

        Args:
            target: what a transcoder predicts of x.
        """
        config, sae = self.config, self.sae
        y = x if target is None else target
        if config.normalize_input:
            self.input_scale.copy_(_scale(x))
            self.output_scale.copy_(_scale(y))
        rows = self._first_rows(x.device, x.dtype)
        sae.W_dec.copy_(rows)
        sae.b_enc.zero_()
        scaled = y * self.output_scale
        if self.is_transcoder:
            self._start_encoder(x * self.input_scale, scaled)
        else:
            sae.W_enc.copy_(rows.T)
        if config.b_dec_init == "geometric_median":
            sae.b_dec.copy_(optim.geometric_median(scaled))
        elif config.b_dec_init == "mean":
            sae.b_dec.copy_(scaled.mean(dim=0))

    def _first_rows(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "d_sae d_out"]:
        """Random unit rows; parts of one width start alike, so that what tells them apart is what training finds."""
        seed = self.config.seed
        if not self.parts or len({part.width for part in self.parts}) > 1:
            return optim.random_unit_rows(self.config.d_sae, self.sae.d_out, seed, device, dtype, self.own_span)
        block = optim.random_unit_rows(self.config.d_sae, self.parts[0].width, seed, device, dtype, self.own_span)
        return block.repeat(1, len(self.parts)) / math.sqrt(len(self.parts))

    @property
    def own_span(self) -> slice:
        """This rank's features among all."""
        return slice(self.first, self.first + self.sae.d_sae)

    def _start_encoder(self, x: Float[Tensor, "m d_in"], y: Float[Tensor, "m d_out"]) -> None:
        """A transcoder's encoder, for scaled activations."""
        config, sae, rule = self.config, self.sae, self.config.rule
        seed = (config.seed + ENCODER_SEED) % 2**63
        rows = optim.random_unit_rows(config.d_sae, sae.d_in, seed, x.device, x.dtype, self.own_span)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.copy_(-(rows @ x.mean(dim=0)))
        x, y = x[:SPREAD_ROWS], y[:SPREAD_ROWS]
        if isinstance(rule, ThresholdRule):
            code = kernels.threshold_encode(x, sae.W_enc, sae.b_enc, rule.threshold(self.own, sae.W_enc))
        else:
            values, indices = kernels.topk_encode(x, sae.W_enc, sae.b_enc, config.k_at(0))
            if self.shards.size > 1:
                values, indices = kernels.best_of_shards(values, indices, self.shards)
            code = SparseCode(values, indices, sae.d_sae)
        written = self.shards.sum_(kernels.decode(code, sae.W_dec)).square().sum()
        size = (STARTING_SPREAD * losses.total_variance(y) / written.clamp_min(torch.finfo(y.dtype).tiny)).sqrt()
        sae.W_enc.mul_(size)
        sae.b_enc.mul_(size)
        if isinstance(rule, ThresholdRule):
            rule.rescale_(self.own, size)

    def count(self, firings: Int[Tensor, "d_sae"], n_tokens: int) -> None:
        """Counts the tokens since each feature's last firing, given on how many of a batch it has fired."""
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired.masked_fill_(firings > 0, 0)

    def record(
        self,
        loss: Float[Tensor, ""],
        squared_error: Float[Tensor, ""],
        variance: Float[Tensor, ""],
        firings: Int[Tensor, "d_sae"],
        n_tokens: int,
        density_rate: float | Float[Tensor, ""],
        aux_loss: Float[Tensor, ""] | None,
    ) -> None:
        """Adds a step to the running densities and to the sums of the next report.

        Args:
            variance: what the squared error is a share of.
            firings: tokens of the batch on which each feature is active.
            density_rate: weight of this batch in the densities.
            aux_loss: None where the step had no auxiliary loss.
        """
        self.density.lerp_(firings.to(self.density.dtype) / n_tokens, density_rate)
        zero = torch.zeros((), dtype=torch.float64, device=self.totals.device)
        l0 = firings.sum().double() / n_tokens
        sums = [loss.double(), squared_error.double(), variance.double(), l0]
        self.totals += torch.stack([*sums, zero if aux_loss is None else aux_loss.double(), zero + 1, zero])

    def revivable(self) -> Bool[Tensor, "d_sae"]:
        """The features that the auxiliary loss works on: dead ones, or with aux-zipf those that have become rare."""
        dead = self.tokens_since_fired >= self.config.dead_after
        if self.config.aux_kind != "aux_zipf":
            return dead
        d_sae = self.config.d_sae
        rare = losses.rare_features(self.shards.join(self.density, d_sae), self.shards.join(dead, d_sae))
        return rare[self.own_span]

    def last_revivable(self) -> int:
        """How many features the last report found to revive; waits for the device once after resuming."""
        if self.n_revivable is None:
            self.n_revivable = int(self.totals[REVIVABLE])
        return self.n_revivable

    def read_totals(self) -> Totals:
        """Means since the last call; waits for the device."""
        dead = (self.tokens_since_fired >= self.config.dead_after).double().sum()
        self.totals[REVIVABLE] = self.revivable().sum()
        counted = self.shards.sum_(torch.stack([self.totals[ACTIVE], self.totals[REVIVABLE], dead]))
        self.totals[REVIVABLE] = counted[1]
        values = [*self.totals.tolist(), counted[2].item() / self.config.d_sae]
        values[ACTIVE] = counted[0].item()
        self.totals[:REVIVABLE] = 0
        self.n_revivable = int(values[REVIVABLE])
        steps = max(values[STEPS], 1.0)
        return Totals(
            loss=values[LOSS] / steps,
            fvu=values[SQUARED_ERROR] / max(values[VARIANCE], 1e-300),
            l0=values[ACTIVE] / steps,
            aux_loss=values[AUX] / steps,
            dead_share=values[-1],
        )

    @torch.no_grad()
    def finish(self, *, hook_name: str = "", model_name: str = "", sample: Rows | None = None) -> SAE:
        """The finished SAE, for raw activations (W_dec keeps unit norm).

        With s the scale of what is read and t that of what is written, equal in an SAE:

            W_enc s/t,  b_enc 1/t,  b_dec 1/t,  thresholds 1/t,  W_skip s/t

        Args:
            hook_name: what an SAE reads; a transcoder knows its hook points.
            sample: raw activations, best ones not trained on, by which a rule that chose over batches measures its
                thresholds; rules whose `needs_calibration` is set need it.
        """
        rule, scale = self.sae.rule, self.output_scale
        finished = self._whole()
        finished.model_name = model_name
        if isinstance(finished, Transcoder):
            finished.W_enc.mul_(self.input_scale / scale)
            if finished.W_skip is not None:
                finished.W_skip.mul_(self.input_scale / scale)
        else:
            finished.hook_name = hook_name
        finished.b_enc.div_(scale)
        finished.b_dec.div_(scale)
        state: dict[str, Tensor] = {}
        if isinstance(rule, ThresholdRule):
            own = {name: self.shards.join(tensor, self.config.d_sae) for name, tensor in self.own.items()}
            state = rule.finished_state(own, scale)
        elif rule.needs_calibration:
            if sample is None:
                raise ValueError(f"the rule {rule.name} measures its thresholds on a sample of activations")
            weights = finished.W_enc, finished.b_enc, finished.W_dec
            density = self.shards.join(self.density, self.config.d_sae)
            batch = Batch(finished.centred(sample.x), *weights, density, 1.0, sample.gradients)
            state = rule.calibrate(replace(batch, batch_size=self.config.batch_size))
        for name, tensor in state.items():
            finished.get_buffer(name).copy_(tensor)
        return Crosscoder.of_scaled(finished, self.parts) if self.parts else finished

    def _whole(self) -> SAE:
        """A copy of the SAE with the features of all ranks."""
        self.settle()
        if self.shards.size == 1:
            return copy.deepcopy(self.sae)
        whole = self._new_sae(self.config.d_sae, self.device)
        parts = dict(self.sae.named_parameters())
        for name, parameter in whole.named_parameters():
            dim = self.feature_dim(name)
            part = parts[name].data
            parameter.data.copy_(part if dim is None else self.shards.join(part, self.config.d_sae, dim))
        return whole


def _scale(rows: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """sqrt(d) over the rows' mean norm."""
    norm = torch.linalg.vector_norm(rows, dim=1).mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return math.sqrt(rows.shape[1]) / norm
