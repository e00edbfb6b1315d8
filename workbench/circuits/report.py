"""Circuit analyses run on a task and stored, one kind each.

    circuit-heads      tables scores, prefixes, composition
    circuit-nodes      tables nodes, summary, prompts        (attribution, patching, path patching, ablation)
    circuit-edges      tables edges, nodes, curves, summary, prompts     (EAP and its variants, exact edge patching)
    circuit-features   tables nodes, edges, summary, prompts                    (`feature_report`)
    circuit-discrete   tables nodes, edges, prompts
    circuit-agreement  tables methods, prompts
    circuit-dfa        tables by_head, steps, tokens                            (`attention_saes`)

An analysis that is already stored under its name, made from the same model, prompts and settings, is opened and not
made again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import pandas as pd
import torch

from circuits.ablation import ablate_heads
from circuits.attribution import logit_attribution
from circuits.discrete import discrete_circuit
from circuits.eap import Variant, attribute_edges
from circuits.edges import written
from circuits.faithfulness import FRACTIONS, FaithfulnessCurve, Ranking, circuit_edges, faithfulness_curve
from circuits.nodes import head_names
from circuits.passes import OnProgress
from circuits.patching import patch_activations
from circuits.path_patching import patch_edges, patch_paths
from circuits.prompts import PromptSet
from circuits.scores import EdgeScores, NodeScores
from sae.errors import InputError
from workbench.catalog.origin import versions
from workbench.catalog.results import Result
from workbench.circuits import figures
from workbench.circuits.task import Task, fingerprint
from workbench.models.load import LoadedModel
from workbench.workspace import Workspace

HEADS, NODES, EDGES, FEATURES = "circuit-heads", "circuit-nodes", "circuit-edges", "circuit-features"
DISCRETE, AGREEMENT, DFA = "circuit-discrete", "circuit-agreement", "circuit-dfa"
NodeMethod = Literal["attribution", "patching", "path-patching", "ablation"]
EdgeMethod = Literal["eap", "ig-inputs", "ig-activations", "exact"]
RANKINGS: tuple[Ranking, ...] = ("absolute", "signed")
VARIANTS: tuple[Variant, ...] = ("eap", "ig-inputs", "ig-activations")


def report_nodes(
    space: Workspace,
    name: str,
    model: LoadedModel,
    task: Task,
    method: NodeMethod,
    *,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> Result:
    """Runs and stores a method that gives every node a number.

    Args:
        options: the method's own: `site`, `direction`, `by_position` of patching, `receivers` of path patching,
            `kind` of ablation; see `circuits.patching`, `circuits.path_patching` and `circuits.ablation`.

    Raises:
        InputError: an unknown method or metric, a task the tokenizer cannot express, or as the method.
    """
    if method not in get_args(NodeMethod):
        raise InputError(f"unknown method {method!r}: choose {', '.join(get_args(NodeMethod))}")
    prompts, given = task.prompts(model), dict(options or {})
    metric = task.measure(prompts)

    def make() -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
        shared: dict[str, Any] = {"metric": metric, "batch_size": batch_size, "on_progress": on_progress}
        if method == "attribution":
            if metric.__name__ != "logit_difference":
                raise InputError("direct logit attribution splits the logit difference: leave the metric out")
            scores = logit_attribution(model.bridge, prompts, batch_size=batch_size).nodes()
        elif method == "patching":
            scores = patch_activations(model.bridge, prompts, **shared, **given)
        elif method == "path-patching":
            scores = patch_paths(model.bridge, prompts, **shared, **given)
        else:
            scores = ablate_heads(model.bridge, prompts, **shared, **given)
        _check_difference(scores)
        drawn = {"strongest": figures.strongest_nodes(scores)}
        if not set(scores.nodes).isdisjoint(head_names(model.info.n_layers, model.info.n_heads)):
            drawn["heads"] = figures.head_scores_heatmap(scores)
        return {"nodes": scores.table(), "summary": _summary(scores, prompts)}, drawn

    return stored_on_task(space, NODES, name, model, task, prompts, {"method": method, **given}, make)


def report_edges(
    space: Workspace,
    name: str,
    model: LoadedModel,
    task: Task,
    method: EdgeMethod = "ig-inputs",
    *,
    steps: int = 5,
    fractions: Sequence[float] = FRACTIONS,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> Result:
    """Scores every edge, and stores the scores with the faithfulness curves of their circuits.

    The curves are those of the absolute ranking (CMD) and the signed one (CPR). The table `nodes` gives for every
    writer its total effect (all edges that leave it), its direct effect (its edge to the logits) and the norm of what
    it writes at the last position, mean over the clean prompts.

    Raises:
        InputError: as `circuits.eap.attribute_edges` and `circuits.faithfulness.faithfulness_curve`.
    """
    if method not in get_args(EdgeMethod):
        raise InputError(f"unknown method {method!r}: choose {', '.join(get_args(EdgeMethod))}")
    prompts = task.prompts(model)
    metric = task.measure(prompts)

    def make() -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
        stages = _Stages(on_progress, 3)
        if method == "exact":
            scores = patch_edges(model.bridge, prompts, metric=metric, on_progress=stages.stage(0))
        else:
            scores = attribute_edges(
                model.bridge, prompts, variant=method, steps=steps, metric=metric, batch_size=batch_size,
                on_progress=stages.stage(0),
            )  # fmt: skip
        _check_difference(scores)
        curves = [
            faithfulness_curve(
                model.bridge, prompts, scores, ranking=ranking, fractions=fractions, metric=metric,
                batch_size=batch_size, on_progress=stages.stage(number),
            )
            for number, ranking in enumerate(RANKINGS, start=1)
        ]  # fmt: skip
        nodes = scores.nodes()
        table = nodes.table().rename(columns={"score": "total"})
        direct = scores.scores[:, -1]
        norms = _norms(model, prompts, batch_size)
        table.insert(4, "direct", [float(direct[scores.graph.writers.index(node)]) for node in table.node])
        table["norm"] = [norms[scores.graph.writers.index(node)] for node in table.node]
        summary = _summary(scores, prompts).assign(**asdict(scores.graph), cmd=curves[0].cmd, cpr=curves[1].cpr)
        tables = {"edges": scores.table(), "nodes": table, "curves": curve_table(curves), "summary": summary}
        kept = circuit_edges(scores, min(50, int(scores.graph.exists.sum())))
        return tables, {
            "graph": figures.circuit_graph(scores, kept),
            "faithfulness": figures.faithfulness_figure(curves),
            "nodes": figures.strongest_nodes(nodes),
        }

    parameters = {"method": method, "fractions": list(fractions)} | ({"steps": steps} if "ig" in method else {})
    return stored_on_task(space, EDGES, name, model, task, prompts, parameters, make)


def report_discrete(
    space: Workspace,
    name: str,
    model: LoadedModel,
    task: Task,
    *,
    n_train: int = 10,
    normalised: bool = False,
    on_progress: OnProgress | None = None,
) -> Result:
    """Finds and stores heads by discrete codes; see `circuits.discrete`."""
    prompts = task.prompts(model)

    def make() -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
        found = discrete_circuit(
            model.bridge, prompts, n_train=n_train, normalised=normalised, seed=task.seed, on_progress=on_progress
        )
        grid = found.nodes.view(model.info.n_layers, model.info.n_heads)
        drawn = {"heads": figures.head_heatmap(grid, f"{prompts.name}: discrete codes", diverging=False)}
        return {"nodes": found.table(), "edges": found.edge_table()}, drawn

    return stored_on_task(
        space, DISCRETE, name, model, task, prompts, {"n_train": n_train, "normalised": normalised}, make
    )  # fmt: skip


def report_agreement(
    space: Workspace,
    name: str,
    model: LoadedModel,
    task: Task,
    *,
    exact_prompts: int = 2,
    steps: int = 5,
    fractions: Sequence[float] = FRACTIONS,
    on_progress: OnProgress | None = None,
) -> Result:
    """How well every EAP variant agrees with patching each edge exactly, and how faithful its circuits are.

    Correlations are over all edges on the first `exact_prompts` prompts, one forward pass an edge; CPR and CMD are
    over all prompts.

    Raises:
        InputError: fewer prompts than are to be patched exactly, or none.
    """
    prompts = task.prompts(model)
    metric = task.measure(prompts)
    if not 1 <= exact_prompts <= len(prompts):
        raise InputError(f"exact patching on {exact_prompts} prompts was asked for, the task has {len(prompts)}")

    def make() -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
        stages = _Stages(on_progress, 1 + 2 * len(VARIANTS))
        few = prompts[:exact_prompts]
        exact = patch_edges(model.bridge, few, metric=metric, on_progress=stages.stage(0))
        there = exact.graph.exists
        rows, curves = [], []
        for number, variant in enumerate(VARIANTS):
            close = attribute_edges(model.bridge, few, variant=variant, steps=steps, metric=metric)
            one, two = pd.Series(close.scores[there].numpy()), pd.Series(exact.scores[there].numpy())
            scores = attribute_edges(model.bridge, prompts, variant=variant, steps=steps, metric=metric)
            _check_difference(scores)
            pair = [
                faithfulness_curve(model.bridge, prompts, scores, ranking=ranking, fractions=fractions, metric=metric,
                                   on_progress=stages.stage(1 + 2 * number + place))
                for place, ranking in enumerate(RANKINGS)
            ]  # fmt: skip
            curves += pair
            rows.append(
                {"method": scores.method, "edges": len(one), "pearson": one.corr(two),
                 "spearman": one.rank().corr(two.rank()), "cpr": pair[1].cpr, "cmd": pair[0].cmd}
            )  # fmt: skip
        return {"methods": pd.DataFrame(rows), "curves": curve_table(curves)}, {
            "faithfulness": figures.faithfulness_figure([curve for curve in curves if curve.ranking == "absolute"])
        }

    parameters = {"exact_prompts": exact_prompts, "steps": steps, "fractions": list(fractions)}
    return stored_on_task(space, AGREEMENT, name, model, task, prompts, parameters, make)


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
          "clean": scores.clean, "corrupted": scores.corrupted}]
    )  # fmt: skip


def _check_difference(scores: NodeScores | EdgeScores) -> None:
    if scores.clean == scores.corrupted:
        raise InputError(f"task {scores.task}: {scores.metric} is the same on clean and corrupted prompts")


@torch.no_grad()
def _norms(model: LoadedModel, prompts: PromptSet, batch_size: int) -> list[float]:
    total: Any = 0
    for batch in prompts.batches(batch_size):
        outputs = written(model.bridge, batch.clean)
        rows = torch.arange(len(batch), device=outputs.device)
        total = total + outputs[:, rows, batch.last].double().norm(dim=-1).sum(dim=1)
    found: list[float] = (total / len(prompts)).tolist()
    return found


class _Stages:
    """One count of progress over several stages of about the same length."""

    def __init__(self, on_progress: OnProgress | None, stages: int) -> None:
        self._report, self._stages = on_progress, stages

    def stage(self, number: int) -> OnProgress:
        """The callback of one stage."""

        def report(done: int, total: int) -> None:
            if self._report is not None:
                self._report(number * 1000 + 1000 * done // total, 1000 * self._stages)

        return report


def stored_on_task(
    space: Workspace,
    kind: str,
    name: str,
    model: LoadedModel,
    task: Task,
    prompts: PromptSet,
    parameters: dict[str, Any],
    make: Callable[[], tuple[dict[str, pd.DataFrame], dict[str, Any]]],
) -> Result:
    """The result of that name if it was made from the same things, else made and saved."""
    asked = {**parameters, "task": task.name, "n": task.n, "seed": task.seed, "metric": task.measure(prompts).__name__}
    provenance = {
        "model": model.info.to_dict(),
        "task": {"name": prompts.name, "prompts": len(prompts), "fingerprint": fingerprint(prompts)},
        "versions": versions(),
    }
    return stored_or_made(
        space, kind, name, asked, provenance, make, {"prompts": prompts.table(model.tokenizer)}
    )  # fmt: skip


def stored_or_made(
    space: Workspace,
    kind: str,
    name: str,
    parameters: dict[str, Any],
    provenance: dict[str, Any],
    make: Callable[[], tuple[dict[str, pd.DataFrame], dict[str, Any]]],
    extra: Mapping[str, pd.DataFrame],
) -> Result:
    """Opens the result of that name made from the same things, else makes and saves it with the tables `extra`."""
    for result in space.results.find(kind):
        if result.name == name and result.parameters == parameters and result.provenance == provenance:
            return result
    tables, drawn = make()
    return space.results.save(
        kind,
        name,
        parameters=parameters,
        provenance=provenance,
        tables={**tables, **extra},
        figures={figure: plot.to_json() for figure, plot in drawn.items()},
    )
