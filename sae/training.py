"""Training: several SAEs, transcoders or crosscoders side by side on one stream of batches.

For every SAE and batch x (scaled so that the mean norm of a token is sqrt(d_in)):

1. code = rule(x - b_dec), x_hat = decode(code), loss and gradients (`sae.passes`, `sae.losses`): the plain error or
   the Matryoshka loss, a sparsity penalty for rules that have one, the same again at 4 k for multi-k;
2. gradients of the auxiliary loss for features that have not fired for a while, or too rarely;
3. the decoder gradient's component along each decoder row is removed, the gradients are clipped if asked for, Adam
   steps, rows are renormalised.

A crosscoder is an SAE of several activations side by side (`sae.crosscoder`): only its L1 penalty differs, in which a
feature counts by the sum of its decoder norms in the parts.

A transcoder encodes x and predicts y, each scaled by its own mean norm: 1 has rule(x) and y_hat, with a skip
y_hat = decode(code) + x W_skip^T, and all errors are of y.

No dense [tokens, features] decode or backward exists. The input scale is folded in when an SAE is finished, so
what is returned works on raw activations. Rules that choose over a batch then measure their thresholds on the batches
that would have come next, which are not trained on unless all activations are.

Nothing here draws random numbers after initialisation and every sum has a fixed order, so a run resumed from a
checkpoint ends in the same bits as one that was never stopped (on the same device, with the same number of threads
and the same torch).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae import checkpoint
from sae.config import TrainConfig
from sae.errors import InputError
from sae.fused_step import Step, new_step
from sae.interrupts import deferred_interrupt
from sae.ranks import ALONE, Ranks
from sae.sharing import Sharing, TrainedSAE
from sae.source import BatchSource, GradientSource, Pair, Part, PartSource, Rows, TargetSource
from sae.state import TrainingState

SAMPLE_ROWS = 16_384
"""Rows from which the input scale and b_dec's starting value are taken."""
REPORTS_PER_RUN = 200
MEANS = ("loss", "fvu", "l0", "dead_share", "aux_loss", "lr")
"""What a report says of training."""
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


def train(
    configs: Sequence[TrainConfig],
    source: BatchSource | TargetSource,
    *,
    pairs: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    on_metrics: Callable[[StepMetrics], None] | None = None,
    hook_name: str = "",
    model_name: str = "",
    make_step: Callable[[TrainingState], Step] = new_step,
    ranks: Ranks = ALONE,
) -> list[TrainedSAE]:
    """Trains SAEs on one stream of batches.

    Args:
        configs: one per SAE; all with the same batch size and number of tokens.
        source: where batches come from. A `TargetSource` makes transcoders, a `PartSource` crosscoders.
        pairs: for each configuration, which of that source's pairs of hook points it goes between; the first for all
            when None.
        device: where the SAEs live.
        checkpoint_dir: folder for checkpoints; none are written when None. One is also written on Ctrl-C, at the
            end of the step, before KeyboardInterrupt is raised.
        checkpoint_seconds: time between checkpoints.
        resume: continue from the checkpoint in `checkpoint_dir`, if there is one.
        on_metrics: called with every SAE's metrics about 200 times a run.
        hook_name, model_name: recorded in the SAEs; transcoders and crosscoders know theirs.
        make_step: how an SAE's steps are made; the fastest way that its device and configuration allow.
        ranks: those that train together, see `sae.sharing`; all of them call this alike, and `on_metrics` is called on
            the first.

    Returns:
        One entry per configuration, on the first of several ranks. A configuration whose loss stops being finite has an
        error and no SAE; the others go on.

    Raises:
        InputError: no or clashing configurations, a rule without the gradients it needs, a skip in an SAE, or a
            checkpoint that does not belong to them.
        KeyboardInterrupt: stopped with Ctrl-C; the same call with `resume=True` goes on.
    """
    check_configs(configs)
    sharing = Sharing(configs, ranks)
    stream = _Stream(configs, source, torch.device(device), sharing)
    states = stream.states(configs, pairs)
    steps = {number: make_step(state) for number, state in states.items()}
    resumable = resume and checkpoint_dir is not None
    step = checkpoint.load(checkpoint_dir, states, source, ranks) if resumable and checkpoint_dir is not None else None
    if step is None:
        step, sample = 0, stream.sample(SAMPLE_ROWS)
        for number, state in states.items():
            rows = stream.of(number, sample)
            state.initialise(rows.x, rows.target)
    run = _Run(states, steps, stream, checkpoint_dir, checkpoint_seconds, on_metrics)
    run.go_on_from(step)
    return _finish(configs, states, stream, hook_name, model_name, ranks)


@dataclass(frozen=True)
class _Run:
    """The steps of a run."""

    states: Mapping[int, TrainingState]
    steps: Mapping[int, Step]
    stream: "_Stream"
    checkpoint_dir: Path | None
    checkpoint_seconds: float
    on_metrics: Callable[[StepMetrics], None] | None

    def go_on_from(self, step: int) -> None:
        """Makes all steps that are left; see `train`."""
        sharing, states, ranks = self.stream.sharing, self.states, self.stream.sharing.ranks
        n_steps, batch_size = self.stream.n_steps, self.stream.batch_size
        report_every = max(1, n_steps // REPORTS_PER_RUN)
        started = last_checkpoint = time.monotonic()
        going = True
        with deferred_interrupt() as interrupt:
            while step < n_steps and going:
                batches = self.stream.next_rows(batch_size)
                for number, state in states.items():
                    if state.error is None:
                        rows = self.stream.of(number, batches)
                        _step(state, self.steps[number], rows, step, alone=sharing.is_alone)
                step += 1
                if step % report_every == 0 or step == n_steps:
                    _report(states, step, time.monotonic() - started, self.on_metrics, sharing)
                if not sharing.agrees_at(step, n_steps):
                    continue
                due = self.checkpoint_dir is not None and time.monotonic() - last_checkpoint >= self.checkpoint_seconds
                left = any(state.error is None for state in states.values())
                pressed, due, going = (bool(one) for one in ranks.most(interrupt.pressed, due and ranks.leads, left))
                if self.checkpoint_dir is not None and (pressed or due):
                    checkpoint.save(self.checkpoint_dir, states, self.stream.source, step, ranks)
                    last_checkpoint = time.monotonic()
                if pressed:
                    raise KeyboardInterrupt


class _Stream:
    """What training draws from: rows for every pair of hook points, one for all where there are no pairs."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        source: BatchSource | TargetSource,
        device: torch.device,
        sharing: Sharing,
    ) -> None:
        self.source, self.device, self.sharing = source, device, sharing
        self.n_steps, self.batch_size = configs[0].n_steps, configs[0].batch_size
        self.needing = next((config.rule.name for config in configs if config.rule.needs_gradients), None)
        self.of_state: list[int] = []
        self.hook_names: list[str] | None = None
        """What each state reads, where the source says it."""
        predicts = isinstance(source, TargetSource) and all(pair.target_hook_name for pair in source.pairs)
        skipping = next((config.name for config in configs if config.skip), None)
        if skipping is not None and not predicts:
            raise InputError(
                f"{skipping}: a skip goes past the features to another activation: give a target (--target-hook)"
            )
        if not isinstance(source, TargetSource):
            if self.needing is not None and isinstance(source, PartSource):
                raise InputError(
                    f"the rule {self.needing} weighs features by the loss at one hook point, and a crosscoder has "
                    "several: choose another rule"
                )
            if self.needing is not None and not isinstance(source, GradientSource):
                raise InputError(
                    f"the rule {self.needing} needs gradients: harvest with --gradients and train on that harvest"
                )

    def states(self, configs: Sequence[TrainConfig], pairs: Sequence[int] | None) -> dict[int, TrainingState]:
        """The states that this rank has, by the number of their configuration, each on its pair."""
        self.of_state = [0] * len(configs) if pairs is None else list(pairs)
        places: Sequence[int | Pair | Sequence[Part]]
        if isinstance(self.source, TargetSource):
            chosen = [self.source.pairs[pair] for pair in self.of_state]
            self.hook_names = [pair.hook_name for pair in chosen]
            places = [pair if pair.target_hook_name else pair.d_in for pair in chosen]
        else:
            places = [self.source.parts if isinstance(self.source, PartSource) else self.source.d_in] * len(configs)
        shards = self.sharing.shards
        return {
            number: TrainingState(configs[number], places[number], self.device, shards) for number in self.sharing.own
        }

    def of(self, number: int, rows: Sequence[Rows]) -> Rows:
        """The rows of a state."""
        return rows[self.of_state[number]]

    def next_rows(self, n: int) -> list[Rows]:
        """The next n rows of every pair, with gradients if a rule needs them."""
        if isinstance(self.source, TargetSource):
            return [self._here(rows) for rows in self.source.next_rows(n, gradients=self.needing is not None)]
        if self.needing is None:
            return [self._here(Rows(self.source.next_batch(n)))]
        assert isinstance(self.source, GradientSource)
        activations, gradients = self.source.next_pair(n)
        return [self._here(Rows(activations, gradients=gradients))]

    def sample(self, n: int) -> list[Rows]:
        """At most n rows of every pair."""
        if isinstance(self.source, TargetSource):
            return [self._here(rows) for rows in self.source.sample_rows(n)]
        return [self._here(Rows(self.source.sample(n)))]

    def calibration(self) -> list[Rows]:
        """Rows that would have come next; the stream stays where it is."""
        place = self.source.state_dict()
        rows = self.next_rows(CALIBRATION_ROWS)
        self.source.load_state_dict(place)
        return rows

    def _here(self, rows: Rows) -> Rows:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, torch.float32)

        return Rows(rows.x.to(self.device, torch.float32), moved(rows.target), moved(rows.gradients))


def _finish(
    configs: Sequence[TrainConfig],
    states: Mapping[int, TrainingState],
    stream: _Stream,
    hook_name: str,
    model_name: str,
    ranks: Ranks,
) -> list[TrainedSAE]:
    sample: Sequence[Rows] | None = None
    calibrated = any(state.error is None and state.config.rule.needs_calibration for state in states.values())
    if ranks.most(calibrated)[0]:
        sample = stream.calibration()
    hook_names = stream.hook_names or [hook_name] * len(configs)
    results = {}
    for number, state in states.items():
        sae = None
        if state.error is None:
            rows = None if sample is None else stream.of(number, sample)
            sae = state.finish(hook_name=hook_names[number], model_name=model_name, sample=rows)
        results[number] = TrainedSAE(state.config, sae, state.error)
    return stream.sharing.collected(results)


def _step(state: TrainingState, make: Step, rows: Rows, step: int, *, alone: bool) -> None:
    """A step; beside others, one that fails - by running out of memory, say - takes only itself out."""
    try:
        make(rows.x, step, rows.gradients, rows.target)
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


def _report(
    states: Mapping[int, TrainingState],
    step: int,
    seconds: float,
    on_metrics: Callable[[StepMetrics], None] | None,
    sharing: Sharing,
) -> None:
    """Reports every SAE's means, in the order of the configurations, on the first rank."""
    # Whether there are any, and the means; zeros for SAEs that other ranks report.
    lines = torch.zeros(len(sharing.configs), 1 + len(MEANS), dtype=torch.float64)
    for number, state in states.items():
        means = _means(state, step)
        if means is not None and sharing.reports:
            lines[number] = torch.tensor([1.0, *means], dtype=torch.float64)
    sharing.ranks.sum_(lines)
    if on_metrics is None or not sharing.ranks.leads:
        return
    for config, (there, *means) in zip(sharing.configs, lines.tolist(), strict=True):
        if there:
            tokens, named = step * config.batch_size, dict(zip(MEANS, means, strict=True))
            on_metrics(
                StepMetrics(config.name, step, tokens, config.n_steps * config.batch_size, **named, seconds=seconds)
            )


def _means(state: TrainingState, step: int) -> list[float] | None:
    """The numbers of a report; None for an SAE that trains no longer."""
    if state.error is not None:
        return None
    totals = state.read_totals()
    if not math.isfinite(totals.loss):
        state.error = f"the loss stopped being finite by step {step}: try a lower learning rate"
        return None
    return [totals.loss, totals.fvu, totals.l0, totals.dead_share, totals.aux_loss, state.last_lr]
