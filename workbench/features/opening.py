"""A dictionary of somebody else's to its pages: imported, harvested as it was trained, indexed.

1. It is imported: from a published release, or from a local folder (`workbench.saes.exchange`).
2. Its model reads the text that it was trained on, at its hook points, in contexts of the same length, with BOS or
   without; a set's layers all in one pass.
3. Its features are indexed on that harvest, a set's layer by layer.

Each step is stored in the workspace under the dictionary's name, is found again when it is there, and goes on where it
was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae.errors import InputError
from sae.formats.foreign import load_foreign
from sae.transcoder_set import load_transcoders
from workbench.catalog.catalog import PROVENANCE, Catalog
from workbench.disk.descriptions import read_description
from workbench.disk.names import check_name, layer_name, new_folder
from workbench.features.index.build import build_index
from workbench.harvest.plan import HarvestConfig
from workbench.harvest.run import HarvestEstimate, HarvestProgress, harvest_into
from workbench.models.bundled import demo_transcoders_dir
from workbench.models.contexts import context_length
from workbench.models.load import load_model
from workbench.models.load_own import recorded_model
from workbench.saes.exchange import BUNDLED, import_folder, import_pretrained, import_published_set, import_set, is_set
from workbench.saes.hub_sets import describe_hub_set, fetch_hub_set
from workbench.saes.published import Published, Trained, describe_published

CONTEXT = 128
"""Tokens a context where a dictionary does not say how long its were."""
OnProgress = Callable[[str, int, int], None]
"""Called with (the step, done, in all)."""


@dataclass(frozen=True)
class Opening:
    """What opening a dictionary will do, before anything is fetched or written."""

    name: str
    source: str
    """The release and id, or the folder."""
    trained: Trained
    published: Published | None
    """None for a local folder."""
    config: HarvestConfig
    """What is harvested; the hook points may yet be named otherwise, where the dictionary is moved behind a norm."""

    @property
    def harvest_bytes(self) -> int:
        """Of the harvest at most, in single precision."""
        return self.config.max_tokens * (4 * self.trained.d_in * len(self.trained.hooks) + 22)


@dataclass(frozen=True)
class Opened:
    """What is in the workspace now."""

    name: str
    """Of the dictionary, and of the harvest it is indexed on."""
    indexes: tuple[str, ...]
    """The names under which features are looked at: the dictionary's, or those of its layers."""


def plan_opening(
    source: str,
    sae_id: str | None = None,
    *,
    name: str | None = None,
    hook: str | None = None,
    model: str | None = None,
    corpus: str | None = None,
    text_field: str | None = None,
    tokens: int = 500_000,
) -> Opening:
    """What opening a dictionary will do; see the module's description.

    Args:
        source: a release in SAELens' registry or a repository of the hub, with `sae_id`; a repository with a set of
            circuit-tracer's alone; or a local folder.
        sae_id: the dictionary in the release; with a * for the layer, a set of transcoders.
        name: in the workspace; made of the release and id, or the folder, when None.
        hook, model, corpus: what it reads and was trained on, where it does not say.
        text_field: field of the corpus that holds the text; the one that it was trained on, or `text`, when None.
        tokens: rows to harvest and index.

    Raises:
        InputError: as `describe_published`, no such folder, or a dictionary that does not say what it was trained on.
    """
    published, folder = None, Path(source).expanduser()
    if sae_id is not None:
        published = describe_published(source, sae_id, hook=hook, model=model)
        trained, called = published.trained, f"{source}-{sae_id}"
    elif is_set(folder):
        coders = load_transcoders(demo_transcoders_dir() if folder == BUNDLED else folder).coders
        trained, called = Trained.of(coders, _record_in(folder / "layer_0")), folder.name
    elif folder.is_dir():
        coder = load_foreign(folder, hook_name=hook, model_name=model)
        if coder.parts:
            raise InputError(
                f"{source} is a crosscoder, which reads several activations: bring it in with `workbench import`, "
                "harvest what it reads and name the harvests to `workbench index`"
            )
        trained, called = Trained.of({0: coder}, _record_in(folder)), folder.name
    elif "/" in source and not source.startswith(("/", ".", "~")):
        published = describe_hub_set(source, model=model)
        trained, called = published.trained, source
    else:
        raise InputError(f"no folder at {source}: give a folder, or a release and the id of a published SAE in it")
    named = model or trained.model
    if not named:
        raise InputError(f"{source} does not say which model it reads: give one, as --model EleutherAI/pythia-70m")
    if model is None:
        # Python that a file of somebody else's names is not run.
        recorded_model(named)
    text = corpus or trained.corpus or ("python-stdlib" if named == "demo" else None)
    if text is None:
        raise InputError(
            f"{source} does not say which text it was trained on: give one, as --corpus NeelNanda/pile-10k"
        )
    context = trained.context_len or CONTEXT
    config = HarvestConfig(
        model=named, corpus=text, hooks=trained.hooks, text_field=text_field or trained.text_field,
        context_len=context, max_tokens=max(tokens, context), bos=trained.bos, separate=trained.separate,
    )  # fmt: skip
    plain = "".join(mark if mark.isalnum() or mark in "-_." else "-" for mark in called)
    name = check_name(name or plain.replace(".", "_"), "name")
    return Opening(name, f"{source}/{sae_id}" if sae_id else source, trained, published, config)


def _record_in(folder: Path) -> dict[str, Any]:
    """What a workspace recorded of an SAE in its folder; empty for a folder of somebody else's."""
    file = folder / PROVENANCE
    return read_description(file) if file.is_file() else {}


def open_dictionary(
    catalog: Catalog,
    plan: Opening,
    *,
    layers: Sequence[int] = (),
    device: str = "auto",
    on_estimate: Callable[[HarvestEstimate], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Opened:
    """Does what `plan_opening` said; see the module's description.

    Args:
        layers: of a set, which are harvested and indexed; all when empty.
        on_estimate: called with what the harvest takes before it begins.
        on_progress: called as each step goes on.

    Raises:
        InputError: a name that is taken by something else, a layer that is not there, or as importing, harvesting and
            indexing.
    """

    def report(step: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(step, done, total) if on_progress is not None else None

    hooks = _imported(catalog, plan)
    if layers:
        wrong = next((layer for layer in layers if layer_name(plan.name, layer) not in hooks), None)
        if wrong is not None:
            raise InputError(f"{plan.name} has no layer {wrong}: it has {', '.join(hooks)}")
        hooks = {name: hooks[name] for name in (layer_name(plan.name, layer) for layer in layers)}
    model = load_model(plan.config.model, device=device)
    context = context_length(model, None, plan.config.context_len or CONTEXT)
    asked = replace(plan.config, hooks=tuple(dict.fromkeys(hooks.values())), context_len=context)

    def harvesting(progress: HarvestProgress) -> None:
        report("harvest")(progress.tokens, progress.total_tokens)

    folder = new_folder(catalog.harvest_folder(plan.name))
    harvest_into(folder, asked, model=model, device=device, on_estimate=on_estimate, on_progress=harvesting)
    for name in hooks:
        build_index(catalog, name, harvest=plan.name, model=model, device=device, on_progress=report(f"index {name}"))
    return Opened(plan.name, tuple(hooks))


def _imported(catalog: Catalog, plan: Opening) -> dict[str, str]:
    """Imports the dictionary where it is not there yet; hook points by the names of what reads them."""
    published, name, model = plan.published, plan.name, plan.config.model
    folder = Path(plan.source).expanduser()
    is_a_set = published.is_folder or len(published.ids) > 1 if published else is_set(folder)
    names = [one.name for one in (catalog.transcoder_sets() if is_a_set else catalog.saes())]
    if name not in names:
        if published is not None and published.is_folder:
            import_set(catalog, name, fetch_hub_set(published.release), model=model, repo=published.release)
        elif published is not None and is_a_set:
            import_published_set(catalog, name, published.release, published.ids, model=model)
        elif published is not None:
            hook = plan.trained.hooks[0]
            import_pretrained(catalog, name, published.release, published.ids[0], hook=hook, model=model)
        elif is_a_set:
            import_set(catalog, name, folder, model=model)
        else:
            import_folder(catalog, name, folder, hook=plan.trained.hooks[0], model=model)
    coders = catalog.with_layers([name])
    imported = catalog.origin(coders[0]).imported or {}
    lies = demo_transcoders_dir() if folder == BUNDLED else folder
    where = {"path": str(lies.resolve())}
    if published is not None and published.is_folder:
        where = {"repo": published.release}
    elif published is not None:
        where = {"release": published.release, "id": published.ids[min(published.ids)]}
    if any(imported.get(key) != value for key, value in where.items()):
        raise InputError(f"{name!r} exists and is something else: choose another --name")
    return {one: catalog.origin(one).hook for one in coders}
