"""Steering page: the model's text with features added, held or taken out, beside the text without the edit."""

from html import escape

import streamlit as st

from app.live import choose_sae, open_live, prompt_box
from app.shared import command, here, open_workspace, page_link, plain
from workbench import InputError, Workspace
from workbench.features import prompt_figures as live_figures
from workbench.features.live import LiveSAE
from workbench.features.steering import KINDS, NEW_TOKENS, PLACES, Edit, Steering, most_new_tokens, read_strength
from workbench.features.steering_sweep import Sweep
from workbench.models.prompt_text import has_chat_template
from workbench.show.html import STYLE, quoted

STRONGEST, MOST_TOKENS = 20.0, 100
PLAIN = {"displayModeBar": False}


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Steering")
    with st.container(key="beside"):
        left, right = st.columns([1, 2], gap="large")
    with left:
        live, version = open_live(workspace, choose_sae(workspace))
        feature = choose_feature(live)
        edit = choose_edit(feature)
        chat, n, temperature, seed = choose_sampling(live)
    with right:
        prompt = prompt_box(live.name, "The text to go on from, then press Ctrl+Enter")
        try:
            edit.check(live.sae.d_sae)
        except InputError as error:
            st.error(plain(str(error)))
            return
        described(workspace, live, edit)
        if not prompt:
            st.info("Type a prompt to see how the model goes on from it with and without the feature.")
            return
        try:
            found = _steer(live, version, edit, prompt, chat, n, temperature, seed)
            show(found)
            sweep(live, version, edit, prompt, chat)
        except InputError as error:
            st.error(plain(str(error)))


def described(workspace: Workspace, live: LiveSAE, edit: Edit) -> None:
    """The features that are edited, each a link, with what strengths are multiples of."""
    for feature, unit in live.units(edit).items():
        if live.known is None:
            index = command(workspace, "index", live.name)
            st.caption(f"Feature {feature} has no name, and strength is in activation units, before {index}.")
        else:
            label = f"Feature {feature}: {live.feature_name(feature)}: its maximum is {unit:.3g}"
            page_link("Feature", plain(label), **here("prompt"), sae=live.name, feature=feature)


def choose_feature(live: LiveSAE) -> int:
    """The feature's number, kept in the URL as `feature`."""
    last = live.sae.d_sae - 1
    asked = st.query_params.get("feature", "0")
    if not (asked.isdecimal() and int(asked) <= last):
        st.warning(plain(f"This link asks for feature {asked!r}: {live.name} has features 0 to {last}."))
        asked = "0"
    st.session_state["feature"] = int(asked)

    def follow() -> None:
        st.query_params.update({"sae": live.name, "feature": str(st.session_state["feature"])})

    return int(st.number_input("Feature", 0, last, step=1, key="feature", on_change=follow))


def choose_edit(feature: int) -> Edit:
    """What to do to which features; all of it in the URL."""
    usual = Edit(feature)
    kind = st.radio(
        "Edit", KINDS, key="kind", bind="query-params", horizontal=True,
        help="add: strength x maximum x decoder direction; clamp: hold the activation at strength x maximum; "
        "ablate: take the feature out",
    )  # fmt: skip
    strength = st.slider(
        "Strength (maxima)", -STRONGEST, STRONGEST, usual.strength, 0.25, key="strength", bind="query-params",
        disabled=kind == "ablate", help="0 adds nothing; negative strengths push the other way",
    )  # fmt: skip
    more = st.text_input(
        "More features", key="also", bind="query-params", placeholder="7=-1.5, 12",
        help="numbers, each with a strength of its own where it differs from that of the slider",
    )  # fmt: skip
    where = st.radio(
        "Where", PLACES, key="where", bind="query-params", horizontal=True,
        help="generated: only positions that predict a generated token",
    )  # fmt: skip
    keep = st.checkbox(
        "keep error", value=usual.keep_error, key="error", bind="query-params",
        help="what the SAE fails to reconstruct stays; off: the model reads the edited reconstruction alone",
    )  # fmt: skip
    return Edit(feature, kind, strength, where, keep, further(more, strength))


def further(text: str, strength: float) -> tuple[tuple[int, float], ...]:
    """The features and strengths of a list such as `7=-1.5, 12`; what is none is said and left out."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(read_strength(part, strength))
        except InputError as error:
            st.warning(plain(str(error)))
    return tuple(found)


def choose_sampling(live: LiveSAE) -> tuple[bool, int, float, int]:
    """Whether the prompt is a chat message, new tokens, temperature and seed; all of it in the URL."""
    chat = has_chat_template(live.model) and st.checkbox(
        "chat message", value=True, key="chat", bind="query-params", help="the prompt in the model's chat template"
    )
    with st.expander("Sampling"):
        most = min(MOST_TOKENS, most_new_tokens(live.model))
        usual = min(NEW_TOKENS, -(-most // 2))
        n = st.slider("New tokens", 0, most, usual, key="n", bind="query-params") if most else 0
        temperature = st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, key="temperature", bind="query-params")
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="seed", bind="query-params", help="the same for both texts")
    return chat, n, temperature, seed


@st.cache_data(max_entries=32, show_spinner="Generating ...")
def _steer(
    _live: LiveSAE, version: int, edit: Edit, prompt: str, chat: bool, new_tokens: int, temperature: float, seed: int
) -> Steering:
    return _live.steer(edit, prompt, chat=chat, new_tokens=new_tokens, temperature=temperature, seed=seed)


@st.cache_data(max_entries=32, show_spinner="Sweeping ...")
def _sweep(_live: LiveSAE, version: int, edit: Edit, prompt: str, chat: bool) -> Sweep:
    return _live.sweep(edit, prompt, chat=chat)


def show(found: Steering) -> None:
    """Both texts, the side effects in numbers, and the figures."""
    if found.truncated:
        st.info(f"Only the beginning of the prompt was read: {len(found.texts) - found.first:,} tokens.")
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
    divergence.metric("KL (nats)", f"{found.mean_kl:.4f}", help="mean over the prompt's tokens")
    change = found.mean_losses[1] - found.mean_losses[0]
    loss.metric(
        "Loss (nats)",
        f"{found.mean_losses[1]:.3f}",
        f"{change:+.4f}",
        delta_color="inverse",
        help="mean over the prompt's tokens",
    )
    following, along = st.tabs([found.outcome.capitalize(), "Along the prompt"])
    with following:
        if found.next_tokens.empty:
            st.caption("No probability after the prompt changes.")
        else:
            st.plotly_chart(live_figures.next_token_bars(found), key="next", config=PLAIN)
    with along:
        st.plotly_chart(live_figures.side_effects(found), key="side", config=PLAIN)


def sweep(live: LiveSAE, version: int, edit: Edit, prompt: str, chat: bool) -> None:
    """The same edit at many strengths; asked for, since the prompt is read at each."""
    if edit.kind == "ablate" or not st.toggle(
        "Sweep over strengths", key="sweep", bind="query-params",
        help="where the feature's own tokens rise before KL does, the strength acts on what the feature means",
    ):  # fmt: skip
        return
    found = _sweep(live, version, edit, prompt, chat)
    st.plotly_chart(live_figures.sweep_curves(found, edit.strength), key="curves", config=PLAIN)
    own = ", ".join(map(quoted, found.tokens))
    st.caption(
        plain(f"Means over the prompt's tokens. Its tokens: {own}." if own else "Means over the prompt's tokens.")
    )


main()
