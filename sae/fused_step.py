"""The training step on an NVIDIA GPU, made of `sae.kernels.triton`: what `sae.plain_step` does, for most rules of a k.

1. A step is planned from what the host knows: the rule that chooses, with its k, and room for the features to revive,
   of which the last report told the number. Those that die between two reports beyond that room wait for the next.
2. Steps with the same plan do the same work on the same memory. The first ones run as they are, which compiles and
   warms up; then the step is captured as a CUDA graph and replayed.
3. Everything that changes from step to step - learning rate, Adam's corrections, the densities' rate - is read from
   a table on the device, uploaded ahead. A step waits for nothing, but where a rule's encoder has to ask the device in
   its midst (`FusedEncoder.settle`): then it is two graphs, one that encodes and one that learns from the code.

Weights and Adam's moments are fp32 and lie where `TrainingState` has them: checkpoints and finished SAEs are the
same. The bf16 shadows that products read are made anew when training starts or resumes; they are a function of the
weights. Adam runs feature by feature while a gradient is made; where gradients are clipped, which needs the norm of
all of them, they are written to memory first. Not fused, and so on the plain path: ReLU and JumpReLU, Matryoshka,
multi-k, more than 512 entries a token, rules without a fused encoder, and machines without triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sae import kernels
from sae.code import SparseCode
from sae.config import TrainConfig
from sae.plain_step import PlainStep
from sae.rules import CodeRule, FusedEncoder, FusedInputs
from sae.state import TrainingState

if TYPE_CHECKING:
    from sae.kernels.triton import AuxGradients, Centred, KernelSizes, Parameters, StepResult

EPS = 1e-8
"""Adam's, as torch has it."""
TABLE_STEPS = 1024
"""Steps whose scalars are uploaded at once."""
WARM_UP = 3
"""Steps of a plan before it is captured."""


class Step(Protocol):
    """Makes one step of training."""

    def __call__(
        self,
        batch: Float[Tensor, "n d_in"],
        step: int,
        gradients: Float[Tensor, "n d_out"] | None = None,
        target: Float[Tensor, "n d_out"] | None = None,
    ) -> None:
        """See `PlainStep`."""


def new_step(state: TrainingState) -> Step:
    """How `state` makes its steps: fused where its device and configuration allow it."""
    fused = state.device.type == "cuda" and kernels.has_triton() and can_be_fused(state.config)
    fused = fused and not state.is_transcoder
    return FusedStep(state) if fused else PlainStep(state)


def can_be_fused(config: TrainConfig) -> bool:
    """Whether the fused step can train this on a GPU; see the module's description for what it cannot."""
    rule = config.rule
    if not isinstance(rule, CodeRule) or not rule.has_fused_encoder():
        return False
    if config.widths or config.multi_k:
        return False
    return max(rule.k, config.anneal_from_k or 0) <= kernels.MAX_K


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
class StepPlan:
    """What a step does, as far as its kernels and their memory depend on it."""

    rule: CodeRule
    """The rule that chooses, at the step's k."""
    bucket: int
    """Room for features to revive; 0 for no auxiliary loss."""


class FusedStep:
    """Steps of `state`, whose configuration `can_be_fused`.

    Args:
        state: what is trained.
        precision: of the products; bf16 on a GPU and fp32 in Triton's interpreter when None.
        min_bucket: least room for features to revive.
        capture: whether steps are captured as CUDA graphs, on a GPU.
        sizes: how the kernels cut their work; their own when None.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        precision: torch.dtype | None = None,
        min_bucket: int = 64,
        capture: bool = True,
        sizes: "KernelSizes | None" = None,
    ) -> None:
        from sae.kernels.triton import SIZES

        self.state = state
        on_gpu = state.device.type == "cuda"
        self.precision = precision or (torch.bfloat16 if on_gpu else torch.float32)
        self.min_bucket, self.capture, self.sizes = min_bucket, capture and on_gpu, sizes or SIZES
        # This step's learning rate and corrections for Adam, and the rate of the running densities.
        self.scalars = torch.zeros(3, device=state.device)
        self._aux_loss = torch.zeros((), device=state.device)
        self._table: tuple[int, Tensor] | None = None
        self._parameters: Parameters | None = None
        self._batch: Tensor | None = None
        self._gradients: Tensor | None = None
        self._made: tuple[Centred, SparseCode] | None = None
        self._plan: StepPlan | None = None
        self._encoder: FusedEncoder | None = None
        self._run: Program | None = None
        self._graph: Program | None = None
        self._repeats = 0

    @property
    def is_captured(self) -> bool:
        """Whether the last step's plan is replayed as CUDA graphs."""
        return self._graph is not None

    @torch.no_grad()
    def __call__(
        self,
        batch: Float[Tensor, "n d_in"],
        step: int,
        gradients: Float[Tensor, "n d_in"] | None = None,
        target: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """See `PlainStep`."""
        # Triton launches, and graphs are captured, on the current device.
        with torch.cuda.device_of(self.scalars):
            self._receive(batch, gradients)
            self._set_scalars(step)
            plan = self.plan_of(step)
            if plan != self._plan:
                self._encoder = plan.rule.fused_encoder(self._inputs())
                self._plan, self._run, self._graph, self._repeats = plan, self._program(self._encoder, plan), None, 0
            assert self._run is not None
            assert self._encoder is not None
            if self._graph is None and self._repeats >= WARM_UP and self.capture and self._encoder.captured:
                self._graph = self._run.captured()
            self._repeats += 1
            (self._graph or self._run)()

    def plan_of(self, step: int) -> StepPlan:
        """What a step does; asks the device where the number of features to revive is not known."""
        config = self.state.config
        assert isinstance(config.rule, CodeRule)
        bucket = 0
        n_revivable = self.state.last_revivable() if config.has_aux(step) else 0
        if n_revivable:
            bucket = min(config.d_sae, max(self.min_bucket, 1 << (n_revivable - 1).bit_length()))
        return StepPlan(config.rule.stage(step / config.n_steps).at_k(config.k_at(step)), bucket)

    def _receive(self, batch: Float[Tensor, "n d_in"], gradients: Float[Tensor, "n d_in"] | None) -> None:
        """Copies a batch to where the step reads it."""
        if self._batch is None:
            self._batch = torch.empty_like(batch)
            self._gradients = None if gradients is None else torch.empty_like(gradients)
        self._batch.copy_(batch)
        if gradients is not None:
            assert self._gradients is not None
            self._gradients.copy_(gradients)

    def _set_scalars(self, step: int) -> None:
        config = self.state.config
        first = step - step % TABLE_STEPS
        if self._table is None or self._table[0] != first:
            rows = [self._scalars_at(s) for s in range(first, min(first + TABLE_STEPS, config.n_steps))]
            table = torch.tensor(rows)
            if self.scalars.is_cuda:
                table = table.pin_memory()
            self._table = first, table.to(self.scalars.device, non_blocking=True)
        self.scalars.copy_(self._table[1][step - first])
        self.state.last_lr = config.lr_at(step)

    def _scalars_at(self, step: int) -> tuple[float, float, float]:
        from sae.kernels.triton import step_scalars

        config = self.state.config
        return (*step_scalars(config.lr_at(step), step + 1, config.betas), config.density_rate(step))

    def _inputs(self) -> FusedInputs:
        config, density = self.state.config, self.state.density
        shadows = self._shadowed().shadows
        return FusedInputs(config.batch_size, config.d_sae, shadows, density, self._gradients, self.sizes)

    def _program(self, encoder: FusedEncoder, plan: StepPlan) -> Program:
        """The step of a plan; every tensor it meets belongs to this step or its state."""
        parameters = self._shadowed()
        weights = parameters.padded_enc.T, parameters.b_enc

        def encode() -> None:
            centred = self._centre()
            self._made = centred, encoder.encode(centred.x, *weights)

        def learn() -> None:
            self._learn(plan)

        if encoder.settle is None:

            def whole() -> None:
                encode()
                learn()

            return Program((whole,))
        settle = encoder.settle

        def look() -> None:
            assert self._made is not None
            settle(self._made[0].x, *weights)

        return Program((encode, learn), look)

    def _centre(self) -> "Centred":
        from sae.kernels import triton as fast

        assert self._batch is not None
        parameters = self._shadowed()
        return fast.centre(self._batch, self.state.input_scale, parameters.b_dec, parameters.shadows.dtype)

    def _learn(self, plan: StepPlan) -> None:
        """All that follows the encoder."""
        from sae.kernels import triton as fast

        assert self._made is not None
        centred, code = self._made
        state, config, parameters = self.state, self.state.config, self._shadowed()

        def aux(result: "StepResult") -> "AuxGradients":
            made, loss = fast.aux_gradients(
                parameters, state.revivable(), result.residual, result.x_centred, plan.bucket, config.aux_coefficient,
                signed=plan.rule.signed,
            )  # fmt: skip
            self._aux_loss.copy_(loss)
            return made

        result = fast.learn(
            centred, code, parameters, state.tokens_since_fired,
            fast.AdamStep(self.scalars[:2], *config.betas, EPS),
            decoder=not config.frozen_decoder, clip=config.clip_grad_norm, aux=aux if plan.bucket else None,
            sizes=self.sizes,
        )  # fmt: skip
        torch._foreach_add_([state.adam.state[tensor]["step"] for tensor in state.trained.values()], 1)
        squared_error, variance = result.squared_error, result.total_variance
        aux_loss = self._aux_loss if plan.bucket else None
        state.record(
            squared_error / variance, squared_error, variance, result.firings, config.batch_size, self.scalars[2],
            aux_loss,
        )  # fmt: skip

    def _shadowed(self) -> "Parameters":
        """The parameters with shadows of their present values; made once, then kept up by every step."""
        if self._parameters is None:
            from sae.kernels.triton import Moments, Parameters

            state, sae = self.state, self.state.sae

            def moments(name: str, parameter: Tensor) -> Moments:
                if name not in state.trained:
                    # A frozen decoder has none, and the step does not touch them.
                    return Moments(parameter, parameter)
                kept = state.adam.state[state.trained[name]]
                return Moments(kept["exp_avg"], kept["exp_avg_sq"])

            W_enc, W_dec, b_enc, b_dec = sae.W_enc.data.T, sae.W_dec.data, sae.b_enc.data, sae.b_dec.data
            self._parameters = Parameters.with_shadows(
                W_enc, W_dec, b_enc, b_dec,
                moments("W_enc", W_enc), moments("W_dec", W_dec), moments("b_enc", b_enc), moments("b_dec", b_dec),
                self.precision,
            )  # fmt: skip
        return self._parameters
