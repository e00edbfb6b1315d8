"""`workbench compare`: SAEs side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption
from workbench.cli.output import print_json, print_table

COLUMNS = {
    "sae": "SAE",
    "rule": "rule",
    "k": "k",
    "d_sae": "features",
    "l0": "L0",
    "fvu": "FVU",
    "added_nats": "+ nats",
    "recovered": "recovered",
    "dead": "dead",
}


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(compare)


def compare(
    saes: Annotated[list[str] | None, typer.Argument(help="Names of SAEs; all of the workspace when left out.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the figure (L0 against FVU and added nats) here.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Compare SAEs: sparsity, reconstruction and cost to the model, from their stored evaluations.

    SAEs that have not been evaluated show dashes: run `workbench evaluate` on them first.
    """
    from workbench.workspace import Workspace

    table = Workspace(workspace, create=False).compare(saes or [])
    if html is not None:
        write_figure(table, html)
    # Whole-number columns with missing entries are floats in pandas.
    records = [
        {key: plain(value, whole=key in ("k", "seed", "tokens")) for key, value in row.items()}
        for row in table.to_dict("records")
    ]
    if as_json:
        print_json(records)
        return
    print_table("SAEs", list(COLUMNS.values()), [[record[key] for key in COLUMNS] for record in records])
    for note in notes(table):
        print(note)
    if html is not None:
        print(f"Figure: {html}")


def plain(value: Any, *, whole: bool) -> Any:
    """A cell of a frame as JSON has it: None for a missing value, int for a whole number."""
    if value is None or value != value:
        return None
    return int(value) if whole else value


def notes(table: Any) -> list[str]:
    """What to bear in mind when reading the table."""
    found = []
    texts = table["evaluated_on"].dropna().unique()
    if len(texts) > 1:
        found.append(f"Measured on different held-out text, so not quite comparable: {'; '.join(texts)}.")
    if table[["model", "hook"]].drop_duplicates().shape[0] > 1:
        found.append("These SAEs read different hook points or models: FVU is comparable within one only.")
    missing = table.loc[table["evaluated_on"].isna(), "sae"].tolist()
    if missing:
        found.append(f"Not evaluated: {', '.join(missing)}. Next: workbench evaluate {' '.join(missing)}")
    return found


def write_figure(table: Any, html: Path) -> None:
    """Writes the comparison figure as a page of its own that needs no network."""
    from sae.errors import InputError
    from workbench.saes.figures import sae_comparison

    try:
        sae_comparison(table).write_html(html, include_plotlyjs=True)
    except OSError as error:
        raise InputError(f"cannot write {html}: {error.strerror}; choose another file") from None
