"""Runs a circuit method on a task and stores what it finds; `methods` lists the methods and the kinds of results.

A result that is already stored under its name, made from the same model, prompts and settings, is opened and not made
again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch

from circuits.ablation import ablate_heads, resolved
from circuits.attribution import logit_attribution
from circuits.discrete import discrete_circuit
from circuits.eap import attribute_edges
from circuits.edges import written
from circuits.faithfulness import FRACTIONS, FaithfulnessCurve, Ranking, circuit_edges, faithfulness_curve
from circuits.feature_circuits import feature_circuit
from circuits.metrics import Metric
from circuits.nodes import head_names
from circuits.passes import OnProgress, stages
from circuits.patching import patch_activations
from circuits.path_patching import patch_edges, patch_paths
from circuits.prompts import PromptSet
from circuits.scores import EdgeScores, NodeScores, no_behaviour
from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits import figures
from workbench.circuits.dictionary import dictionary_tables
from workbench.circuits.methods import DICTIONARY, EDGES, METHODS, Method, method_named
from workbench.circuits.task import Task, attributes_fingerprint, fingerprint
from workbench.models.load import LoadedModel
from workbench.models.memory import attention_bytes, check_fits_memory

RANKINGS: tuple[Ranking, ...] = ("absolute", "signed")


def run_method(
    catalog: Catalog,
    model: LoadedModel,
    task: Task | str,
    method: str,
    *,
    name: str | None = None,
    saes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> Result:
    """Runs a method on a task and stores the result, or opens the one that is stored.

    Args:
        task: one with its settings, or just its name.
        method: a name in `workbench.circuits.methods.METHODS`.
        name: of the result; the task's and the method's when None. A number follows where another result has it.
        saes: names of SAEs, one a hook point, for methods that need them and no others.
        options: the method's own, keyword arguments of its function below.
        batch_size: prompts a forward pass.

    Raises:
        InputError: an unknown method or option, SAEs where there should be none or the other way round, a metric that
            the method cannot take, or as the task and the method.
    """
    task = Task(task) if isinstance(task, str) else task
    known, asked = checked(task, method, saes, options)
    prompts = task.prompts(model)
    metric = task.measure(prompts, known.metric)
    if known.name == "ablation":
        # Which mean a mean is depends on the prompts, and the result has to say so.
        asked["kind"] = resolved(asked["kind"], prompts)
    loaded = {item: catalog.sae(item, device=str(model.device)) for item in saes}
    run = Run(known, model, prompts, metric, task.seed, loaded, batch_size, on_progress)
    # Where a kind has one method only, it says already which.
    several = sum(other.kind == known.kind for other in METHODS) > 1
    parameters = asked | ({"method": method} if several else {}) | ({"saes": list(saes)} if saes else {})
    if known.kind == DICTIONARY:
        # A file may give the same tokens other attributes.
        parameters["attributes"] = attributes_fingerprint(prompts)

    def make() -> Made:
        check_fits_memory(
            f"{known.title} on {len(prompts)} prompts", least_bytes(known, model, prompts, batch_size), model.device,
            "use fewer or shorter prompts, or a smaller batch size",
        )  # fmt: skip
        made: Made = known.run(run, **asked)
        return made

    return stored_on_task(
        catalog, known.kind, name or result_name(task, method), model, task, {task.seed: prompts}, metric, parameters,
        make, saes=loaded,
    )  # fmt: skip


def checked(
    task: Task, method: str, saes: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> tuple[Method, dict[str, Any]]:
    """The method and its options: what can be told to be wrong before a model is loaded.

    Raises:
        InputError: an unknown method or option, SAEs where there should be none or the other way round, a metric that
            the method cannot take.
    """
    known = method_named(method)
    asked = known.options(options or {})
    if known.needs_saes != bool(saes):
        needing = ", ".join(other.name for other in METHODS if other.needs_saes)
        raise InputError(f"the methods {needing} and SAEs (--sae) go together: name one SAE or more for these alone")
    if known.metric not in (None, task.metric or known.metric):
        raise InputError(f"{known.title} splits the {known.metric}: leave the metric out")
    return known, asked


def least_bytes(method: Method, model: LoadedModel, prompts: PromptSet, batch_size: int) -> int:
    """Memory that a method takes at least: attention of one layer, and what it keeps of a batch of prompts.

    Edge methods keep what every writer writes on both prompts and the difference, and those of gradients every layer's
    attention pattern; `exact` takes all prompts in one pass. The others keep the heads' outputs of both prompts.
    """
    info, p = model.info, prompts.clean.shape[1]
    exact = method.name == "exact"
    n = len(prompts) if exact else min(batch_size, len(prompts))
    needed = attention_bytes(model, n, p)
    if method.kind == EDGES:
        writers = 1 + info.n_layers * (info.n_heads + 1)
        needed += 3 * writers * n * p * info.d_model * model.dtype.itemsize
        needed += 0 if exact else info.n_layers * attention_bytes(model, n, p) // 2
        return needed
    return needed + 2 * info.n_layers * n * p * info.d_attention * model.dtype.itemsize


def result_name(task: Task, method: str) -> str:
    """The name of a result that was given none: `induction-eap`."""
    return f"{task.title}-{method}"


def stored_on_task(
    catalog: Catalog,
    kind: str,
    name: str,
    model: LoadedModel,
    task: Task,
    draws: Mapping[int, PromptSet],
    metric: Metric,
    parameters: Mapping[str, Any],
    make: Callable[[], Made],
    *,
    saes: Mapping[str, SAE] | None = None,
) -> Result:
    """The result of that name if it was made from the same things, else made and saved with its prompts; where another
    has the name, under it with a number.

    Args:
        draws: the prompts it is made from, by their seeds.
    """

    def with_prompts() -> Made:
        tables, drawn = make()
        prompts = [one.table(model.tokenizer).assign(seed=seed) for seed, one in draws.items()]
        together = pd.concat(prompts, ignore_index=True)
        return {**tables, "prompts": together if len(draws) > 1 else together.drop(columns="seed")}, drawn

    settings = {"task": task.name, "n": task.n, "seed": task.seed, "metric": metric.__name__}
    fingerprints = [fingerprint(prompts) for prompts in draws.values()]
    described = {
        "name": draws[task.seed].name,
        "prompts": sum(map(len, draws.values())),
        "fingerprint": fingerprints[0] if len(draws) == 1 else fingerprints,
    }
    origin = Origin.of_measurement(model, saes=saes, task=described)
    return catalog.results.get_or_make(
        kind, name, parameters={**parameters, **settings}, origin=origin, make=with_prompts, keep=True
    )


@dataclass(frozen=True)
class Run:
    """What a method is run on."""

    method: Method
    model: LoadedModel
    prompts: PromptSet
    metric: Metric
    seed: int
    saes: Mapping[str, SAE]
    """By name, for methods that need them."""
    batch_size: int
    on_progress: OnProgress | None

    @property
    def settings(self) -> dict[str, Any]:
        """What most methods take."""
        return {"metric": self.metric, "batch_size": self.batch_size, "on_progress": self.on_progress}


def attribution(run: Run) -> Made:
    """Direct logit attribution, the mean over the prompts."""
    return _of_nodes(run, logit_attribution(run.model.bridge, run.prompts, batch_size=run.batch_size).nodes())


def patching(run: Run, *, site: str = "head", direction: str = "denoise", by_position: bool = False) -> Made:
    """Activation patching; see `circuits.patching`."""
    chosen: dict[str, Any] = {"site": site, "direction": direction, "by_position": by_position}
    return _of_nodes(run, patch_activations(run.model.bridge, run.prompts, **chosen, **run.settings))


def path_patching(run: Run, *, receivers: Sequence[str] = ("logits",)) -> Made:
    """Every head's path to chosen receivers; see `circuits.path_patching`."""
    return _of_nodes(run, patch_paths(run.model.bridge, run.prompts, receivers=receivers, **run.settings))


def ablation(run: Run, *, kind: str = "mean") -> Made:
    """Every head ablated alone; see `circuits.ablation`."""
    chosen: dict[str, Any] = {"kind": kind}
    return _of_nodes(run, ablate_heads(run.model.bridge, run.prompts, **chosen, **run.settings))


def eap(run: Run, *, fractions: Sequence[float] = FRACTIONS) -> Made:
    """Edge attribution patching, with the faithfulness curves of its circuits; see `circuits.eap`."""
    return _of_edges(run, fractions, partial(attribute_edges, variant="eap", batch_size=run.batch_size))


def eap_ig(run: Run, *, steps: int = 5, fractions: Sequence[float] = FRACTIONS) -> Made:
    """The same with integrated gradients, at the place that the method's name says."""
    variant: Any = run.method.name
    return _of_edges(
        run, fractions, partial(attribute_edges, variant=variant, steps=steps, batch_size=run.batch_size)
    )  # fmt: skip


def exact(run: Run, *, fractions: Sequence[float] = FRACTIONS) -> Made:
    """Every edge patched by itself; see `circuits.path_patching`."""
    return _of_edges(run, fractions, patch_edges)


def discrete(run: Run, *, n_train: int = 10, normalised: bool = False) -> Made:
    """Heads by discrete codes; see `circuits.discrete`."""
    found = discrete_circuit(
        run.model.bridge, run.prompts, n_train=n_train, normalised=normalised, seed=run.seed,
        batch_size=run.batch_size, on_progress=run.on_progress,
    )  # fmt: skip
    grid = found.nodes.view(run.model.info.n_layers, run.model.info.n_heads)
    drawn = {"heads": figures.head_heatmap(grid, f"{run.prompts.name}: discrete codes", diverging=False)}
    return {"nodes": found.table(), "edges": found.edge_table()}, drawn


def features(run: Run, *, keep: float = 0.8) -> Made:
    """A circuit of SAE features; see `circuits.feature_circuits`.

    Raises:
        InputError: an SAE of a hook point that the model does not have.
    """
    _check_hooks(run)
    found = feature_circuit(
        run.model.bridge, run.prompts, list(run.saes.values()), keep=keep, metric=run.metric,
        on_progress=run.on_progress,
    )  # fmt: skip
    summary = pd.DataFrame(
        [{"task": run.prompts.name, "metric": run.metric.__name__, "prompts": len(run.prompts),
          "nodes": len(found.nodes), "share": found.share, "faithfulness_with_errors": found.with_errors,
          "faithfulness_without_errors": found.without_errors, "clean": found.clean, "corrupted": found.corrupted,
          "note": no_behaviour(found.clean, found.corrupted)}]
    )  # fmt: skip
    return {"nodes": found.nodes, "edges": found.edges, "summary": summary}, {"graph": figures.feature_graph(found)}


def dictionary(run: Run, *, changes: Sequence[int] = (1, 2, 4)) -> Made:
    """SAEs beside supervised dictionaries of a task's attributes; see `workbench.circuits.dictionary`.

    Args:
        changes: features that an edit may change, in the test of control.

    Raises:
        InputError: an SAE of a hook point that the model does not have, or as
            `workbench.circuits.dictionary.dictionary_tables`.
    """
    _check_hooks(run)
    tables = dictionary_tables(
        run.model.bridge, run.prompts, run.saes, metric=run.metric, changes=changes, seed=run.seed,
        batch_size=run.batch_size, on_progress=run.on_progress,
    )  # fmt: skip
    return tables, {"control": figures.control_figure(tables["control"])}


def _check_hooks(run: Run) -> None:
    for label, sae in run.saes.items():
        if sae.hook_name not in run.model.bridge.hook_dict:
            raise InputError(f"SAE {label!r} reads {sae.hook_name!r}, which {run.model.info.name} does not have")


def _of_nodes(run: Run, scores: NodeScores) -> Made:
    drawn = {"strongest": figures.strongest_nodes(scores)}
    if not set(scores.nodes).isdisjoint(head_names(run.model.info.n_layers, run.model.info.n_heads)):
        drawn["heads"] = figures.head_scores_heatmap(scores)
    return {"nodes": scores.table(), "summary": _summary(scores, run.prompts)}, drawn


def _of_edges(run: Run, fractions: Sequence[float], score: Callable[..., EdgeScores]) -> Made:
    """Scores of every edge, and the faithfulness of their circuits by the absolute ranking (CMD) and the signed (CPR).

    The table `nodes` gives for every writer its total effect (all edges that leave it), its direct effect (its edge to
    the logits) and the norm of what it writes at the last position, mean over the clean prompts.
    """
    bridge, prompts, steps = run.model.bridge, run.prompts, stages(run.on_progress, 1 + len(RANKINGS))
    scores = score(bridge, prompts, metric=run.metric, on_progress=steps[0])
    curves = [
        faithfulness_curve(
            bridge, prompts, scores, ranking=ranking, fractions=fractions, metric=run.metric,
            batch_size=run.batch_size, on_progress=step,
        )
        for ranking, step in zip(RANKINGS, steps[1:], strict=True)
    ]  # fmt: skip
    nodes, writers = scores.nodes(), scores.graph.writers
    table = nodes.table().rename(columns={"score": "total"})
    direct, norms = scores.scores[:, -1], _norms(run)
    table.insert(4, "direct", [float(direct[writers.index(node)]) for node in table.node])
    table["norm"] = [norms[writers.index(node)] for node in table.node]
    summary = _summary(scores, prompts).assign(**asdict(scores.graph), cmd=curves[0].cmd, cpr=curves[1].cpr)
    kept = circuit_edges(scores, min(50, int(scores.graph.exists.sum())))
    return {"edges": scores.table(), "nodes": table, "curves": curve_table(curves), "summary": summary}, {
        "graph": figures.circuit_graph(scores, kept),
        "faithfulness": figures.faithfulness_figure(curves),
        "nodes": figures.strongest_nodes(nodes),
    }


def curve_table(curves: Sequence[FaithfulnessCurve]) -> pd.DataFrame:
    """The points of several curves: method, ranking, fraction, edges, faithfulness, completeness."""
    tables = []
    for curve in curves:
        table = curve.table()
        table.insert(0, "method", curve.method)
        table.insert(1, "ranking", curve.ranking)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _summary(scores: NodeScores | EdgeScores, prompts: PromptSet) -> pd.DataFrame:
    return pd.DataFrame(
        [{"method": scores.method, "task": scores.task, "metric": scores.metric, "prompts": len(prompts),
          "clean": scores.clean, "corrupted": scores.corrupted, "note": no_behaviour(scores.clean, scores.corrupted)}]
    )  # fmt: skip


@torch.no_grad()
def _norms(run: Run) -> list[float]:
    total: Any = 0
    for batch in run.prompts.batches(run.batch_size):
        outputs = written(run.model.bridge, batch.clean)
        rows = torch.arange(len(batch), device=outputs.device)
        total = total + outputs[:, rows, batch.last].double().norm(dim=-1).sum(dim=1)
    found: list[float] = (total / len(run.prompts)).tolist()
    return found
