"""Commands that look: info, sql, doctor, gc."""

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, open_workspace
from workbench.cli.output import format_cell, print_json, print_table
from workbench.show.html import brief
from workbench.show.progress import format_bytes

if TYPE_CHECKING:
    from workbench.catalog.summaries import SAESummary

NAMES = 40
"""Names of results of a kind that `info` prints."""


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(info)
    app.command()(sql)
    app.command()(doctor)
    app.command()(gc)


def info(folder: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """List what the workspace holds: harvests, runs, SAEs with their evaluations, sets of transcoders, results."""
    workspace = open_workspace(folder)
    harvests = workspace.harvest_summaries()
    runs, saes, sets = workspace.runs(), workspace.saes(), workspace.transcoder_sets()
    results = workspace.results.names()
    if as_json:
        print_json(
            {
                "workspace": str(workspace.path),
                "harvests": [dataclasses.asdict(item) for item in harvests],
                "runs": [dataclasses.asdict(item) for item in runs],
                "saes": [dataclasses.asdict(item) for item in saes],
                "transcoder_sets": [dataclasses.asdict(item) for item in sets],
                "results": results,
            }
        )
        return
    print(f"Workspace {workspace.path}")
    print_table(
        "Harvests",
        ["name", "model", "corpus", "hooks", "rows", "size", "state"],
        [
            [item.name, item.model, item.corpus, "\n".join(item.hooks), item.rows, format_bytes(item.bytes), item.state]
            for item in harvests
        ],
    )
    print_table(
        "Training runs",
        ["name", "rows from", "hook", "SAEs", "tokens", "state"],
        [
            [run.name, run.rows_from, run.hook, "\n".join(run.saes), run.tokens, run.state] for run in runs
        ],
    )  # fmt: skip
    for run in runs:
        for sae, error in run.errors.items():
            print(f"  {sae} of {run.name} failed: {error}")
    crosscoders = [item for item in saes if item.parts]
    if len(saes) > len(crosscoders) or not saes:
        print_table(
            "SAEs",
            ["name", "hook", "features", "L0", "FVU", "+ nats", "recovered"],
            [
                [item.name, item.place.replace(" → ", "\n→ "), item.d_sae]
                + [(item.evaluation or {}).get(key) for key in ("l0", "fvu", "added_nats", "loss_recovered_zero")]
                for item in saes
                if not item.parts
            ],
        )
    if crosscoders:
        print_table(
            "Crosscoders",
            ["name", "rule", "features", "hook", "parts", "L0", "explained variance", "+ nats"],
            [
                [item.name, item.rule, item.d_sae, item.hook, "\n".join(item.parts), *by_part(item)]
                for item in crosscoders
            ],
        )
    if sets:
        print_table(
            "Sets of transcoders",
            ["name", "layers", "rule", "features", "hook", "all layers: + nats", "by zeros"],
            [
                [item.name, item.layers, item.rule, item.d_sae, f"{item.hook}\n→ {item.target_hook}"]
                + [(item.replacement or {}).get(key) for key in ("added_nats", "added_nats_zero")]
                for item in sets
            ],
        )
    if results:
        print_table("Results", ["kind", "names"], [[kind, _in_lines(names)] for kind, names in results.items()])


def _in_lines(names: Sequence[str]) -> str:
    """Names side by side, the first `NAMES` of them."""
    shown = [*names[:NAMES], *([f"and {len(names) - NAMES} more"] if len(names) > NAMES else [])]
    return "\n".join(textwrap.wrap(", ".join(shown), 70, break_on_hyphens=False))


def by_part(item: "SAESummary") -> list[Any]:
    """L0 of a crosscoder, then explained variance and added nats part by part; nothing where it was not measured."""
    if item.by_part is None:
        return [None, None, None]
    parts = [item.by_part[name] for name in item.parts]
    variance, nats = (
        "\n".join(format_cell(part[key]) for part in parts) for key in ("explained_variance", "added_nats")
    )
    return [parts[0]["l0"], variance, nats]


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT statement.")],
    harvest: Annotated[str | None, typer.Option(help="Harvest the table names speak of.")] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Query tokens, activations, runs and results with read-only SQL (DuckDB).

    `activations` joins tokens and vectors; `vec('HOOK', row)` gives a vector.
    """
    answer = open_workspace(folder).sql(query, harvest=harvest)
    if as_json:
        print_json([dict(zip(answer.names, row, strict=True)) for row in answer.rows])
    else:
        print_table("", answer.columns, [[brief(cell) for cell in row] for row in answer.rows])
    if answer.truncated:
        print(f"workbench: only the first {len(answer.rows):,} rows are shown, there are more", file=sys.stderr)


def doctor(
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Check the installation and, where there is one, the workspace: versions, devices, disk, every block's checksum.

    Exit code 1 when something is broken.
    """
    from workbench.cli.examine import examine

    checks = examine(folder)
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        for check in checks:
            print(f"{check.state.upper():7} {check.what}: {check.finding}")
            if check.remedy:
                print(f"        {check.remedy}")
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


def gc(
    sae: Annotated[list[str], typer.Option("--sae", metavar="NAME", help="Remove this SAE.")] = [],  # noqa: B006
    transcoders: Annotated[
        list[str], typer.Option("--transcoders", metavar="NAME", help="Remove this set of transcoders.")
    ] = [],  # noqa: B006
    harvest: Annotated[list[str], typer.Option("--harvest", metavar="NAME", help="Remove this harvest.")] = [],  # noqa: B006
    run: Annotated[list[str], typer.Option("--run", metavar="NAME", help="Remove this training run.")] = [],  # noqa: B006
    result: Annotated[
        list[str], typer.Option("--result", metavar="KIND/NAME", help="Remove this result, such as graph/add.")
    ] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option(help="Only list what would go.")] = False,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Remove leftovers of killed processes, and the artefacts that are named."""
    removed = open_workspace(folder).gc(
        saes=sae, transcoders=transcoders, harvests=harvest, runs=run, results=result, dry_run=dry_run
    )
    if as_json:
        print_json([{"path": str(item.path), "bytes": item.bytes, "what": item.what} for item in removed])
        return
    for item in removed:
        what = item.what or format_bytes(item.bytes)
        print(f"{'would remove' if dry_run else 'removed'} {item.path} ({what})")
    print(f"{format_bytes(sum(item.bytes for item in removed))} in {len(removed)} items")
