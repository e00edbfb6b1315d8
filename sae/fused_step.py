"""The training step on an NVIDIA GPU, made of `sae.kernels.triton`: what `sae.plain_step` does, for nearly every rule.

1. A step is planned from what the host knows: the rule that chooses, with its k, and room for the features to revive,
   of which the last report told the number. Those that die between two reports beyond that room wait for the next.
2. Steps with the same plan do the same work on the same memory. The first ones run as they are, which compiles and
   warms up; then the step is captured as a CUDA graph and replayed.
3. Everything that changes from step to step - learning rate, Adam's corrections, the densities' rate - is read from
   a table on the device, uploaded ahead. A step waits for nothing, but where a rule's encoder has to ask the device in
   its midst (`FusedEncoder.settle`, `sae.fused_thresholds`): then it is several graphs, of which the last learns.

Weights and Adam's moments are fp32 and lie where `TrainingState` has them: checkpoints and finished SAEs are the
same. The bf16 shadows that products read are made anew when training starts or resumes; they are a function of the
weights. Adam runs feature by feature while a gradient is made; where gradients are clipped, which needs the norm of
all of them, they are written to memory first. A transcoder's step takes two arrays of rows, what its encoder reads and
what it predicts. Not fused, and so on the plain path: a k above 512, more than 16 reconstructions of a token (prefixes,
and twice as many with multi-k), rules without a fused encoder, transcoders between activations of different widths,
and machines without triton; over several ranks, threshold rules of features that cannot be shared out evenly.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae import kernels
from sae.code import SparseCode
from sae.config import TrainConfig
from sae.fused_parts import Part, Program, StepPlan
from sae.fused_thresholds import ThresholdProgram
from sae.optim import EPS
from sae.plain_step import MULTI_K, PlainStep
from sae.rules import CodeRule, FusedEncoder, FusedInputs, ThresholdRule
from sae.state import TrainingState

if TYPE_CHECKING:
    from sae.kernels.triton import (
        AdamStep,
        AuxGradients,
        Centred,
        CentredRows,
        Errors,
        KernelSizes,
        Nesting,
        Parameters,
        StepResult,
    )

Narrow = Callable[[SparseCode], Bool[Tensor, "entries"]]
"""The entries of a code at a larger k that the code at k has too."""
TABLE_STEPS = 1024
"""Steps whose scalars are uploaded at once."""
MAX_RECONSTRUCTIONS = 16
"""Reconstructions whose sums a kernel's program holds in registers."""


WIDER_WINDOW = 128
"""`KernelSizes.window` of multi-k, whose features have four times as many entries."""


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
    # The kernels make a feature's two rows in one pass over their columns.
    fused = fused and state.sae.d_in == state.sae.d_out and not _weighs_parts(state)
    if isinstance(state.config.rule, ThresholdRule):
        # Ranks add up chunks of rows whose number depends on how many features they have.
        fused = fused and state.config.d_sae % state.shards.size == 0
    return FusedStep(state) if fused else PlainStep(state)


def _weighs_parts(state: TrainingState) -> bool:
    """Whether the penalty is a crosscoder's, which counts features by their decoder norms in the parts."""
    rule = state.config.rule
    return bool(state.parts) and isinstance(rule, ThresholdRule) and bool(rule.shrinkage(1.0, 1))


def can_be_fused(config: TrainConfig) -> bool:
    """Whether the fused step can train this on a GPU; see the module's description for what it cannot."""
    rule = config.rule
    if isinstance(rule, ThresholdRule):
        return True
    if not isinstance(rule, CodeRule) or not rule.has_fused_encoder():
        return False
    if max(1, len(config.widths)) * (2 if config.multi_k else 1) > MAX_RECONSTRUCTIONS:
        return False
    largest = max(rule.k, config.anneal_from_k or 0) * (MULTI_K if config.multi_k else 1)
    return min(largest, config.d_sae) <= kernels.MAX_K


def _first_entries(code: SparseCode, k: int) -> Bool[Tensor, "entries"]:
    """The first k entries of every token of a code that has as many of each."""
    n, width = code.values.shape
    return (torch.arange(width, device=code.values.device) < k).expand(n, width).reshape(-1)


def _copied(rows: Float[Tensor, "n d"], room: Float[Tensor, "n d"] | None) -> Float[Tensor, "n d"]:
    """`rows` in `room`, which is made where there is none yet."""
    return rows.clone() if room is None else room.copy_(rows)


class FusedStep:
    """Steps of `state`, whose configuration `can_be_fused`.

    Args:
        state: what is trained; a transcoder reads as many numbers as it writes.
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
        self.min_bucket, self.capture = min_bucket, capture and on_gpu
        # A shard's scores are narrower: as many more rows of them at once.
        at_once = state.config.batch_size // 16 * (state.shards.size if state.shards.size > 1 else 0)
        window = WIDER_WINDOW if state.config.multi_k else SIZES.window
        self.sizes = sizes or replace(SIZES, min_rows=max(SIZES.min_rows, at_once), window=window)
        # This step's learning rate and correction for Adam, the densities' rate, and the penalty's weight and target.
        self.scalars = torch.zeros(5, device=state.device)
        self._aux_loss = torch.zeros((), device=state.device)
        self._table: tuple[int, Tensor] | None = None
        self._parameters: Parameters | None = None
        self._rows: CentredRows | None = None
        self._batch: Tensor | None = None
        self._gradients: Tensor | None = None
        self._target: Tensor | None = None
        self._centred: Centred | None = None
        self._code: SparseCode | None = None
        self._errors: Errors | None = None
        self._plan: StepPlan | None = None
        self._program: Program | ThresholdProgram | None = None
        self._nesting = self._new_nesting()

    @property
    def is_captured(self) -> bool:
        """Whether the last step's plan is replayed as CUDA graphs."""
        return self._program is not None and self._program.is_captured

    @torch.no_grad()
    def __call__(
        self,
        batch: Float[Tensor, "n d_in"],
        step: int,
        gradients: Float[Tensor, "n d_out"] | None = None,
        target: Float[Tensor, "n d_out"] | None = None,
    ) -> None:
        """See `PlainStep`."""
        # Triton launches, and graphs are captured, on the current device.
        with torch.cuda.device_of(self.scalars):
            self._receive(batch, gradients, target)
            self._set_scalars(step)
            plan = self.plan_of(step)
            if self._program is None or plan != self._plan:
                # The old one's graphs and memory go before the new one takes its own.
                self._program = None
                self._plan, self._program = plan, self._new_program(plan)
            self._program()

    def plan_of(self, step: int) -> StepPlan:
        """What a step does; asks the device where the number of features to revive is not known."""
        config = self.state.config
        bucket = 0
        n_revivable = self.state.last_revivable() if config.has_aux(step) else 0
        if n_revivable:
            bucket = max(self.min_bucket, 1 << (n_revivable - 1).bit_length())
            # All may be one rank's, and the smallest has so many features.
            bucket = min(config.d_sae // self.state.shards.size, bucket)
        if not isinstance(config.rule, CodeRule):
            return StepPlan(config.rule, bucket)
        return StepPlan(config.rule.stage(step / config.n_steps).at_k(config.k_at(step)), bucket)

    def _receive(self, batch: Tensor, gradients: Tensor | None, target: Tensor | None) -> None:
        """Centres a batch to where the step reads it, or copies a transcoder's two; copies the gradients."""
        from sae.kernels import triton as fast

        if target is None:
            # Out of the batch's own memory, which is another each time, and so before what is captured.
            state, p = self.state, self.shadowed()
            self._rows = fast.centre_rows(batch, state.input_scale, p.b_dec, p.shadows.dtype, into=self._rows)
        else:
            self._batch, self._target = _copied(batch, self._batch), _copied(target, self._target)
        if gradients is not None:
            self._gradients = _copied(gradients, self._gradients)

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

    def _scalars_at(self, step: int) -> tuple[float, float, float, float, float]:
        from sae.kernels.triton import step_scalars

        config = self.state.config
        sparsity, target = 0.0, None
        if isinstance(config.rule, ThresholdRule):
            sparsity, target = config.sparsity_at(step), config.target_at(step)
        adam = step_scalars(config.lr_at(step), step + 1, config.betas)
        return (*adam, config.density_rate(step), sparsity, target or 0.0)

    def _new_nesting(self) -> "Nesting | None":
        from sae.kernels.triton import Nesting

        config = self.state.config
        if not config.widths and not config.multi_k:
            return None
        return Nesting.of(self.state.own_span, config.widths, config.multi_k, self.state.device)

    def _encoders(self, rule: CodeRule) -> tuple[FusedEncoder, Narrow | None]:
        """What encodes: with multi-k at the larger k, and then also what finds the code at the rule's own in it."""
        config, density = self.state.config, self.state.density
        inputs = FusedInputs(
            config.batch_size, self.state.sae.d_sae, self.shadowed().shadows, density, self._gradients, self.sizes
        )  # fmt: skip
        encoder = rule.fused_encoder(inputs)
        if not config.multi_k:
            return encoder, None
        narrow = encoder.narrow or partial(_first_entries, k=rule.k)
        return rule.at_k(min(MULTI_K * rule.k, config.d_sae)).fused_encoder(inputs), narrow

    def _new_program(self, plan: StepPlan) -> "Program | ThresholdProgram":
        """The step of a plan; every tensor it meets belongs to this step or its state."""
        if not isinstance(plan.rule, CodeRule):
            return ThresholdProgram(self, plan)
        from sae.kernels import triton as fast

        parameters = self.shadowed()
        weights = parameters.padded_enc.T, parameters.b_enc
        encoder, narrow = self._encoders(plan.rule)
        capture = self.capture and encoder.captured
        by_rows = self.state.shards.size > 1 and encoder.by_rows and plan.rule.fuses_among() and self._nesting is None

        def prepare() -> None:
            assert encoder.prepare is not None
            side = fast.Side(self.state.device)
            self._centred = side.run(self.centre) if self._rows is not None else self.centre()
            encoder.prepare(self._centred.x, *weights)
            side.join()

        def encode() -> None:
            side = fast.Side(self.state.device)
            if encoder.prepare is None:
                self._centred = side.run(self.centre) if self._rows is not None else self.centre()
            assert self._centred is not None
            if by_rows:
                self._code = self._encode_over_ranks(self._centred, encoder)
            else:
                self._code = encoder.encode(self._centred.x, *weights)
            side.join()

        def learn() -> None:
            self._learn(plan, narrow)

        if encoder.settle is None:

            def whole() -> None:
                encode()
                learn()

            return Program((Part(whole, capture=capture),))
        settle = encoder.settle

        def look() -> None:
            assert self._centred is not None
            settle(self._centred.x, *weights)

        first = None if encoder.prepare is None else Part(prepare, capture=capture)
        second = Part(encode, capture=capture, after=first)
        parts = (second,) if first is None else (first, second)
        seen = torch.cuda.Event() if self.state.device.type == "cuda" else None
        return Program((*parts, Part(learn, capture=capture, after=second)), look, seen)

    def _encode_over_ranks(self, centred: "Centred", encoder: FusedEncoder) -> SparseCode:
        """This rank's part of the choice of all, with the errors on their way."""
        from sae.kernels import triton as fast

        p, shards = self.shadowed(), self.state.shards
        self._errors = fast.Errors(centred.target, p.shadow_dec, shards)
        return fast.encode_over_ranks(
            centred.x,
            lambda rows: encoder.encode(rows, p.padded_enc.T, p.b_enc),
            self._errors,
            self.sizes.pieces,
            shards,
        )

    def centre(self) -> "Centred":
        """The batch as the encoder reads it and as the features are to write it."""
        from sae.kernels import triton as fast

        if self._rows is not None:
            return fast.spread(self._rows)
        assert self._batch is not None
        assert self._target is not None
        state, p = self.state, self.shadowed()
        scales = state.input_scale, state.output_scale
        return fast.centre_pair(self._batch, self._target, scales, p.b_dec, p.W_skip, p.shadows.dtype)

    def _learn(self, plan: StepPlan, narrow: Narrow | None) -> None:
        """All that follows the encoder, for a rule with a k."""
        from sae.kernels import triton as fast

        centred, code = self._centred, self._code
        assert centred is not None
        assert code is not None
        config, shards = self.state.config, self.state.shards
        errors, self._errors = self._errors, None
        assert isinstance(plan.rule, CodeRule)
        kept = None
        if shards.size > 1 and errors is None:
            code, kept = self._among(plan.rule, code)
        elif narrow is not None:
            kept = narrow(code)
        parts = None if self._nesting is None else self._nesting.parts_of(code, kept)
        fast.learn(
            centred, code, self.shadowed(), self.state.tokens_since_fired, self.adam(),
            decoder=not config.frozen_decoder, clip=config.clip_grad_norm, aux=self.aux(plan), parts=parts,
            errors=errors, sizes=self.sizes, beside=lambda result: self.record(result, plan),
        )  # fmt: skip

    def _among(self, rule: CodeRule, code: SparseCode) -> tuple[SparseCode, Bool[Tensor, "entries"] | None]:
        """This rank's entries among those that all choose; with multi-k at the larger k, and which are so at the
        rule's own."""
        config, shards = self.state.config, self.state.shards
        if not config.multi_k:
            return rule.among(code, config.batch_size, shards), None
        wider = rule.at_k(min(MULTI_K * rule.k, config.d_sae))
        own, missing = code, 0
        if code.offsets is None:
            # The first k of a token's list are its list at k.
            missing = code.values.shape[1] - rule.k
            own = SparseCode(code.values[:, : rule.k].contiguous(), code.indices[:, : rule.k].contiguous(), code.d_sae)
        kept = rule.among(own, config.batch_size, shards).values != 0
        kept = torch.nn.functional.pad(kept, (0, missing)).reshape(-1)
        return wider.among(code, config.batch_size, shards), kept

    def adam(self) -> "AdamStep":
        """This step's constants."""
        from sae.kernels.triton import AdamStep

        return AdamStep(self.scalars[:2], *self.state.config.betas, EPS)

    def aux(self, plan: StepPlan) -> "Callable[[StepResult], AuxGradients] | None":
        """What makes the auxiliary loss's gradients, where a step has one."""
        from sae.kernels import triton as fast

        if not plan.bucket:
            return None
        state = self.state

        def make(result: "StepResult") -> "AuxGradients":
            made, loss = fast.aux_gradients(
                self.shadowed(), state.revivable(), result.residual, result.x_centred, plan.bucket,
                state.config.aux_coefficient, signed=plan.rule.signed,
            )  # fmt: skip
            self._aux_loss.copy_(loss)
            return made

        return make

    def record(self, result: "StepResult", plan: StepPlan, penalty: Float[Tensor, ""] | None = None) -> None:
        """Counts a step of Adam's, and adds what it has made to the sums of the next report.

        Args:
            penalty: part of the loss that is no error.
        """
        from sae.kernels import triton as fast

        state = self.state
        torch._foreach_add_([state.adam.state[tensor]["step"] for tensor in state.trained.values()], 1)
        fast.add_to_report(
            state.density, state.totals, result.firings, state.config.batch_size, self.scalars[2],
            result.loss, result.squared_error, result.total_variance, penalty, self._aux_loss if plan.bucket else None,
        )  # fmt: skip

    def shadowed(self) -> "Parameters":
        """The parameters with shadows of their present values; made once, then kept up by every step."""
        if self._parameters is None:
            from sae.kernels.triton import Moments, Parameters

            state, sae = self.state, self.state.sae
            state.settle()

            def moments(name: str, parameter: Tensor) -> Moments:
                if name not in state.trained:
                    # A frozen decoder has none, and the step does not touch them.
                    return Moments(parameter, parameter)
                kept = state.adam.state[state.trained[name]]
                return Moments(kept["exp_avg"], kept["exp_avg_sq"])

            W_enc, W_dec, b_enc, b_dec = sae.W_enc.data.T, sae.W_dec.data, sae.b_enc.data, sae.b_dec.data
            made = Parameters.with_shadows(
                W_enc, W_dec, b_enc, b_dec,
                moments("W_enc", W_enc), moments("W_dec", W_dec), moments("b_enc", b_enc), moments("b_dec", b_dec),
                self.precision,
            )  # fmt: skip
            W_skip = state.trained.get("W_skip")
            self._parameters = made = replace(
                made, subtracts_b_dec=sae.subtracts_b_dec, W_skip=W_skip, ranks=state.shards,
                m_W_skip=None if W_skip is None else moments("W_skip", W_skip),
                norms=None if state.config.clip_grad_norm else torch.ones(sae.d_sae, device=state.device),
            )  # fmt: skip
            state.settle = made.settle
        return self._parameters
