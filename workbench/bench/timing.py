"""Times arms in turn: round after round on the same batches, so that a change in the machine's speed meets all alike.

On a GPU each step is timed with CUDA events, behind one of its own that is not counted; elsewhere with a clock. A first
few rounds, in which kernels are compiled and steps captured, are not counted.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.bench.arms import Arm, Size, Step

WARM_UP = 5


@dataclass(frozen=True)
class Measured:
    """An arm's step, in milliseconds."""

    median: float
    p10: float
    p90: float
    tokens_per_second: float
    peak_bytes: int | None
    """Device memory of a step with its state; None on a CPU."""


def measure(
    size: Size,
    arms: Mapping[str, Arm],
    data: Sequence[Tensor],
    rounds: int,
    on_left_out: Callable[[str, str], None],
) -> dict[str, Measured]:
    """Times of the arms that run on this machine.

    Args:
        data: batches [n, d], all on one device.
        rounds: counted ones, at least 2.
        on_left_out: told the name of an arm that does not run here, or fails in a later round, and why.
    """
    device = data[0].device
    steps: dict[str, Step] = {}
    peaks: dict[str, int | None] = {}
    for name, make in arms.items():
        try:
            steps[name], peaks[name] = _made(make, data)
        except Exception as error:  # a library that does not run here is left out and named
            on_left_out(name, _reason(error))
            _release(device)
    milliseconds: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps):
            try:
                milliseconds[name].append(_timed(steps[name], data[number % len(data)]))
            except Exception as error:  # as one that wants more memory beside the others than it did alone
                peak = peaks[name]
                needs = "" if peak is None else f"; its step and state take {peak / 2**30:.1f} GiB"
                on_left_out(name, f"in round {number + 1}, {_reason(error)}{needs}")
                del steps[name], milliseconds[name]
                _release(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    results = {}
    for name, readings in milliseconds.items():
        times = [reading() for reading in readings]
        tenths = statistics.quantiles(times, n=10, method="inclusive")
        median = statistics.median(times)
        results[name] = Measured(median, tenths[0], tenths[-1], size.batch / median * 1e3, peaks[name])
    return results


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _release(device: torch.device) -> None:
    """Gives the memory of an arm that was left out to the others."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _made(make: Arm, data: Sequence[Tensor]) -> tuple[Step, int | None]:
    """A step that has warmed up, and its peak memory."""
    on_gpu = data[0].is_cuda
    before = 0
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    step = make()
    for number in range(WARM_UP if on_gpu else 2):
        step(data[number % len(data)])
    if not on_gpu:
        return step, None
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def _timed(step: Step, batch: Tensor) -> Callable[[], float]:
    """Runs a step; its milliseconds, to be asked for when the device is done."""
    if batch.is_cuda:
        # A step after one of its own, as in training: by then the host is ahead of the device. Of the first arm after a
        # wait the time until the host has launched it would be counted too.
        step(batch)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(batch)
        stop.record()
        return lambda: start.elapsed_time(stop)
    began = time.perf_counter()
    step(batch)
    passed = (time.perf_counter() - began) * 1e3
    return lambda: passed
