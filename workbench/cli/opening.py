"""`workbench open`: a published dictionary, or one in a folder, imported, harvested, indexed, and its pages."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.options import DEFAULT_WORKSPACE, DeviceOption, JsonOption, WorkspaceOption
from workbench.cli.output import print_json
from workbench.cli.pipeline import describe_estimate
from workbench.cli.web_app import open_app
from workbench.show.progress import ProgressBar, format_bytes

if TYPE_CHECKING:
    from workbench.features.opening import Opening
    from workbench.harvest.run import HarvestEstimate


FieldOption = Annotated[
    str | None, typer.Option(help="Field of the corpus that holds the text; as in training, or text, if left out.")
]


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("open")(open_)


def open_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RELEASE|FOLDER",
            help="Release in SAELens' registry, a hub repository of SAEs or of circuit-tracer's, or a folder.",
        ),
    ],
    sae_id: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="The SAE of the release; with a * for the layer, a set of transcoders."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the workspace; made of its own when left out.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to harvest and index.", min=256)] = 500_000,
    layer: Annotated[
        list[int] | None, typer.Option(metavar="LAYER", help="Of a set, index this layer only; repeat for several.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Text to read; what it was trained on when left out.")] = None,
    text_field: FieldOption = None,
    hook: Annotated[str | None, typer.Option(help="Hook point it reads, where its files do not say.")] = None,
    model: Annotated[str | None, typer.Option(help="Model it reads, where its files do not say.")] = None,
    estimate_only: Annotated[bool, typer.Option(help="Print what will be downloaded and taken, and stop.")] = False,
    pages: Annotated[bool, typer.Option("--app/--no-app", help="Open the web app on it when it is done.")] = True,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Open a dictionary of somebody else's: import it, harvest its model as it was trained, index it, show its pages.

    Says first what it will download and take. Interrupted, it goes on where it stopped when the command is repeated.
    """
    # Before what takes seconds to import: no such release, or no network to fetch it.
    from workbench.saes.releases import check_reachable

    if sae_id is not None:
        check_reachable(source, sae_id)
    from workbench.features.opening import plan_opening
    from workbench.workspace import Workspace

    plan = plan_opening(
        source, sae_id, name=name, hook=hook, model=model, corpus=corpus, text_field=text_field, tokens=tokens
    )
    if not as_json:
        print_plan(plan)
    if estimate_only:
        if as_json:
            print_json({**asdict(plan), "harvest_bytes": plan.harvest_bytes})
        return
    workspace = Workspace(folder)

    def say(estimate: "HarvestEstimate") -> None:
        if not as_json:
            print(describe_estimate(estimate))

    with ProgressBar("open", 1, enabled=not as_json) as bar:

        def on_progress(step: str, done: int, total: int) -> None:
            bar.label = step
            bar.report(done, total)

        made = workspace.open_dictionary(
            plan, layers=layer or (), device=device, on_estimate=say, on_progress=on_progress
        )
    if as_json:
        print_json({**asdict(made), "path": str(workspace.path)})
        return
    features = f"workbench feature {made.indexes[0]} --workspace {folder}"
    print(f"Opened {plan.source} as {made.name}; its features: {features}")
    if pages:
        open_app(folder)


def print_plan(plan: "Opening") -> None:
    """What will be done, fetched and taken, in a few lines."""
    trained, config = plan.trained, plan.config
    at = trained.hooks[0] if len(trained.hooks) == 1 else f"{trained.hooks[0]} and {len(trained.hooks) - 1} more"
    print(f"{plan.source}: {trained.d_sae:,} features at {at} of {config.model}, as {plan.name}")
    for what, size in (plan.published.fetched if plan.published else {}).items():
        print(f"Downloads {what}: {'what is not in the cache' if size is None else format_bytes(size)}")
    # Whether the model has a BOS is not known before it is there.
    begins = "beginning with BOS, where the model has one" if config.bos else "without BOS"
    contexts = f"contexts of {config.context_len}, {begins}"
    print(
        f"Harvests up to {config.max_tokens:,} tokens of {config.corpus} in {contexts}: "
        f"at most {format_bytes(plan.harvest_bytes)} of disk"
    )
    if trained.context_len is None:
        print(f"It does not say how long the contexts were that it was trained on: {config.context_len} is a guess.")
    if trained.processed:
        print(f"It was trained on a model with {', '.join(trained.processed)}; here the weights are as published.")
