"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.errors import InputError

if TYPE_CHECKING:
    from workbench.workspace import Workspace

WorkspaceOption = Annotated[
    Path,
    typer.Option("--workspace", "-w", envvar="WORKBENCH_WORKSPACE", help="Folder that holds everything made."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
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
