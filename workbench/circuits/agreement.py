"""How well every EAP variant agrees with patching each edge exactly, and how faithful its circuits are.

Stored as `circuit-agreement`: tables methods, curves, prompts.
"""

from collections.abc import Sequence
from typing import Any, get_args

import pandas as pd

from circuits.eap import Variant, attribute_edges
from circuits.faithfulness import FRACTIONS, FaithfulnessCurve, faithfulness_curve
from circuits.passes import OnProgress, stages
from circuits.path_patching import patch_edges
from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Made, Result
from workbench.circuits import figures
from workbench.circuits.report import RANKINGS, check_difference, curve_table, stored_on_task
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel

AGREEMENT = "circuit-agreement"
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def report_agreement(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    task: Task,
    *,
    exact_prompts: int = 2,
    steps: int = 5,
    fractions: Sequence[float] = FRACTIONS,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures the agreement and stores it.

    Correlations are over all edges on the first `exact_prompts` prompts, one forward pass an edge; CPR and CMD are
    over all prompts.

    Raises:
        InputError: fewer prompts than are to be patched exactly, or none.
    """
    prompts = task.prompts(model)
    metric = task.measure(prompts)
    if not 1 <= exact_prompts <= len(prompts):
        raise InputError(f"exact patching on {exact_prompts} prompts was asked for, the task has {len(prompts)}")

    def make() -> Made:
        steps_of = stages(on_progress, 1 + 2 * len(VARIANTS))
        few = prompts[:exact_prompts]
        shared: dict[str, Any] = {"metric": metric, "batch_size": batch_size}
        exact = patch_edges(model.bridge, few, metric=metric, on_progress=steps_of[0])
        there = exact.graph.exists
        rows: list[dict[str, object]] = []
        curves: list[FaithfulnessCurve] = []
        for number, variant in enumerate(VARIANTS):
            close = attribute_edges(model.bridge, few, variant=variant, steps=steps, **shared)
            one, two = pd.Series(close.scores[there].numpy()), pd.Series(exact.scores[there].numpy())
            scores = attribute_edges(model.bridge, prompts, variant=variant, steps=steps, **shared)
            check_difference(scores)
            pair = [
                faithfulness_curve(model.bridge, prompts, scores, ranking=ranking, fractions=fractions,
                                   on_progress=steps_of[1 + 2 * number + place], **shared)
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
    return stored_on_task(catalog, AGREEMENT, name, model, task, prompts, metric, parameters, make)
