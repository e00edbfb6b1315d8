"""Every method that runs on a task, by the name that the command line and the app know it under."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from circuits.passes import OnProgress
from sae.errors import InputError
from workbench.catalog.results import Result
from workbench.circuits.feature_report import report_features
from workbench.circuits.report import EdgeMethod, NodeMethod, report_discrete, report_edges, report_nodes
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel
from workbench.workspace import Workspace

METHODS = {
    "ig-inputs": "EAP-IG (edges)",
    "eap": "EAP (edges)",
    "ig-activations": "EAP-IG at activations (edges)",
    "exact": "every edge patched (edges)",
    "patching": "patching (heads)",
    "path-patching": "path patching (heads)",
    "ablation": "ablation (heads)",
    "attribution": "direct logit attribution",
    "discrete": "discrete codes (heads)",
    "features": "SAE features",
}
"""What each is called in the app."""


def result_name(task: Task, method: str) -> str:
    """The name of a result that was given none: `induction-eap`."""
    return f"{task.title}-{method}"


def run_method(
    space: Workspace,
    model: LoadedModel,
    task: Task,
    method: str,
    *,
    name: str | None = None,
    saes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Runs a method on a task and stores the result, or opens the one that is stored.

    Args:
        method: a name in `METHODS`.
        name: of the result; the task's and the method's when None.
        saes: names of SAEs in the workspace, one a hook point, for `features` and nothing else.
        options: the method's own; see `report_nodes`, `report_edges`, `report_features` and `report_discrete`.

    Raises:
        InputError: an unknown method, SAEs where there should be none or the other way round, or as the method.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose {', '.join(METHODS)}")
    if (method == "features") != bool(saes):
        raise InputError("the method features and SAEs (--sae) go together: name one SAE for each hook point")
    called, given = name or result_name(task, method), dict(options or {})
    if method == "features":
        loaded = {item: space.sae(item, device=str(model.device)) for item in saes}
        return report_features(space, called, model, task, loaded, on_progress=on_progress, **given)
    if method == "discrete":
        return report_discrete(space, called, model, task, on_progress=on_progress, **given)
    if method in get_args(NodeMethod):
        shared = {key: given.pop(key) for key in ("batch_size",) if key in given}
        return report_nodes(
            space, called, model, task, method, options=given, on_progress=on_progress, **shared  # type: ignore[arg-type]
        )  # fmt: skip
    assert method in get_args(EdgeMethod)
    return report_edges(space, called, model, task, method, on_progress=on_progress, **given)  # type: ignore[arg-type]
