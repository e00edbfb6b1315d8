"""`workbench lens`: what a prompt's residual stream says after each block; `workbench lens fit` averages Jacobians."""

from typing import Annotated

import typer

from sae.errors import InputError
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    CorpusOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OnlyOption,
    TextFieldOption,
    TokensOption,
    WorkspaceOption,
)
from workbench.cli.output import print_frame, print_json, print_result, records
from workbench.cli.shared import text_first
from workbench.show.html import quoted
from workbench.show.progress import ProgressBar

commands = typer.Typer(
    name="lens",
    cls=text_first("read"),
    help='What a model would say after each of its blocks: `workbench lens "def add(self"`.',
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.add_typer(commands)


@commands.command()
def read(
    prompt: Annotated[str, typer.Argument(help="The text to read.")],
    jacobian: Annotated[
        str | None, typer.Option(help="Name of Jacobians made by `lens fit`; the logit lens when left out.")
    ] = None,
    centred: Annotated[
        bool, typer.Option("--centred", help="The Jacobian lens with a bias that is right on average.")
    ] = False,
    model: ModelOption = "demo",
    position: Annotated[
        int | None, typer.Option(help="Position to show (BOS is 0, -1 the last token); all when left out.")
    ] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Read a prompt: the likeliest next token by layer and position; the word `read` may be left out."""
    from workbench.models.load import load_model
    from workbench.workspace import Workspace

    if centred and jacobian is None:
        raise InputError("--centred is a Jacobian lens: name its Jacobians with --jacobian")
    workspace = Workspace(folder, create=jacobian is None)
    loaded = load_model(model, device=device)
    found = workspace.read_lens(loaded, prompt, jacobian, centred=centred)
    table, n = found.table(), len(found.texts)
    if position is not None:
        if not -n <= position < n:
            among = ", BOS among them" if loaded.n_bos else ""
            raise InputError(f"position {position} does not exist: the prompt has 0 to {n - 1}{among}")
        table = table[table["position"] == position % n]
    if as_json:
        print_json(records(table))
        return
    if position is not None:
        title = f"{found.lens} lens after {quoted(found.texts[position % n])}"
        print_frame(title, table.drop(columns=["position", "token"]), as_json=False, top=len(table))
        return
    wide = table.pivot(index="position", columns="layer", values="next").rename(columns=str).reset_index()
    wide.insert(1, "token", list(found.texts))
    print_frame(
        f"{found.lens} lens: likeliest {found.outcome} after so many blocks", wide, as_json=False, top=len(wide)
    )


@commands.command()
def fit(
    name: Annotated[str, typer.Argument(help="Name of the Jacobians.")],
    model: ModelOption = "demo",
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    only: OnlyOption = None,
    tokens: TokensOption = 4096,
    heldout: Annotated[int, typer.Option(help="Held-out tokens to measure the lenses on.", min=2)] = 8192,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens per context, BOS included; left out, 128 or what a shorter model takes.", min=2),
    ] = None,
    own: Annotated[
        bool,
        typer.Option("--own", help="Only what a position does to itself: nearer to its next token."),
    ] = False,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Average a model's Jacobians over a corpus, and measure the logit and the Jacobian lens by layer."""
    from workbench.models.load import load_model
    from workbench.text.chats import counting
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    workspace, opened = Workspace(folder), open_corpus(corpus, text_field=counting(text_field, only))
    loaded = load_model(model, device=device)
    with ProgressBar("jacobians", 1, enabled=not as_json, unit="steps") as bar:
        result = workspace.lens(
            name, loaded, opened, max_tokens=tokens, heldout_tokens=heldout, context_len=context, own=own,
            on_progress=bar.report,
        )  # fmt: skip
    print_result(result, {title: result.table(title) for title in ("summary", "layers")}, as_json, top=1000)
