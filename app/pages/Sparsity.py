"""Sparsity page: how little of a model is used, layer by layer and neuron by neuron, and what using less costs."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app.shared import clickable, command, harvested_model, loaded_model, open_workspace, plain, switch_page, version
from workbench import Corpus, InputError, Result, Workspace, open_corpus
from workbench.catalog.origin import Origin
from workbench.circuits.figures import selectable_heads
from workbench.circuits.heads import HEADS as SCORED
from workbench.features.index.page import example_html
from workbench.show.html import STYLE
from workbench.sparsity import figures
from workbench.sparsity.calibration import Calibration, calibrate
from workbench.sparsity.compare import compare, report_names, report_parts
from workbench.sparsity.enforce import generate
from workbench.sparsity.measurements import ATTENTION, CURVES, EXPERTS, HEADS, MLP, PREDICT, SAES
from workbench.sparsity.methods import method_named
from workbench.sparsity.neurons import NeuronView, view_neuron

# Kinds of result by what the page calls them; Streamlit would write a string below it onto the page.
PARTS = {
    "MLPs": MLP, "Cost": CURVES, "Beforehand": PREDICT, "Attention": ATTENTION, "Heads": HEADS, "SAEs": SAES,
    "Experts": EXPERTS,
}  # fmt: skip
COMMANDS = {
    MLP: "measure", CURVES: "enforce", PREDICT: "predict", ATTENTION: "attention", HEADS: "heads", SAES: "sae",
    EXPERTS: "experts",
}  # fmt: skip
NEURON_COLUMNS = {"neuron": "neuron", "density": "share of tokens", "mean_abs": "mean |h|", "max_abs": "largest |h|"}
SAE_COLUMNS = {
    "sae": "SAE", "l0": "L0", "l0_p10": "L0, 10%", "l0_p50": "median", "l0_p90": "90%", "dead_share": "dead share",
    "dense_share": "dense share", "zipf_exponent": "Zipf exponent", "zipf_r2": "R² of the fit",
}  # fmt: skip
LAYER_COLUMNS = {
    "layer": "layer", "experts": "experts", "chosen": "chosen a token", "load_entropy": "entropy of loads, bits",
    "in_use": "in use", "gate_entropy": "entropy of a token's gates, bits", "max_load": "largest load",
    "unused": "never chosen", "d_expert": "neurons of each", "d_shared": "of the shared one",
}  # fmt: skip
EXPERT_COLUMNS = {
    "expert": "expert", "load": "share of tokens", "gate": "mean gate", "concept": "best concept", "f1": "F1",
    "chance": "F1 by chance", "precision": "precision", "recall": "recall",
}  # fmt: skip
PROMPT = "def read_lines(path):\n    with open("
NEURON_TOKENS = 8192


Parts = dict[str, Result]


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Activation sparsity")
    names = report_names(workspace)
    if not names:
        todo = command(workspace, "sparsity", "report", "mine", "--model", harvested_model(workspace))
        st.info(f"No report yet. Make one with {todo}.")
        return
    chosen = st.multiselect(
        "Reports", names, default=names[:1], key="reports", bind="query-params", placeholder="choose reports to see"
    )
    if not chosen:
        st.info("Choose one report, or several to see them side by side.")
        return
    reports = {name: report_parts(workspace, name) for name in chosen}
    if len(chosen) > 1:
        summary = compared(str(workspace.path), version(workspace), tuple(chosen))
        st.dataframe(summary.set_index("name").T.map(in_words), width="stretch")
    measured = {kind for parts in reports.values() for kind in parts}
    first = next(part for part, kind in PARTS.items() if kind in measured)
    part = st.segmented_control(
        "Part", list(PARTS), default=first, key="part", bind="query-params", label_visibility="collapsed", required=True
    )
    # `required` keeps a second click on the part from taking it away, but types do not know that.
    draws = dict(zip(PARTS, (mlps, cost, beforehand, attention, heads, saes, experts), strict=True))
    draws[part or first](workspace, reports)


def in_words(value: object) -> str:
    """A cell of a table that holds names and numbers in one column; a dash where nothing was measured."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


@st.cache_data(max_entries=8, show_spinner=False)
def compared(workspace: str, version: str, names: Sequence[str]) -> pd.DataFrame:
    """The summary of several reports."""
    return compare(Workspace(workspace, create=False), names)


def mlps(workspace: Workspace, reports: dict[str, Parts]) -> None:
    """Layers by metric, then the neurons of one layer."""
    found = having(workspace, reports, MLP)
    if not found:
        return
    draw(found, "layers", figures.layer_grid, "How much of each MLP is used", "layer-grid")
    # Panels of several reports need the whole width each.
    left, right = st.columns(2) if len(found) == 1 else (st.container(), st.container())
    with left:
        draw(found, "neurons", figures.neuron_densities, "How often neurons fire", "by-rank")
    with right:
        draw(found, "positions", figures.positions, "By position in the context", "positions")
    with st.expander("All numbers; the residual stream's largest entries and coding rate"):
        for name, result in found.items():
            st.markdown(f"**{plain(name)}**")
            st.dataframe(result.table("layers").set_index("layer").T, width="stretch")
            for table in ("residual", "coding"):
                if table in result.tables():
                    st.dataframe(result.table(table), hide_index=True, width="stretch")
    name = one_of(list(found), "Neurons of")
    neurons_of(found[name])


def neurons_of(result: Result) -> None:
    """Table and histogram of a layer's neurons, and the neuron that is chosen."""
    st.subheader("Neurons")
    table = result.table("neurons")
    layer = st.selectbox("Layer", sorted(table["layer"].unique()), key="layer", bind="query-params")
    rows = table[table["layer"] == layer].sort_values("density", ascending=False)
    with st.container(key="beside"):
        left, right = st.columns(2)
    with left:
        event = st.dataframe(
            rows[list(NEURON_COLUMNS)], hide_index=True, height=360, column_config=NEURON_COLUMNS,
            key=f"neurons {result.name} {layer}", on_select="rerun", selection_mode="single-row",
        )  # fmt: skip
    with right:
        st.plotly_chart(figures.density_histogram(table, int(layer)), key="densities")
    clicked = event["selection"]["rows"]
    st.session_state.setdefault("neuron", 0)
    if clicked and st.session_state.get("clicked") != (result.name, layer, clicked):
        st.session_state["clicked"] = (result.name, layer, clicked)
        st.session_state["neuron"] = int(rows["neuron"].iloc[clicked[0]])
    last = int(rows["neuron"].max())
    st.session_state["neuron"] = min(last, int(st.session_state["neuron"]))
    neuron = st.number_input("Neuron", 0, last, key="neuron", bind="query-params", help="or click a row of the table")
    if st.button("Show where it is largest", icon=":material/search:") or st.session_state.get("examples"):
        st.session_state["examples"] = True
        show_neuron(result, int(layer), int(neuron))


def show_neuron(result: Result, layer: int, neuron: int) -> None:
    """A neuron's values and the text around its largest ones."""
    try:
        view = neuron_view(result.origin, layer, neuron, result.parameters["context_len"])
    except InputError as error:
        st.error(plain(str(error)))
        return
    st.caption(f"{view.tokens:,} tokens of training documents; exactly zero on {view.zero:.1%} of them.")
    left, right = st.columns([1, 2])
    left.plotly_chart(figures.neuron_histogram(view), key="values")
    if view.examples:
        strongest = abs(view.examples[0].activation)
        rows = "".join(example_html(example, strongest) for example in view.examples)
        right.html(f'{STYLE}<div class="wbf">{rows}</div>')
    else:
        right.info("It is zero on every token.")


@st.cache_data(max_entries=64, show_spinner="Running the model ...")
def neuron_view(made_of: Origin, layer: int, neuron: int, context_len: int) -> NeuronView:
    """A neuron seen from near."""
    return view_neuron(
        loaded_model(made_of), opened(made_of), layer, neuron,
        max_tokens=max(NEURON_TOKENS, context_len), context_len=context_len,
    )  # fmt: skip


def cost(workspace: Workspace, reports: dict[str, Parts]) -> None:
    """Loss against sparsity, and generated text at a sparsity."""
    found = having(workspace, reports, CURVES)
    if not found:
        return
    if len(found) == 1:
        st.subheader("What enforced sparsity costs")
        (result,) = found.values()
        st.plotly_chart(figures.cost_curves(result.table("points")), key="curves")
    else:
        draw(found, "points", figures.cost_panel, "What enforced sparsity costs", "curves")
    for name, result in found.items():
        if result.parameters["ps"]:
            ppl = result.table("ppl")
            said = ", ".join(f"**{row.sparsity:.1%}** at p = {100 * row.p:g}%" for row in ppl.itertuples())
            st.markdown(f"{plain(name)}: PPL-p% sparsity {said}")
    trusted = {name: result for name, result in found.items() if "corrupted" in result.parameters}
    if trusted:
        draw(trusted, "reliability", figures.reliability_curves, "Calibration and robustness under top-k", "trusted")
    with st.expander("All numbers"):
        for name, result in found.items():
            st.markdown(f"**{plain(name)}**")
            st.dataframe(result.table("points"), hide_index=True, width="stretch")
    st.subheader("Text at that sparsity")
    text_at(found[one_of(list(found), "Text of")])


@st.fragment
def text_at(result: Result) -> None:
    """A slider over the levels of a method, and the model's text at each; only this part runs again."""
    points = result.table("points")
    left, right = st.columns(2)
    methods = list(points["method"].unique())
    name = left.selectbox(
        "Method", methods, index=methods.index("CETT") if "CETT" in methods else 0, key="method", bind="query-params"
    )
    levels = points[points["method"] == name].sort_values("level")
    if len(levels) > 1:
        choices = levels["level"].tolist()
        level = right.select_slider("Level", choices, choices[len(choices) // 2], key=f"level {name}")
    else:
        level = levels["level"].iloc[0]
    point = levels[levels["level"] == level].iloc[0]
    st.markdown(
        f"**{point['sparsity']:.1%}** zeros, **{point['added_nats']:.3f}** added nats, "
        f"**{point['flops_saved']:.1%}** of weight products saved "
        f"({plain(method_named(name).level_means)})"
    )
    prompt = st.text_area("Prompt", PROMPT, key="prompt", bind="query-params", height=90)
    clean, thinned = st.columns(2)
    try:
        for column, title, at in ((clean, "As it is", 0.0), (thinned, "At this sparsity", float(level))):
            column.caption(title)
            text = continuation(result.origin, prompt, name, at, result.parameters["context_len"])
            column.code(prompt + text, language=None, wrap_lines=True)
    except InputError as error:
        st.error(plain(str(error)))


@st.cache_data(max_entries=256, show_spinner="Generating ...")
def continuation(made_of: Origin, prompt: str, method: str, level: float, context_len: int) -> str:
    """The model's greedy text with a method at a level."""
    calibration = calibrated(made_of, context_len)
    return generate(loaded_model(made_of), calibration, prompt, method_named(method), level)


@st.cache_resource(max_entries=2, show_spinner="Finding thresholds ...")
def calibrated(made_of: Origin, context_len: int) -> Calibration:
    """The thresholds' sample, as the report's own."""
    return calibrate(loaded_model(made_of), opened(made_of), context_len=context_len)


def beforehand(workspace: Workspace, reports: dict[str, Parts]) -> None:
    """Whether active neurons can be known before a token comes: cores, a low-rank predictor, shared dimensions."""
    found = having(workspace, reports, PREDICT)
    if not found:
        return
    draw(found, "cores", figures.core_costs, "Second halves of contexts on a core of neurons", "cores")
    ranked = {name: result for name, result in found.items() if "predictor" in result.tables()}
    if ranked:
        draw(ranked, "predictor", figures.predicted_neurons, "Neurons told by a low-rank predictor", "predictor")
        st.caption(
            "Dotted: guessing the neurons most often needed, whatever the token. A rank below its layer's dots finds "
            "fewer than that guess."
        )
    for name, result in found.items():
        with st.expander(f"Overlap of cores, and dimensions of the residual stream: {plain(name)}"):
            st.dataframe(result.table("overlap"), hide_index=True, width="stretch")
            st.dataframe(result.table("dimensions"), hide_index=True, width="stretch")


def attention(workspace: Workspace, reports: dict[str, Parts]) -> None:
    """What patterns of keys cost and keep, and attention sinks."""
    found = having(workspace, reports, ATTENTION)
    if not found:
        return
    old = [name for name, result in found.items() if "rest" not in result.table("curves")]
    for name in old:
        again = command(workspace, "sparsity", "attention", name)
        st.info(f"{plain(name)} was measured before patterns that adapt: run {again} again.")
    found = {name: result for name, result in found.items() if name not in old}
    if not found:
        return
    draw(found, "curves", figures.attention_curves, "What restricting every head costs", "attention-curves")
    st.caption(
        "Dashed: the keys that are not kept are read at their mean instead of dropped. Adaptive patterns keep as many "
        "keys in the mean as the fixed budgets."
    )
    for name, result in found.items():
        if result.parameters["tasks"]:
            st.subheader(f"What is left of tasks: {plain(name)}")
            st.plotly_chart(figures.task_curves(result.table("tasks")), key=f"tasks {name}")
    budgets = sorted(set.intersection(*(set(result.table("coverage")["budget"]) for result in found.values())))
    if budgets:
        budget = budgets[0]
        if len(budgets) > 1:
            budget = st.select_slider("Keys per query", budgets, value=budgets[len(budgets) // 2], key="budget")
        for name, result in found.items():
            st.subheader(f"Attention that patterns keep: {plain(name)}")
            coverage = result.table("coverage")
            of_heads(workspace, result, figures.best_patterns(coverage, int(budget)), f"best {name} {budget}")
            st.plotly_chart(figures.attention_coverage(coverage, int(budget)), key=f"coverage {name}")
    for name, result in found.items():
        st.subheader(f"Attention sinks: {plain(name)}")
        heads = result.table("heads")
        of_heads(workspace, result, figures.sinks(heads), f"sinks {name}")
        with st.expander("Entropy and keys with 95% of the attention, by head"):
            st.dataframe(heads, hide_index=True, width="stretch")


def heads(workspace: Workspace, reports: dict[str, Parts]) -> None:
    """One head at a time, and heads left whole."""
    found = having(workspace, reports, HEADS)
    if not found:
        return
    draw(found, "curve", figures.heads_left_whole, "All heads restricted but some", "whole")
    titles = {title: column for column, title in figures.HEAD_COSTS.items()}
    column = titles[str(st.selectbox("Colour by", list(titles), key="head-cost"))]
    for name, result in found.items():
        asked = result.parameters
        st.subheader(f"One head at a time: {plain(name)}")
        st.caption(f"{asked['pattern']}, {asked['budget']} keys per query, the rest {asked['rest']}")
        of_heads(workspace, result, figures.head_costs(result.table("heads"), column), f"costs {name} {column}")
        with st.expander("All numbers, and by layer"):
            st.dataframe(result.table("heads"), hide_index=True, width="stretch")
            st.dataframe(result.table("layers"), hide_index=True, width="stretch")


def of_heads(workspace: Workspace, result: Result, figure: go.Figure, key: str) -> None:
    """A heat map of a model's heads; a click opens one on the page Heads."""
    model = result.origin.model_info
    head = clickable(selectable_heads(figure, model.n_layers, model.n_heads), key)
    if head is None:
        return
    scored = [
        item.name for item in workspace.results.find(SCORED) if item.origin.weights_sha256 == model.weights_sha256
    ]
    if scored:
        switch_page("Heads", scores=scored[-1], head=head)
    score = command(workspace, "circuits", "heads", "--model", result.origin.model)
    st.info(f"The page Heads opens {head} once this model's heads are scored: {score}")


def saes(workspace: Workspace, reports: dict[str, Parts]) -> None:
    """Sparsity of SAE codes, and terms per token."""
    found = having(workspace, reports, SAES)
    for name, result in found.items():
        st.subheader(plain(name))
        summary = result.table("summary")
        st.dataframe(summary[list(SAE_COLUMNS)].rename(columns=SAE_COLUMNS), hide_index=True, width="stretch")
        left, middle, right = st.columns(3)
        left.plotly_chart(figures.density_spectrum(result.table("spectrum")), key=f"spectrum {name}")
        middle.plotly_chart(figures.sae_positions(result.table("positions")), key=f"l0 {name}")
        right.plotly_chart(figures.terms_needed(result.table("terms")), key=f"terms {name}")


def experts(workspace: Workspace, reports: dict[str, Parts]) -> None:
    """What the experts of mixtures are used for: loads by layer, then a layer's experts and which go together."""
    found = having(workspace, reports, EXPERTS)
    if not found:
        return
    draw(found, "experts", figures.expert_loads, "How often experts are chosen", "loads")
    for name, result in found.items():
        if len(found) > 1:
            st.markdown(f"**{plain(name)}**")
        layers = result.table("layers")
        st.dataframe(layers[list(LAYER_COLUMNS)], hide_index=True, width="stretch", column_config=LAYER_COLUMNS)
    result = found[one_of(list(found), "Experts of")]
    st.subheader("Experts of a layer")
    table, pairs = result.table("experts"), result.table("pairs")
    layer = int(st.selectbox("Layer", sorted(table["layer"].unique()), key="mixture", bind="query-params"))
    rows = table[table["layer"] == layer].sort_values("load", ascending=False)
    left, right = st.columns([3, 2])
    with left:
        st.dataframe(rows[list(EXPERT_COLUMNS)], hide_index=True, height=420, column_config=EXPERT_COLUMNS)
        if rows["concept"].isna().all():
            st.caption("No concepts: they are told on one half of the documents and judged on the other, from text.")
        else:
            st.caption("The concept that an expert tells best on half of the documents, scored on the other half.")
    right.plotly_chart(figures.expert_pairs(pairs, layer), key=f"pairs {result.name}")
    with st.expander("Pairs of experts"):
        shown = pairs[pairs["layer"] == layer].sort_values("together", ascending=False)
        st.dataframe(shown, hide_index=True, width="stretch")


def having(workspace: Workspace, reports: dict[str, Parts], kind: str) -> Parts:
    """The results of a kind; says which command makes the missing ones."""
    for name, parts in reports.items():
        if kind not in parts:
            made_of = next(iter(parts.values())).origin
            measured = [COMMANDS[kind], name, *(["SAE"] if kind == SAES else []), "--model", made_of.model]
            # A corpus that the record does not name is the command's own default.
            text = ["--corpus", made_of.corpus] if made_of.corpus else []
            text += ["--text-field", made_of.text_field] if made_of.text_field != "text" else []
            what = "Not measured yet for" if kind != EXPERTS else "No mixture of experts was measured for"
            st.info(f"{what} {plain(name)}. Next: {command(workspace, 'sparsity', *measured, *text)}")
    return {name: parts[kind] for name, parts in reports.items() if kind in parts}


def draw(found: Parts, table: str, figure: Callable[[pd.DataFrame], go.Figure], title: str, key: str) -> None:
    """One figure per report, in a row when there are several."""
    st.subheader(title)
    drawn = {name: figure(result.table(table)) for name, result in found.items()}
    shown = next(iter(drawn.values())) if len(drawn) == 1 else figures.beside(drawn)
    st.plotly_chart(shown, key=key)


def one_of(names: list[str], label: str) -> str:
    """A report out of several; no box for a single one."""
    return names[0] if len(names) == 1 else str(st.selectbox(label, names, key="report", bind="query-params"))


def opened(made_of: Origin) -> Corpus:
    """The corpus of a result. Raises InputError where it is not the same any more, or not said."""
    if made_of.corpus is None:
        raise InputError("this result does not say on which corpus it was measured: run its command again")
    found = open_corpus(made_of.corpus, text_field=made_of.text_field)
    if found.fingerprint != made_of.fingerprint:
        raise InputError(f"corpus {made_of.corpus} has changed since this was measured: run the command again")
    return found


main()
