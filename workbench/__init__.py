"""The workbench: models, corpora, harvests, training, evaluation and the workspace that holds them.

from workbench import Workspace
"""

from workbench.workspace import Workspace

__all__ = ["Workspace"]
