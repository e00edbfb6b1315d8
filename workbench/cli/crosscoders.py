"""`workbench diff`, and how evaluations of crosscoders are printed."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    MODELS,
    ContextOption,
    CorpusOption,
    DeviceOption,
    JsonOption,
    OnlyOption,
    TextFieldOption,
    WorkspaceOption,
)
from workbench.cli.output import print_json, print_table, records
from workbench.show.html import one_line
from workbench.show.progress import ProgressBar

if TYPE_CHECKING:
    from workbench.catalog.results import Result
    from workbench.workspace import Workspace

PART_COLUMNS = {
    "tokens": "tokens",
    "explained variance": "explained_variance",
    "CE clean": "ce_clean",
    "added nats": "added_nats",
    "recovered (zero)": "loss_recovered_zero",
    "KL": "kl",
}
SHOWN = 5
"""Features named of every group of a single part."""


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(diff)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"A model: {MODELS}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another with the same tokenizer, such as A fine-tuned.")],
    name: Annotated[str | None, typer.Option(help="Of what is made; the models' names when left out.")] = None,
    hook: Annotated[
        str | None, typer.Option(help="Hook point in both; the residual stream in A's middle when left out.")
    ] = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    only: OnlyOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens to harvest of each model.", min=2)] = 400_000,
    epochs: Annotated[float, typer.Option(help="How often the crosscoder sees them.", min=0.01)] = 2.0,
    d_sae: Annotated[int, typer.Option(help="Number of features.", min=1)] = 2048,
    k: Annotated[int, typer.Option(help="Active features per token, on average.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the crosscoder: repeat with others before you believe it.")] = 0,
    context: ContextOption = None,
    heldout: Annotated[int, typer.Option(help="Held-out tokens to measure both models on.", min=2)] = 32_768,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare two models by a crosscoder: which features they share, and which only one of them has.

    Harvests both on the same text, trains a BatchTopK crosscoder, measures it on held-out documents and indexes its
    features. Interrupted, it goes on where it stopped when the same command is repeated.
    """
    from workbench.text.chats import counting
    from workbench.workspace import Workspace

    field = counting(text_field, only)
    workspace = Workspace(folder)
    with ExitStack() as shown:
        bar: ProgressBar | None = None

        def on_progress(step: str, done: int, total: int) -> None:
            nonlocal bar
            if bar is None or bar.label != step:
                shown.close()
                bar = shown.enter_context(ProgressBar(step, total, enabled=not as_json))
            bar.update(done)

        made = workspace.diff(
            a, b, name=name, hook=hook, corpus=corpus, text_field=field, tokens=tokens, epochs=epochs, d_sae=d_sae, k=k,
            seed=seed, context_len=context, heldout_tokens=heldout, device=device, on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        print_json({"name": made.name, **as_document(made.evaluation)})
        return
    print_crosscoders([made.evaluation])
    print_examples(workspace, made.name, made.evaluation)
    print(f"Next: workbench app --workspace {folder}, page Crosscoders")


def evaluate_crosscoders(
    workspace: "Workspace", names: Sequence[str], *, max_tokens: int, quiet: bool, **settings: Any
) -> "list[Result]":
    """`Workspace.evaluate_crosscoder` of each behind a progress bar."""
    found = []
    for name in names:
        with ProgressBar(f"evaluate {name}", max_tokens, enabled=not quiet) as bar:
            found.append(
                workspace.evaluate_crosscoder(name, max_tokens=max_tokens, on_progress=bar.report_share, **settings)
            )
    return found


def as_document(evaluation: "Result") -> dict[str, Any]:
    """Parts and groups of features, for JSON; in place of the groups why there are none, where little is explained."""
    from workbench.saes.crosscoders import poorly_explained

    parts, why = records(evaluation.table("parts")), poorly_explained(evaluation)
    return (
        {"parts": parts, "groups": records(evaluation.table("groups"))}
        if why is None
        else {"parts": parts, "no_groups": why}
    )


def print_crosscoders(evaluations: "Sequence[Result]") -> None:
    """The parts of crosscoders, one column each, and their groups of features, where enough is explained."""
    from workbench.saes.crosscoders import poorly_explained

    for evaluation in evaluations:
        parts = evaluation.table("parts").set_index("part")
        rows = [[title, *_known(parts[key])] for title, key in PART_COLUMNS.items()]
        print_table(f"{evaluation.name}: L0 {parts['l0'].iloc[0]:.1f}", ["", *parts.index], rows)
        why = poorly_explained(evaluation)
        if why is not None:
            print(why)
            continue
        groups = evaluation.table("groups")
        columns = ["group", "features", "share", "cosine", "nu_error", "nu_reconstruction"]
        print_table(
            "Features", [column.replace("_", " ") for column in columns],
            [_known(row) for row in groups[columns].to_numpy().tolist()],
        )  # fmt: skip


def _known(values: Iterable[Any]) -> list[Any]:
    """The values, None in place of NaN."""
    return [None if value != value else value for value in values]


def print_examples(workspace: "Workspace", name: str, evaluation: "Result") -> None:
    """The features of a single part that fire most often, with what they fire on, where enough is explained."""
    from workbench.saes.crosscoders import poorly_explained

    if poorly_explained(evaluation) is not None:
        return
    features = evaluation.table("features")
    own = features[features["group"].str.startswith("only ")]
    if own.empty:
        print("No feature is one part's alone.")
        return
    shown = own.sort_values("firings", ascending=False).groupby("group").head(SHOWN).sort_values("group")
    index = workspace.index(name)
    names = index.names(shown["feature"].tolist())
    rows = [
        [line.group, line.feature, line.firings, line.nu_error, one_line(names[line.feature])]
        for line in shown.itertuples()
    ]
    index.close()
    print_table("Features of one part alone", ["group", "feature", "firings", "nu error", "fires on"], rows)
