"""A command that torchrun has started as several ranks: one of them speaks.

The first rank prints what there is to print. A mistake of the user's meets all ranks alike, and when one is killed all
others notice: of these, whichever comes first says so, in one line, and torchrun ends the rest.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta

from sae.errors import InputError

COMMANDS = ("harvest", "train")
"""Those that several ranks do together."""
GO_ON = "repeat the same command to go on from the last checkpoint"


def started_by_torchrun() -> bool:
    """Whether there are other ranks; says so without loading torch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the first rank, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def refuse_ranks(command: str | None) -> None:
    """Raises InputError where several ranks are to do what one process does."""
    if started_by_torchrun() and command not in COMMANDS:
        raise InputError(
            f"{command or 'this'} is for one process: start it without torchrun, which is for {' and '.join(COMMANDS)}"
        )


@contextlib.contextmanager
def ranks_together() -> Iterator[None]:
    """Within it only the first of several ranks writes to standard output, and being ended by torchrun is said."""
    if not started_by_torchrun():
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    with contextlib.ExitStack() as stack:
        if not is_first():
            silent = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silent))
        yield


def _end(number: int, frame: object) -> None:
    """What torchrun does to the ranks that are left when one has ended, often before they notice."""
    tell(f"workbench: error: another rank has ended, or all were told to: {GO_ON}")
    os._exit(1)


def part(code: int) -> int:
    """Ends what the ranks have together, and gives back the exit code; of several ranks one that fails ends here."""
    distributed = sys.modules.get("torch.distributed")
    if not started_by_torchrun() or distributed is None or not distributed.is_initialized():
        return code
    if code:
        # The others may wait for this one on the GPU, and it for them: no word of goodbye would come through.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    # Captured steps hold on to the ranks' way of speaking.
    gc.collect()
    distributed.destroy_process_group()
    return code


def tell(line: str) -> None:
    """Prints a line about the end of a command to standard error; of several ranks only the first to come here."""
    if not started_by_torchrun() or _comes_first():
        print(line, file=sys.stderr, flush=True)


def _comes_first() -> bool:
    import torch.distributed as dist

    try:
        # torchrun's own process keeps it, whichever rank is gone.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"workbench ended {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (KeyError, RuntimeError):
        return is_first()


def ended(error: RuntimeError) -> str:
    """What ended a run of several ranks: an error of this one, or another that is gone."""
    from torch.distributed import DistError

    rank, reason = os.environ.get("RANK"), (str(error).splitlines() or [type(error).__name__])[0]
    gone = isinstance(error, DistError) or "gloo" in reason
    what = f"a rank has ended, without which rank {rank} cannot go on" if gone else f"rank {rank}: {reason}"
    return f"{what}: {GO_ON}"
