"""Steering page: the model's text with one feature added, held or taken out, beside the text without the edit."""

from html import escape

import streamlit as st

from app.live import choose_sae, open_live
from app.shared import open_workspace, page_link, plain
from workbench import InputError
from workbench.features import prompt_figures as live_figures
from workbench.features.live import LiveSAE
from workbench.features.steering import KINDS, PLACES, Edit, Steering
from workbench.show.html import STYLE

STRONGEST, MOST_TOKENS = 20.0, 100


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Steering")
    left, right = st.columns([1, 2], gap="large")
    with left:
        live, version = open_live(workspace, choose_sae(workspace))
        feature = choose_feature(live)
        edit, n, temperature, seed = choose_edit(feature)
        if live.known is not None:
            page_link("Feature", f"Open feature {feature}", sae=live.name, feature=feature)
    with right:
        prompt = st.text_area(
            "Prompt", key="prompt", bind="query-params", height=110,
            placeholder="The text to go on from, then press Ctrl+Enter",
        )  # fmt: skip
        maximum = (
            f"its maximum is {live.unit(feature):.3g}"
            if live.known
            else "without an index, strength is in activation units"
        )
        st.caption(plain(f"Feature {feature}: {live.feature_name(feature) or 'no index, no name'}" + f": {maximum}."))
        if not prompt:
            st.info("Type a prompt to see how the model goes on from it with and without the feature.")
            return
        try:
            found = _steer(live, version, edit, prompt, n, temperature, seed)
        except InputError as error:
            st.error(plain(str(error)))
            return
        show(found)


def choose_feature(live: LiveSAE) -> int:
    """The feature's number, kept in the URL as `feature`."""
    last = live.sae.d_sae - 1
    asked = st.query_params.get("feature", "0")
    if not (asked.isdecimal() and int(asked) <= last):
        st.warning(plain(f"This link asks for feature {asked!r}: {live.name} has features 0 to {last}."))
        asked = "0"
    st.query_params["feature"] = asked
    st.session_state["feature"] = int(asked)

    def follow() -> None:
        st.query_params["feature"] = str(st.session_state["feature"])

    return int(st.number_input("Feature", 0, last, step=1, key="feature", on_change=follow))


def choose_edit(feature: int) -> tuple[Edit, int, float, int]:
    """What to do, tokens, temperature and seed; all of it in the URL."""
    kind = st.radio(
        "Edit", KINDS, key="kind", bind="query-params", horizontal=True,
        help="add: strength x maximum x decoder direction; clamp: hold the activation at strength x maximum; "
        "ablate: take the feature out",
    )  # fmt: skip
    strength = st.slider(
        "Strength (maxima)", -STRONGEST, STRONGEST, 2.0, 0.25, key="strength", bind="query-params",
        disabled=kind == "ablate", help="0 adds nothing; negative strengths push the other way",
    )  # fmt: skip
    where = st.radio(
        "Where", PLACES, key="where", bind="query-params", horizontal=True,
        help="generated: only positions that predict a generated token",
    )  # fmt: skip
    keep = st.checkbox(
        "keep error", value=True, key="error", bind="query-params",
        help="what the SAE fails to reconstruct stays; off: the model reads the edited reconstruction alone",
    )  # fmt: skip
    with st.expander("Sampling"):
        n = st.slider("New tokens", 0, MOST_TOKENS, 30, key="n", bind="query-params")
        temperature = st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, key="temperature", bind="query-params")
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="seed", bind="query-params", help="the same for both texts")
    return Edit(feature, kind, strength, where, keep), n, temperature, seed


@st.cache_data(max_entries=32, show_spinner="Generating ...")
def _steer(
    _live: LiveSAE, version: int, edit: Edit, prompt: str, new_tokens: int, temperature: float, seed: int
) -> Steering:
    return _live.steer(edit, prompt, new_tokens=new_tokens, temperature=temperature, seed=seed)


def show(found: Steering) -> None:
    """Both texts, the side effects in numbers, and the figures."""
    if found.truncated:
        st.info(f"Only the beginning of the prompt was read: {len(found.texts):,} tokens.")
    for column, title, text, nats in zip(
        st.columns(2), ("Clean", "Steered"), (found.clean, found.steered), (found.clean_nats, found.steered_nats),
        strict=True,
    ):  # fmt: skip
        column.markdown(f"**{title}**")
        column.html(
            f'{STYLE}<div class="wbf"><div class="text"><span class="dim">{escape(found.prompt)}</span>'
            f"<strong>{escape(text)}</strong></div></div>"
        )
        if text:
            column.caption(f"{nats:.2f} nats a token under the unedited model")
    if found.clean == found.steered:
        st.caption("Both texts are the same: the edit changes none of the tokens chosen.")
    divergence, loss = st.columns(2)
    divergence.metric("KL (nats)", f"{found.kl.mean():.4f}", help="mean over the prompt's tokens")
    change = found.mean_losses[1] - found.mean_losses[0]
    loss.metric(
        "Loss (nats)",
        f"{found.mean_losses[1]:.3f}",
        f"{change:+.4f}",
        delta_color="inverse",
        help="mean over the prompt's tokens",
    )
    following, along = st.tabs(["Next token", "Along the prompt"])
    with following:
        if found.next_tokens.empty:
            st.caption("No probability after the prompt changes.")
        else:
            st.plotly_chart(live_figures.next_token_bars(found), key="next", config={"displayModeBar": False})
    with along:
        st.plotly_chart(live_figures.side_effects(found), key="side", config={"displayModeBar": False})


main()
