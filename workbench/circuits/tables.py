"""Published circuits beside what the methods find here: IOI and greater-than in GPT-2 small, docstring in attn-only-4l.

Every method scores every head; the ROC AUC says how often a head of the published circuit outranks another head.

    discrete          mean over seeds (`circuits.discrete`); the only row with published numbers of its own method
    EAP-IG, EAP, patching, ablation to the mean over positions     by absolute score

Published: AUC of discrete codes and of ACDC from O'Neill & Bui 2024 (arXiv 2405.12522); heads from Wang et al. 2023
(IOI), Hanna et al. 2023 (greater-than) and Heimersheim & Janiak 2023 (docstring). The AUC of edges takes for true every
pair of published heads of different layers (reconstructed: which pairs the paper counts is not known here).

Prompts are 250 clean and 250 corrupted ones, as in the paper, of which ten train the codes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import ablate_heads
from circuits.discrete import DiscreteCircuit, discrete_circuit, roc_auc
from circuits.eap import attribute_edges
from circuits.metrics import Metric
from circuits.nodes import head_name
from circuits.passes import OnProgress, stages
from circuits.patching import patch_activations
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.tasks.ioi import ioi
from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Made, Result
from workbench.circuits.methods import method_named
from workbench.circuits.report import least_bytes, stored_on_task
from workbench.circuits.task import Task
from workbench.models import attn_only
from workbench.models.load import LoadedModel, load_model
from workbench.models.memory import check_fits_memory

TABLE = "circuit-table"
IOI_LISTS = ("names", "places", "objects", "templates")


@dataclass(frozen=True)
class Published:
    """A circuit from the literature."""

    model: str
    n_layers: int
    n_heads: int
    heads: tuple[str, ...]
    discrete: tuple[float, float]
    """AUC of nodes and of edges."""
    acdc: float
    """AUC of nodes."""


def _heads(text: str) -> tuple[str, ...]:
    places = (place.split(".") for place in text.split())
    return tuple(head_name(int(layer), int(head)) for layer, head in places)


PUBLISHED: Mapping[str, Published] = {
    "ioi": Published(
        "gpt2", 12, 12,
        _heads(
            "2.2 4.11 0.1 3.0 0.10 5.5 6.9 5.8 5.9 7.3 7.9 8.6 8.10 10.7 11.10 9.9 9.6 10.0 10.10 10.6 10.2 10.1 11.2 "
            "11.9 11.3 9.7"
        ),
        (0.868, 0.840), 0.873,
    ),
    "greater-than": Published(
        "gpt2", 12, 12, _heads("0.3 0.5 0.1 5.5 6.1 6.9 7.10 8.11 9.1"), (0.855, 0.873), 0.890
    ),
    "docstring": Published(attn_only.NAME, 4, 8, _heads("0.5 1.0 1.4 2.0 3.0 3.6"), (0.869, 0.896), 0.391),
}  # fmt: skip


def load_published_model(spec: str, device: str) -> LoadedModel:
    """`attn-only-4l` in TransformerLens' own format, or anything that `load_model` takes."""
    return attn_only.load_attn_only(device) if spec == attn_only.NAME else load_model(spec, device=device)


def report_table(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    which: str,
    *,
    n: int = 250,
    seeds: int = 5,
    data: Path | None = None,
    batch_size: int = 16,
    on_progress: OnProgress | None = None,
) -> Result:
    """Runs the methods on a published task and stores tables `published` (AUC) and `heads` (every head's ranks).

    Args:
        n: prompts.
        seeds: runs of the discrete method.
        data: lists of names, places, objects and templates for IOI; those of `circuits.tasks.ioi` when None.

    Raises:
        InputError: an unknown table, or a model of another shape than the published circuit's.
    """
    if which not in PUBLISHED:
        raise InputError(f"no published table {which!r}: choose {', '.join(PUBLISHED)}")
    known = PUBLISHED[which]
    if (model.info.n_layers, model.info.n_heads) != (known.n_layers, known.n_heads):
        raise InputError(
            f"the published {which} circuit is one of {known.model}, {known.n_layers} layers of {known.n_heads} heads; "
            f"{model.info.name} has {model.info.n_layers} of {model.info.n_heads}: use --model {known.model}"
        )
    task = Task(which, n)
    prompts = task.prompts(model) if data is None else _ioi_from(data, which, model, n)
    metric = task.measure(prompts)

    def make() -> Made:
        check_fits_memory(
            f"the published table on {len(prompts)} prompts",
            least_bytes(method_named("discrete"), model, prompts, batch_size), model.device,
            "use fewer prompts, or a smaller batch size",
        )  # fmt: skip
        others = _others(model, prompts, metric, batch_size)
        steps = stages(on_progress, seeds + len(others))
        runs = [
            discrete_circuit(model.bridge, prompts, seed=seed, batch_size=batch_size, on_progress=steps[seed])
            for seed in range(seeds)
        ]
        found = {"discrete": torch.stack([run.nodes for run in runs]).mean(dim=0)}
        for (label, score), step in zip(others.items(), steps[seeds:], strict=True):
            scores = score()
            found[label] = torch.tensor([abs(scores[head]) for head in runs[0].heads], dtype=torch.float64)
            step(1, 1)
        return {"published": _areas(known, runs, found), "heads": _ranks(known, runs[0].heads, found)}, {}

    parameters = {"table": which, "seeds": seeds}
    return stored_on_task(catalog, TABLE, name, model, task, {task.seed: prompts}, metric, parameters, make)


def _others(
    model: LoadedModel, prompts: PromptSet, metric: Metric, batch_size: int
) -> dict[str, Callable[[], NodeScores]]:
    """The methods beside discrete codes, each run when it is called."""
    bridge = model.bridge
    shared: dict[str, Any] = {"metric": metric, "batch_size": batch_size}
    return {
        "EAP-IG": lambda: attribute_edges(bridge, prompts, variant="ig-inputs", **shared).nodes(),
        "EAP": lambda: attribute_edges(bridge, prompts, variant="eap", **shared).nodes(),
        "ablation to the mean over positions": lambda: ablate_heads(
            bridge, prompts, kind="mean-over-positions", **shared
        ),
        "patching": lambda: patch_activations(bridge, prompts, **shared),
    }


def _areas(
    known: Published, runs: Sequence[DiscreteCircuit], found: Mapping[str, Float[Tensor, "heads"]]
) -> pd.DataFrame:
    """A method's area under the ROC curve against the published heads, and for discrete codes against their edges."""
    heads = runs[0].heads
    truth = torch.tensor([head in known.heads for head in heads])
    layers = torch.arange(len(heads)) // known.n_heads
    earlier, both = layers[:, None] < layers[None], truth[:, None] & truth[None]
    nodes = torch.tensor([roc_auc(run.nodes, truth) for run in runs])
    edges = torch.tensor([roc_auc(run.edges[earlier], both[earlier]) for run in runs])
    rows: list[dict[str, Any]] = [
        {"method": f"discrete codes, {len(runs)} seeds", "published_nodes": known.discrete[0],
         "ours_nodes": float(nodes.mean()), "published_edges": known.discrete[1], "ours_edges": float(edges.mean())},
        {"method": "ACDC", "published_nodes": known.acdc},
        *({"method": label, "ours_nodes": roc_auc(scores, truth)}
          for label, scores in found.items() if label != "discrete"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "published_nodes", "ours_nodes", "published_edges", "ours_edges"])


def _ranks(known: Published, heads: Sequence[str], found: Mapping[str, Float[Tensor, "heads"]]) -> pd.DataFrame:
    """Every head's rank by every method, the published ones first."""
    table = pd.DataFrame({"node": heads, "published": [head in known.heads for head in heads]})
    for label, scores in found.items():
        table[f"rank {label}"] = pd.Series(scores.numpy()).rank(ascending=False, method="min").astype(int)
    return table.sort_values(["published", "rank discrete"], ascending=[False, True], ignore_index=True)


def _ioi_from(folder: Path, which: str, model: LoadedModel, n: int) -> PromptSet:
    if which != "ioi":
        raise InputError("--data gives the lists of IOI: leave it out for other tables")
    lists = {}
    for part in IOI_LISTS:
        file = folder / f"{part}.json"
        try:
            lists[part] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"cannot read {file}: give a folder with {', '.join(IOI_LISTS)} as JSON lists") from None
    return ioi(model.tokenizer, model.bos_id, n, **lists).to(model.device)
