"""One SAE in training: parameters, Adam's moments, counters of firings, and the training step."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import kernels, losses, optim
from sae.code import SparseCode
from sae.config import TrainConfig
from sae.model import SAE
from sae.passes import Pass, code_pass, threshold_pass
from sae.rules import Batch, CodeRule, ThresholdRule

MULTI_K = 4
"""Multi-TopK's second k, as a multiple of the first (Gao et al. 2024, section 2.4 and appendix A.6)."""

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
        self.gradients: kernels.Gradients | None = None

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

    @torch.no_grad()
    def step(self, batch: Float[Tensor, "n d_in"], step: int, gradients: Float[Tensor, "n d_in"] | None = None) -> None:
        """One training step on a batch of raw activations; `step` counts from 0.

        Args:
            gradients: of the model's loss at the activations, for rules that need them.
        """
        x = batch * self.input_scale
        x_centred = x - self.sae.b_dec
        # On a GPU the encoder's product runs in bf16 and accumulates in fp32; the weights stay fp32.
        encoded = x_centred.to(torch.bfloat16) if x.is_cuda else x_centred
        if isinstance(self.config.rule, ThresholdRule):
            done = self._threshold_step(self.config.rule, x, x_centred, encoded, step)
        else:
            done = self._code_step(x, x_centred, encoded, gradients, step)
        aux = self._add_aux(done, x_centred, step)
        self._update(done, step)
        self._count(done, x.shape[0], aux, step)

    def _code_step(self, x: Tensor, x_centred: Tensor, encoded: Tensor, gradients: Tensor | None, step: int) -> Pass:
        config, sae = self.config, self.sae
        assert isinstance(config.rule, CodeRule)
        rule = config.rule.at_k(config.k_at(step))
        batch = Batch(encoded, sae.W_enc, sae.b_enc, sae.W_dec, self.density, step / config.n_steps, gradients)

        def run(code: SparseCode, out: kernels.Gradients | None) -> Pass:
            return code_pass(sae, code, x, x_centred, widths=config.widths, decoder=not config.frozen_decoder, out=out)

        done = run(rule.select(batch), self.gradients)
        if not x.is_cuda:
            self.gradients = done.gradients
        if config.multi_k:
            wider = run(rule.at_k(min(MULTI_K * rule.k, config.d_sae)).select(batch), None)
            done.gradients.add_(wider.gradients, config.multi_k)
            done = replace(done, loss=done.loss + config.multi_k * wider.loss)
        return done

    def _threshold_step(self, rule: ThresholdRule, x: Tensor, x_centred: Tensor, encoded: Tensor, step: int) -> Pass:
        config, d_in = self.config, self.sae.d_in
        coefficient = config.sparsity_at(step)
        threshold = rule.threshold(self.own, self.sae.W_enc)
        done = threshold_pass(
            self.sae, x, x_centred, encoded, threshold, bandwidth=rule.bandwidth_at(d_in),
            shrinkage=rule.shrinkage(coefficient, d_in), decoder=not config.frozen_decoder,
        )  # fmt: skip
        return Pass(
            loss=done.fit.loss + rule.penalty(done.support, coefficient, d_in),
            fit=done.fit,
            gradients=done.gradients,
            firings=done.firings,
            own=rule.own_gradients(self.own, done.support, coefficient, d_in),
        )

    def _add_aux(self, done: Pass, x_centred: Tensor, step: int) -> Tensor | None:
        config = self.config
        if not config.has_aux(step):
            return None
        chosen = torch.nonzero(self.revivable()).squeeze(1)
        if chosen.numel() == 0:
            return None
        sae = self.sae
        return losses.add_aux_k(
            done.gradients, chosen, done.fit.residual, x_centred, sae.W_enc, sae.b_enc, sae.W_dec,
            config.aux_coefficient, signed=config.rule.signed,
        )  # fmt: skip

    def _update(self, done: Pass, step: int) -> None:
        config, sae, gradients = self.config, self.sae, done.gradients
        if gradients.W_dec is not None:
            optim.remove_parallel_(gradients.W_dec, sae.W_dec)
        for name, tensor in self.trained.items():
            if name in self.own:
                tensor.grad = done.own[name]
            else:
                tensor.grad = gradients.W_enc.T if name == "W_enc" else getattr(gradients, name)
        if config.clip_grad_norm is not None:
            # The loss is a share of the batch's variance; the limit is for squared error a token.
            limit = config.clip_grad_norm * done.fit.residual.shape[0] / done.fit.total_variance
            optim.clip_norm_([tensor.grad for tensor in self.trained.values() if tensor.grad is not None], limit)
        self.last_lr = optim.learning_rate(step, config.n_steps, config.peak_lr, config.warmup, config.decay)
        for group in self.adam.param_groups:
            group["lr"] = self.last_lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        if gradients.W_dec is not None:
            optim.normalise_rows_(sae.W_dec)

    def _count(self, done: Pass, n_tokens: int, aux: Tensor | None, step: int) -> None:
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired.masked_fill_(done.firings > 0, 0)
        self.density.lerp_(done.firings.to(self.density.dtype) / n_tokens, self.config.density_rate(step))
        l0 = done.firings.sum().double() / n_tokens
        self._add_totals(done.loss, done.fit.squared_error, done.fit.total_variance, l0, aux)

    def _add_totals(
        self, loss: Tensor, squared_error: Tensor, variance: Tensor, l0: Tensor, aux: Tensor | None
    ) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=self.totals.device)
        sums = [loss.double(), squared_error.double(), variance.double(), l0.double()]
        self.totals += torch.stack([*sums, zero if aux is None else aux.double(), zero + 1, zero])

    def revivable(self) -> Bool[Tensor, "d_sae"]:
        """The features that the auxiliary loss works on: dead ones, or with aux-zipf those that have become rare."""
        dead = self.tokens_since_fired >= self.config.dead_after
        return losses.rare_features(self.density, dead) if self.config.aux_kind == "aux_zipf" else dead

    def read_totals(self) -> Totals:
        """Means since the last call; waits for the device."""
        dead = (self.tokens_since_fired >= self.config.dead_after).double().mean()
        self.totals[REVIVABLE] = self.revivable().sum()
        values = [*self.totals.tolist(), dead.item()]
        self.totals[:REVIVABLE] = 0
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
