"""The training step in plain torch, with the kernels where there are any: every rule and every loss, on every device.

1. The rule's code and its loss with all gradients (`sae.passes`); at 4 k once more for multi-k.
2. The auxiliary loss adds its gradients.
3. The decoder's gradients lose what lies along its rows, all are clipped if asked for, Adam steps, and the decoder's
   rows are brought back to norm 1.

The reference of `sae.fused_step`.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae import kernels, losses, optim
from sae.code import SparseCode
from sae.passes import Pass, code_pass, threshold_pass
from sae.rules import Batch, CodeRule, ThresholdRule
from sae.state import TrainingState

MULTI_K = 4
"""Multi-TopK's second k, as a multiple of the first (Gao et al. 2024, section 2.4 and appendix A.6)."""


class PlainStep:
    """Steps of `state`; on a CPU the memory of the gradients is used again from step to step."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self.gradients: kernels.Gradients | None = None

    @torch.no_grad()
    def __call__(
        self,
        batch: Float[Tensor, "n d_in"],
        step: int,
        gradients: Float[Tensor, "n d_out"] | None = None,
        target: Float[Tensor, "n d_out"] | None = None,
    ) -> None:
        """One step on a batch of raw activations; `step` counts from 0.

        Args:
            gradients: of the model's loss at the activations, or at the target, for rules that need them.
            target: raw activations that a transcoder predicts.
        """
        done, aux_loss = self.differentiate(batch, step, gradients, target)
        self._update(done, step)
        self.count(done, aux_loss, step)

    @torch.no_grad()
    def differentiate(
        self,
        batch: Float[Tensor, "n d_in"],
        step: int,
        gradients: Float[Tensor, "n d_out"] | None = None,
        target: Float[Tensor, "n d_out"] | None = None,
    ) -> tuple[Pass, Float[Tensor, ""] | None]:
        """Losses and gradients of a batch, the auxiliary loss's among the gradients; changes nothing."""
        state, config = self.state, self.state.config
        x = batch * state.input_scale
        y = x if target is None else target * state.output_scale
        x_centred = state.sae.centred(x)
        # On a GPU the encoder's product runs in bf16 and accumulates in fp32; the weights stay fp32.
        encoded = x_centred.to(torch.bfloat16) if x.is_cuda else x_centred
        if isinstance(config.rule, ThresholdRule):
            done = self._threshold_pass(config.rule, y, x_centred, encoded, step)
        else:
            done = self._code_pass(y, x_centred, encoded, gradients, step)
        aux_loss = self._add_aux(done, x_centred, step)
        state.shards.sum_(done.gradients.b_dec)
        return done, aux_loss

    def count(self, done: Pass, aux_loss: Float[Tensor, ""] | None, step: int) -> None:
        """Adds a step to the state's counters, densities and sums."""
        state, fit, n_tokens = self.state, done.fit, done.fit.residual.shape[0]
        state.count(done.firings, n_tokens)
        state.record(
            done.loss, fit.squared_error, fit.total_variance, done.firings, n_tokens,
            state.config.density_rate(step), aux_loss,
        )  # fmt: skip

    def _code_pass(
        self,
        y: Float[Tensor, "n d_out"],
        x_centred: Float[Tensor, "n d_in"],
        encoded: Float[Tensor, "n d_in"],
        gradients: Float[Tensor, "n d_out"] | None,
        step: int,
    ) -> Pass:
        config, sae, density = self.state.config, self.state.sae, self.state.density
        assert isinstance(config.rule, CodeRule)
        rule = config.rule.at_k(config.k_at(step))
        batch = Batch(encoded, sae.W_enc, sae.b_enc, sae.W_dec, density, step / config.n_steps, gradients)

        def run(code: SparseCode, out: kernels.Gradients | None) -> Pass:
            return code_pass(
                sae, code, y, x_centred, widths=config.widths, decoder=not config.frozen_decoder, out=out,
                first=self.state.first, ranks=self.state.shards,
            )  # fmt: skip

        done = run(self._select(rule, batch), self.gradients)
        if not y.is_cuda:
            self.gradients = done.gradients
        if config.multi_k:
            wider = run(self._select(rule.at_k(min(MULTI_K * rule.k, config.d_sae)), batch), None)
            done.gradients.add_(wider.gradients, config.multi_k)
            done = replace(done, loss=done.loss + config.multi_k * wider.loss)
        return done

    def _select(self, rule: CodeRule, batch: Batch) -> SparseCode:
        """The rule's code; of this rank's features, what it chooses among those of all."""
        code, shards = rule.select(batch), self.state.shards
        return code if shards.size == 1 else rule.among(code, batch.x.shape[0], shards)

    def _threshold_pass(
        self,
        rule: ThresholdRule,
        y: Float[Tensor, "n d_out"],
        x_centred: Float[Tensor, "n d_in"],
        encoded: Float[Tensor, "n d_in"],
        step: int,
    ) -> Pass:
        config, sae, own = self.state.config, self.state.sae, self.state.own
        # Activations are lengths in what is predicted: its width sets their scale.
        coefficient, width = config.sparsity_at(step), sae.d_out
        done = threshold_pass(
            sae, y, x_centred, encoded, rule.threshold(own, sae.W_enc), bandwidth=rule.bandwidth_at(width),
            shrinkage=rule.shrinkage(coefficient, width), parts=self.state.parts, decoder=not config.frozen_decoder,
            d_sae=config.d_sae, ranks=self.state.shards,
        )  # fmt: skip
        sums = replace(done.sums, target=config.target_at(step))
        return Pass(
            loss=done.fit.loss + rule.penalty(sums, coefficient, width),
            fit=done.fit,
            gradients=done.gradients,
            firings=done.firings,
            own=rule.own_gradients(own, sums, coefficient, width),
        )

    def _add_aux(self, done: Pass, x_centred: Float[Tensor, "n d_in"], step: int) -> Float[Tensor, ""] | None:
        config, sae = self.state.config, self.state.sae
        if not config.has_aux(step):
            return None
        chosen = torch.nonzero(self.state.revivable()).squeeze(1)
        shards = self.state.shards
        if sum(shards.counts(chosen.numel())) == 0:
            return None
        return losses.add_aux_k(
            done.gradients, chosen, done.fit.residual, x_centred, sae.W_enc, sae.b_enc, sae.W_dec,
            config.aux_coefficient, signed=config.rule.signed, centred=sae.subtracts_b_dec,
            ranks=shards,
        )  # fmt: skip

    def _update(self, done: Pass, step: int) -> None:
        state, gradients = self.state, done.gradients
        config, sae = state.config, state.sae
        if gradients.W_dec is not None:
            optim.remove_parallel_(gradients.W_dec, sae.W_dec)
        for name, tensor in state.trained.items():
            if name in state.own:
                tensor.grad = done.own[name]
            else:
                tensor.grad = gradients.W_enc.T if name == "W_enc" else getattr(gradients, name)
        if config.clip_grad_norm is not None:
            # The loss is a share of the batch's variance; the limit is for squared error a token.
            limit = config.clip_grad_norm * done.fit.residual.shape[0] / done.fit.total_variance
            made = {name: tensor.grad for name, tensor in state.trained.items() if tensor.grad is not None}
            shared = [state.feature_dim(f"adam.{name}.exp_avg") is None for name in made]
            optim.clip_norm_(list(made.values()), limit, shared, state.shards)
        state.last_lr = config.lr_at(step)
        state.adam.step(state.last_lr)
        if gradients.W_dec is not None:
            optim.normalise_rows_(sae.W_dec)
