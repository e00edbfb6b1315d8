"""Training: several SAEs side by side on one stream of batches.

For every SAE and batch x (scaled so that the mean norm of a token is sqrt(d_in)):

1. code = rule(x - b_dec), x_hat = decode(code);
2. loss and its gradient with respect to x_hat (`sae.losses`), parameter gradients from the sparse code
   (`sae.kernels.gradients`), aux-k gradients for features that have not fired for a while;
3. the decoder gradient's component along each decoder row is removed, Adam steps, rows are renormalised.

No dense [tokens, features] decode or backward exists. The input scale is folded in when an SAE is finished, so
what is returned works on raw activations. Nothing here draws random numbers after initialisation and every sum has
a fixed order, so a run resumed from a checkpoint ends in the same bits as one that was never stopped (on the same
device, with the same number of threads and the same torch).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae import checkpoint, rules
from sae.errors import InputError
from sae.interrupts import deferred_interrupt
from sae.model import SAE
from sae.rules import Rule, TopK
from sae.state import TrainingState

BDecInit = Literal["geometric_median", "mean", "zero"]
LR_AT_16K = 2e-3
"""Ten times Gao et al.'s 2e-4, which is for billions of tokens. Held-out FVU on the demo model (k 32, batch 4096):
d_sae 4096, 2M tokens: 0.222, 0.105, 0.082 at 4e-4, 2e-3, 4e-3; 20M: 0.070, 0.052, 0.050; d_sae 16384, 2M: 0.227,
0.092, 0.070. At 8e-3 features begin to die."""
MAX_DEAD_AFTER = 10_000_000
SAMPLE_ROWS = 16_384
"""Rows from which the input scale and b_dec's starting value are taken."""
REPORTS_PER_RUN = 200


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
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int | None = None
    """A feature is dead when it has not fired for this long; min(10M, a tenth of the budget) when None."""
    b_dec_init: BDecInit = "geometric_median"
    normalize_input: bool = True
    frozen_decoder: bool = False
    """Keeps the decoder at its random start: the baseline that shows what the encoder alone can do."""
    seed: int = 0

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else LR_AT_16K * math.sqrt(2**14 / self.d_sae)

    @property
    def n_steps(self) -> int:
        return max(1, round(self.total_tokens / self.batch_size))

    @property
    def dead_after(self) -> int:
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(1, min(MAX_DEAD_AFTER, self.total_tokens // 10))

    def check(self) -> None:
        """Raises InputError for settings that cannot be trained with."""
        self.rule.check(self.d_sae)
        if self.batch_size < 2 or self.total_tokens < 1:
            raise InputError(
                f"{self.name}: needs at least 2 tokens a batch and 1 in all, "
                f"got {self.batch_size} and {self.total_tokens}"
            )
        if not (0 < self.peak_lr < math.inf):
            raise InputError(f"{self.name}: the learning rate must be positive, got {self.lr}")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise InputError(
                f"{self.name}: warm-up and decay are shares of the steps and at most 1 together, "
                f"got {self.warmup} and {self.decay}"
            )
        if self.b_dec_init not in get_args(BDecInit):
            raise InputError(
                f"{self.name}: unknown b_dec_init {self.b_dec_init!r}: choose {', '.join(get_args(BDecInit))}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON; `from_dict` is the inverse."""
        return {**asdict(self), "rule": rules.to_dict(self.rule), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        return cls(**{**fields, "rule": rules.from_dict(fields["rule"]), "betas": tuple(fields["betas"])})


class BatchSource(Protocol):
    """An endless, shuffled, resumable stream of activations."""

    @property
    def d_in(self) -> int: ...

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        """The next n rows."""

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """At most n rows, always the same ones; does not move the stream."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""


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
        InputError: no or clashing configurations, or a checkpoint that does not belong to them.
        KeyboardInterrupt: stopped with Ctrl-C; the same call with `resume=True` goes on.
    """
    _check(configs)
    states = [TrainingState(config, source.d_in, torch.device(device)) for config in configs]
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
            batch = source.next_batch(batch_size).to(device, torch.float32)
            for state in states:
                if state.error is None:
                    state.step(batch, step)
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
    return [
        TrainedSAE(
            state.config,
            None if state.error else state.finish(hook_name=hook_name, model_name=model_name),
            state.error,
        )
        for state in states
    ]


def _check(configs: Sequence[TrainConfig]) -> None:
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
