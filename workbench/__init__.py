"""The workbench: models, corpora, harvests, training, evaluation, features, circuits and sparsity in one workspace.

from workbench import Workspace, load_model
"""

import os
from typing import TYPE_CHECKING

from sae.errors import InputError
from sae.lazy import lazy_exports

# OpenMP's threads spin while they wait, so two processes on the same cores (the app beside a training run, two
# commands) starve each other and each takes many times as long; threads that sleep share them, and a process alone is
# as fast. It is read when torch is loaded, so it comes first; who has set it keeps it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from workbench.catalog.catalog import Catalog
    from workbench.catalog.origin import Origin
    from workbench.catalog.results import Result
    from workbench.features.index.query import FeatureIndex
    from workbench.harvest.plan import HarvestConfig
    from workbench.models.load import LoadedModel, load_model, reload_model
    from workbench.models.own import OwnModel
    from workbench.saes.sweeps import parse_sweep
    from workbench.text.corpora import Corpus, open_corpus
    from workbench.workspace import Workspace

_HOMES = {
    "Catalog": "workbench.catalog.catalog",
    "Corpus": "workbench.text.corpora",
    "FeatureIndex": "workbench.features.index.query",
    "HarvestConfig": "workbench.harvest.plan",
    "LoadedModel": "workbench.models.load",
    "Origin": "workbench.catalog.origin",
    "OwnModel": "workbench.models.own",
    "Result": "workbench.catalog.results",
    "Workspace": "workbench.workspace",
    "load_model": "workbench.models.load",
    "reload_model": "workbench.models.load",
    "open_corpus": "workbench.text.corpora",
    "parse_sweep": "workbench.saes.sweeps",
}
__all__ = [
    "Catalog",
    "Corpus",
    "FeatureIndex",
    "HarvestConfig",
    "InputError",
    "LoadedModel",
    "Origin",
    "OwnModel",
    "Result",
    "Workspace",
    "load_model",
    "open_corpus",
    "parse_sweep",
    "reload_model",
]
# Loaded when asked for: the command line answers Ctrl-C with one line from its start, and torch takes a second.
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
