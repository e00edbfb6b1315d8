"""The figures of docs/methods/sparsity.md, from reports that lie in a workspace.

    workbench sparsity report demo --workspace w
    workbench sparsity report stories260K --model FOLDER --corpus FILE --workspace w
    python benchmarks/sparsity_figures.py w demo stories260K --out docs/methods/figures

Writes sparsity-*.png. Needs kaleido and a Chromium.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from workbench.catalog.results import Result
from workbench.sparsity import figures
from workbench.sparsity.compare import report_parts
from workbench.sparsity.measurements import ATTENTION, CURVES, HEADS, MLP
from workbench.workspace import Workspace

DRAWN: dict[str, tuple[str, Sequence[str], Callable[[pd.DataFrame], go.Figure]]] = {
    "layers": (MLP, ["layers"], figures.layer_grid),
    # The levels found at given costs lie between the coarse ones, where the curve is not straight.
    "cost": (CURVES, ["points", "costs"], figures.cost_panel),
    "attention": (ATTENTION, ["curves"], figures.attention_curves),
    "whole": (HEADS, ["curve"], figures.heads_left_whole),
    "sinks": (ATTENTION, ["heads"], figures.sinks),
}
WIDTH = 1000


def panel(result: Result, tables: Sequence[str], draw: Callable[[pd.DataFrame], go.Figure]) -> go.Figure:
    """One report's panel, of one table or of several with the same columns."""
    return draw(pd.concat([result.table(name) for name in tables]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("names", nargs="+", help="reports, one panel each")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = {name: report_parts(Workspace(arguments.workspace, create=False), name) for name in arguments.names}
    for drawn, (kind, tables, draw) in DRAWN.items():
        panels = {name: panel(found[kind], tables, draw) for name, found in parts.items()}
        figure = figures.beside(panels).update_layout(template="plotly_white", width=WIDTH)
        figure.write_image(arguments.out / f"sparsity-{drawn}.png")


if __name__ == "__main__":
    main()
