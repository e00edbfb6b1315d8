"""Training: several SAEs side by side on one stream of batches.

For every SAE and batch x (scaled so that the mean norm of a token is sqrt(d_in)):

1. code = rule(x - b_dec), x_hat = decode(code), loss and gradients (`sae.passes`, `sae.losses`): the plain error or
   the Matryoshka loss, a sparsity penalty for rules that have one, the same again at 4 k for multi-k;
2. gradients of the auxiliary loss for features that have not fired for a while, or too rarely;
3. the decoder gradient's component along each decoder row is removed, the gradients are clipped if asked for, Adam
   steps, rows are renormalised.

No dense [tokens, features] decode or backward exists. The input scale is folded in when an SAE is finished, so
what is returned works on raw activations. Rules that choose over a batch then measure their thresholds on the batches
that would have come next, which are not trained on unless all activations are.

Nothing here draws random numbers after initialisation and every sum has a fixed order, so a run resumed from a
checkpoint ends in the same bits as one that was never stopped (on the same device, with the same number of threads
and the same torch).
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae import checkpoint, rules
from sae.errors import InputError
from sae.fused_state import new_state
from sae.interrupts import deferred_interrupt
from sae.model import SAE
from sae.rules import AuxKind, CodeRule, Rule, ThresholdRule, TopK
from sae.state import ANNEAL_SHARE, TrainingState

BDecInit = Literal["geometric_median", "mean", "zero"]
LR_AT_16K = 2e-3
"""Ten times Gao et al.'s 2e-4, which is for billions of tokens. Held-out FVU on the demo model (k 32, batch 4096):
d_sae 4096, 2M tokens: 0.222, 0.105, 0.082 at 4e-4, 2e-3, 4e-3; 20M: 0.070, 0.052, 0.050; d_sae 16384, 2M: 0.227,
0.092, 0.070. At 8e-3 features begin to die."""
MAX_DEAD_AFTER = 10_000_000
SAMPLE_ROWS = 16_384
"""Rows from which the input scale and b_dec's starting value are taken."""
REPORTS_PER_RUN = 200
CALIBRATION_ROWS = 32_768
"""Rows on which thresholds are measured. With k = 32 the relative error of L0 is below 1%."""


@dataclass(frozen=True)
class TrainConfig:
    """What one SAE is and how it is trained."""

    name: str
    total_tokens: int
    d_sae: int = 4096
    rule: Rule = field(default_factory=lambda: TopK(32))
    lr: float | None = None
    """Peak learning rate; LR_AT_16K * sqrt(2^14 / d_sae), Gao et al.'s (2024) scaling with the width, when None."""
    batch_size: int = 4096
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.2
    """Share of the steps over which it falls to zero at the end."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad_norm: float | None = None
    """Largest norm of all gradients together; None for no limit. For the loss in SAELens' and dictionary_learning's
    units, squared error a token of inputs with mean norm sqrt(d_in), so that their 1 is 1 here."""
    sparsity_coefficient: float | None = None
    """Weight of the penalty of rules without a k; the rule's default when None."""
    sparsity_warmup: float = 0.05
    """Share of the steps over which that weight rises from 0."""
    aux: AuxKind | None = None
    """The auxiliary loss: none, aux_k or aux_zipf; the rule's default when None."""
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int | None = None
    """A feature is dead when it has not fired for this long; min(10M, a tenth of the budget) when None."""
    b_dec_init: BDecInit = "geometric_median"
    normalize_input: bool = True
    frozen_decoder: bool = False
    """Keeps the decoder at its random start: the baseline that shows what the encoder alone can do."""
    matryoshka: tuple[int, ...] = ()
    """Widths of nested prefixes that each reconstruct; d_sae is added. Empty for the plain error."""
    multi_k: float = 0.0
    """Weight of the error at 4 k, so that codes stay useful beyond k; Gao et al. take 1/8."""
    anneal_from_k: int | None = None
    """k of the first step; it goes to the rule's own linearly over the first 70% of the steps."""
    seed: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Matryoshka's prefixes up to d_sae."""
        if not self.matryoshka or self.matryoshka[-1] == self.d_sae:
            return self.matryoshka
        return (*self.matryoshka, self.d_sae)

    @property
    def aux_kind(self) -> AuxKind:
        """The auxiliary loss: the one asked for, or the rule's default."""
        return self.aux if self.aux is not None else self.rule.default_aux

    def k_at(self, step: int) -> int:
        """k of a step: round(k0 (1 - p) + k p) with p = step / (0.7 n_steps), at most 1."""
        assert isinstance(self.rule, CodeRule)
        if self.anneal_from_k is None:
            return self.rule.k
        done = min(1.0, step / (ANNEAL_SHARE * self.n_steps))
        return round(self.anneal_from_k * (1 - done) + self.rule.k * done)

    def sparsity_at(self, step: int) -> float:
        """Weight of the sparsity penalty at a step."""
        assert isinstance(self.rule, ThresholdRule)
        peak = self.rule.default_sparsity if self.sparsity_coefficient is None else self.sparsity_coefficient
        return peak * min(1.0, (step + 1) / max(1.0, self.sparsity_warmup * self.n_steps))

    @property
    def peak_lr(self) -> float:
        """The learning rate asked for, or LR_AT_16K sqrt(2^14 / d_sae): falling with width as in Gao et al. 2024."""
        return self.lr if self.lr is not None else LR_AT_16K * math.sqrt(2**14 / self.d_sae)

    @property
    def n_steps(self) -> int:
        """Number of steps: total_tokens / batch_size, rounded."""
        return max(1, round(self.total_tokens / self.batch_size))

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a feature counts as dead."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(1, min(MAX_DEAD_AFTER, self.total_tokens // 10))

    def has_aux(self, step: int) -> bool:
        """Whether a step adds the auxiliary loss: not before any feature can have died."""
        return self.aux_kind != "none" and self.aux_coefficient != 0 and step * self.batch_size >= self.dead_after

    def density_rate(self, step: int) -> float:
        """Weight of a step's batch in the running densities.

        A plain mean over the first steps, then one that forgets over as many tokens as make a feature dead.
        """
        return min(1.0, max(self.batch_size / self.dead_after, 1 / (step + 1)))

    def check(self) -> None:
        """Raises InputError for settings that cannot be trained with."""
        if self.batch_size < 2 or self.total_tokens < 1:
            raise InputError(
                f"{self.name}: needs at least 2 tokens a batch and 1 in all, "
                f"got {self.batch_size} and {self.total_tokens}"
            )
        self.rule.check(self.d_sae, self.batch_size)
        self._check_losses()
        if not 0 <= self.seed < 2**63:
            raise InputError(f"{self.name}: the seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")
        if not (0 < self.peak_lr < math.inf):
            raise InputError(f"{self.name}: the learning rate must be positive, got {self.lr}")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise InputError(f"{self.name}: dead_after_tokens must be at least 1, got {self.dead_after_tokens}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"{self.name}: betas are two numbers from 0 to below 1, got {self.betas}")
        # Written so that NaN fails too.
        if not (min(self.warmup, self.decay) >= 0 and self.warmup + self.decay <= 1):
            raise InputError(
                f"{self.name}: warm-up and decay are shares of the steps and at most 1 together, "
                f"got {self.warmup} and {self.decay}"
            )
        if self.b_dec_init not in get_args(BDecInit):
            raise InputError(
                f"{self.name}: unknown b_dec_init {self.b_dec_init!r}: choose {', '.join(get_args(BDecInit))}"
            )

    def _check_losses(self) -> None:
        if self.aux is not None and self.aux not in get_args(AuxKind):
            raise InputError(f"{self.name}: unknown aux {self.aux!r}: choose {', '.join(get_args(AuxKind))}")
        if isinstance(self.rule, ThresholdRule):
            unused: dict[str, Any] = {
                "matryoshka": self.matryoshka,
                "multi_k": self.multi_k,
                "anneal_from_k": self.anneal_from_k,
            }
            given = [name for name, value in unused.items() if value]
            if given:
                raise InputError(f"{self.name}: {given[0]} needs a rule with a k, and {self.rule.name} has none")
        elif self.sparsity_coefficient is not None:
            raise InputError(
                f"{self.name}: sparsity_coefficient is for relu and jumprelu; set k to make {self.rule.name} sparser"
            )
        if not (0 <= self.sparsity_warmup <= 1):
            raise InputError(f"{self.name}: sparsity_warmup is a share of the steps, got {self.sparsity_warmup}")
        if self.clip_grad_norm is not None and not 0 < self.clip_grad_norm < math.inf:
            raise InputError(f"{self.name}: clip_grad_norm must be positive, or none, got {self.clip_grad_norm}")
        for name, value in (("sparsity_coefficient", self.sparsity_coefficient), ("multi_k", self.multi_k)):
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{self.name}: {name} must be 0 or larger, got {value}")
        edges = (0, *self.widths)
        if any(a >= b for a, b in itertools.pairwise(edges)) or edges[-1] > self.d_sae:
            raise InputError(
                f"{self.name}: matryoshka widths must rise from 1 to at most {self.d_sae}, got {list(self.matryoshka)}"
            )
        if self.anneal_from_k is not None and not 1 <= self.anneal_from_k <= self.d_sae:
            raise InputError(
                f"{self.name}: anneal_from_k must lie between 1 and {self.d_sae}, got {self.anneal_from_k}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON; `from_dict` is the inverse."""
        lists: dict[str, Any] = {"betas": list(self.betas), "matryoshka": list(self.matryoshka)}
        return {**asdict(self), "rule": rules.to_dict(self.rule), **lists}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`. Raises InputError for an unknown rule or settings it does not have."""
        lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("betas", "matryoshka") if name in fields}
        return cls(**{**fields, "rule": rules.from_dict(fields["rule"]), **lists})


class BatchSource(Protocol):
    """An endless, shuffled, resumable stream of activations."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        """The next n rows."""

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """At most n rows, always the same ones; does not move the stream."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""


@runtime_checkable
class GradientSource(BatchSource, Protocol):
    """A stream that also has the gradients of the model's loss at the activations."""

    def next_pair(self, n: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
        """Activations and gradients of the next n rows."""


@dataclass(frozen=True)
class StepMetrics:
    """A report on one SAE: means over the steps since the last report."""

    name: str
    step: int
    tokens: int
    total_tokens: int
    loss: float
    fvu: float
    """Ratio of sums over the reported steps."""
    l0: float
    dead_share: float
    aux_loss: float
    lr: float
    seconds: float
    """Wall-clock seconds of training so far, in this process."""


@dataclass(frozen=True)
class TrainedSAE:
    """What became of one configuration: a finished SAE, or the reason why there is none."""

    config: TrainConfig
    sae: SAE | None
    error: str | None = None


def train(
    configs: Sequence[TrainConfig],
    source: BatchSource,
    *,
    device: torch.device | str = "cpu",
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    on_metrics: Callable[[StepMetrics], None] | None = None,
    hook_name: str = "",
    model_name: str = "",
) -> list[TrainedSAE]:
    """Trains SAEs on one stream of batches.

    Args:
        configs: one per SAE; all with the same batch size and number of tokens.
        source: where batches come from.
        device: where the SAEs live.
        checkpoint_dir: folder for checkpoints; none are written when None. One is also written on Ctrl-C, at the
            end of the step, before KeyboardInterrupt is raised.
        checkpoint_seconds: time between checkpoints.
        resume: continue from the checkpoint in `checkpoint_dir`, if there is one.
        on_metrics: called with every SAE's metrics about 200 times a run.
        hook_name, model_name: recorded in the SAEs.

    Returns:
        One entry per configuration. A configuration whose loss stops being finite has an error and no SAE; the
        others go on.

    Raises:
        InputError: no or clashing configurations, a rule without the gradients it needs, or a checkpoint that does
            not belong to them.
        KeyboardInterrupt: stopped with Ctrl-C; the same call with `resume=True` goes on.
    """
    check_configs(configs)
    next_rows = _stream(configs, source, torch.device(device))
    states = [new_state(config, source.d_in, torch.device(device)) for config in configs]
    step = 0
    restored = checkpoint.load(checkpoint_dir, states, source) if resume and checkpoint_dir is not None else None
    if restored is None:
        sample = source.sample(SAMPLE_ROWS).to(device, torch.float32)
        for state in states:
            state.initialise(sample)
    else:
        step = restored
    n_steps, batch_size = configs[0].n_steps, configs[0].batch_size
    report_every = max(1, n_steps // REPORTS_PER_RUN)
    started = last_checkpoint = time.monotonic()
    with deferred_interrupt() as interrupt:
        while step < n_steps and any(state.error is None for state in states):
            batch, gradients = next_rows(batch_size)
            for state in states:
                if state.error is None:
                    _step(state, batch, step, gradients, alone=len(states) == 1)
            step += 1
            if step % report_every == 0 or step == n_steps:
                for state in states:
                    _report(state, step, time.monotonic() - started, on_metrics)
            due = interrupt.pressed or time.monotonic() - last_checkpoint >= checkpoint_seconds
            if checkpoint_dir is not None and due:
                checkpoint.save(checkpoint_dir, states, source, step)
                last_checkpoint = time.monotonic()
            if interrupt.pressed:
                raise KeyboardInterrupt
    return _finish(states, source, next_rows, hook_name, model_name)


NextRows = Callable[[int], tuple[Tensor, Tensor | None]]


def _stream(configs: Sequence[TrainConfig], source: BatchSource, device: torch.device) -> NextRows:
    """How the next activations, and gradients if a rule needs them, are had."""
    hungry = next((config.rule.name for config in configs if config.rule.needs_gradients), None)
    if hungry is None:
        return lambda n: (source.next_batch(n).to(device, torch.float32), None)
    if not isinstance(source, GradientSource):
        raise InputError(f"the rule {hungry} needs gradients: harvest with --gradients and train on that harvest")

    def next_pair(n: int) -> tuple[Tensor, Tensor]:
        activations, gradients = source.next_pair(n)
        return activations.to(device, torch.float32), gradients.to(device, torch.float32)

    return next_pair


def _finish(
    states: Sequence[TrainingState], source: BatchSource, next_rows: NextRows, hook_name: str, model_name: str
) -> list[TrainedSAE]:
    sample: Tensor | None = None
    gradients: Tensor | None = None
    if any(state.error is None and state.config.rule.needs_calibration for state in states):
        place = source.state_dict()
        sample, gradients = next_rows(CALIBRATION_ROWS)
        source.load_state_dict(place)
    results = []
    for state in states:
        if state.error is None:
            sae = state.finish(hook_name=hook_name, model_name=model_name, sample=sample, sample_gradients=gradients)
            results.append(TrainedSAE(state.config, sae))
        else:
            results.append(TrainedSAE(state.config, None, state.error))
    return results


def _step(state: TrainingState, batch: Tensor, step: int, gradients: Tensor | None, *, alone: bool) -> None:
    """A step; beside others, one that fails - by running out of memory, say - takes only itself out."""
    try:
        state.step(batch, step, gradients)
    except RuntimeError as error:
        if alone:
            raise
        state.error = f"step {step + 1} failed: {(str(error).splitlines() or [type(error).__name__])[0]}"


def check_configs(configs: Sequence[TrainConfig]) -> None:
    """Raises InputError for configurations that cannot be trained together."""
    if not configs:
        raise InputError("nothing to train: give at least one configuration")
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise InputError(f"SAE names must differ, got {', '.join(names)}")
    if len({(config.batch_size, config.n_steps) for config in configs}) > 1:
        raise InputError("SAEs trained on one stream need the same batch size and number of tokens")
    for config in configs:
        config.check()


def _report(state: TrainingState, step: int, seconds: float, on_metrics: Callable[[StepMetrics], None] | None) -> None:
    if state.error is not None:
        return
    totals = state.read_totals()
    if not math.isfinite(totals.loss):
        state.error = f"the loss stopped being finite by step {step}: try a lower learning rate"
        return
    if on_metrics is not None:
        on_metrics(
            StepMetrics(
                name=state.config.name,
                step=step,
                tokens=step * state.config.batch_size,
                total_tokens=state.config.n_steps * state.config.batch_size,
                loss=totals.loss,
                fvu=totals.fvu,
                l0=totals.l0,
                dead_share=totals.dead_share,
                aux_loss=totals.aux_loss,
                lr=state.last_lr,
                seconds=seconds,
            )
        )
