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

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae import checkpoint
from sae.config import TrainConfig
from sae.errors import InputError
from sae.fused_step import Step, new_step
from sae.interrupts import deferred_interrupt
from sae.model import SAE
from sae.source import BatchSource, GradientSource
from sae.state import TrainingState

SAMPLE_ROWS = 16_384
"""Rows from which the input scale and b_dec's starting value are taken."""
REPORTS_PER_RUN = 200
CALIBRATION_ROWS = 32_768
"""Rows on which thresholds are measured. With k = 32 the relative error of L0 is below 1%."""


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
    make_step: Callable[[TrainingState], Step] = new_step,
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
        make_step: how an SAE's steps are made; the fastest way that its device and configuration allow.

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
    states = [TrainingState(config, source.d_in, torch.device(device)) for config in configs]
    steps = [make_step(state) for state in states]
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
            for state, make in zip(states, steps, strict=True):
                if state.error is None:
                    _step(state, make, batch, step, gradients, alone=len(states) == 1)
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
    needing = next((config.rule.name for config in configs if config.rule.needs_gradients), None)
    if needing is None:
        return lambda n: (source.next_batch(n).to(device, torch.float32), None)
    if not isinstance(source, GradientSource):
        raise InputError(f"the rule {needing} needs gradients: harvest with --gradients and train on that harvest")

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


def _step(
    state: TrainingState,
    make: Step,
    batch: Float[Tensor, "n d_in"],
    step: int,
    gradients: Float[Tensor, "n d_in"] | None,
    *,
    alone: bool,
) -> None:
    """A step; beside others, one that fails - by running out of memory, say - takes only itself out."""
    try:
        make(batch, step, gradients)
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
