"""The workbench: models, corpora, harvests, training, evaluation and the workspace that holds them.

from workbench import Workspace
"""

import os
from typing import TYPE_CHECKING, Any

# OpenMP's threads spin while they wait, so two processes on the same cores (the app beside a training run, two
# commands) starve each other and each takes many times as long; threads that sleep share them, and a process alone is
# as fast. It is read when torch is loaded, so it comes first; who has set it keeps it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from workbench.workspace import Workspace

__all__ = ["Workspace"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line answers Ctrl-C with one line from its start, and torch takes a second.
    if name == "Workspace":
        from workbench.workspace import Workspace

        return Workspace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
