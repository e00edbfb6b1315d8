"""A command that torchrun has started as several ranks: one of them speaks.

The first rank prints what there is to print. A mistake of the user's meets all ranks alike, and when one is killed all
others notice: of these, whichever comes first says so, in one line, and torchrun ends the rest.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from sae.errors import InputError

COMMANDS = ("harvest", "train")
"""Those that several ranks do together."""


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
    """Within it only the first of several ranks writes to standard output."""
    if not started_by_torchrun():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not is_first():
            silent = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silent))
        yield
    # Where something has failed the others may not be there to agree.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        # Captured steps hold on to the ranks' way of speaking.
        gc.collect()
        distributed.destroy_process_group()


def tell(line: str) -> None:
    """Prints a line about the end of a command to standard error; of several ranks only the first to come here."""
    if not started_by_torchrun() or _comes_first():
        print(line, file=sys.stderr, flush=True)


def _comes_first() -> bool:
    import torch.distributed as dist

    try:
        # torchrun's own process keeps it, whichever rank is gone.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return store.add(f"workbench ended {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (KeyError, RuntimeError):
        return is_first()


def ended(error: RuntimeError) -> str:
    """What ended a run of several ranks: an error of this one, or another that is gone."""
    from torch.distributed import DistError

    rank, reason = os.environ.get("RANK"), (str(error).splitlines() or [type(error).__name__])[0]
    gone = isinstance(error, DistError) or "gloo" in reason
    what = f"a rank has ended, without which rank {rank} cannot go on" if gone else f"rank {rank}: {reason}"
    return f"{what}: repeat the same command to go on from the last checkpoint"
