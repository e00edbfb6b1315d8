"""Heads page: every head coloured by a score, and one head from near: its attention, composition and OV circuit."""

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.shared import (
    canvas,
    command,
    harvested_model,
    here,
    loaded_model,
    open_workspace,
    page_link,
    plain,
    sae_names,
    url_choice,
)
from workbench import InputError, Result, Workspace
from workbench.catalog.origin import Origin
from workbench.circuits import attention_view as attention
from workbench.circuits import heads as views
from workbench.circuits.attention_view import AttentionView
from workbench.circuits.figures import prefix_curves, selectable_heads
from workbench.circuits.graphs import sets_for_graphs
from workbench.circuits.head_examples import HeadExamples, head_examples
from workbench.circuits.head_features import FAMILIES, HEAD_FEATURES
from workbench.circuits.heads import DIVERGING, HEADS, ON_RANDOM_TOKENS, SCORES, HeadOnText, report_heads
from workbench.circuits.methods import DISCRETE, NODES
from workbench.circuits.needles import needles_behind
from workbench.circuits.stored import composition_of_head, head_grid, head_values, scores_of_head
from workbench.models.load import ModelInfo
from workbench.show.html import quoted
from workbench.sparsity.colourings import colourings
from workbench.text.corpora import open_corpus

MOST_LINKS = 8
STATE = ("scores", "head")
TEXT = "def area(width, height):\n    return width * height\n\ndef area(width, height):\n    return width"


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Heads")
    result = choose_scores(workspace)
    if result is None:
        return
    model = result.origin.model_info
    with st.container(key="beside"):
        grid, near = st.columns(2)
    with grid:
        head = choose_head(workspace, result, model, near)
        prefixes(result, head)
    near.subheader(head)
    near.dataframe(scores_of_head(result, head).round(4), hide_index=True, width="stretch", height="content")
    on_text(workspace, result.origin, head)
    features(workspace, model, head)
    composition(result, head)


def choose_scores(workspace: Workspace) -> Result | None:
    """The stored scores, kept in the URL as `scores`; offers to score the demo model where there are none."""
    found = {item.name: item for item in workspace.results.find(HEADS)}
    if not found:
        todo = command(workspace, "circuits", "heads", "--model", harvested_model(workspace))
        st.info(f"No heads scored yet. Run {todo}.")
        if st.button("Score the heads of the demo model"):
            with st.spinner("Scoring every head ..."):
                report_heads(workspace, "heads-demo", loaded_model("demo"))
            st.rerun()
        return None
    name = url_choice("scores", "Scores", list(found), list(found)[-1])
    return found[name]


def choose_head(workspace: Workspace, result: Result, model: ModelInfo, near: DeltaGenerator) -> str:
    """The grid of heads; a click or a box in `near` chooses one, kept in the URL as `head`."""
    columns = [score for score in SCORES if score in result.table("scores")]
    others = {
        f"{item.name} ({item.parameters.get('method', 'discrete codes')})": item
        for item in [*workspace.results.find(NODES), *workspace.results.find(DISCRETE)]
        if item.origin.weights_sha256 == model.weights_sha256 and head_values(item, model).isfinite().any()
    }
    needs = colourings(workspace, model)
    by = url_choice("by", "Colour by", [*columns, *others, *needs], "induction")
    if by in needs:
        values = needs[by].values
    else:
        values = head_values(result, model, by) if by in columns else head_values(others[by], model)
    names = list(result.table("scores")["node"])
    flat = values.nan_to_num(nan=float("-inf")).flatten()
    strongest = names[int(flat.argmax())]
    asked = st.query_params.get("head", strongest)
    if asked not in names:
        st.warning(f"This link asks for {plain(asked)}: {model.name} has heads a0.h0 to {names[-1]}.")
        asked = strongest
    # A click on the grid of the last run; the grid of the next head starts with nothing selected.
    event = st.session_state.get(f"grid {result.name} {by} {asked}", {"selection": {"points": []}})
    clicked = [str(point["customdata"]) for point in event["selection"]["points"] if "customdata" in point]
    asked = clicked[0] if clicked else asked
    own = needs[by].figure if by in needs else None
    st.plotly_chart(
        head_grid(values, by, asked, diverging=by in others or by in DIVERGING)
        if own is None
        else selectable_heads(own, model.n_layers, model.n_heads, asked),
        key=f"grid {result.name} {by} {asked}", on_select="rerun", selection_mode="points",
        config={"displayModeBar": False},
    )  # fmt: skip
    known = [needs[by].rests_on] if by in needs else rests_on(workspace, result, by)
    st.caption(" ".join(["Click a head to open it.", *known]))
    if clicked:
        open_head(asked)
    st.session_state["head"] = asked

    def follow() -> None:
        open_head(st.session_state["head"])

    return str(near.selectbox("Head", names, key="head", on_change=follow))


def open_head(head: str) -> None:
    """Puts a head that was chosen into the URL, with the scores that it was chosen in."""
    st.query_params.update({"scores": st.session_state["scores"], "head": head})


def rests_on(workspace: Workspace, result: Result, by: str) -> list[str]:
    """What a score was measured on, where that is not plain."""
    table = result.table("scores")
    counted = {
        "retrieval": "A needle's token counts once, as the paper defines the score.",
        "retrieval_steps": "A needle's token counts at every step that copies it, as the paper's code has it.",
    }
    if by in (*counted, "evidence") and "needles_found" in table:
        return [*filter(None, [counted.get(by)]), needles_behind(result, by)]
    if by in ON_RANDOM_TOKENS:
        on_text = command(workspace, "sparsity", "attention", result.name, "--model", result.origin.model)
        return [f"Measured on random tokens; {on_text} measures it on text."]
    return []


def prefixes(result: Result, head: str) -> None:
    """The head's induction by the length of the prefix that is repeated, where that was measured."""
    try:
        measured = result.table("prefixes")
    except InputError:
        return
    st.plotly_chart(prefix_curves(measured[measured["node"] == head]), key="prefixes", config={"displayModeBar": False})
    st.caption(
        "Attention to what followed a repeated prefix, by its length; corrupted: all but its last token stand elsewhere"
    )


def on_text(workspace: Workspace, origin: Origin, head: str) -> None:
    """Attention on a text of one's own, kept in the URL as `text`, and the OV circuit on its tokens."""

    def forget() -> None:
        # Its number means another token of another text.
        st.session_state.pop("token asked for", None)

    text = st.text_area("Text", TEXT, key="text", bind="query-params", height=100, on_change=forget)
    try:
        found = head_on_text(origin, head, text)
    except InputError as error:
        st.error(plain(str(error)))
        return
    if found.truncated:
        st.info(f"Only the first {len(found.tokens)} tokens are shown.")
    seen, corpus, pattern, copies = st.tabs(["Attention on the text", "In a corpus", "Pattern", "OV circuit"])
    with seen:
        view = view_on_text(origin, text)
        all_heads(view, head)
        token_links(workspace, origin, view, text)
    with corpus:
        in_corpus(workspace, origin, head)
    pattern.plotly_chart(found.figure(), key="pattern", config={"displayModeBar": False})
    copies.markdown("What attending to a token promotes and suppresses, from the weights alone")
    copies.dataframe(found.copies, hide_index=True, height=480, width="stretch")


def in_corpus(workspace: Workspace, origin: Origin, head: str) -> None:
    """Where the head looks hardest in held-out text; asked for, since the model reads some thousand tokens."""
    corpora = {item.corpus for item in workspace.harvest_summaries() if item.model == origin.model} or {"python-stdlib"}
    corpus = str(st.selectbox("Corpus", sorted(corpora), key="corpus", bind="query-params"))
    if not st.toggle("Read it", key="read", bind="query-params", help="held-out documents, for all heads at once"):
        return
    try:
        found = examples_in(origin, corpus)
    except InputError as error:
        st.error(plain(str(error)))
        return
    st.caption(
        f"The strongest attention in {found.n_tokens:,} held-out tokens, one a context and pair of tokens; the query "
        "is framed, the key it looks at coloured. Looks at a context's first token are left out."
    )
    st.html(found.html(head))


@st.cache_resource(max_entries=2, show_spinner="Reading text ...")
def examples_in(origin: Origin, corpus: str) -> HeadExamples:
    """The examples of all heads, kept."""
    return head_examples(loaded_model(origin), open_corpus(corpus))


_patterns = canvas(
    "workbench_attention",
    attention,
    """drawAttention(parentElement.querySelector(".att"), data, (...heads) => setTriggerValue("clicked", heads),
    (token, other) => setTriggerValue("asked", [token ?? -1, other]))""",
)


def all_heads(view: AttentionView, head: str) -> None:
    """All heads small and `head` large, the text beside it; a click on a small one opens it on the page."""
    if view.truncated:
        st.info(f"Only the first {len(view.tokens)} tokens are shown.")
    st.caption("Click a head to open it, with Shift to compare it with this one; click a token to go on from it.")

    def clicked() -> None:
        asked = st.session_state["attention"]["clicked"]
        if asked is not None:
            # The view is drawn anew: the head to compare with stays.
            head, st.session_state["compared"] = asked
            open_head(head)

    def asked() -> None:
        event = st.session_state["attention"]["asked"]
        if event is not None:
            token, st.session_state["compared"] = event
            st.session_state["token asked for"] = None if token < 0 else token

    shown = {
        "head": head, "other": st.session_state.get("compared"), "held": st.session_state.get("token asked for")
    }  # fmt: skip
    _patterns(data=view.data() | shown, key="attention", on_clicked_change=clicked, on_asked_change=asked)


def token_links(workspace: Workspace, scored: Origin, view: AttentionView, text: str) -> None:
    """From a token that was clicked to its features, by every SAE of the model, and to a graph of what follows it."""
    token = st.session_state.get("token asked for")
    if token is None or token >= len(view.tokens):
        return
    # Between quotation marks, where a token of white space is seen and ends no emphasis.
    st.markdown(f"**Token {token}, {plain(quoted(view.tokens[token]))}**")
    origins = {name: workspace.origin(name) for name in sae_names(workspace)}
    known = (None, scored.weights_sha256)
    names = [name for name, one in origins.items() if one.model == scored.model and one.weights_sha256 in known]
    for name in names[:MOST_LINKS]:
        page_link("Prompt", f"its features by {plain(name)}", sae=name, prompt=text, token=token, **here(*STATE))
    if token > 0 and any(of == scored.model for _, of in sets_for_graphs(workspace)):
        page_link("Graph", "a graph of what follows it", prompt=view.text_to(token), **here(*STATE))
    if not names:
        hook = f"blocks.{scored.model_info.n_layers // 2}.hook_resid_post"
        train = command(workspace, "train", "--model", scored.model, "--hook", hook, "--name", "mine")
        st.caption(f"No SAE of this model yet: {train} makes one, and then this says what fires here.")


@st.cache_data(max_entries=16, show_spinner="Running the model ...")
def view_on_text(origin: Origin, text: str) -> AttentionView:
    """The attention of every head, kept."""
    return attention.attention_view(loaded_model(origin), text)


@st.cache_data(max_entries=32, show_spinner="Running the model ...")
def head_on_text(origin: Origin, head: str, text: str) -> HeadOnText:
    """One forward pass, kept."""
    return views.head_on_text(loaded_model(origin), head, text)


def features(workspace: Workspace, model: ModelInfo, head: str) -> None:
    """The features that read from the head most, of every survey of its layer, each a link to its page."""
    for result in workspace.results.find(HEAD_FEATURES):
        own = result.table("features").query("node == @head")
        if result.origin.weights_sha256 != model.weights_sha256 or own.empty:
            continue
        sae = str(result.parameters["sae"])
        if "relations" not in result.parameters:
            again = command(workspace, "circuits", "head-features", sae)
            st.info(f"Run {again} again: it counts meanings in another way now.")
            continue
        of_head = result.table("heads").set_index("node").loc[head]
        st.subheader(f"Features of {plain(sae)}")
        st.caption(
            f"Meanings: {of_head['meanings']}, of {of_head['told']} features that a relation tells; "
            + ", ".join(f"{of_head[kind]} {kind}" for kind in FAMILIES)
        )
        summary = result.table("summary").iloc[0]
        if summary["heads"]:
            st.caption(
                f"With more than one: {summary['polysemantic']:.0%} of {summary['heads']:.0f} heads of this layer; "
                f"{summary['dealt']:.0%} where their features are dealt by lot."
            )
        for row in own.itertuples():
            label = (
                f"{row.share:.0%} · {row.feature} {plain(str(row.name))} · {row.family}, {row.distance:.1f} tokens back"
                + (f" · {row.relation}: {plain(row.tokens)} (F1 {row.relation_f1:.2f})" if row.told_by else "")
            )
            page_link("Feature", label, sae=sae, feature=row.feature, **here(*STATE))


def composition(result: Result, head: str) -> None:
    """The heads it reads from and those that read from it, by effective weights."""
    st.subheader("Composition")
    sides = list(
        zip(("reads from", "is read by"), ("writer", "reader"), composition_of_head(result, head), strict=True)
    )
    found = [side for side in sides if not side[2].empty]
    for title, _, rows in sides:
        if rows.empty:
            st.caption(f"{head} {title} no head.")
    for column, (title, other, rows) in zip(st.columns(max(len(found), 1)), found, strict=False):
        column.markdown(f"**{head} {title}**")
        shown = rows.head(12)[[other, "kind", "score", "over the mean"]]
        column.dataframe(shown, hide_index=True, width="stretch")


main()
