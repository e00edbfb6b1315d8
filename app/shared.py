"""What the pages share: the workspace, opened indexes and models, the choice of an SAE, and links to features."""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go
import streamlit as st
from streamlit.errors import StreamlitPageNotFoundError

from workbench import FeatureIndex, InputError, LoadedModel, Workspace, load_model, reload_model
from workbench.catalog.origin import Origin
from workbench.catalog.summaries import SAESummary
from workbench.features.explanations.language_models import Endpoint, LanguageModel, LocalModel
from workbench.features.index.titles import concepts_path, explanations_path
from workbench.features.live import model_name, model_of
from workbench.models.load_own import must_be_given

FINISHED = ("harvests/*/harvest.duckdb", "saes/*/cfg.json", "transcoders/*/transcoders.json", "runs/*/run.duckdb",
            "results/*/*.duckdb", "indexes/*.duckdb")  # fmt: skip


SEARCH = ("search", "by", "all")
"""What the URL says of a search among features."""
COUNTS = {
    name: st.column_config.NumberColumn(format="localized")
    for name in ("features", "tokens", "firings", "rows", "neurons", "nodes", "edges")
}
"""How a table shows columns that count, with separators between thousands."""


def open_workspace() -> Workspace:
    """The workspace that `workbench app` was started on; one that is gone or foreign is said so, and the page ends."""
    try:
        return Workspace(sys.argv[1], create=False)
    except InputError as error:
        st.error(plain(str(error)))
        st.stop()


def command(workspace: Workspace, *words: str) -> str:
    """A command of this workspace to copy, in Markdown: `command(workspace, "index", "mine")`."""
    return f"`{shlex.join(['workbench', *words, '--workspace', str(workspace.path)])}`"


def version(workspace: Workspace) -> str:
    """Changes with every finished artefact of the workspace: a key for `st.cache_data`."""
    files = [path for pattern in FINISHED for path in workspace.path.glob(pattern)]
    return str(hash(tuple(sorted((str(path), path.stat().st_mtime_ns) for path in files))))


def sae_names(workspace: Workspace) -> list[str]:
    """The SAEs and transcoders there are, baselines with a frozen random decoder last."""
    names = [item.name for item in workspace.coders()]
    return sorted(names, key=lambda name: workspace.origin(name).frozen_decoder)


def choose_index(workspace: Workspace) -> FeatureIndex:
    """The indexed SAE chosen by `pick_sae`; says what to do and stops where there are none."""
    names = workspace.indexes()
    if not names:
        saes = sae_names(workspace)
        if saes:
            st.info(f"No index yet. Make one with {command(workspace, 'index', saes[0])}.")
        else:
            no_sae(workspace)
        st.stop()
    return open_index(workspace, pick_sae(workspace, names, "the index of"))


def no_sae(workspace: Workspace) -> None:
    """Says how a workspace without SAEs gets one: from its first harvest, or straight from the demo model."""
    harvest = next(iter(workspace.harvests()), None)
    of = [harvest] if harvest else ["--model", "demo", "--hook", "blocks.2.hook_resid_post"]
    demo = "" if harvest else f", or begin with {command(workspace, 'demo')}"
    st.info(f"No SAE yet. Train one with {command(workspace, 'train', *of, '--name', 'mine')}{demo}.")


def harvested_model(workspace: Workspace) -> str:
    """A model for commands to copy: of the first harvest; the demo model where there is none."""
    return next((one.model for one in workspace.harvest_summaries()), "demo")


def pick_sae(workspace: Workspace, names: Sequence[str], what: str, default: str | None = None) -> str:
    """Boxes for model, hook point, SAE and, of a set of transcoders, its layer, each offering what the ones before
    leave; those without a choice are left out. The SAE is kept in the URL as `sae`.

    Args:
        names: SAEs to choose from, at least one.
        what: is missing where a link asks for another, such as "the index of".
        default: where the URL names none; the first.
    """
    known = {item.name: item for item in workspace.coders()}
    places = {name: _place(known[name]) if name in known else ("", "", name, "") for name in names}
    sae = _sae_of_url(names, what, default or names[0])
    mine = places[sae]
    shown = []
    for depth, (label, key) in enumerate(LEVELS):
        left = [name for name in reversed(names) if places[name][:depth] == mine[:depth]]
        first = {places[name][depth]: name for name in left}
        if len(first) > 1 or key == "sae":
            shown.append((label, key, mine[depth], first))
    about = known[sae].place if sae in known else ""
    with st.container(key="pick"):
        columns = st.columns(len(shown))
    for column, (label, key, chosen, first) in zip(columns, shown, strict=True):
        st.session_state[key] = chosen

        def follow(key: str = key, first: dict[str, str] = first) -> None:
            st.query_params["sae"] = first[st.session_state[key]]

        column.selectbox(
            label, sorted(first, key=_in_order), key=key, on_change=follow,
            help=f"{about} of {mine[0]}" if key == "sae" else None,
        )  # fmt: skip
    return sae


LEVELS = (("Model", "model of sae"), ("Hook point", "hook of sae"), ("SAE", "sae"), ("Layer", "layer of sae"))


def _place(item: SAESummary) -> tuple[str, str, str, str]:
    """What the boxes of LEVELS say of an SAE: a set of transcoders has one hook point and one name."""
    if not item.member_of:
        return item.model, item.hook, item.name, ""
    return item.model, re.sub(r"\d+", "*", item.hook, count=1), item.member_of, str(item.layer)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


def _sae_of_url(names: Sequence[str], what: str, default: str) -> str:
    """The SAE that the URL names; what nobody chose is not written there (`url_choice`)."""
    asked = st.query_params.get("sae")
    if asked is None or asked in names:
        return asked or default
    st.warning(f"This link asks for {what} {asked!r}, which this workspace does not have.")
    return default


def url_choice(
    key: str, label: str, options: Sequence[str], default: str, *, what: str = "", alone: bool = False,
    format_func: Callable[[str], str] = str,
) -> str:  # fmt: skip
    """A box whose choice the URL holds as `key`. The default is not written there: each change of the URL is a step of
    the way Back, which would lead here again, where it would be written once more.

    Args:
        what: is missing where a link asks for another, such as "the graph ".
        alone: a choice empties the rest of the URL, which is about what was chosen before.
    """
    asked = st.query_params.get(key)
    if asked is not None and asked not in options:
        st.warning(f"This link asks for {what}{plain(asked)}, which this workspace does not have.")
    st.session_state[key] = asked if asked in options else default

    def follow() -> None:
        chosen = {key: st.session_state[key]}
        if alone:
            st.query_params.from_dict(chosen)
        else:
            st.query_params.update(chosen)

    return str(st.selectbox(label, options, key=key, on_change=follow, format_func=format_func))


def open_index(workspace: Workspace, name: str) -> FeatureIndex:
    """An index, opened once and again when it or the concepts of its features are made anew."""
    files = (workspace.index_path(name), concepts_path(workspace, name), explanations_path(workspace, name))
    return _opened(str(workspace.path), name, tuple(path.stat().st_mtime_ns for path in files if path.is_file()))


@st.cache_resource(max_entries=4, show_spinner=False)
def _opened(workspace: str, name: str, versions: tuple[int, ...]) -> FeatureIndex:
    return FeatureIndex.open(Workspace(workspace, create=False), name)


_last_loaded: dict[str, tuple[str | None, str]] = {}
"""By a model's name what it was asked for with, and the hash of what was loaded."""


def loaded_model(of: Origin | str) -> LoadedModel:
    """A model, loaded once for all pages and sessions, and again when other weights of the name are asked for.

    Args:
        of: what was made from it, with its weights; or its name, for any weights.

    Raises:
        InputError: a model that cannot be loaded, or one that has other weights now.
    """
    origin = Origin({}, of) if isinstance(of, str) else of
    asked, found = _last_loaded.get(origin.model, (None, None))
    if origin.weights_sha256 not in (None, found):
        asked = origin.weights_sha256
    model = _loaded(origin.model, asked)
    _last_loaded[origin.model] = asked, model.info.weights_sha256
    origin.check_model(model, "what is shown here")
    return model


def model_of_sae(workspace: Workspace, sae: str) -> LoadedModel:
    """The model that an SAE reads, with texts that begin as its contexts did. Raises InputError as `loaded_model`, or
    where nothing says which model it is."""
    model_name(workspace, sae)
    return model_of(workspace, sae, loaded_model(workspace.origin(sae)))


@st.cache_resource(max_entries=1, show_spinner="Loading the model ...")
def _loaded(name: str, asked: str | None) -> LoadedModel:
    if len(sys.argv) > 2 and must_be_given(name):
        return load_model(sys.argv[2])
    return reload_model(name, sha256=asked)


@st.cache_resource(max_entries=1, show_spinner="Loading the language model ...")
def explainer(name: str, endpoint: str | None) -> LanguageModel:
    """The language model that explains features (`workbench app --explain`)."""
    return Endpoint(endpoint, name) if endpoint else LocalModel(name)


def here(*names: str) -> dict[str, str]:
    """Parts of this page's URL that go along in a link to a page which does not read them: Streamlit first puts the new
    state under this page and then changes the page, so that the way Back leads over the new state. What is bound to a
    widget does not go along, since Streamlit takes it out of the URL with its widget."""
    return {name: st.query_params[name] for name in names if name in st.query_params}


def switch_page(page: str, **query: Any) -> None:
    """Goes to another page with its state, such as `switch_page("Feature", sae="mine", feature=3)`."""
    path = Path(__file__).with_name("pages") / f"{page}.py"
    st.switch_page(path, query_params={name: str(value) for name, value in query.items()})


def page_link(page: str, label: str, **query: Any) -> None:
    """A link to another page with its state, such as `page_link("Feature", "feature 3", sae="mine", feature=3)`."""
    try:
        st.page_link(f"pages/{page}.py", label=label, query_params={name: str(value) for name, value in query.items()})
    except StreamlitPageNotFoundError:
        # A page that a test runs by itself knows no others.
        st.markdown(label)


def clickable(figure: go.Figure, key: str) -> str | None:
    """A figure; the customdata of the point that was just clicked: the name of a node or head."""
    event = st.plotly_chart(
        figure, key=key, on_select="rerun", selection_mode="points", config={"displayModeBar": False}
    )  # fmt: skip
    found = [point["customdata"] for point in event["selection"]["points"] if point.get("customdata")]
    return None if not found else str(found[0] if isinstance(found[0], str) else found[0][0])


def canvas(name: str, view: ModuleType, call: str) -> Any:
    """A component that a module of `workbench` draws: its ROOT, CSS and SCRIPT.

    Args:
        call: JavaScript that draws `data` into `parentElement` and tells of clicks by `setTriggerValue`.
    """
    script = f"{view.SCRIPT}\nexport default function ({{ data, parentElement, setTriggerValue }}) {{ return {call}; }}"
    return st.components.v2.component(name, html=view.ROOT, css=view.CSS, js=script)


def plain(text: str) -> str:
    """Text whose marks Markdown does not take for its own."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]()<>#+-.!|~$:^=&" else mark for mark in text)
