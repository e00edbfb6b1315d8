"""One SAE in training: parameters, Adam's moments, dead-feature counters, and the training step."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae import kernels, losses, optim
from sae.code import SparseCode
from sae.model import SAE

if TYPE_CHECKING:
    from sae.train import TrainConfig

# Running sums between two reports.
LOSS, SQUARED_ERROR, VARIANCE, ACTIVE, AUX, STEPS = range(6)


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

    def __init__(self, config: "TrainConfig", d_in: int, device: torch.device) -> None:
        self.config = config
        self.error: str | None = None
        self.last_lr = 0.0
        self.sae = SAE(d_in, config.d_sae, config.rule, device=device)
        self.input_scale = torch.ones((), device=device)
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.totals = torch.zeros(6, dtype=torch.float64, device=device)
        # W_enc's memory is [d_sae, d_in]; Adam sees it that way round, since it copies what is not contiguous.
        self.trained = {
            name: parameter.data.T if name == "W_enc" else parameter.data
            for name, parameter in self.sae.named_parameters()
            if not (config.frozen_decoder and name == "W_dec")
        }
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
    def step(self, batch: Float[Tensor, "n d_in"], step: int) -> None:
        """One training step on a batch of raw activations; `step` counts from 0."""
        config, sae = self.config, self.sae
        x = batch * self.input_scale
        x_centred = x - sae.b_dec
        # On a GPU the encoder's product runs in bf16 and accumulates in fp32; the weights stay fp32.
        encoded = x_centred.to(torch.bfloat16) if x.is_cuda else x_centred
        code = config.rule.encode(encoded, sae.W_enc, sae.b_enc)
        x_hat = kernels.decode(code, sae.W_dec, sae.b_dec)
        fit = losses.reconstruction(x, x_hat)
        gradients = kernels.gradients(
            code, x_centred, fit.grad_x_hat, sae.W_enc, sae.W_dec, decoder=not config.frozen_decoder, out=self.gradients
        )
        if not x.is_cuda:
            self.gradients = gradients
        aux = self._add_aux_k(gradients, fit.residual, x_centred, step)
        self._update(gradients, step)
        self._count(code, fit, aux)

    def _add_aux_k(self, gradients: kernels.Gradients, residual: Tensor, x_centred: Tensor, step: int) -> Tensor | None:
        config = self.config
        if config.aux_coefficient == 0 or step * config.batch_size < config.dead_after:
            return None
        dead = torch.nonzero(self.tokens_since_fired >= config.dead_after).squeeze(1)
        if dead.numel() == 0:
            return None
        sae = self.sae
        return losses.add_aux_k(
            gradients, dead, residual, x_centred, sae.W_enc, sae.b_enc, sae.W_dec, config.aux_coefficient
        )

    def _update(self, gradients: kernels.Gradients, step: int) -> None:
        config, sae = self.config, self.sae
        if gradients.W_dec is not None:
            optim.remove_parallel_(gradients.W_dec, sae.W_dec)
        for name, tensor in self.trained.items():
            tensor.grad = gradients.W_enc.T if name == "W_enc" else getattr(gradients, name)
        self.last_lr = optim.learning_rate(step, config.n_steps, config.peak_lr, config.warmup, config.decay)
        for group in self.adam.param_groups:
            group["lr"] = self.last_lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        if gradients.W_dec is not None:
            optim.normalise_rows_(sae.W_dec)

    def _count(self, code: SparseCode, fit: losses.Reconstruction, aux: Tensor | None) -> None:
        active = code.values != 0
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool)
        # Inactive slots point at feature 0 and must not count as its firing: they scatter to an extra place.
        slots = torch.where(active, code.indices, self.config.d_sae).reshape(-1)
        fired = torch.cat([fired, fired.new_zeros(1)]).index_fill_(0, slots, True)[:-1]
        self.tokens_since_fired += code.n_tokens
        self.tokens_since_fired.masked_fill_(fired, 0)
        zero = torch.zeros((), device=self.totals.device)
        self.totals += torch.stack(
            [
                fit.loss.double(),
                fit.squared_error.double(),
                fit.total_variance.double(),
                active.sum() / code.n_tokens,
                (zero if aux is None else aux).double(),
                zero.double() + 1,
            ]
        )

    def read_totals(self) -> Totals:
        """Means since the last call; waits for the device."""
        values = self.totals.tolist()
        self.totals.zero_()
        steps = max(values[STEPS], 1.0)
        dead = (self.tokens_since_fired >= self.config.dead_after).double().mean().item()
        return Totals(
            loss=values[LOSS] / steps,
            fvu=values[SQUARED_ERROR] / max(values[VARIANCE], 1e-300),
            l0=values[ACTIVE] / steps,
            aux_loss=values[AUX] / steps,
            dead_share=dead,
        )

    @torch.no_grad()
    def finish(self, *, hook_name: str, model_name: str) -> SAE:
        """The finished SAE, for raw activations: the input scale divides both biases (W_dec keeps unit norm)."""
        finished = SAE(
            self.sae.d_in, self.sae.d_sae, self.sae.rule, hook_name=hook_name, model_name=model_name,
            device=self.sae.W_dec.device,
        )  # fmt: skip
        finished.W_enc.copy_(self.sae.W_enc)
        finished.W_dec.copy_(self.sae.W_dec)
        finished.b_enc.copy_(self.sae.b_enc / self.input_scale)
        finished.b_dec.copy_(self.sae.b_dec / self.input_scale)
        return finished
