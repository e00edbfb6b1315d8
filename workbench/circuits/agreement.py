"""How well every EAP variant agrees with patching each edge exactly, and how faithful its circuits are, over draws.

1. Prompts are drawn several times, with consecutive seeds: what a method gives on one draw may be far from what it
   gives on the next. A task file is one draw.
2. On the first prompts of a draw each edge is patched exactly, one forward pass an edge, and scored by each variant:
   Pearson and Spearman correlation over all edges, and Pearson's without the edge of largest exact effect, which alone
   can decide it.
3. On all prompts of the draw each variant's circuits are run: CPR and CMD (`circuits.faithfulness`).

Stored as `circuit-agreement`: tables methods (mean, standard deviation, least and greatest over the draws), draws,
edges, curves, prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import pandas as pd

from circuits.eap import Variant, attribute_edges
from circuits.faithfulness import FRACTIONS, FaithfulnessCurve, faithfulness_curve
from circuits.passes import OnProgress, stages
from circuits.path_patching import patch_edges
from circuits.prompts import PromptSet
from circuits.tasks import is_file
from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Made, Result
from workbench.circuits import figures
from workbench.circuits.methods import method_named
from workbench.circuits.report import RANKINGS, curve_table, least_bytes, stored_on_task
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel
from workbench.models.memory import check_fits_memory

AGREEMENT = "circuit-agreement"
VARIANTS: tuple[Variant, ...] = get_args(Variant)
DRAWS = 5
MEASURES = ("pearson", "pearson_rest", "spearman", "cpr", "cmd")
"""`pearson_rest` leaves out the edge of largest exact effect."""


def report_agreement(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    task: Task,
    *,
    draws: int | None = None,
    exact_prompts: int = 2,
    steps: int = 5,
    fractions: Sequence[float] = FRACTIONS,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures the agreement and stores it.

    Args:
        draws: of the prompts, with seeds from that of the task on; DRAWS of a generated task when None.
        exact_prompts: of each draw, on which every edge is patched by itself.
        steps: of integrated gradients.

    Raises:
        InputError: no draws, several of a file, or more prompts to be patched exactly than a draw has.
    """
    draws = draws if draws is not None else 1 if is_file(task.name) else DRAWS
    if draws < 1 or (draws > 1 and is_file(task.name)):
        raise InputError(f"{draws} draws of {task.title} were asked for: give at least one, and one alone for a file")
    drawn = {task.seed + number: replace(task, seed=task.seed + number).prompts(model) for number in range(draws)}
    first = drawn[task.seed]
    metric = task.measure(first)
    settings: dict[str, Any] = {"metric": metric, "batch_size": batch_size}
    if not 1 <= exact_prompts <= len(first):
        raise InputError(f"exact patching on {exact_prompts} prompts was asked for, the task has {len(first)}")

    def make() -> Made:
        needed = [
            least_bytes(method_named(method), model, prompts, batch_size)
            for method, prompts in (("eap", first), ("exact", first[:exact_prompts]))
        ]
        check_fits_memory(
            f"comparing edge methods on {len(first)} prompts", max(needed), model.device,
            "use fewer or shorter prompts, or a smaller batch size",
        )  # fmt: skip
        found = {
            seed: _of_draw(model, prompts, exact_prompts, fractions, settings, steps, step)
            for (seed, prompts), step in zip(drawn.items(), stages(on_progress, draws), strict=True)
        }
        table = _together({seed: rows for seed, (rows, _, _) in found.items()})
        tables = {
            "methods": over_draws(table),
            "draws": table,
            "edges": _together({seed: effects for seed, (_, effects, _) in found.items()}),
            "curves": _together({seed: curve_table(curves) for seed, (_, _, curves) in found.items()}),
        }
        absolute = [curve for _, _, curves in found.values() for curve in curves if curve.ranking == "absolute"]
        return tables, {
            "agreement": figures.agreement_figure(table, MEASURES),
            "faithfulness": figures.faithfulness_figure(absolute),
        }

    parameters = {
        "draws": draws, "exact_prompts": exact_prompts, "steps": steps, "fractions": list(fractions),
    }  # fmt: skip
    return stored_on_task(catalog, AGREEMENT, name, model, task, drawn, metric, parameters, make)


def over_draws(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method and measure: mean, standard deviation (NaN for one draw), least and greatest over the draws."""
    long = table.melt(["method"], MEASURES, var_name="measure")
    found = long.groupby(["method", "measure"], sort=False)["value"].agg(["mean", "std", "min", "max", "count"])
    return found.reset_index().rename(columns={"count": "draws"})


def _together(by_seed: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """Tables of all draws in one, the seed first."""
    found = pd.concat(by_seed, names=["seed"])
    return found.reset_index(level="seed").reset_index(drop=True)


def _of_draw(
    model: LoadedModel, prompts: PromptSet, n_exact: int, fractions: Sequence[float], settings: dict[str, Any],
    steps: int, on_progress: OnProgress,
) -> tuple[pd.DataFrame, pd.DataFrame, list[FaithfulnessCurve]]:  # fmt: skip
    """One row a variant, one row an edge with its effects, and the curves of one draw."""
    bridge, few = model.bridge, prompts[:n_exact]
    first, *rest = stages(on_progress, 1 + len(VARIANTS) * len(RANKINGS))
    exact = patch_edges(bridge, few, metric=settings["metric"], on_progress=first)
    there = exact.graph.exists
    effects = pd.DataFrame(
        {"edge": [exact.graph.edge_name(*place) for place in there.nonzero().tolist()], "exact": exact.scores[there]}
    )
    largest = effects["exact"].abs().idxmax()
    rows, curves = [], []
    for number, variant in enumerate(VARIANTS):
        close = attribute_edges(bridge, few, variant=variant, steps=steps, **settings)
        effects[close.method] = close.scores[there]
        scores = attribute_edges(bridge, prompts, variant=variant, steps=steps, **settings)
        absolute, signed = (
            faithfulness_curve(
                bridge, prompts, scores, ranking=ranking, fractions=fractions, on_progress=step, **settings
            )
            for ranking, step in zip(RANKINGS, rest[2 * number : 2 * number + 2], strict=True)
        )
        curves += [absolute, signed]
        pair, others = effects[["exact", close.method]], effects.drop(index=largest)[["exact", close.method]]
        rows.append(
            {"method": close.method, "edges": len(pair), "pearson": pair.corr().iloc[0, 1],
             "pearson_rest": others.corr().iloc[0, 1], "spearman": pair.rank().corr().iloc[0, 1],
             "cpr": signed.cpr, "cmd": absolute.cmd}
        )  # fmt: skip
    return pd.DataFrame(rows), effects, curves
