"""Arguments and options that several commands share. What can be checked without loading anything is checked here."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae.errors import InputError
from workbench.disk.names import is_function

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel
    from workbench.workspace import Workspace


def _check_device(device: str) -> str:
    """Before anything else is loaded; torch is asked only about what is not on every machine."""
    if device not in ("auto", "cpu"):
        from workbench.models.devices import choose_device

        choose_device(device)
    return device


WorkspaceOption = Annotated[
    Path,
    typer.Option("--workspace", "-w", envvar="WORKBENCH_WORKSPACE", help="Folder that holds everything made."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]
DeviceOption = Annotated[
    str, typer.Option(callback=_check_device, metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
]
SAEArgument = Annotated[str, typer.Argument(help="Name of an SAE.")]
ResultArgument = Annotated[
    str, typer.Argument(help="Name of the result; asked for again alike, it is shown as stored, else replaced.")
]
MODELS = "demo, a local Hugging Face folder, a hub name, a HookedTransformer's checkpoint, or FILE.py:FUNCTION"
ModelOption = Annotated[str, typer.Option(help=f"{MODELS}.")]
MeasuredOption = Annotated[str | None, typer.Option(help=f"{MODELS}; NAME when left out.")]
GivenModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model, where it has to be given again: FILE.py:FUNCTION, which is run."),
]
CorpusOption = Annotated[
    str,
    typer.Option(
        help="python-stdlib, a text/JSONL/Parquet/npy file or folder, one at s3://, gs://, hf:// or https://, or a hub "
        "dataset."
    ),
]
TextFieldOption = Annotated[
    str, typer.Option(help="Field holding text or messages in JSONL, Parquet and hub datasets.")
]
OnlyOption = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="WHICH",
        help="Which tokens count: roles of conversations (assistant), positions (8:), no-special; commas between.",
    ),
]
TokensOption = Annotated[int, typer.Option(help="Tokens to run on.", min=2)]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context", help="Tokens per context, BOS included; left out, 256 or as many as a shorter model takes.", min=2
    ),
]
NoBosOption = Annotated[bool, typer.Option("--no-bos", help="Contexts begin without BOS; SAEs are then used without.")]
SeparateOption = Annotated[
    bool, typer.Option("--separate", help="No context holds parts of two documents; the rest is padding.")
]
Precision = Literal["auto", "float32", "float16", "bfloat16"]
MOST_SEED = 2**63 - 1
"""The largest that torch takes."""
MOST_TOKENS = 10**13
"""No run ends that has more before it."""
DEFAULT_WORKSPACE = Path("workspace")
DEMO_WORKSPACE = Path("demo-workspace")


_held: "list[LoadedModel]" = []


def give_model(workspace: "Workspace", saes: Sequence[str], model: str | None, device: str) -> None:
    """Loads the model of some SAEs where it has to be given again, and holds on to it until the command ends.

    Raises:
        InputError: a model that cannot be loaded, or one with other weights than the SAEs'.
    """
    loaded = given_model(model, device)
    if loaded is None:
        return
    from workbench.models.load_own import remembered

    for sae in saes:
        origin = workspace.origin(sae)
        origin.check_model(loaded, f"SAE {sae!r}")
        _held.append(remembered(loaded, origin.model))


def given_again(model: str) -> str:
    """What the next command needs besides, where a recorded model has to be given again."""
    return f" --model {shlex.quote(model)}" if is_function(model) else ""


def given_model(model: str | None, device: str) -> "LoadedModel | None":
    """The model, where one is given."""
    from workbench.models.load import load_model

    return None if model is None else load_model(model, device=device)


def measured(name: str, model: str | None) -> tuple[str, str]:
    """(the result's name, the model to measure): a name that is a model's is that model where none is named beside it.

    Raises:
        InputError: no model named, and the name is none.
    """
    if model is not None:
        return name, model
    from workbench.models.checkpoints import reads_as_model

    if not reads_as_model(name):
        raise InputError(f"say which model to measure, as in --model demo: {name!r} is no model that is known here")
    return Path(name).name, name


def harvested(name: str, model: str | None) -> str:
    """The model to harvest, the demo model when none is named.

    Raises:
        InputError: none named, and the harvest would have the name of another.
    """
    from workbench.models.checkpoints import reads_as_model

    if model is None and name != "demo" and reads_as_model(name):
        raise InputError(
            f"{name!r} is the harvest's name and reads as a model: say which is meant, --model {name} or --model demo"
        )
    return model or "demo"


def open_workspace(folder: Path) -> "Workspace":
    """The workspace in a folder. Raises InputError, which names the demo's where it lies here, when there is none."""
    from workbench.workspace import Workspace

    if not folder.exists() and (DEMO_WORKSPACE / "workspace.json").is_file():
        raise InputError(
            f"no workspace at {folder}: for the demo's, which lies here, give --workspace {DEMO_WORKSPACE}"
        )
    return Workspace(folder, create=False)
