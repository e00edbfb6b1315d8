"""`workbench app`: the web app on a workspace."""

import os
import socket
import sys
from typing import Annotated

import typer

from sae.errors import InputError
from workbench.cli.options import DEFAULT_WORKSPACE, GivenModelOption, WorkspaceOption, open_workspace

EXPLAINER, EXPLAINER_AT = "WORKBENCH_EXPLAINER", "WORKBENCH_EXPLAINER_ENDPOINT"
"""Where the app's pages read them."""


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("app")(open_app)


def open_app(
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    model: GivenModelOption = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Language model that explains features, as `explain --model`; repeat for several, whose words stand "
            "beside each other. Else what WORKBENCH_EXPLAINER says, one a line.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(envvar=EXPLAINER_AT, help="Its address, as `explain --endpoint`.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 8501,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open the web app on a workspace; it listens on this machine only."""
    from workbench.models.bundled import app_dir

    workspace = open_workspace(folder)
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind(("localhost", port))
        except OSError as error:
            raise InputError(f"cannot listen on port {port}: {error.strerror}; choose another with --port") from None
    app = app_dir()
    # With -P and by the file's path: the folder that the command is called from may hold a package `app` of its own.
    command = [
        sys.executable, "-P", str(app / "serve.py"), "run", str(app / "main.py"),
        "--server.address", "localhost", "--server.port", str(port),
        "--server.headless", "false" if browser else "true", "--browser.gatherUsageStats", "false",
        # Where Streamlit has never run it would ask for an email address first, and end where nobody can answer.
        "--server.showEmailPrompt", "false", "--client.toolbarMode", "viewer",
        # With its greeting goes its advertisement for agents; the address is ours to say then.
        "--logger.hideWelcomeMessage", "true",
        "--", str(workspace.path), *([] if model is None else [model]),
    ]  # fmt: skip
    asked = "\n".join(explain or [])
    os.environ.update({name: value for name, value in ((EXPLAINER, asked), (EXPLAINER_AT, endpoint)) if value})
    print(f"Workspace {workspace.path} at http://localhost:{port}; Ctrl-C ends it", flush=True)
    # In this process's place, so that whatever ends the command ends the server.
    os.execv(sys.executable, command)
