"""The workbench: models, corpora, harvests, training, evaluation and the workspace that holds them.

from workbench import Workspace
"""

import os

# OpenMP's threads spin while they wait, so two processes on the same cores (the app beside a training run, two
# commands) starve each other and each takes many times as long; threads that sleep share them, and a process alone is
# as fast. It is read when torch is loaded, so it comes first; who has set it keeps it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from workbench.workspace import Workspace

__all__ = ["Workspace"]
