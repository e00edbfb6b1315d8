"""Attribution graphs of a task's prompts laid over each other: which features recur, beside the heads of EAP-IG.

A `task-graphs` result:

    features  layer, feature, prompts (whose pruned graph has it), share (of all prompts), influence (mean over prompts,
              summed over positions), activation (mean where it is a node), at_last (share of its nodes at the last
              token)
    heads     head, graph (share of the strongest edges into the likeliest token that goes through it, mean over
              prompts), eap_ig (sum of its outgoing edges' absolute scores by EAP-IG on the same prompts)
    prompts   prompt, text, says, p, right (whether that is an answer of the task), nodes, replacement,
              completeness_targets
    summary   one row: task, prompts, agreement (Spearman's correlation of the two scores of heads)

1. Each clean prompt's graph is pruned to 0.8 of the influence, and its features are counted.
2. The `STRONGEST` edges into its likeliest token are split by heads (`circuits.graph.heads`); a head's share is that of
   its parts' absolute weights.
3. EAP-IG with inputs interpolated scores every edge of the model for the task's metric; a head's score is that of what
   it hands on. A graph knows one prompt and no corrupted one, EAP-IG the difference of the two: they need not agree.
"""

from collections import defaultdict
from typing import Any

import pandas as pd

import circuits.graph
from circuits.eap import attribute_edges
from circuits.graph.graph import FEATURE
from circuits.graph.heads import STRAIGHT, head_shares, sources_again
from circuits.nodes import head_names
from circuits.passes import OnProgress
from circuits.prompts import PromptSet
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits.graphs import KEPT, Coders, begins_as_trained, transcoders_for
from workbench.circuits.task import Task, fingerprint
from workbench.models.load import LoadedModel

TASK_GRAPHS = "task-graphs"
"""The kind of result."""
STRONGEST = 10
STEPS = 5
"""Of EAP-IG."""


def graph_task(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    task: Task | str,
    *,
    transcoders: str | None = None,
    max_features: int = 2000,
    on_progress: OnProgress | None = None,
) -> Result:
    """Makes the graphs of a task's prompts and stores what recurs in them, or opens what is stored.

    Args:
        transcoders: name of a set; see `workbench.circuits.graphs.transcoders_for`.
        max_features: of each graph.

    Raises:
        InputError: as the task, `transcoders_for`, or `circuits.graph.attribute`.
    """
    task = Task(task) if isinstance(task, str) else task
    label, coders = transcoders_for(catalog, model, transcoders)
    model = begins_as_trained(catalog, model, label)
    prompts = task.prompts(model)
    parameters = {
        "task": task.name, "n": task.n, "seed": task.seed, "transcoders": label, "max_features": max_features,
        "prompts": fingerprint(prompts),
    }  # fmt: skip

    def make() -> Made:
        return laid_over(model, prompts, coders, task, max_features, on_progress), {}

    origin = Origin.of_measurement(model, transcoders=(label, coders))
    return catalog.results.get_or_make(TASK_GRAPHS, name, parameters=parameters, origin=origin, make=make)


def laid_over(
    model: LoadedModel,
    prompts: PromptSet,
    coders: Coders,
    task: Task,
    max_features: int,
    on_progress: OnProgress | None,
) -> dict[str, pd.DataFrame]:
    """The tables; see the module's description."""
    seen: dict[tuple[int, int], list[tuple[int, float, float, bool]]] = defaultdict(list)
    by_head: dict[str, float] = defaultdict(float)
    rows = []
    for number in range(len(prompts)):
        tokens = prompts.clean[number, : int(prompts.last[number]) + 1]
        whole = circuits.graph.attribute(
            model.bridge, tokens, coders, bos_id=model.bos_id, max_features=max_features
        )  # fmt: skip
        kept = whole.prune(*KEPT)
        nodes = kept.nodes
        for node in (nodes.kind == FEATURE).nonzero().squeeze(1).tolist():
            key = int(nodes.layer[node]), int(nodes.feature[node])
            at_last = int(nodes.position[node]) == len(tokens) - 1
            seen[key].append((number, float(kept.influence[node]), float(nodes.activation[node]), at_last))
        for head, share in _through(model, whole, coders).items():
            by_head[head] += share / len(prompts)
        said, scores = int(whole.nodes.token[whole.n_sources]), whole.scores()
        rows.append(
            (number, model.text(tokens[prompts.n_bos :].tolist()), model.text([said]),
             float(whole.nodes.activation[whole.n_sources]), said in prompts.answers[number].tolist(), len(nodes),
             scores.replacement, scores.completeness_targets)
        )  # fmt: skip
        if on_progress is not None:
            on_progress(number + 1, len(prompts))
    titles = ["prompt", "text", "says", "p", "right", "nodes", "replacement", "completeness_targets"]
    heads = _heads(model, prompts, task, by_head)
    agreement = heads[["graph", "eap_ig"]].rank().corr().iloc[0, 1]
    summary = pd.DataFrame([{"task": prompts.name, "prompts": len(prompts), "agreement": float(agreement)}])
    return {
        "features": _features(seen, len(prompts)), "heads": heads, "prompts": pd.DataFrame(rows, columns=titles),
        "summary": summary,
    }  # fmt: skip


def _features(seen: dict[tuple[int, int], list[tuple[int, float, float, bool]]], n_prompts: int) -> pd.DataFrame:
    rows = []
    for (layer, feature), found in seen.items():
        numbers = {number for number, *_ in found}
        influence = sum(value for _, value, _, _ in found) / n_prompts
        activation = sum(value for _, _, value, _ in found) / len(found)
        at_last = sum(last for *_, last in found) / len(found)
        rows.append((layer, feature, len(numbers), len(numbers) / n_prompts, influence, activation, at_last))
    titles = ["layer", "feature", "prompts", "share", "influence", "activation", "at_last"]
    table = pd.DataFrame(rows, columns=titles)
    return table.sort_values(["prompts", "influence"], ascending=False, kind="stable", ignore_index=True)


def _through(model: LoadedModel, graph: Any, coders: Coders) -> dict[str, float]:
    """Step 2 for one prompt."""
    sources = sources_again(model.bridge, graph, coders)
    answer = graph.nodes.names[graph.n_sources]
    parts = pd.concat([head_shares(graph, sources, name, answer) for name in graph.inputs(answer, STRONGEST)["source"]])
    parts = parts.assign(size=parts["weight"].abs())
    sizes = parts[parts["head"] != STRAIGHT].groupby("head")["size"].sum() / parts["size"].sum()
    return {str(head): float(size) for head, size in sizes.items()}


def _heads(model: LoadedModel, prompts: PromptSet, task: Task, by_head: dict[str, float]) -> pd.DataFrame:
    """Step 3 beside step 2."""
    scores = attribute_edges(
        model.bridge, prompts, variant="ig-inputs", steps=STEPS, metric=task.measure(prompts)
    )  # fmt: skip
    handed = dict(zip(scores.graph.writers, scores.scores.abs().sum(dim=1).tolist(), strict=True))
    names = head_names(model.info.n_layers, model.info.n_heads)
    table = pd.DataFrame(
        {"head": names, "graph": [by_head.get(name, 0.0) for name in names], "eap_ig": [handed[name] for name in names]}
    )
    return table.sort_values("graph", ascending=False, kind="stable", ignore_index=True)
