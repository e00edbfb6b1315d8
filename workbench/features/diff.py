"""Two models of one tokenizer compared by a crosscoder: what they share, and what only one of them has.

1. Both models' activations at one hook point are harvested on the same text.
2. A BatchTopK crosscoder of the two trains on them.
3. It is evaluated on held-out documents, part by part, and its features are sorted into shared ones, those of one model
   alone, and those in between (`workbench.saes.crosscoders`).
4. Its features are indexed on the harvests: where each fires.

Each step is stored in the workspace, is found again when it is there, and goes on where it was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae.config import TrainConfig
from sae.errors import InputError
from sae.rules import BatchTopK
from sae.training import check_configs
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Result
from workbench.catalog.runs import Run
from workbench.disk.names import check_name, is_function, new_folder
from workbench.features.index.build import IndexSummary, build_index
from workbench.harvest.plan import HarvestConfig
from workbench.harvest.run import HarvestProgress, harvest_into
from workbench.models.contexts import context_length
from workbench.models.hooks import check_hooks, resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.models.load_own import short_name
from workbench.saes.crosscoders import evaluate_crosscoder
from workbench.saes.train import train_all

BATCH_SIZE = 1024
OnProgress = Callable[[str, int, int], None]
"""Called with (the step, done, in all)."""


@dataclass(frozen=True)
class ModelDiff:
    """What `diff_models` made."""

    name: str
    """Of the crosscoder, its run, its index and its evaluation."""
    evaluation: Result
    """Tables parts, groups, features and feature_parts; see `workbench.saes.crosscoders`."""
    index: IndexSummary


def diff_models(
    catalog: Catalog,
    a: str | LoadedModel,
    b: str | LoadedModel,
    *,
    name: str | None = None,
    hook: str | None = None,
    corpus: str = "python-stdlib",
    text_field: str = "text",
    tokens: int = 400_000,
    epochs: float = 2.0,
    d_sae: int = 2048,
    k: int = 32,
    context_len: int | None = None,
    seed: int = 0,
    heldout_tokens: int = 32_768,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> ModelDiff:
    """Compares two models; see the module's description.

    Args:
        a, b: as `load_model` takes them, or loaded.
        name: of the crosscoder and everything about it; the models' names when None.
        hook: hook point in both; the residual stream in the middle of the first model when None.
        corpus, text_field: text that both read.
        tokens: rows harvested of each model.
        epochs: how often the crosscoder sees them.
        d_sae, k: its features, and how many are active a token.
        seed: of its start and of the order of the rows.
        heldout_tokens: on which it is evaluated.
        on_progress: called as each step goes on.

    Raises:
        InputError: models of different tokenizers or kinds of output, a hook point one of them does not have, or as
            `harvest_into`, `workbench.saes.train.train_all` and `evaluate_crosscoder`.
    """
    models = _loaded((a, b), hook, device)
    context_len = min(context_length(model, context_len) for model in models)
    hook = hook or f"blocks.{models[0].info.n_layers // 2}.hook_resid_post"
    _check(models, hook)
    labels = part_labels(models[0].info.name, models[1].info.name)
    name = check_name(name or "-".join(labels), "name of a comparison")
    # Small batches: a comparison is made of few tokens, and many steps learn more from them.
    config = TrainConfig(name, round(epochs * tokens) or 1, d_sae, BatchTopK(k), batch_size=BATCH_SIZE, seed=seed)
    harvests = [f"{name}.{label}" for label in labels]
    _check_settings(catalog, config, harvests)

    def report(step: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(step, done, total) if on_progress is not None else None

    for model, label, harvest in zip(models, labels, harvests, strict=True):
        asked = HarvestConfig(
            model=model.info.name, corpus=corpus, text_field=text_field, hooks=(hook,), context_len=context_len,
            max_tokens=tokens,
        )  # fmt: skip
        _harvest(new_folder(catalog.harvest_folder(harvest)), asked, model, device, report(f"harvest {label}"))
    rows = catalog.open_harvest(harvests[0]).n_trainable_rows
    config, train = replace(config, total_tokens=max(1, round(epochs * rows))), report("train")
    (trained,) = train_all(
        catalog, name, harvests, [config], hook=hook, device=device,
        on_metrics=lambda metrics: train(metrics.tokens, metrics.total_tokens),
    )  # fmt: skip
    if trained.error:
        raise InputError(f"the crosscoder could not be trained: {trained.error}")
    evaluation = evaluate_crosscoder(
        catalog, name, models=models, max_tokens=heldout_tokens, device=device, on_progress=report("evaluate")
    )
    index = build_index(catalog, name, model=models[0], device=device, on_progress=report("index"))
    return ModelDiff(name, evaluation, index)


def _loaded(given: Sequence[str | LoadedModel], hook: str | None, device: str) -> list[LoadedModel]:
    for spec in given:
        if isinstance(spec, str) and hook is not None:
            check_hooks(spec, [hook])
    return [load_model(spec, device=device) if isinstance(spec, str) else spec for spec in given]


def _check(models: Sequence[LoadedModel], hook: str) -> None:
    """Raises InputError for models of different tokenizers, without the hook point, or with outputs of two kinds."""
    first, other = models
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(
            f"{first.info.name} and {other.info.name} have different tokenizers, so they do not read the same tokens: "
            "compare models that share one"
        )
    for model in models:
        resolve_hook(model, hook)
    if first.gives_tokens != other.gives_tokens:
        raise InputError(
            f"of {first.info.name} and {other.info.name} one gives tokens and the other classes: compare models of one "
            "kind of output"
        )


def _check_settings(catalog: Catalog, config: TrainConfig, harvests: Sequence[str]) -> None:
    """Raises InputError, before anything is harvested, for settings that cannot be trained or a name that is taken."""
    check_configs([config])
    run = Run(new_folder(catalog.run_folder(config.name)))
    if not run.folder.is_dir():
        catalog.check_new_sae(config.name)
    elif run.description.get("harvest") != " + ".join(harvests):
        raise InputError(f"a training run {config.name!r} exists that is no such comparison: choose another --name")


def _harvest(
    folder: Path, config: HarvestConfig, model: LoadedModel, device: str, report: Callable[[int, int], None]
) -> None:
    def on_progress(progress: HarvestProgress) -> None:
        report(progress.tokens, progress.total_tokens)

    harvest_into(folder, config, model=model, device=device, on_progress=on_progress)


def part_labels(a: str, b: str) -> list[str]:
    """What the models are called: the last words of their names, the second by another where these are the same."""
    # Dots stand between a comparison's name and its harvests'.
    first, second = (short_name(spec).replace(".", "-") for spec in (a, b))
    if first == second and is_function(a) and is_function(b):
        first, second = (spec.rpartition(":")[2] for spec in (a, b))
    return [first, second] if first != second else [first, f"{first}-2"]
