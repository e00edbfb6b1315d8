"""Feature page: what one feature does, what people wrote about it, and how it reads a text of one's own."""

import os
import random
from collections.abc import Sequence
from dataclasses import replace

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.examples import example_rows
from app.shared import (
    SEARCH,
    choose_index,
    explainer,
    here,
    loaded_model,
    open_workspace,
    page_link,
    plain,
    switch_page,
)
from workbench import FeatureIndex, InputError, LoadedModel, Workspace
from workbench.catalog.notes import Notes
from workbench.catalog.summaries import SAESummary
from workbench.circuits.attention_saes import attribute
from workbench.features.index import figures
from workbench.features.index.feature import Feature, TokenEffect
from workbench.features.index.loss import with_loss_effects
from workbench.features.index.on_text import LiveText, activations_on_text
from workbench.features.index.page import example_html
from workbench.models.prompt_text import MAX_CHARACTERS, MAX_TOKENS
from workbench.show.html import STYLE, quoted, visible

BOOKMARKS = "bookmarks"
PLAIN = {"displayModeBar": False}
# Pixels that a histogram beside the examples is high.
SMALL = 170


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    with st.container(key="top"):
        picker, browse = st.columns([2, 3], vertical_alignment="bottom")
    with picker:
        index = choose_index(workspace)
    with browse:
        number, mark = choose_feature(index)
    feature = index.feature(number)
    with mark:
        bookmark(workspace, feature)
    if "search" in st.query_params:
        page_link("Features", f"← search for {plain(repr(st.query_params['search']))}", sae=index.sae, **here(*SEARCH))
    headline(feature)
    about_it = next((item for item in workspace.coders() if item.name == feature.sae), None)
    # A crosscoder's text would be that of several activations, maybe of two models.
    parts = about_it.parts if about_it else []
    with st.container(key="beside"):
        left, right = st.columns([5, 2], gap="medium")
    with left:
        tested = None if parts else own_text(workspace, index, feature)
        if tested is not None and feature.heads:
            sources(workspace, feature, tested)
        examples(workspace, index, feature, runs=not parts)
    with right:
        histograms(feature, tested)
        logits(feature)
        nearest(feature)
    with st.container(key="below"):
        beside, notes, about = st.columns([5, 4, 3], gap="medium")
    with beside:
        together(feature)
    with notes:
        written(workspace, feature)
    with about:
        card(feature, about_it)


def headline(feature: Feature) -> None:
    """Number and name of the feature, and how often it fires."""
    stats = feature.stats
    signs = f", {stats.negative:,} of them negative" if feature.signed else ""
    st.subheader(f"{feature.sae} / {feature.feature}")
    st.text(feature.name)
    st.caption(
        f"fires on **{stats.density:.3%}** of {feature.n_tokens:,} tokens ({stats.firings:,}{signs}) · "
        + plain(f"{feature.place} of {feature.model}")
    )
    if feature.dead:
        st.warning("Dead: this feature fires on none of the indexed tokens.")


def choose_feature(index: FeatureIndex) -> tuple[int, DeltaGenerator]:
    """The feature's number, kept in the URL as `feature`, with buttons to go on from it, and room for one more."""
    last = index.d_sae - 1
    asked = st.query_params.get("feature", "0")
    if not (asked.isdecimal() and int(asked) <= last):
        st.warning(f"This link asks for feature {asked!r}: {index.sae} has features 0 to {last}.")
        asked = "0"
    # The URL decides and every control changes the URL, so that links to other features always arrive. Writing what it
    # says on every run brings the browser's address up to date after a link from this page to itself.
    if "feature" in st.query_params:
        st.query_params["feature"] = st.query_params["feature"]
    number = st.session_state["feature"] = int(asked)

    def go(to: int) -> None:
        st.query_params.update({"sae": index.sae, "feature": str(to % index.d_sae)})

    def follow() -> None:
        go(st.session_state["feature"])

    box, before, after, anywhere, room = st.columns([3, 1, 1, 1, 1], vertical_alignment="bottom")
    box.number_input("Feature", 0, last, step=1, key="feature", on_change=follow)
    before.button("←", help="previous feature", on_click=go, args=(number - 1,), width="stretch")
    after.button("→", help="next feature", on_click=go, args=(number + 1,), width="stretch")
    anywhere.button("⚄", help="any feature", on_click=go, args=(random.randrange(index.d_sae),), width="stretch")
    return number, room


def bookmark(workspace: Workspace, feature: Feature) -> None:
    """A star that puts the feature on the list of bookmarks or takes it off."""
    notes = Notes(workspace.path)
    marked = BOOKMARKS in notes.lists_of(feature.sae, feature.feature)
    change = notes.remove_from_list if marked else notes.add_to_list
    st.button(
        "★" if marked else "☆", help=f"on the list {BOOKMARKS}" if marked else "bookmark", key="bookmark",
        on_click=change, args=(BOOKMARKS, feature.sae, feature.feature), width="stretch",
    )  # fmt: skip


def written(workspace: Workspace, feature: Feature) -> None:
    """Label, notes and lists, which persist in the workspace."""
    notes = Notes(workspace.path)
    place = f"{feature.sae} {feature.feature}"

    def save_label() -> None:
        notes.set_label(feature.sae, feature.feature, st.session_state[f"label {place}"])

    def save_note() -> None:
        if st.session_state[f"note {place}"].strip():
            notes.add_note(feature.sae, feature.feature, st.session_state[f"note {place}"])
            st.session_state[f"note {place}"] = ""

    st.text_input(
        "Label", feature.label or "", max_chars=200, key=f"label {place}", on_change=save_label,
        placeholder=feature.name,
    )  # fmt: skip
    for concept in feature.concepts:
        sign = "negative activations " if concept.sign < 0 else ""
        st.caption(
            f"{sign}concept **{plain(concept.name)}**: F1 **{concept.f1:.2f}** on held-out documents (precision "
            f"{concept.precision:.2f}, recall {concept.recall:.2f}, correlation {concept.correlation:+.2f}; "
            f"above {concept.threshold:.3g}; {concept.positives:,} tokens have it)"
        )
    explained(workspace, feature)
    for note in feature.notes:
        st.text(note)
    st.text_area("Add a note", max_chars=2000, height=68, key=f"note {place}", on_change=save_note)
    for member_of in notes.lists_of(feature.sae, feature.feature):
        on, off = st.columns([4, 1], vertical_alignment="center")
        with on:
            page_link("Features", f"list {plain(member_of)}", sae=feature.sae, list=member_of)
        off.button(
            "✕", key=f"off {member_of}", help=f"take it off {member_of}", on_click=notes.remove_from_list,
            args=(member_of, feature.sae, feature.feature),
        )  # fmt: skip
    with st.popover("Add to a list"), st.form(f"list {place}", border=False):
        name = st.selectbox("List", list(notes.lists()), accept_new_options=True, index=None, placeholder="a new name")
        if st.form_submit_button("Add") and name:
            try:
                notes.add_to_list(name, feature.sae, feature.feature)
            except InputError as error:
                st.error(plain(str(error)))
            else:
                st.rerun()


def explained(workspace: Workspace, feature: Feature) -> None:
    """What language models say it responds to, with their scores; one more for each model that the app was given."""
    for said in feature.explanations:
        if said.explanation:
            score = f", detection **{said.score:.2f}** (chance 0.50)" if said.score is not None else ""
            st.caption(f"in the words of {plain(said.model)}: **{plain(said.explanation)}**{score}")
    given = os.environ.get("WORKBENCH_EXPLAINER", "").splitlines()
    for name in [] if feature.dead else given:
        if any(said.model == name for said in feature.explanations) or not st.button(
            "Explain it" if len(given) == 1 else f"Explain it by {plain(name)}", key=f"explain {name}",
            help=f"asks {name} for a phrase and tests it on texts that it has not seen",
        ):  # fmt: skip
            continue
        try:
            with st.spinner("Asking the language model ..."):
                model = explainer(name, os.environ.get("WORKBENCH_EXPLAINER_ENDPOINT"))
                workspace.explain(feature.sae, [feature.feature], model)
        except InputError as error:
            st.error(plain(str(error)))
        else:
            st.rerun()


def nearest(feature: Feature) -> None:
    """Features close in direction, each a link."""
    st.markdown("**Nearest decoder directions** · cosine")
    links(feature.sae, [(near.feature, near.name, f"{near.cosine:+.2f}") for near in feature.neighbours])


def together(feature: Feature) -> None:
    """Features close in time, each a link; heads of an attention SAE."""
    st.markdown("**Fires together with** · phi, PMI")
    found = [(other.feature, other.name, f"{other.phi:.2f}, {other.pmi:.1f}") for other in feature.coactivations]
    links(feature.sae, found)
    if not found:
        st.caption("No feature fires with it on three tokens or more.")
    if feature.heads:
        st.markdown("**Share of heads in its direction**")
        st.bar_chart({"share": feature.heads}, height=160, x_label="head", y_label="share")


def links(sae: str, targets: Sequence[tuple[int, str, str]]) -> None:
    """One link a feature."""
    for number, name, value in targets[:6]:
        page_link("Feature", f"{value} · {number} {plain(name)}", sae=sae, feature=number)


def card(feature: Feature, about_it: SAESummary | None) -> None:
    """What the SAE is and how well it does, and the feature's files."""
    if about_it is not None and about_it.parts:
        page, label = "Crosscoders", f"Whose features they are: {plain(', '.join(about_it.parts))}"
    else:
        page, label = "Steering", "Steer the model with it"
    page_link(page, label, sae=feature.sae, feature=feature.feature, **here(*SEARCH))
    st.markdown("**About the SAE**")
    evaluation = (about_it.evaluation if about_it else None) or {}
    measured = {"l0": "L0", "fvu": "FVU", "loss_recovered_zero": "loss recovered"}
    known = [f"{title} {evaluation[key]:.3g}" for key, title in measured.items() if key in evaluation]
    st.text("\n".join([feature.model, feature.place, feature.rule, f"{feature.n_tokens:,} tokens indexed", *known]))
    name = f"{feature.sae}-{feature.feature}"
    st.download_button("Save as HTML", feature.to_html, f"{name}.html", "text/html", on_click="ignore")
    st.download_button("Save as JSON", feature.to_json, f"{name}.json", "application/json", on_click="ignore")


def own_text(workspace: Workspace, index: FeatureIndex, feature: Feature) -> LiveText | None:
    """The box for a text of one's own, kept in the URL as `text`; what the feature does on it."""
    text = st.text_input(
        "Test on my text", key="text", bind="query-params", label_visibility="collapsed",
        placeholder="Test on my text: type and press Enter",
    )  # fmt: skip
    if not text:
        return None
    try:
        sae = workspace.coder(index.sae)
        found = activations_on_text(model_of_feature(workspace, feature), sae, feature.feature, text)
    except InputError as error:
        st.error(f"The feature cannot be run on text here: {plain(str(error))}")
        return None
    if found.truncated:
        st.info(f"Only the beginning was read: at most {MAX_CHARACTERS:,} characters and {MAX_TOKENS} tokens.")
    strongest = max(abs(feature.stats.minimum or 0), abs(feature.stats.maximum or 0), abs(found.example.activation))
    st.html(f'{STYLE}<div class="wbf">{example_html(found.example, strongest, opened=True)}</div>')
    if not found.example.activation:
        st.caption("It does not fire on this text.")
    return found


def model_of_feature(workspace: Workspace, feature: Feature) -> LoadedModel:
    """The model that a feature's SAE reads, as its index says, with texts that begin as the SAE's contexts did."""
    origin = workspace.origin(feature.sae)
    return loaded_model(replace(origin, model=feature.model)).beginning(origin.bos)


def sources(workspace: Workspace, feature: Feature, tested: LiveText) -> None:
    """Where an attention feature reads from on the tested text, by head and source token (DFA)."""
    peak = tested.example.peak
    try:
        model = model_of_feature(workspace, feature)
        found, figure = attribute(model, workspace.sae(feature.sae), tested.ids, feature.feature, peak + 1)
    except InputError as error:
        st.error(f"The feature cannot be attributed here: {plain(str(error))}")
        return
    st.markdown("**Where it reads from**")
    st.plotly_chart(figure, key="sources", config=PLAIN)
    st.caption(
        f"What every head brings from every token to the pre-activation {found.pre_activation:.3g} at "
        f"{plain(quoted(tested.example.tokens[peak]))}; {found.constant:+.3g} of it is constant."
    )


def logits(feature: Feature) -> None:
    """The tokens it promotes and suppresses."""
    if feature.logits is None:
        st.caption(f"No logit effects: {plain(feature.missing or '')}")
        return
    sides = "".join(
        f"<div><h3>{title}</h3><table>{''.join(map(effect_row, effects))}</table></div>"
        for title, effects in (("Promotes", feature.promotes), ("Suppresses", feature.suppresses))
    )
    st.html(f'{STYLE}<div class="wbf"><div class="cols">{sides}</div></div>')


def effect_row(effect: TokenEffect) -> str:
    """One token with its effect."""
    return f'<tr><td class="tok">{visible(effect.text)}</td><td class="n">{effect.effect:+.3f}</td></tr>'


def histograms(feature: Feature, tested: LiveText | None) -> None:
    """Distributions of its activations, with the tested text's marked, and of its logit effects."""
    drawn = {}
    if not feature.dead:
        mark = tested.example.activation if tested is not None and tested.example.activation else None
        drawn["activations"] = figures.activation_histogram(feature, mark)
    if feature.logits is not None:
        drawn["logits"] = figures.logit_histogram(feature)
    for key, figure in drawn.items():
        st.plotly_chart(figure.update_layout(height=SMALL), key=key, config=PLAIN)


def examples(workspace: Workspace, index: FeatureIndex, feature: Feature, *, runs: bool) -> None:
    """Groups of examples, the strongest first; a click on a row shows all of its text and what can be done with it.
    `runs`: whether the feature can be run on text."""
    if not feature.groups:
        return
    if runs and st.toggle(
        "Effect on the loss", key="loss",
        help="Runs the model on every example with the feature taken out. Lines below tokens: green where the loss "
        "rises, so that the feature helps, red where it falls; hover a token for the number.",
    ):  # fmt: skip
        try:
            with st.spinner("Running the model ..."):
                model = model_of_feature(workspace, feature)
                feature = with_loss_effects(index, feature, model, workspace.coder(feature.sae))
        except InputError as error:
            st.error(f"The loss cannot be measured here: {plain(str(error))}")
    asked = example_rows(feature, key="examples")
    if asked is None:
        return
    if asked.what == "document":
        whole_document(index, feature, asked.row)
        return
    text = next("".join(one.tokens) for group in feature.groups for one in group.examples if one.row == asked.row)
    page = "Steering" if asked.what == "steer" else "Prompt"
    switch_page(page, sae=feature.sae, feature=feature.feature, prompt=text, **here(*SEARCH))


@st.dialog("Whole document", width="large")
def whole_document(index: FeatureIndex, feature: Feature, row: int) -> None:
    """The document around an example, as far as it was harvested, with the feature's activations."""
    example = index.document(feature.feature, row)
    strongest = max(abs(feature.stats.minimum or 0), abs(feature.stats.maximum or 0))
    st.html(f'{STYLE}<div class="wbf">{example_html(example, strongest, opened=True)}</div>')


main()
