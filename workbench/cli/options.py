"""Arguments and options that several commands share. What can be checked without loading anything is checked here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae.errors import InputError

if TYPE_CHECKING:
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
ModelOption = Annotated[str, typer.Option(help="demo, a local Hugging Face folder, or a hub name.")]
CorpusOption = Annotated[
    str, typer.Option(help="python-stdlib, a text/JSONL/Parquet file or folder, or a hub dataset.")
]
TextFieldOption = Annotated[str, typer.Option(help="Field holding the text in JSONL, Parquet and hub datasets.")]
TokensOption = Annotated[int, typer.Option(help="Tokens to run on.", min=2)]
ContextOption = Annotated[int, typer.Option(help="Tokens per context, BOS included.", min=2)]
Precision = Literal["auto", "float32", "float16", "bfloat16"]
DEFAULT_WORKSPACE = Path("workspace")
DEMO_WORKSPACE = Path("demo-workspace")


def open_workspace(folder: Path) -> "Workspace":
    """The workspace in a folder. Raises InputError, which names the demo's where it lies here, when there is none."""
    from workbench.workspace import Workspace

    if not folder.exists() and (DEMO_WORKSPACE / "workspace.json").is_file():
        raise InputError(
            f"no workspace at {folder}: for the demo's, which lies here, give --workspace {DEMO_WORKSPACE}"
        )
    return Workspace(folder, create=False)
