"""What restricting attention costs on tasks: loss on text hides a task that breaks.

Every head restricted as in `attention`, at the same budgets and thresholds; a task's own metric (`circuits.metrics`)
at the last position of its prompts, mean over prompts. `kept` is that over the clean model's: 1 loses nothing, 0 leaves
nothing of the preference.
"""

from collections.abc import Sequence

import pandas as pd
import torch

from circuits.passes import answer_logits
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel
from workbench.sparsity.attention import RESTS, BudgetedPattern, restricted


@torch.no_grad()
def task_costs(model: LoadedModel, settings: Sequence[BudgetedPattern], tasks: Sequence[Task]) -> pd.DataFrame:
    """One row per task, pattern, use of the rest and budget: task, metric, prompts, pattern, rest, budget, clean,
    value, kept.

    Raises:
        InputError: a task that the tokenizer cannot express, or as `Task.prompts`.
    """
    rows = []
    for task in tasks:
        prompts = task.prompts(model)
        metric = task.measure(prompts)
        clean = metric(answer_logits(model.bridge, prompts.clean, prompts.last), prompts).double().mean().item()
        for setting in settings:
            for rest in RESTS:
                with restricted(model.bridge, setting.keep, setting.value, rest=rest):
                    logits = answer_logits(model.bridge, prompts.clean, prompts.last)
                value = metric(logits, prompts).double().mean().item()
                rows.append(
                    {
                        "task": task.title, "metric": metric.__name__, "prompts": len(prompts),
                        "pattern": setting.pattern, "rest": rest, "budget": setting.budget, "clean": clean,
                        "value": value, "kept": value / clean,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)
