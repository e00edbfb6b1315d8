"""The figure of docs/benchmarks.md: a training step's median time, an arm a bar, from what was measured.

    python benchmarks/train_step.py --json > docs/train-step.json
    python benchmarks/train_step_figure.py docs/train-step.json docs/train-step.svg

Needs kaleido and a Chromium.
"""

import argparse
import json
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from train_step import roofline

from workbench.bench.arms import OURS, SIZES

OURS_COLOUR, OTHERS_COLOUR = "#4269d0", "#b8bdc9"


def figure(report: dict[str, dict[str, dict[str, dict[str, float]]]]) -> go.Figure:
    """A panel per size, fastest at the top; the dashed line is the roofline."""
    sizes = [name for name in SIZES if name in report]
    made = make_subplots(
        rows=1, cols=len(sizes), horizontal_spacing=0.17,
        subplot_titles=[
            "{}: {batch} tokens, d {d_in},<br>{d_sae:,} features, k {k}".format(name, **report[name]["size"])
            for name in sizes
        ],
    )  # fmt: skip
    for column, name in enumerate(sizes, start=1):
        medians = {arm: measured["median"] for arm, measured in report[name]["arms"].items()}
        arms = sorted(medians, key=lambda arm: -medians[arm])
        made.add_bar(
            x=[medians[arm] for arm in arms], y=arms, orientation="h", showlegend=False, row=1, col=column,
            text=[f"{medians[arm]:.3g}" for arm in arms], textposition="outside", cliponaxis=False,
            marker_color=[OURS_COLOUR if arm.startswith(OURS) else OTHERS_COLOUR for arm in arms],
        )  # fmt: skip
        made.add_vline(roofline(SIZES[name]) * 1e3, line_dash="dash", line_color="#d1495b", row=1, col=column)
    made.update_xaxes(title="ms a step", rangemode="tozero")
    return made.update_layout(
        width=1250, height=380, template="plotly_white", margin={"l": 10, "r": 40, "t": 60, "b": 40}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    figure(json.loads(options.measured.read_text(encoding="utf-8"))).write_image(options.out)


if __name__ == "__main__":
    main()
