"""The training step on an NVIDIA GPU: `sae.kernels.triton`'s, behind `TrainingState`.

1. A step is planned from what the host knows: k, which rule chooses, and room for the features to revive, of which
   the last report told the number. Those that die between two reports beyond that room wait for the next.
2. Steps with the same plan do the same work on the same memory. The first ones run as they are, which compiles and
   warms up; then the step is captured as a CUDA graph and replayed.
3. Everything that changes from step to step - learning rate, Adam's corrections, the densities' rate - is read from
   a table on the device, uploaded ahead. A step waits for nothing, but for BatchTopK's, which asks the device once
   whether its list holds the answer, and so is two graphs: one that makes the list and one that learns from it.

Weights and Adam's moments are fp32 and lie where `TrainingState` has them: checkpoints and finished SAEs are the
same. The bf16 shadows that products read are made anew when training starts or resumes; they are a function of the
weights. Not fused, and so on the plain path: ReLU and JumpReLU, Matryoshka, multi-k, clipped gradients (Adam runs
feature by feature while a gradient is made, when the norm of all of them is not known yet), more than 512 entries a
token, rules this module does not know, and machines without triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae import kernels, optim
from sae.code import SparseCode
from sae.config import TrainConfig
from sae.rules import (
    AbsTopK,
    BatchAbsTopK,
    BatchTopK,
    CodeRule,
    FeatureChoice,
    GradientTopK,
    MutualChoice,
    TopK,
)
from sae.rules.gradient_topk import SCALE_ROWS
from sae.state import REVIVABLE, Totals, TrainingState

if TYPE_CHECKING:
    from sae.kernels.triton import AuxGradients, Centred, Listed, Parameters, StepResult

FUSED_RULES = (TopK, AbsTopK, BatchTopK, MutualChoice, BatchAbsTopK, FeatureChoice, GradientTopK)
EPS = 1e-8
"""Adam's, as torch has it."""
SHADOW = torch.bfloat16
"""Precision of the products on a GPU."""
TABLE_STEPS = 1024
"""Steps whose scalars are uploaded at once."""
WARM_UP = 3
"""Steps of a plan before it is captured."""
MIN_BUCKET = 64
MAX_CAPTURED_TOKENS = 2**14
"""Batch above which feature choice takes the plain encoder, which waits for the device."""


def new_state(config: TrainConfig, d_in: int, device: torch.device) -> TrainingState:
    """The state that trains `config` on `device`: fused where it can be."""
    return FusedState(config, d_in, device) if is_fused(config, device) else TrainingState(config, d_in, device)


def is_fused(config: TrainConfig, device: torch.device) -> bool:
    """Whether the fused step trains this; see the module's description for what it does not."""
    rule = config.rule
    # A subclass may choose in another way: only the rules themselves are known.
    if not isinstance(rule, CodeRule) or type(rule) not in FUSED_RULES or config.widths or config.multi_k:
        return False
    if config.clip_grad_norm is not None:
        return False
    return max(rule.k, config.anneal_from_k or 0) <= kernels.MAX_K and _runs_triton(device)


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" and kernels.has_triton()


@dataclass(frozen=True)
class Program:
    """A step in parts, between which the host looks at what the first has made."""

    parts: tuple[Callable[[], object], ...]
    between: Callable[[], None] | None = None

    def __call__(self) -> None:
        first, *rest = self.parts
        first()
        if self.between is not None:
            self.between()
        for part in rest:
            part()

    def captured(self) -> "Program":
        """The same with each part as a CUDA graph."""
        from sae.kernels.triton import GraphedStep

        graphs: list[GraphedStep] = []
        for part in self.parts:
            graphs.append(GraphedStep(part, warm_up=0, after=graphs[-1] if graphs else None))
        return Program(tuple(graphs), self.between)


@dataclass(frozen=True)
class Plan:
    """What a step does, as far as its kernels and their memory depend on it."""

    k: int
    by_feature: bool
    """Whether features choose, after feature choice's first part."""
    bucket: int
    """Room for features to revive; 0 for no auxiliary loss."""


class FusedState(TrainingState):
    """`TrainingState` with the fused step; its arguments."""

    def __init__(self, config: TrainConfig, d_in: int, device: torch.device) -> None:
        super().__init__(config, d_in, device)
        # Adam's moments are kept where torch's Adam would, under the names that checkpoints know.
        for tensor in self.trained.values():
            moments = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
            self.adam.state[tensor].update(step=torch.zeros((), device=device), **moments)
        # This step's learning rate and corrections for Adam, and the rate of the running densities.
        self.scalars = torch.zeros(3, device=device)
        self._table: tuple[int, Tensor] | None = None
        self._parameters: Parameters | None = None
        self._batch: Tensor | None = None
        self._loss_gradients: Tensor | None = None
        self._n_revivable: int | None = None
        self._plan: Plan | None = None
        self._run: Program | None = None
        self._graph: Program | None = None
        self._repeats = 0

    @torch.no_grad()
    def step(self, batch: Float[Tensor, "n d_in"], step: int, gradients: Float[Tensor, "n d_in"] | None = None) -> None:
        """See `TrainingState.step`."""
        # Triton launches, and graphs are captured, on the current device.
        with torch.cuda.device_of(self.scalars):
            self._step(batch, step, gradients)

    def _step(self, batch: Tensor, step: int, gradients: Tensor | None) -> None:
        self._receive(batch, gradients)
        self._set_scalars(step)
        plan = self._plan_of(step)
        if plan != self._plan:
            self._plan, self._run, self._graph, self._repeats = plan, self._program(plan), None, 0
        assert self._run is not None
        if self._graph is None and self._repeats >= WARM_UP and self._can_be_captured(plan):
            self._graph = self._run.captured()
        self._repeats += 1
        (self._graph or self._run)()

    def read_totals(self) -> Totals:
        """See `TrainingState.read_totals`; also makes room for what the auxiliary loss is to revive."""
        totals = super().read_totals()
        self._n_revivable = int(self.totals[REVIVABLE])
        return totals

    def _receive(self, batch: Tensor, gradients: Tensor | None) -> None:
        """Copies a batch to where the step reads it."""
        if self._batch is None:
            self._batch = torch.empty_like(batch)
            self._loss_gradients = None if gradients is None else torch.empty_like(gradients)
        self._batch.copy_(batch)
        if gradients is not None:
            assert self._loss_gradients is not None
            self._loss_gradients.copy_(gradients)

    def _set_scalars(self, step: int) -> None:
        config = self.config
        first = step - step % TABLE_STEPS
        if self._table is None or self._table[0] != first:
            rows = [self._scalars_at(s) for s in range(first, min(first + TABLE_STEPS, config.n_steps))]
            table = torch.tensor(rows)
            if self.scalars.is_cuda:
                table = table.pin_memory()
            self._table = first, table.to(self.scalars.device, non_blocking=True)
        self.scalars.copy_(self._table[1][step - first])
        self.last_lr = self._lr_at(step)

    def _lr_at(self, step: int) -> float:
        config = self.config
        return optim.learning_rate(step, config.n_steps, config.peak_lr, config.warmup, config.decay)

    def _scalars_at(self, step: int) -> tuple[float, float, float]:
        from sae.kernels.triton import step_scalars

        return (*step_scalars(self._lr_at(step), step + 1, self.config.betas), self.config.density_rate(step))

    def _plan_of(self, step: int) -> Plan:
        config, rule = self.config, self.config.rule
        by_feature = isinstance(rule, FeatureChoice) and step / config.n_steps >= rule.mutual_share
        bucket = 0
        if config.has_aux(step):
            if self._n_revivable is None:
                # The first such step after resuming: the checkpoint holds what the last report found.
                self._n_revivable = int(self.totals[REVIVABLE])
            if self._n_revivable:
                bucket = min(config.d_sae, max(MIN_BUCKET, 1 << (self._n_revivable - 1).bit_length()))
        return Plan(config.k_at(step), by_feature, bucket)

    def _can_be_captured(self, plan: Plan) -> bool:
        if not self.scalars.is_cuda:
            return False
        if plan.by_feature:
            return self.config.batch_size <= MAX_CAPTURED_TOKENS
        return not self._waits(plan)

    def _waits(self, plan: Plan) -> bool:
        """Whether the encoder asks the device in its midst."""
        from sae.kernels.triton import MAX_MEAN

        return isinstance(self.config.rule, BatchTopK | FeatureChoice) and plan.k > MAX_MEAN

    def _program(self, plan: Plan) -> Program:
        """The step of a plan; every tensor it meets belongs to this state."""
        from sae.kernels import triton as fast

        config, parameters = self.config, self._shadowed()
        rule = config.rule
        assert isinstance(rule, CodeRule)
        assert self._batch is not None
        batch = self._batch
        adam = fast.AdamStep(self.scalars[:2], *config.betas, EPS)
        steps_done = [self.adam.state[tensor]["step"] for tensor in self.trained.values()]
        aux_loss = torch.zeros((), device=self.scalars.device)

        def aux(result: "StepResult") -> "AuxGradients":
            made, loss = fast.aux_gradients(
                parameters, self.revivable(), result.residual, result.x_centred, plan.bucket, config.aux_coefficient,
                signed=rule.signed,
            )  # fmt: skip
            aux_loss.copy_(loss)
            return made

        def centre() -> "Centred":
            return fast.centre(batch, self.input_scale, parameters.b_dec, parameters.shadows.dtype)

        def learn(centred: "Centred", code: SparseCode) -> None:
            result = fast.learn(
                centred, code, parameters, self.tokens_since_fired, adam,
                decoder=not config.frozen_decoder, aux=aux if plan.bucket else None,
            )  # fmt: skip
            self.density.lerp_(result.firings / batch.shape[0], self.scalars[2])
            torch._foreach_add_(steps_done, 1)
            loss = result.squared_error / result.total_variance
            l0 = result.firings.sum().double() / batch.shape[0]
            self._add_totals(loss, result.squared_error, result.total_variance, l0, aux_loss if plan.bucket else None)

        W_enc, b_enc, chosen = parameters.padded_enc.T, parameters.b_enc, rule.at_k(plan.k)
        by_batch = isinstance(chosen, BatchTopK | FeatureChoice) and not plan.by_feature
        if by_batch and not self._waits(plan):
            n_entries, signed = min(chosen.k, config.d_sae) * config.batch_size, chosen.signed
            made: dict[str, tuple[Centred, Listed]] = {}

            def make_list() -> None:
                centred = centre()
                made["last"] = centred, fast.list_batch_topk(centred.x, W_enc, b_enc, n_entries, absolute=signed)

            def look() -> None:
                centred, listed = made["last"]
                listed.code_or_again(centred.x, W_enc, b_enc, absolute=signed)

            return Program((make_list, lambda: learn(made["last"][0], made["last"][1].code)), look)
        encoder = self._encoder(chosen, plan)

        def run() -> None:
            centred = centre()
            learn(centred, encoder(centred.x, W_enc, b_enc))

        return Program((run,))

    def _shadowed(self) -> "Parameters":
        """The parameters with shadows of their present values; made once, then kept up by every step."""
        if self._parameters is None:
            from sae.kernels.triton import Moments, Parameters

            def moments(name: str, parameter: Tensor) -> Moments:
                if name not in self.trained:
                    # A frozen decoder has none, and the step does not touch them.
                    return Moments(parameter, parameter)
                kept = self.adam.state[self.trained[name]]
                return Moments(kept["exp_avg"], kept["exp_avg_sq"])

            sae = self.sae
            W_enc, W_dec, b_enc, b_dec = sae.W_enc.data.T, sae.W_dec.data, sae.b_enc.data, sae.b_dec.data
            self._parameters = Parameters.with_shadows(
                W_enc, W_dec, b_enc, b_dec,
                moments("W_enc", W_enc), moments("W_dec", W_dec), moments("b_enc", b_enc), moments("b_dec", b_dec),
                SHADOW if self.scalars.is_cuda else torch.float32,
            )  # fmt: skip
        return self._parameters

    def _encoder(self, rule: CodeRule, plan: Plan) -> "Callable[[Tensor, Tensor, Tensor], SparseCode]":
        """The rule as the fused step calls it, on centred inputs and shadow weights."""
        from sae.kernels import triton as fast

        n, d_sae = self.config.batch_size, self.config.d_sae
        if isinstance(rule, GradientTopK):
            gradients, shadow = self._loss_gradients, self._shadowed()
            if gradients is None:
                raise ValueError("the rule gradient_topk trains on batches with gradients")

            def by_gradient(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
                scale = rule.scale(shadow.shadow_dec, gradients[:SCALE_ROWS])
                pair = torch.stack((x, (gradients * scale).to(x.dtype)))
                values, indices = fast.paired_topk_encode(pair, shadow.shadows, b_enc, rule.k, rule.beta)
                return SparseCode(values, indices, d_sae)

            return by_gradient
        if isinstance(rule, FeatureChoice) and plan.by_feature:
            on_host = rule.shares(d_sae, n)
            n_entries, shares = int(on_host.sum()), on_host.to(self.scalars.device)

            def by_feature(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
                budgets = rule.assign(shares, self.density)
                return fast.feature_topk_encode(x, W_enc, b_enc, budgets, n_entries=n_entries)

            return by_feature
        if isinstance(rule, BatchTopK | FeatureChoice):

            def by_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
                return fast.batch_topk_encode(x, W_enc, b_enc, rule.k * n, absolute=rule.signed)

            return by_batch
        return fast.topk_rule(rule.k, absolute=rule.signed)
