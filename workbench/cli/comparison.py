"""`workbench compare`: SAEs side by side."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, given_again, open_workspace
from workbench.cli.output import print_frame, write_page

if TYPE_CHECKING:
    import pandas as pd

    from workbench.workspace import Workspace

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
    saes: Annotated[
        list[str] | None, typer.Argument(metavar="SAE...", help="Names of SAEs; all of the workspace when left out.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the figure (L0 against FVU and added nats) here.")] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Compare SAEs: sparsity, reconstruction and cost to the model, from their stored evaluations.

    SAEs that have not been evaluated show dashes: run `workbench evaluate` on them first.
    """
    # Whole-number columns with missing entries are floats in pandas.
    workspace = open_workspace(folder)
    table = workspace.compare(saes or []).astype(dict.fromkeys(("k", "seed", "tokens"), "Int64"))
    if html is not None:
        from workbench.saes.figures import sae_comparison

        # A page of its own that needs no network.
        write_page(html, sae_comparison(table).to_html(include_plotlyjs=True))
    print_frame("SAEs", table, as_json, titles=COLUMNS)
    if as_json:
        return
    for note in notes(table, workspace):
        print(note)
    if html is not None:
        print(f"Figure: {html}")


def notes(table: "pd.DataFrame", workspace: "Workspace") -> list[str]:
    """What to bear in mind when reading the table."""
    found = []
    texts = table["evaluated_on"].dropna().unique()
    if len(texts) > 1:
        found.append(f"Measured on different held-out text, so not quite comparable: {'; '.join(texts)}.")
    if table[["model", "hook"]].drop_duplicates().shape[0] > 1:
        found.append("These SAEs read different hook points or models: FVU is comparable within one only.")
    for said, rows in table.loc[table["note"].fillna("") != ""].groupby("note"):
        found.append(f"{', '.join(rows['sae'])}: {said}.")
    for model, rows in table.loc[table["evaluated_on"].isna()].groupby("model"):
        beside = table.loc[table["evaluated_on"].notna() & (table["model"] == model), "sae"]
        made_here = [workspace.origin(name).corpus is not None for name in rows["sae"]]
        others = [not here for here in made_here]
        text = text_beside(workspace, beside.tolist())
        for missing, said in ((rows["sae"][made_here], ""), (rows["sae"][others], text)):
            if len(missing):
                step = f"workbench evaluate {' '.join(missing)}{given_again(str(model))}{said} --workspace"
                found.append(f"Not evaluated: {', '.join(missing)}. Next: {step} {workspace.path}")
    return found


def text_beside(workspace: "Workspace", evaluated: list[str]) -> str:
    """Options that name the text of SAEs that were evaluated, for those that were made from none here; a word to put it
    in place of where there are none."""
    for result in workspace.results.find("evaluation"):
        if result.name in evaluated:
            asked = result.parameters
            field = f" --text-field {shlex.quote(asked['text_field'])}" if "text_field" in asked else ""
            return f" --corpus {shlex.quote(asked['corpus'])}{field}"
    return " --corpus CORPUS"
