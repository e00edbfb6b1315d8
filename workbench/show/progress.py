"""Progress bars for long work: share done, rate and time left, on standard error.

On a terminal a live bar; elsewhere (a log, CI) one plain line every ten seconds, so that nothing long is silent.
"""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 10.0


def format_seconds(seconds: float) -> str:
    """`75 -> "1:15"`, `3700 -> "1:01:40"`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_count(count: float) -> str:
    """`1234 -> "1.2k"`, `2_000_000 -> "2.0M"`."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{suffix}"
    return f"{count:.0f}"


def format_bytes(count: float) -> str:
    """`2_500_000 -> "2.5 MB"` (powers of ten, as disks are sold)."""
    for limit, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {suffix}"
    return f"{count:.0f} B"


class ProgressBar:
    """Context manager showing `label`, a bar, tokens/s and the time left.

    Args:
        label: what is being done, in a word or two.
        total: number of units of work.
        enabled: when false nothing is shown.
        unit: what is counted, as the rate names it.
    """

    def __init__(self, label: str, total: int, enabled: bool = True, unit: str = "tokens") -> None:
        self.label, self.total, self.enabled, self.unit = label, max(total, 1), enabled, unit
        self._console = Console(stderr=True)
        self._live: Progress | None = None
        self._started = time.monotonic()
        self._last_line = self._started
        self._done_at_start: int | None = None

    def __enter__(self) -> "ProgressBar":
        if self.enabled and self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=False,
            )
            self._task = self._live.add_task(self.label, total=self.total, note="")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self.enabled and error is None:
            self._print_line(self.total, f"done in {format_seconds(time.monotonic() - self._started)}")

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` units of the total are finished; `note` is appended (loss, L0, ...)."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self._done_at_start is None:
            # Resumed work starts part-way: the rate must not count what an earlier process did.
            self._done_at_start = done if done < self.total else 0
            self._started = now if done else self._started
        rate = (done - self._done_at_start) / max(now - self._started, 1e-9)
        text = ""
        if rate > 0 and now - self._started > 0.5:
            text = f"{format_count(rate)} {self.unit}/s, {format_seconds((self.total - done) / rate)} left"
        text = ", ".join(part for part in (text, note) if part)
        if self._live is not None:
            self._live.update(self._task, total=self.total, completed=done, note=text)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print_line(done, text)

    def report(self, done: int, total: int) -> None:
        """As `update`, where only the work itself knows how much there is."""
        self.total = max(total, 1)
        self.update(done)

    def report_share(self, done: int, total: int) -> None:
        """Shows `done` of `total` as that share of the bar's own total, for work that counts in other units."""
        self.update(done * self.total // max(total, 1))

    def _print_line(self, done: int, text: str) -> None:
        print(f"{self.label}: {100 * done / self.total:3.0f}%  {text}", file=sys.stderr, flush=True)
