"""One SAE in training: parameters, Adam's moments, counters and running sums; how it starts and how it is finished.

How a step is made is `sae.plain_step`'s and `sae.fused_step`'s business: both work on a `TrainingState`, which is all
that a checkpoint holds.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import losses, optim
from sae.config import TrainConfig
from sae.model import SAE
from sae.rules import Batch, ThresholdRule

# Running sums between two reports, and how many features the last one found that the auxiliary loss would revive.
LOSS, SQUARED_ERROR, VARIANCE, ACTIVE, AUX, STEPS, REVIVABLE = range(7)


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
        d_in: width of the activations.
        device: where it lives.

    Attributes:
        sae: the SAE as it trains: for activations multiplied by `input_scale`.
        tokens_since_fired: [d_sae], tokens since each feature was last active.
        density: [d_sae], running share of tokens on which each feature is active.
        trained: what Adam moves, by name: parameters and the rule's own tensors, W_enc as [d_sae, d_in].
        adam: torch's Adam with the moments of all these.
        n_revivable: features that the last report found for the auxiliary loss; None where no report is known.
        error: why it trains no longer; None while it does.
    """

    def __init__(self, config: TrainConfig, d_in: int, device: torch.device) -> None:
        self.config = config
        self.error: str | None = None
        self.last_lr = 0.0
        self.sae = SAE(d_in, config.d_sae, config.rule, device=device)
        self.input_scale = torch.ones((), device=device)
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.density = torch.zeros(config.d_sae, device=device)
        self.totals = torch.zeros(7, dtype=torch.float64, device=device)
        rule = config.rule
        own = rule.trained_tensors(config.d_sae, d_in) if isinstance(rule, ThresholdRule) else {}
        self.own = {name: tensor.to(device) for name, tensor in own.items()}
        # W_enc's memory is [d_sae, d_in]; Adam sees it that way round, since it copies what is not contiguous.
        self.trained = {
            name: parameter.data.T if name == "W_enc" else parameter.data
            for name, parameter in self.sae.named_parameters()
            if not (config.frozen_decoder and name == "W_dec")
        } | self.own
        self.adam = torch.optim.Adam(list(self.trained.values()), lr=0.0, betas=config.betas, fused=True)
        # Adam would make its moments at the first step; checkpoints and the fused step want them before.
        for tensor in self.trained.values():
            self.adam.state[tensor] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        self.n_revivable: int | None = None

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.sae.W_dec.device

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, of any shape, by the name it has in checkpoints."""
        named = {name: parameter.data for name, parameter in self.sae.named_parameters()}
        for name in ("input_scale", "tokens_since_fired", "density", "totals"):
            named[name] = getattr(self, name)
        named.update({f"own.{name}": tensor for name, tensor in self.own.items()})
        for name, tensor in self.trained.items():
            named.update({f"adam.{name}.{key}": value for key, value in self.adam.state[tensor].items()})
        return named

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "m d_in"]) -> None:
        """Starting values: random unit decoder rows, the encoder their transpose, b_dec from `sample`.

        The input scale is the inverse of the tokens' mean norm over sqrt(d_in), so that learning rates mean the
        same whatever the model's activations measure.
        """
        config, sae = self.config, self.sae
        if config.normalize_input:
            norm = torch.linalg.vector_norm(sample, dim=1).mean().clamp_min(torch.finfo(sample.dtype).tiny)
            self.input_scale = math.sqrt(sae.d_in) / norm
        rows = optim.random_unit_rows(config.d_sae, sae.d_in, config.seed, sample.device, sample.dtype)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.zero_()
        scaled = sample * self.input_scale
        if config.b_dec_init == "geometric_median":
            sae.b_dec.copy_(optim.geometric_median(scaled))
        elif config.b_dec_init == "mean":
            sae.b_dec.copy_(scaled.mean(dim=0))

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
        return losses.rare_features(self.density, dead) if self.config.aux_kind == "aux_zipf" else dead

    def last_revivable(self) -> int:
        """How many features the last report found to revive; waits for the device once after resuming."""
        if self.n_revivable is None:
            self.n_revivable = int(self.totals[REVIVABLE])
        return self.n_revivable

    def read_totals(self) -> Totals:
        """Means since the last call; waits for the device."""
        dead = (self.tokens_since_fired >= self.config.dead_after).double().mean()
        self.totals[REVIVABLE] = self.revivable().sum()
        values = [*self.totals.tolist(), dead.item()]
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
    def finish(
        self,
        *,
        hook_name: str,
        model_name: str,
        sample: Float[Tensor, "m d_in"] | None = None,
        sample_gradients: Float[Tensor, "m d_in"] | None = None,
    ) -> SAE:
        """The finished SAE, for raw activations: the input scale divides both biases (W_dec keeps unit norm).

        Args:
            sample: raw activations, best ones not trained on, by which a rule that chose over batches measures its
                thresholds; rules whose `needs_calibration` is set need it.
            sample_gradients: of the model's loss at the sample, for rules that need them.
        """
        rule, scale = self.sae.rule, self.input_scale
        finished = SAE(
            self.sae.d_in, self.sae.d_sae, rule, hook_name=hook_name, model_name=model_name,
            device=self.sae.W_dec.device,
        )  # fmt: skip
        finished.W_enc.copy_(self.sae.W_enc)
        finished.W_dec.copy_(self.sae.W_dec)
        finished.b_enc.copy_(self.sae.b_enc / scale)
        finished.b_dec.copy_(self.sae.b_dec / scale)
        state: dict[str, Tensor] = {}
        if isinstance(rule, ThresholdRule):
            state = rule.finished_state(self.own, scale)
        elif rule.needs_calibration:
            if sample is None:
                raise ValueError(f"the rule {rule.name} measures its thresholds on a sample of activations")
            centred, density = sample - finished.b_dec, self.density
            weights = finished.W_enc, finished.b_enc, finished.W_dec
            state = rule.calibrate(Batch(centred, *weights, density, 1.0, sample_gradients, self.config.batch_size))
        for name, tensor in state.items():
            finished.get_buffer(name).copy_(tensor)
        return finished
