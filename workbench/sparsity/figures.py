"""Figures of the sparsity measurements, as Plotly objects over the tables that the results store."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.show.colours import BOTH_WAYS, UPWARDS, series_colour
from workbench.sparsity.attention import COSTS_OF, STRUCTURED, best_of_heads, cost_column
from workbench.sparsity.cells import numbered, with_numbers
from workbench.sparsity.neurons import NeuronView

LAYER_METRICS = {
    "active": "neurons that fire",
    "mass_99": "neurons with 99% of the mass",
    "mass_90": "... 90%",
    "mass_50": "... 50%",
    "dead": "dead neurons",
    "jaccard": "overlap with the next token",
    "jaccard_chance": "... expected by chance",
}
HEAD_COSTS = {
    "restricted_kl": "KL with this head alone restricted, nats per token",
    "restricted_nats": "added nats with this head alone restricted",
    "removed_kl": "KL with this head's output at its mean, nats per token",
    "removed_nats": "added nats with this head's output at its mean",
    "uncovered": "share of its attention that the pattern leaves out",
    "dims_95": "directions of the query-key form for 95% of the attention on 16 keys",
}
ORDER_NAMES = {
    "sensitivity": "the most sensitive", "uncovered": "those with most attention left out",
    "random": "as many at random",
}  # fmt: skip
CORE_NAMES = {
    "own": "core of the first half", "other": "another context's", "corpus": "the training text's", "random": "random"
}  # fmt: skip
AXIS_KEYS = ("type", "range", "tickformat", "dtick", "rangemode", "autorange")
MARGIN = {"l": 50, "r": 10, "t": 40, "b": 40}
COSTLY_NATS = 2.0
"""Curves are drawn up to this cost: beyond it a model is of no use, and the scale would hide what matters."""

CHEAP_NATS = 1e-3


def layer_overview(layers: pd.DataFrame) -> go.Figure:
    """Shares of neurons by layer. Args: the table `layers` of a measurement."""
    figure = go.Figure()
    for number, (column, title) in enumerate(LAYER_METRICS.items()):
        figure.add_scatter(
            x=layers["layer"], y=layers[column], name=title, mode="lines+markers",
            line={"color": series_colour(number), "dash": "dot" if column == "jaccard_chance" else "solid"},
        )  # fmt: skip
    return _laid_out(figure, "layer", "share").update_xaxes(dtick=max(1, len(layers) // 16))


def neuron_densities(neurons: pd.DataFrame) -> go.Figure:
    """Share of tokens on which each neuron fires, the busiest first, one line per layer. Args: the table `neurons`."""
    figure = go.Figure()
    for number, (layer, rows) in enumerate(neurons.groupby("layer", sort=True)):
        ordered = rows["density"].sort_values(ascending=False)
        figure.add_scatter(
            x=[rank / len(ordered) for rank in range(1, len(ordered) + 1)],
            y=ordered, name=f"layer {layer}", mode="lines",
            line={"color": series_colour(number), "width": 1.5},
        )  # fmt: skip
    _laid_out(figure, "neurons, the busiest first", "share of tokens").update_xaxes(tickformat=".0%")
    return figure.update_yaxes(type="log", dtick=1, tickformat=".3~%")


def expert_loads(experts: pd.DataFrame) -> go.Figure:
    """Share of tokens that choose each expert, the busiest first, one line per layer. Args: the table `experts`."""
    figure = go.Figure()
    for number, (layer, rows) in enumerate(experts.groupby("layer", sort=True)):
        ordered = rows.sort_values("load", ascending=False)
        figure.add_scatter(
            x=list(range(1, len(ordered) + 1)), y=ordered["load"], name=f"layer {layer}", mode="lines+markers",
            text=[f"expert {expert}" for expert in ordered["expert"]], line={"color": series_colour(number)},
        )  # fmt: skip
    most = int(experts["expert"].max()) + 1
    return _laid_out(figure, "experts, the busiest first", "share of tokens").update_xaxes(dtick=max(1, most // 16))


def expert_pairs(pairs: pd.DataFrame, layer: int) -> go.Figure:
    """How much oftener than by chance two experts of a layer are chosen together, as log2 of their lift.

    Args:
        pairs: the table `pairs` of experts; pairs that no token chose stay empty.
        layer: one of its layers.
    """
    rows = pairs[(pairs["layer"] == layer) & (pairs["together"] > 0)]
    size = int(pairs.loc[pairs["layer"] == layer, "other"].max()) + 1
    cells, shares = np.full((size, size), np.nan), np.zeros((size, size))
    for a, b in (("expert", "other"), ("other", "expert")):
        cells[rows[a], rows[b]], shares[rows[a], rows[b]] = np.log2(rows["lift"]), rows["together"]
    bound = max(1.0, float(np.nanmax(np.abs(cells)))) if len(rows) else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=cells, customdata=shares, zmin=-bound, zmax=bound, colorscale=BOTH_WAYS,
            colorbar={"title": "log2 lift"},
            hovertemplate="experts %{y} and %{x}: log2 lift %{z:.2f}, on %{customdata:.2%} of tokens<extra></extra>",
        )
    )  # fmt: skip
    ticks = {"dtick": max(1, size // 8)}
    figure = _laid_out(figure, "expert", "expert").update_xaxes(**ticks).update_yaxes(**ticks)
    return figure.update_layout(title=f"chosen together, layer {layer}", height=420)


def cost_curves(points: pd.DataFrame) -> go.Figure:
    """Added nats against sparsity and against the FLOPs saved, one line per method.

    Args:
        points: the table `points` of an enforcement: method, sparsity, added_nats, kl, flops_saved, level.
    """
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=["zeros where the method acts", "weight products saved"],
    )  # fmt: skip
    for number, (method, rows) in enumerate(points.groupby("method", sort=False)):
        for column, key in enumerate(("sparsity", "flops_saved"), start=1):
            drawn = rows.sort_values("level")
            figure.add_scatter(
                x=drawn[key], y=drawn["added_nats"], name=str(method), legendgroup=str(method),
                showlegend=column == 1, mode="lines+markers", customdata=drawn[["level", "kl"]],
                line={"color": series_colour(number), "width": 1.5}, row=1, col=column,
                hovertemplate="level %{customdata[0]}: %{y:.3f} nats, KL %{customdata[1]:.3f}",
            )  # fmt: skip
    figure.update_yaxes(range=[-0.05, COSTLY_NATS])
    figure.update_yaxes(title_text="added nats per token", row=1, col=1)
    figure.update_xaxes(tickformat=".0%")
    return figure.update_layout(height=420, margin=MARGIN, legend={"orientation": "h", "y": -0.15})


def attention_curves(curves: pd.DataFrame) -> go.Figure:
    """Added nats, or the KL of classes, against the mean number of keys a query sees, a line per pattern, dashed with
    the rest at its mean.

    Both axes are logarithmic; costs below CHEAP_NATS are drawn there. Args: the table `curves`.
    """
    figure, cost = go.Figure(), cost_column(curves)
    colours = {pattern: series_colour(number) for number, pattern in enumerate(curves["pattern"].unique())}
    for (pattern, rest), rows in curves.groupby(["pattern", "rest"], sort=False):
        figure.add_scatter(
            x=rows["keys"], y=rows[cost].clip(lower=CHEAP_NATS), mode="lines+markers",
            name=str(pattern) if rest == "dropped" else f"{pattern}, the rest {rest}",
            customdata=rows[["budget", "level", cost]],
            line={"color": colours[pattern], "width": 1.5, "dash": "solid" if rest == "dropped" else "dash"},
            hovertemplate="%{x:.1f} keys (budget %{customdata[0]}, level %{customdata[1]:.3g}): "
            "%{customdata[2]:.4f} nats",
        )  # fmt: skip
    _laid_out(figure, "keys per query", f"{COSTS_OF[cost]} per token").update_xaxes(type="log", dtick=0.30103)
    return figure.update_yaxes(type="log", dtick=1).update_layout(height=460)


def attention_coverage(coverage: pd.DataFrame, budget: int) -> go.Figure:
    """Share of each head's attention that each pattern keeps: heads down, patterns across.

    Args:
        coverage: the table `coverage` of an attention measurement.
        budget: one of its budgets.
    """
    rows = coverage[coverage["budget"] == budget].copy()
    rows["place"] = "a" + rows["layer"].astype(str) + ".h" + rows["head"].astype(str)
    table = rows.pivot(index="place", columns="pattern", values="kept")
    table = table.loc[rows["place"].unique(), rows["pattern"].unique()]
    figure = go.Figure(
        go.Heatmap(z=table, x=list(table.columns), y=list(table.index), zmin=0, zmax=1, colorscale=UPWARDS)
    )
    height = 120 + 14 * len(table)
    return figure.update_layout(height=height, margin=MARGIN, title=f"attention kept with {budget} keys per query")


def task_curves(tasks: pd.DataFrame) -> go.Figure:
    """Share of each task's metric that is left against the budget, a panel per task. Args: the table `tasks`."""
    names = list(tasks["task"].unique())
    figure = make_subplots(rows=1, cols=len(names), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=names)
    colours = {pattern: series_colour(number) for number, pattern in enumerate(tasks["pattern"].unique())}
    for (task, pattern, rest), rows in tasks.groupby(["task", "pattern", "rest"], sort=False):
        figure.add_scatter(
            x=rows["budget"], y=rows["kept"], mode="lines+markers", legendgroup=f"{pattern} {rest}",
            name=str(pattern) if rest == "dropped" else f"{pattern}, the rest {rest}", showlegend=task == names[0],
            line={"color": colours[pattern], "width": 1.5, "dash": "solid" if rest == "dropped" else "dash"},
            row=1, col=names.index(task) + 1,
        )  # fmt: skip
    figure.update_xaxes(type="log", dtick=0.30103, title_text="keys per query")
    figure.update_yaxes(title_text="share of the metric left", row=1, col=1)
    return figure.update_layout(height=460, margin=MARGIN, legend={"orientation": "h", "y": -0.25})


def best_patterns(coverage: pd.DataFrame, budget: int) -> go.Figure:
    """Every head coloured by the pattern that keeps most of its attention, with the share kept, layers upwards.

    Args:
        coverage: the table `coverage` of an attention measurement.
        budget: one of its budgets.
    """
    table = best_of_heads(coverage, budget)
    numbers = {pattern: number for number, pattern in enumerate(STRUCTURED)}
    table["number"] = table["best"].map(numbers)
    table["said"] = [f"{row.best} keeps {row.kept:.1%}, {row.next} {row.next_kept:.1%}" for row in table.itertuples()]
    cells, kept, said = (table.pivot(index="layer", columns="head", values=name) for name in ("number", "kept", "said"))
    # Each number has a stretch of the scale in one colour.
    scale = [
        (end, series_colour(number))
        for number in range(len(STRUCTURED))
        for end in (number / len(STRUCTURED), (number + 1) / len(STRUCTURED))
    ]
    figure = go.Figure(
        go.Heatmap(
            z=cells, x=list(cells.columns), y=list(cells.index), customdata=said, zmin=-0.5,
            zmax=len(STRUCTURED) - 0.5, colorscale=scale, opacity=0.75, xgap=2, ygap=2,
            hovertemplate="layer %{y}, head %{x}: %{customdata}<extra></extra>",
            colorbar={"tickvals": list(numbers.values()), "ticktext": list(numbers)},
        )
    )  # fmt: skip
    with_numbers(figure, kept, ".0%")
    _laid_out(figure, "head", "layer").update_xaxes(dtick=1).update_yaxes(dtick=1)
    title = f"the pattern that keeps most with {budget} keys per query"
    return figure.update_layout(title=title, height=140 + 36 * len(cells))


def head_costs(heads: pd.DataFrame, column: str = "restricted_kl") -> go.Figure:
    """What restricting or removing each head alone costs, layers upwards.

    Args:
        heads: the table `heads` of a measurement of heads.
        column: one of HEAD_COSTS.
    """
    cells = heads.pivot(index="layer", columns="head", values=column).astype(float)
    form = ".0f" if column == "dims_95" else ".3f"
    figure = numbered(cells, form, "layer %{y}, head %{x}: %{z:.4f}<extra></extra>")
    figure.update_traces(colorbar={"thickness": 8}, selector={"type": "heatmap"})
    _laid_out(figure, "head", "layer").update_xaxes(dtick=1).update_yaxes(dtick=1)
    return figure.update_layout(title=HEAD_COSTS[column], height=140 + 36 * len(cells))


def heads_left_whole(curve: pd.DataFrame) -> go.Figure:
    """Added nats, or the KL of classes, with all heads restricted but some, by how those are chosen; random ones as
    mean and spread.

    Args:
        curve: the table `curve` of a measurement of heads.
    """
    none = curve[curve["whole"] == 0]
    figure, cost = go.Figure(), cost_column(curve)
    for number, order in enumerate(curve["order"].unique()):
        rows = pd.concat([none, curve[(curve["order"] == order) & (curve["whole"] > 0)]])
        spread = rows.groupby("whole")[cost].agg(["mean", "min", "max"])
        figure.add_scatter(
            x=spread.index, y=spread["mean"], name=ORDER_NAMES[str(order)],
            mode="lines+markers", line={"color": series_colour(number), "width": 1.5},
            error_y={"array": spread["max"] - spread["mean"], "arrayminus": spread["mean"] - spread["min"],
                     "thickness": 1} if order == "random" else None,
        )  # fmt: skip
    return _laid_out(figure, "heads left whole", f"{COSTS_OF[cost]} per token").update_yaxes(rangemode="tozero")


def core_costs(cores: pd.DataFrame) -> go.Figure:
    """Added nats on second halves by the share of neurons they may use, one line per core. Args: the table `cores`."""
    figure = go.Figure()
    for number, (core, rows) in enumerate(cores.groupby("core", sort=False)):
        _add_curve(figure, number, CORE_NAMES[str(core)], rows["share"], rows["added_nats"])
    return _laid_out(figure, "share of neurons", "added nats").update_xaxes(tickformat=".0%")


def predicted_neurons(predictor: pd.DataFrame) -> go.Figure:
    """Recall of a token's neurons by rank, one line per layer. Args: the table `predictor`."""
    figure = go.Figure()
    for number, (layer, rows) in enumerate(predictor.groupby("layer", sort=True)):
        _add_curve(figure, number, f"layer {layer}", rows["rank"], rows["recall"])
        figure.add_hline(y=rows["frequent"].iloc[0], line={"color": series_colour(number), "width": 1, "dash": "dot"})
    figure = _laid_out(figure, "rank of the predictor", "recall of a token's neurons")
    return figure.update_xaxes(type="log", dtick=0.30103).update_yaxes(range=[0, 1.02], tickformat=".0%")


def reliability_curves(table: pd.DataFrame) -> go.Figure:
    """Calibration error and what corrupted input costs, by level of topk. Args: the table `reliability`."""
    figure = go.Figure()
    names = {"ece": "expected calibration error", "corrupted_nats": "nats added by corrupted input"}
    for number, (column, name) in enumerate(names.items()):
        _add_curve(figure, number, name, table["level"], table[column])
    figure = _laid_out(figure, "neurons dropped per token", "").update_xaxes(tickformat=".0%")
    return figure.update_yaxes(rangemode="tozero")


def density_spectrum(spectrum: pd.DataFrame) -> go.Figure:
    """Firing density of features by rank, one line per SAE, both axes logarithmic. Args: the table `spectrum`."""
    figure = go.Figure()
    for number, (sae, rows) in enumerate(spectrum.groupby("sae", sort=True)):
        figure.add_scatter(
            x=rows["rank"], y=rows["density"], name=str(sae), mode="lines",
            line={"color": series_colour(number), "width": 1.5},
        )  # fmt: skip
    return _laid_out(figure, "features by density", "share of tokens").update_xaxes(type="log").update_yaxes(type="log")


def sae_positions(table: pd.DataFrame) -> go.Figure:
    """Mean L0 against the position in the context, one line per SAE. Args: the table `positions`."""
    figure = go.Figure()
    for number, (sae, rows) in enumerate(table.groupby("sae", sort=True)):
        figure.add_scatter(
            x=rows["pos"], y=rows["l0"], name=str(sae), mode="lines",
            line={"color": series_colour(number), "width": 1.5},
        )  # fmt: skip
    return _laid_out(figure, "position", "L0").update_yaxes(rangemode="tozero")


def terms_needed(terms: pd.DataFrame) -> go.Figure:
    """Mean number of terms a token takes for an error, by dictionary; left out where under half of them reach it.

    Args:
        terms: the table `terms` of an SAE measurement.
    """
    figure = go.Figure()
    for number, (dictionary, rows) in enumerate(terms[terms["reached"] >= 0.5].groupby("dictionary", sort=False)):
        _add_curve(figure, number, str(dictionary), rows["error"], rows["terms_mean"])
    # The names below the axis' title, also in a third of a page.
    return _laid_out(figure, "relative error²", "terms per token").update_layout(
        yaxis_type="log", legend={"orientation": "h", "y": -0.35, "yanchor": "top"}
    )


def layer_grid(layers: pd.DataFrame) -> go.Figure:
    """Layer by metric, as shares in cells: the overview. Args: the table `layers` of a measurement."""
    columns = ["exact_zero", *LAYER_METRICS]
    titles = ["exact zeros", *LAYER_METRICS.values()]
    values = layers[columns].astype(float)
    cells = values.set_axis([f"layer {layer}" for layer in layers["layer"]]).set_axis(titles, axis=1).T
    figure = numbered(cells, ".1%", "%{x}, %{y}: %{z:.2%}<extra></extra>", top=1)
    figure.update_traces(showscale=False, selector={"type": "heatmap"})
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(height=120 + 26 * len(columns), margin={**MARGIN, "l": 210})


def density_histogram(neurons: pd.DataFrame, layer: int) -> go.Figure:
    """Number of neurons of a layer by the share of tokens on which they fire. Args: the table `neurons`."""
    density = neurons.loc[neurons["layer"] == layer, "density"]
    figure = go.Figure(go.Histogram(x=density, nbinsx=50, marker_color=series_colour(0)))
    return _laid_out(figure, "share of tokens", "neurons")


def neuron_histogram(view: NeuronView) -> go.Figure:
    """Values of one neuron where they are not exactly 0."""
    centres = [(low + high) / 2 for low, high in zip(view.edges[:-1], view.edges[1:], strict=True)]
    figure = go.Figure(go.Bar(x=centres, y=view.counts, marker_color=series_colour(0)))
    return _laid_out(figure, "h, where it is not 0", "tokens").update_layout(bargap=0)


def positions(table: pd.DataFrame) -> go.Figure:
    """Neurons that fire against the position in the context, one line per layer. Args: the table `positions`."""
    figure = go.Figure()
    for number, (layer, rows) in enumerate(table.groupby("layer", sort=True)):
        figure.add_scatter(
            x=rows["pos"], y=rows["active"], name=f"layer {layer}", mode="lines",
            line={"color": series_colour(number), "width": 1.5},
        )  # fmt: skip
    return _laid_out(figure, "position", "neurons that fire").update_yaxes(rangemode="tozero")


def sinks(heads: pd.DataFrame) -> go.Figure:
    """Share of every head's attention on a context's first token, layers upwards.

    Args:
        heads: the table of that name of an attention measurement.
    """
    cells = heads.pivot(index="layer", columns="head", values="sink")
    uniform = heads["sink_uniform"].mean()
    figure = numbered(cells, ".2f", "layer %{y}, head %{x}: %{z:.3f}<extra></extra>", top=1)
    _laid_out(figure, "head", "layer").update_xaxes(dtick=1).update_yaxes(dtick=1)
    title = f"attention on the first token, BOS where there is one (uniform attention: {uniform:.3f})"
    return figure.update_layout(title=title, height=140 + 36 * len(cells))


def cost_panel(points: pd.DataFrame) -> go.Figure:
    """Added nats against the share of zeros only, one line per method: the left half of `cost_curves`."""
    figure = go.Figure()
    for number, (method, rows) in enumerate(points.groupby("method", sort=False)):
        drawn = rows.sort_values("level")
        _add_curve(figure, number, str(method), drawn["sparsity"], drawn["added_nats"])
    _laid_out(figure, "share of zeros where the method acts", "added nats per token")
    return figure.update_xaxes(tickformat=".0%").update_yaxes(range=[-0.05, COSTLY_NATS])


def beside(drawn: Mapping[str, go.Figure]) -> go.Figure:
    """Figures of one kind in a row, one panel each, with common axes and one legend.

    Args:
        drawn: figures of a single panel, by title; of the same kind, as their axes are taken from the first.
    """
    first = next(iter(drawn.values()))
    figure = make_subplots(
        rows=1, cols=len(drawn), shared_yaxes="all", shared_xaxes="all", horizontal_spacing=0.03,
        subplot_titles=list(drawn), x_title=first.layout.xaxis.title.text,
    )  # fmt: skip
    legend: set[str] = set()
    for column, panel in enumerate(drawn.values(), start=1):
        for trace in panel.data:
            named = str(trace.name)
            copied = trace.__class__(trace)
            if trace.type == "scatter":
                copied.update(legendgroup=named, showlegend=trace.showlegend is not False and named not in legend)
            else:
                # The colour bars of the panels would lie on one another.
                copied.update(showscale=False)
            legend.add(named)
            figure.add_trace(copied, row=1, col=column)
    x, y = (
        {key: axis[key] for key in AXIS_KEYS if axis[key] is not None}
        for axis in (first.layout.xaxis, first.layout.yaxis)
    )
    figure.update_xaxes(**x)
    figure.update_yaxes(**y)
    figure.update_yaxes(title_text=first.layout.yaxis.title.text, row=1, col=1)
    figure.update_layout(
        height=first.layout.height or 360, margin=first.layout.margin, legend={"orientation": "h", "y": -0.25}
    )
    # The common title stands below all panels, where a single panel's axis leaves no room.
    return figure.update_layout(margin_b=max(60, first.layout.margin.b or 0))


def _add_curve(figure: go.Figure, number: int, name: str, x: pd.Series, y: pd.Series) -> None:
    """One line of a figure, in the colour of its number."""
    figure.add_scatter(
        x=x, y=y, name=name, mode="lines+markers", line={"color": series_colour(number), "width": 1.5}
    )  # fmt: skip


def _laid_out(figure: go.Figure, x: str, y: str) -> Any:
    return figure.update_layout(
        xaxis_title=x, yaxis_title=y, height=360, margin=MARGIN, legend={"orientation": "h", "y": -0.25}
    )
