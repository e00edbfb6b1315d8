"""Studies: the verbs of a Workspace that ask about a model: its heads, circuits, attribution graphs and sparsity.

Each method is one call of the analysis that does it; `Workspace` adds harvests, training, SAEs and their features.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.catalog.catalog import Catalog

if TYPE_CHECKING:
    import pandas as pd

    from workbench.catalog.results import Result
    from workbench.circuits.lenses import LensReading
    from workbench.circuits.task import Task
    from workbench.models.load import LoadedModel
    from workbench.text.corpora import Corpus


class Studies(Catalog):
    """A Catalog with a verb for every study of a model; used as the `Workspace`."""

    def heads(self, name: str, model: "LoadedModel", **settings: Any) -> "Result":
        """Scores every attention head; settings and InputErrors as `workbench.circuits.heads.report_heads`."""
        from workbench.circuits.heads import report_heads

        return report_heads(self, name, model, **settings)

    def retrieval(self, name: str, model: "LoadedModel", **settings: Any) -> "Result":
        """Masks retrieval heads; settings and InputErrors as `workbench.circuits.needles.report_retrieval`."""
        from workbench.circuits.needles import report_retrieval

        return report_retrieval(self, name, model, **settings)

    def circuit(self, model: "LoadedModel", task: "Task | str", method: str = "ig-inputs", **settings: Any) -> "Result":
        """The circuit of a task by a method; settings and InputErrors as `workbench.circuits.report.run_method`."""
        from workbench.circuits.report import run_method

        return run_method(self, model, task, method, **settings)

    def graph(self, name: str, model: "LoadedModel", prompt: str, **settings: Any) -> "Result":
        """The attribution graph of a prompt; settings and InputErrors as `workbench.circuits.graphs.make_graph`."""
        from workbench.circuits.graphs import make_graph

        return make_graph(self, name, model, prompt, **settings)

    def graph_task(self, name: str, model: "LoadedModel", task: "Task | str", **settings: Any) -> "Result":
        """What recurs in the attribution graphs of a task's prompts; settings and InputErrors as
        `workbench.circuits.graph_tasks.graph_task`."""
        from workbench.circuits.graph_tasks import graph_task

        return graph_task(self, name, model, task, **settings)

    def lens(self, name: str, model: "LoadedModel", corpus: "Corpus", **settings: Any) -> "Result":
        """Mean Jacobians of a model and how well they and the logit lens read it; settings and InputErrors as
        `workbench.circuits.lenses.fit_lens`."""
        from workbench.circuits.lenses import fit_lens

        return fit_lens(self, name, model, corpus, **settings)

    def read_lens(
        self, model: "LoadedModel", prompt: str, name: str | None = None, *, centred: bool = False
    ) -> "LensReading":
        """What the residual stream of a prompt says layer by layer: by the logit lens, or by Jacobians stored under
        `name`; InputErrors as `workbench.circuits.lenses.read_lens` and `open_lens`."""
        from workbench.circuits.lenses import open_lens, read_lens

        fitted = None if name is None else (name, open_lens(self, name, model))
        return read_lens(model, prompt, fitted, centred=centred)

    def agreement(
        self, model: "LoadedModel", task: "Task | str", *, name: str | None = None, **settings: Any
    ) -> "Result":
        """How well EAP's variants agree with patching every edge exactly, as `TASK-agreement`; settings and InputErrors
        as `workbench.circuits.agreement.report_agreement`."""
        from workbench.circuits.agreement import report_agreement
        from workbench.circuits.report import result_name
        from workbench.circuits.task import Task

        task = Task(task) if isinstance(task, str) else task
        return report_agreement(self, name or result_name(task, "agreement"), model, task, **settings)

    def dfa(
        self,
        sae: str,
        text: str,
        model: "LoadedModel",
        *,
        name: str | None = None,
        residuals: Sequence[str] = (),
        **settings: Any,
    ) -> "Result":
        """A feature of an attention-output SAE by source token and head, going on through residual SAEs, as `dfa-SAE`;
        settings and InputErrors as `workbench.circuits.attention_saes.report_dfa`."""
        from workbench.circuits.attention_saes import report_dfa

        loaded = {item: self.sae(item, device=str(model.device)) for item in (sae, *residuals)}
        below = {item: loaded[item] for item in residuals}
        model = model.beginning(self.origin(sae).bos)
        return report_dfa(self, name or f"dfa-{sae}", model, (sae, loaded[sae]), text, residuals=below, **settings)

    def head_features(self, sae: str, model: "LoadedModel", *, name: str | None = None, **settings: Any) -> "Result":
        """What each head of an indexed attention-output SAE is for, as `head-features-SAE`; settings and InputErrors as
        `workbench.circuits.head_features.report_head_features`."""
        from workbench.circuits.head_features import report_head_features

        loaded, model = self.sae(sae, device=str(model.device)), model.beginning(self.origin(sae).bos)
        return report_head_features(self, name or f"head-features-{sae}", model, (sae, loaded), **settings)

    def published_table(
        self, which: str, model: "LoadedModel", *, name: str | None = None, **settings: Any
    ) -> "Result":
        """A published circuit beside what the methods find, as `table-WHICH`; settings and InputErrors as
        `workbench.circuits.tables.report_table`."""
        from workbench.circuits.tables import report_table

        return report_table(self, name or f"table-{which}", model, which, **settings)

    def sparsity(self, name: str, model: "LoadedModel", corpus: "Corpus", **settings: Any) -> "list[Result]":
        """How little of a model is used, and what using less costs; one result for each part, all under `name`.

        Args:
            settings: as `workbench.sparsity.report.report_all`, also for the InputErrors.
        """
        from workbench.sparsity.report import report_all

        return report_all(self, name, model, corpus, **settings)

    def sparsity_part(self, part: str, name: str, model: "LoadedModel", corpus: "Corpus", **settings: Any) -> "Result":
        """One part of it, by the name of its command; settings and InputErrors as
        `workbench.sparsity.report.report_part`."""
        from workbench.sparsity.report import report_part

        return report_part(self, part, name, model, corpus, **settings)

    def compare_sparsity(self, names: Sequence[str] = ()) -> "pd.DataFrame":
        """The sparsity reports named, or all, side by side; see `workbench.sparsity.compare.compare`."""
        from workbench.sparsity.compare import compare

        return compare(self, names)

    def compare_concepts(self, names: Sequence[str]) -> "pd.DataFrame":
        """SAEs side by side by their F1 for every concept; see `workbench.features.concepts.report.compare`."""
        from workbench.features.concepts.report import compare

        return compare(self, names)
