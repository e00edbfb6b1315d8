"""Command over explanations: a language model says what features respond to, and is tested on it."""

from contextlib import closing
from typing import Annotated

import typer

from sae.errors import InputError
from workbench.cli.options import DEFAULT_WORKSPACE, DeviceOption, JsonOption, WorkspaceOption, open_workspace
from workbench.cli.output import print_frame
from workbench.show.progress import ProgressBar

TITLES = {
    "feature": "feature", "explanation": "explanation", "score": "score", "fires_right": "right where it fires",
    "silent_right": "right where not", "unclear": "unclear answers", "texts": "texts",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(explain)


def explain(
    sae: Annotated[str, typer.Argument(help="Name of an indexed SAE.")],
    model: Annotated[str, typer.Option(help="A Hugging Face folder or hub name; with --endpoint, the name there.")],
    feature: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER", help="Feature to explain; repeat for several.")
    ] = None,
    member_of: Annotated[str | None, typer.Option("--list", help="Explain the features of a list.")] = None,
    whole: Annotated[bool, typer.Option("--all", help="Explain every feature.")] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="Address that speaks OpenAI's chat protocol, such as http://localhost:8000/v1.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Strongest examples the model is shown.", min=1)] = 10,
    texts: Annotated[
        int, typer.Option(help="Unseen texts in which it fires, and as many in which not, for the score.", min=0)
    ] = 10,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Explain features with a language model, and score each explanation on texts that did not make it.

    The score is the balanced accuracy at telling in which texts the feature fires: 0.5 by chance. Explanations show on
    the feature's page and are found by search. Interrupted, it goes on when the same command is repeated.
    """
    from workbench.catalog.notes import Notes
    from workbench.features.explanations.language_models import Endpoint, LanguageModel, LocalModel

    workspace = open_workspace(folder)
    chosen = list(feature or [])
    if member_of is not None:
        chosen += [number for name, number in Notes(workspace.path).members(member_of) if name == sae]
    if whole and chosen:
        raise InputError("--all explains every feature: leave --feature and --list out")
    with closing(workspace.index(sae)) as index:
        if whole:
            chosen = list(range(index.d_sae))
    if not chosen:
        raise InputError(f"name features of {sae} with --feature or --list, or ask for --all")
    asked: LanguageModel = Endpoint(endpoint, model) if endpoint is not None else LocalModel(model, device)
    with ProgressBar("explain", len(chosen), enabled=not as_json, unit="features") as bar:
        result = workspace.explain(sae, chosen, asked, examples=examples, texts=texts, on_progress=bar.report)
    table = result.table("features")
    table = table[table["feature"].isin(chosen) & (table["model"] == asked.name)]
    print_frame(f"Features of {sae} in the words of {asked.name}", table, as_json, titles=TITLES)
    if not as_json:
        print(f"Next: workbench feature {sae} {chosen[0]} --workspace {folder}")
