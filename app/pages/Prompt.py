"""Prompt page: which features fire on a text of one's own, token by token, and what they do to the next token."""

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.live import Clicked, choose_sae, open_live, prompt_box, token_grid, token_row
from app.shared import command, here, loaded_model, open_workspace, page_link, plain
from workbench import InputError, Workspace
from workbench.circuits.lenses import LENS, LensReading
from workbench.features import prompt_figures as live_figures
from workbench.features.live import LiveSAE, read_with
from workbench.features.prompt_page import feature_rows, sae_rows
from workbench.features.prompts import RANKINGS, PromptReading, Ranking
from workbench.models.places import between
from workbench.models.prompt_text import MAX_CHARACTERS, MAX_TOKENS
from workbench.show.grid import grid_html
from workbench.show.html import STYLE, edged, quoted, visible

SHOWN = 200
DENSE = 0.1
LINK = "feature=(.*)$"
LOGIT, CENTRED = "logit lens", ", centred"


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Prompt")
    with st.container(key="top"):
        picker, box = st.columns([1, 3])
    with picker:
        live, version = open_live(workspace, choose_sae(workspace))
    with box:
        text = prompt_box(live.name, "Type or paste a text, then press Ctrl+Enter")
    place = between(live.sae.hook_name, live.sae.written_hook)
    picker.caption(plain(f"{live.sae.d_sae:,} features at {place} of {live.model.info.name}"))
    if not text:
        st.info("Type a prompt to see which features fire on it. Every token can be clicked.")
        return
    try:
        reading = _read(live, version, text)
    except InputError as error:
        st.error(plain(str(error)))
        return
    if reading.truncated:
        st.info(f"Only the beginning was read: {reading.n_read:,} tokens (at most {MAX_CHARACTERS:,} characters, "
                f"{MAX_TOKENS:,} tokens and one context of the model).")  # fmt: skip
    looked_at(workspace, live, version, reading, text, st.query_params.get("sae"))


@st.fragment
def looked_at(
    workspace: Workspace, live: LiveSAE, version: int, reading: PromptReading, text: str, asked: str | None
) -> None:
    """What was read, at the token and feature that are looked at; a click draws this alone again.

    Args:
        asked: the SAE that the URL named when the page was drawn.
    """
    if st.query_params.get("sae") != asked:
        # A cell of all SAEs opened another one.
        st.rerun()
    with st.container(key="pairs"):
        token_box, feature_box, ranking, dense = st.columns([2, 2, 3, 2], vertical_alignment="bottom")
    position, feature = chosen(reading, token_box, feature_box)
    by, max_density = choose_ranking(reading, ranking, dense)
    with st.container(key="beside"):
        prompt, detail = st.columns(2, gap="medium")
    with prompt:
        tokens(reading, position, feature)
    with detail:
        looked_into(reading, position, feature)
    # What a click asks for is drawn before the grids, which it only marks.
    grids = st.container()
    features(workspace, reading, by, max_density, position)
    with grids:
        every_sae(workspace, live, text, position)
        lens(workspace, live, version, text, position)
        grid(reading, version, by, max_density, position, feature)


def looked_into(reading: PromptReading, position: int | None, feature: int | None) -> None:
    """What the model expects after the token that is looked at and the feature along the prompt, beside each other;
    without either, how much every token surprised the model."""
    if position is None and feature is None:
        st.caption("Click a token to see its features and what the model expects after it.")
        st.plotly_chart(live_figures.prompt_losses(reading), key="losses", config={"displayModeBar": False})
        return
    asked = [position is not None, feature is not None]
    columns = iter(st.columns([share for share, one in zip((2, 3), asked, strict=True) if one]))
    if position is not None:
        with next(columns):
            expectations(reading, position)
    if feature is not None:
        with next(columns):
            one_feature(reading, feature, position)


@st.cache_resource(max_entries=8, show_spinner="Reading ...")
def _read(_live: LiveSAE, version: int, text: str) -> PromptReading:
    return _live.read(text)


def _number(name: str, last: int, what: str) -> int | None:
    """A number of the URL, None where it has none; one that does not exist is said so and dropped."""
    asked = st.query_params.get(name)
    if asked is None:
        return None
    if not (asked.isdecimal() and int(asked) <= last):
        st.warning(plain(f"This link asks for {what} {asked!r}: there are 0 to {last}."))
        del st.query_params[name]
        return None
    return int(asked)


def _set(name: str, value: int | None) -> None:
    if value is None:
        st.query_params.pop(name, None)
    else:
        st.query_params[name] = str(value)


def chosen(
    reading: PromptReading, token_box: DeltaGenerator, feature_box: DeltaGenerator
) -> tuple[int | None, int | None]:
    """Token and feature looked at, kept in the URL as `token` and `feature`; without one, the whole prompt."""
    last_token, last_feature = len(reading.tokens) - 1, reading.d_sae - 1
    position, feature = _number("token", last_token, "token"), _number("feature", last_feature, "feature")
    # The URL decides, so that clicks on tokens and rows and these boxes agree.
    st.session_state["token"], st.session_state["feature"] = position, feature

    def follow(name: str) -> None:
        _set(name, st.session_state[name])

    token_box.number_input("Token", 0, last_token, value=None, step=1, key="token", placeholder="all",
                           help="its position, BOS being 0", on_change=follow, args=("token",))  # fmt: skip
    feature_box.number_input("Coloured by feature", 0, last_feature, value=None, step=1, key="feature",
                             placeholder="loss", on_change=follow, args=("feature",))  # fmt: skip
    return position, feature


def choose_ranking(reading: PromptReading, ranking: DeltaGenerator, dense: DeltaGenerator) -> tuple[Ranking, float]:
    """How features are ranked, and the largest density of those shown."""
    hide = dense.checkbox(
        "hide dense", key="hide_dense", bind="query-params", disabled=reading.known is None,
        help=f"features that fire on over {DENSE:.0%} of the indexed tokens",
    )  # fmt: skip
    by: Ranking = ranking.segmented_control(
        "Rank by", RANKINGS if reading.known else RANKINGS[:2], default="max", key="rank_by", bind="query-params",
        required=True, help="max: strongest activation; mean: over all tokens; rare: strongest x log(1 / density)",
    )  # fmt: skip
    return by, DENSE if hide and reading.known else 1.0


def every_sae(workspace: Workspace, live: LiveSAE, text: str, position: int | None) -> None:
    """All SAEs of the model on this prompt, in the order of their hook points; asked for, since each is loaded."""
    others = siblings(workspace, live)
    if not others or not st.toggle(
        f"All {len(others) + 1} SAEs of the model", key="all_saes", bind="query-params",
        help="at every token the feature of each SAE that is nearest to its maximum",
    ):  # fmt: skip
        return
    opened = [open_live(workspace, name) for name in in_order(workspace, [live.name, *others])]
    readings = _read_all([one for one, _ in opened], tuple(version for _, version in opened), text)

    def open_at(place: Clicked) -> None:
        if place.row is not None:
            st.query_params["sae"] = place.row
        _set("token", place.at)
        _set("feature", None)

    token_grid(
        grid_html(readings[0].texts, sae_rows(readings)), row=live.name, at=position,
        hint="Hover a cell to read its features; click it to open the SAE at this token.", on_click=open_at,
        key="grid of all SAEs",
    )  # fmt: skip


def lens(workspace: Workspace, live: LiveSAE, version: int, text: str, position: int | None) -> None:
    """What the model would say after each of its blocks, by the logit lens or by Jacobians of the workspace."""
    shown, choice = st.columns([2, 3], vertical_alignment="center")
    if not shown.toggle(
        "After each block", key="lens_shown", bind="query-params",
        help=f"the {live.model.outcome} that the stream says after each block, by the logit lens or a mean Jacobian",
    ):  # fmt: skip
        return
    sha256 = live.model.info.weights_sha256
    fitted = [result.name for result in workspace.results.find(LENS) if result.origin.weights_sha256 == sha256]
    lenses = [LOGIT, *(f"{name}{form}" for name in fitted for form in ("", CENTRED))]
    fit = command(workspace, "lens", "fit", "mine", "--model", live.model.info.name)
    name = choice.selectbox(
        "Lens", lenses, key="lens", bind="query-params", label_visibility="collapsed",
        help=f"{fit} averages Jacobians, which say what a layer leads to",
    )  # fmt: skip
    try:
        found = _lens(workspace, live, version, text, name)
    except InputError as error:
        st.warning(plain(str(error)))
        return
    token_grid(
        grid_html(found.texts, found.rows()), at=position, key="lens grid",
        hint="Hover a cell to read what the layer says; click it to open its token.",
        on_click=lambda place: _set("token", place.at),
    )  # fmt: skip


@st.cache_resource(max_entries=4, show_spinner="Reading ...")
def _lens(_workspace: Workspace, _live: LiveSAE, version: int, text: str, name: str) -> LensReading:
    fitted = None if name == LOGIT else name.removesuffix(CENTRED)
    return _workspace.read_lens(_live.model, text, fitted, centred=name.endswith(CENTRED))


def siblings(workspace: Workspace, live: LiveSAE) -> list[str]:
    """Other SAEs of the same model that are indexed: those whose features have names. All read one row of tokens, so
    they begin with BOS as this one does, and one activation, so crosscoders are none of them."""
    origins = {item.name: workspace.origin(item.name) for item in workspace.coders() if not item.parts}
    own, known = workspace.origin(live.name), (None, live.model.info.weights_sha256)
    model = loaded_model(own)
    same = {name for name, one in origins.items() if one.weights_sha256 in known
            and (one.model, one.begins(model)) == (own.model, own.begins(model))}  # fmt: skip
    return [name for name in workspace.indexes() if name != live.name and name in same]


def in_order(workspace: Workspace, names: list[str]) -> list[str]:
    """SAEs by layer, then by hook point and name."""
    hook = {item.name: item.hook for item in workspace.coders()}
    return sorted(names, key=lambda name: ([int(part) for part in hook[name].split(".") if part.isdecimal()],
                                           hook[name], name))  # fmt: skip


@st.cache_resource(max_entries=4, show_spinner="Reading ...")
def _read_all(_saes: list[LiveSAE], versions: tuple[int, ...], text: str) -> list[PromptReading]:
    return read_with(_saes, text)


@st.cache_resource(max_entries=8, show_spinner=False)
def _best_html(_reading: PromptReading, version: int, text: str, by: Ranking, max_density: float) -> str:
    rows = feature_rows(_reading, by, max_density=max_density)
    return grid_html(_reading.texts, rows) if rows else ""


def grid(
    reading: PromptReading, version: int, by: Ranking, max_density: float, position: int | None, feature: int | None
) -> None:
    """The best features of the prompt by token; a cell opens its token and colours the text by its feature."""

    def open_at(place: Clicked) -> None:
        # At once: each change by itself would be a step of the way Back.
        asked = {"feature": place.row, "token": place.at}
        st.query_params.update({name: str(value) for name, value in asked.items() if value is not None})

    html = _best_html(reading, version, reading.text, by, max_density)
    if html:
        token_grid(
            html, row=None if feature is None else str(feature), at=position,
            hint="The best features of the prompt. Hover a cell to read it; click it to open its token and feature.",
            on_click=open_at, key="grid of features",
        )  # fmt: skip


def tokens(reading: PromptReading, position: int | None, feature: int | None) -> None:
    """The prompt, coloured by a feature or by the loss of its tokens."""
    if feature is None:
        # Red marks what surprised the model.
        values, strongest, unit = (-reading.losses).tolist(), 10.0, "log probability (nats)"
        st.caption(f"Red: how much each token surprised the model, {reading.mean_loss:.3f} nats on average.")
    else:
        values, strongest = reading.activations(feature).tolist(), reading.strongest(feature)
        unit = f"feature {feature}"
        name = reading.known.names[feature] if reading.known else ""
        st.caption(plain(f"Feature {feature} {name}".strip() + f", full colour at {strongest:.3g}."))
    token_row(
        reading.texts, values, strongest, first=reading.first, selected=position, unit=unit, key="tokens",
        on_click=lambda at: _set("token", None if at == position else at),
    )  # fmt: skip


def features(
    workspace: Workspace, reading: PromptReading, by: Ranking, max_density: float, position: int | None
) -> None:
    """The features of the prompt or of one token, each with its label and a link; a selected row colours the text."""
    if position is None:
        table = reading.features(by, max_density=max_density)
        st.caption(f"{len(table):,} features fire on {reading.n_read:,} tokens")
    else:
        table = at_token(reading, position, max_density)
        st.caption(f"{len(table):,} features fire on token {position}")
    if table.empty:
        st.info("No feature is left: show dense features.")
        return
    if reading.known is None:
        table = table.drop(columns=["name", "density"])
        st.caption(f"Names and densities come with an index: {command(workspace, 'index', reading.sae)}.")
    table = table.head(SHOWN).copy()
    for column in table.columns.intersection(["token", "next"]):
        table[column] = [edged(text) for text in table[column]]
    if reading.missing is not None:
        st.caption(plain(f"No attribution: {reading.missing}"))
        table = table.drop(columns=["attribution", "next"], errors="ignore")
    number = table["feature"].to_numpy()
    link = [f"Feature?sae={reading.sae}&feature={feature}" for feature in number]
    key = f"table {reading.sae} {position} {hash(reading.text)}"

    def colour() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows:
            _set("feature", int(number[rows[0]]))

    st.dataframe(
        table.drop(columns="score", errors="ignore").assign(feature=link), hide_index=True, on_select=colour,
        selection_mode="single-row", key=key, height=380,
        column_config={
            "feature": st.column_config.LinkColumn("feature", display_text=LINK),
            "density": st.column_config.NumberColumn("density", format="percent"),
            "attribution": st.column_config.NumberColumn(
                "to next" if reading.outcome == "next token" else "to class", format="%+.3f",
                help=f"what it adds to the logit of the likeliest {reading.outcome}",
            ),
        },
    )  # fmt: skip


def at_token(reading: PromptReading, position: int, max_density: float) -> pd.DataFrame:
    """The features of one token with their attribution to a next token, kept in the URL as `target`."""
    target = None
    if reading.missing is None:
        text = st.text_input(
            f"Attribute to {reading.outcome}", key="target", bind="query-params",
            placeholder=f"{quoted(reading.next_texts[position][0])} (likeliest)",
            help="direct logit attribution, past the layers in between; one token, with its space",
        )  # fmt: skip
        try:
            target = reading.target(text) if text else None
        except InputError as error:
            st.warning(plain(str(error)))
    table = reading.at(position, target=target, max_density=max_density)
    if reading.missing is None and st.checkbox("rank by attribution", key="by_attribution", bind="query-params"):
        order = table["attribution"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)
    return table


def expectations(reading: PromptReading, position: int) -> None:
    """What the model expects after a token, and what comes."""
    st.markdown(f"**After token {position}**")
    pairs = zip(reading.next_texts[position], reading.next_probabilities[position], strict=True)
    rows = "".join(
        f'<tr><td class="tok">{visible(text)}</td><td class="n">{share:.1%}</td></tr>' for text, share in pairs
    )
    st.html(f'{STYLE}<div class="wbf"><table>{rows}</table></div>')
    if position + 1 < len(reading.tokens) and reading.outcome == "next token":
        st.caption(plain(f"Next comes {quoted(reading.texts[position + 1])}: {reading.losses[position + 1]:.2f} nats."))


def one_feature(reading: PromptReading, feature: int, position: int | None) -> None:
    """The feature along the prompt, with links to its own page and to steering with it."""
    st.markdown(f"**Feature {feature}**")
    if reading.activations(feature).any():
        st.plotly_chart(live_figures.prompt_activations(reading, feature, position), key="along",
                        config={"displayModeBar": False})  # fmt: skip
    else:
        st.caption("It does not fire on this prompt.")
    if reading.known is not None:
        page_link("Feature", f"Open feature {feature}", sae=reading.sae, feature=feature, **here("prompt", "token"))
    page_link(
        "Steering", f"Steer with feature {feature}", sae=reading.sae, feature=feature, prompt=reading.text,
        **here("token"),
    )  # fmt: skip


main()
