"""Circuits of SAE features run on a task and stored as `circuit-features`; method: `circuits.feature_circuits`."""

import hashlib
from collections.abc import Mapping
from typing import Any

import pandas as pd

from circuits.feature_circuits import feature_circuit
from circuits.passes import OnProgress
from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.results import Result
from workbench.circuits import figures
from workbench.circuits.report import FEATURES, stored_on_task
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel
from workbench.workspace import Workspace


def report_features(
    space: Workspace,
    name: str,
    model: LoadedModel,
    task: Task,
    saes: Mapping[str, SAE],
    *,
    keep: float = 0.8,
    on_progress: OnProgress | None = None,
) -> Result:
    """Finds and stores a circuit of SAE features; see `circuits.feature_circuits`.

    Args:
        saes: by name; at most one for each hook point.

    Raises:
        InputError: as `circuits.feature_circuits.feature_circuit`, or an SAE of a hook point the model has not.
    """
    prompts = task.prompts(model)
    metric = task.measure(prompts)
    for label, sae in saes.items():
        if sae.hook_name not in model.bridge.hook_dict:
            raise InputError(f"SAE {label!r} reads {sae.hook_name!r}, which {model.info.name} does not have")

    def make() -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
        found = feature_circuit(
            model.bridge, prompts, list(saes.values()), keep=keep, metric=metric, on_progress=on_progress
        )
        summary = pd.DataFrame(
            [{"task": prompts.name, "metric": metric.__name__, "prompts": len(prompts), "nodes": len(found.nodes),
              "share": found.share, "faithfulness_with_errors": found.with_errors,
              "faithfulness_without_errors": found.without_errors, "clean": found.clean,
              "corrupted": found.corrupted}]
        )  # fmt: skip
        tables = {"nodes": found.nodes, "edges": found.edges, "summary": summary}
        return tables, {"graph": figures.feature_graph(found)}

    described = {label: sae_fingerprint(sae) for label, sae in saes.items()}
    return stored_on_task(space, FEATURES, name, model, task, prompts, {"saes": described, "keep": keep}, make)


def sae_fingerprint(sae: SAE) -> str:
    """SHA-256 of an SAE's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
