"""`workbench documents`: documents by the features that fire in them."""

from typing import Annotated, Literal

import typer

from sae.errors import InputError
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    DeviceOption,
    GivenModelOption,
    JsonOption,
    WorkspaceOption,
    give_model,
    open_workspace,
)
from workbench.cli.output import print_frame, print_json, print_result, records
from workbench.show.progress import ProgressBar

# As in workbench.features.documents.pooling, which loads pandas.
PoolingOption = Annotated[
    Literal["sum", "count", "max"],
    typer.Option(help="What a document has of a feature: sum of its activations, tokens it fires on, or its maximum."),
]
KOption = Annotated[
    list[int], typer.Option("--k", metavar="K", help="Active features of a document; repeat for several.")
]
IndexedArgument = Annotated[str, typer.Argument(help="Name of an indexed SAE.")]
commands = typer.Typer(
    name="documents",
    help="Documents by the features that fire in them: `workbench documents like SAE DOCUMENT`.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.add_typer(commands)


@commands.command()
def like(
    sae: IndexedArgument,
    document: Annotated[
        str | None, typer.Argument(help="Name of a document of the index, or its number where names repeat.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A text in place of a document; the model reads it.")] = None,
    pooling: PoolingOption = "sum",
    top: Annotated[int, typer.Option(help="Documents to list, most alike first.", min=1)] = 10,
    shared: Annotated[int, typer.Option(help="Features to name of each, those that it shares most.", min=1)] = 5,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the documents most like one, or like a text, and the features that they share.

    Documents are compared by the cosine of their pooled codes, weighted as words are in a search: log(1 + amount) of a
    feature times log of the documents over those that have it.
    """
    if (document is None) == (text is None):
        raise InputError("name a document of the index, or give a --text in its place")
    workspace = open_workspace(folder)
    if text is not None:
        give_model(workspace, [sae], model, device)
    found = workspace.similar_documents(
        sae, document, text=text, pooling=pooling, limit=top, shared=shared, device=device
    )
    if as_json:
        rest = {key: value for key, value in vars(found).items() if key not in ("documents", "shared")}
        print_json({**rest, "documents": records(found.documents), "shared": records(found.shared)})
        return
    titles = {"document": "document", "tokens": "tokens", "cosine": "cosine", "shared": "features that they share"}
    said = f"Of {found.n_documents:,} documents those most like {found.query[:60]!r}, by {sae}"
    print_frame(said, found.table(), as_json=False, titles=titles)
    first = found.shared[found.shared["doc"] == found.documents["doc"].iloc[0]]
    shares = {"feature": "feature", "name": "name", "part": "part of the cosine", "here": f"{pooling} here",
              "there": f"{pooling} there"}  # fmt: skip
    print_frame(f"What it shares with {found.documents['document'].iloc[0]}", first, as_json=False, titles=shares)


@commands.command()
def halves(
    sae: IndexedArgument,
    tokens: Annotated[int, typer.Option(help="Tokens of each half.", min=1)] = 600,
    draws: Annotated[int, typer.Option(help="Times the halves are drawn.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first draw.", min=0)] = 0,
    documents: Annotated[int, typer.Option(help="Documents at most.", min=1)] = 500,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Measure how well codes find a document's other half: beside tf-idf of tokens, the mean activation and its PCA.

    Of every document that is long enough two windows are drawn that share no context; each looks for the other among
    those of all documents. Of codes and tokens also the 2, 4, 8 and 32 numbers that weigh most.
    """
    workspace = open_workspace(folder)
    result = workspace.document_halves(sae, tokens=tokens, draws=draws, seed=seed, documents=documents)
    summary = result.table("summary")
    if as_json:
        print_result(result, {"summary": summary, "draws": result.table("draws")}, as_json)
        return
    titles = {"method": "method", "kept": "kept", "top1": "found first", "least": "least", "greatest": "greatest",
              "reciprocal_rank": "1 / place", "lead": "over tokens", "least_lead": "least lead",
              "greatest_lead": "greatest lead", "numbers": "numbers"}  # fmt: skip
    said = f"Other halves found, {summary['documents'].iloc[0]:,} documents, {tokens:,} tokens each, {draws} draws"
    shown = summary.assign(kept=[str(kept) if kept else "all" for kept in summary["kept"]])
    print_frame(said, shown, as_json=False, titles=titles)
    print(f"Stored as {result.kind} result {result.name!r} in {result.path}")


@commands.command()
def sparse(
    harvest: Annotated[str, typer.Argument(help="Name of a finished harvest.")],
    hook: Annotated[str | None, typer.Option(help="Hook point; needed when the harvest has several.")] = None,
    k: KOption = [2, 4, 8],  # noqa: B006
    anneal_from: Annotated[int, typer.Option(help="Where k starts that is annealed.", min=1)] = 64,
    gamma: Annotated[float, typer.Option(help="Weight of the labels, where they are used.")] = 1.0,
    width: Annotated[int, typer.Option(help="Features in all.", min=1)] = 1024,
    steps: Annotated[int, typer.Option(help="Steps of training, of 256 passages each.", min=1)] = 2000,
    tokens: Annotated[int, typer.Option(help="Tokens of each half that is to be found.", min=1)] = 600,
    draws: Annotated[int, typer.Option(help="Draws of documents, halves and training.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first draw.", min=0)] = 0,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Embed documents by 2, 4 or 8 active features, and measure it by finding the other halves of unseen documents.

    k-sparse codes of mean activations are trained with and without annealing of k, with and without the documents as
    labels; beside them stand the mean activation whole, its principal components and tf-idf of tokens.
    """
    workspace = open_workspace(folder)
    with ProgressBar("codes", 1, enabled=not as_json) as bar:
        result = workspace.sparse_documents(
            harvest, hook=hook, k=k, anneal_from=anneal_from, gamma=gamma, width=width, steps=steps, tokens=tokens,
            draws=draws, seed=seed, device=device, on_progress=bar.report,
        )  # fmt: skip
    summary = result.table("summary")
    if as_json:
        print_result(result, {"summary": summary, "draws": result.table("draws")}, as_json)
        return
    titles = {"code": "code", "k": "k", "annealed": "annealed", "labels": "labels", "top1": "found first",
              "least": "least", "greatest": "greatest", "reciprocal_rank": "1 / place", "dead": "dead",
              "least_dead": "least dead", "greatest_dead": "greatest dead", "fvu": "FVU"}  # fmt: skip
    shown = summary.assign(k=[str(one) if one else "all" for one in summary["k"]])
    said = f"Other halves found, {summary['documents'].iloc[0]:.0f} documents, {tokens:,} tokens each, {draws} draws"
    print_frame(said, shown, as_json=False, titles=titles)
    print(f"Stored as {result.kind} result {result.name!r} in {result.path}")
