"""The Features and Feature pages in their states, run by Streamlit's own test harness."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from streamlit.testing.v1 import AppTest

from sae import SAE, TopK
from workbench import Workspace
from workbench.catalog.notes import Notes
from workbench.features.index.build import build_index
from workbench.features.index.query import FeatureIndex, listed_features
from workbench.harvest.plan import HarvestConfig
from workbench.models.bundled import demo_model_dir
from workbench.models.load import load_model

OpenPage = Callable[..., AppTest]
HOOK, DEAD = "blocks.2.hook_resid_post", 3


@pytest.fixture(scope="module")
def indexed(
    tmp_path_factory: pytest.TempPathFactory,
    demo_sae: Callable[..., SAE],
    indexed_workspace: Callable[..., Workspace],
) -> Path:
    sae = demo_sae(TopK(6))
    with torch.no_grad():
        sae.b_enc[DEAD] = -1e6
    return indexed_workspace(tmp_path_factory.mktemp("app"), sae, documents=20, tokens=1200).path


@pytest.fixture
def space(indexed: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(indexed, tmp_path / "w")
    return Workspace(tmp_path / "w")


@pytest.fixture
def busiest(space: Workspace) -> int:
    return int(FeatureIndex.open(space, "s").table().sort_values("firings")["feature"].iloc[-1])


def rows_of_examples(page: AppTest) -> str:
    """HTML of the component that shows them."""
    return str(json.loads(page.get("bidi_component")[0].proto.json)["html"])


@pytest.mark.parametrize("page", ["Features", "Feature"])
def test_without_an_index_the_page_says_what_to_do(page: str, tmp_path: Path, open_page: OpenPage) -> None:
    empty = Workspace(tmp_path / "empty")
    shown = open_page(page, empty)
    assert not shown.exception
    assert "Train one with `workbench train --model demo --hook " in shown.info[0].value
    SAE(8, 16, TopK(2), hook_name=HOOK, model_name="m").save(empty.path / "saes" / "mine")
    assert "`workbench index mine" in open_page(page, empty).info[0].value


def test_the_table_lists_what_fires_and_the_filters_work(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Features", space)
    assert not page.exception
    table = FeatureIndex.open(space, "s").table()
    assert page.dataframe[0].value["feature"].tolist() == table[table["firings"] > 0]["feature"].tolist()
    # Only the tab that is open is drawn.
    assert not page.get("plotly_chart")
    for tab in ("Map", "Density"):
        page.session_state["tab"] = tab
        page.run()
        assert len(page.get("plotly_chart")) == 1
        assert not page.dataframe
    page.session_state["tab"] = "Table"
    page.run()
    page.checkbox(key="hide_dead").uncheck().run()
    assert len(page.dataframe[0].value) == 48
    page.checkbox(key="hide_dense").check().run()
    assert page.dataframe[0].value["density"].max() <= 0.1


def test_search_shows_where_it_found_the_text(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    Notes(space.path).set_label("s", busiest, "my own label")
    page = open_page("Features", space, search="own label")
    assert not page.exception
    assert page.text_input(key="search").value == "own label"
    assert page.dataframe[0].value[["feature", "found in", "name"]].to_numpy().tolist() == [
        [busiest, "label", "my own label"]
    ]
    page.text_input(key="search").set_value("no such text").run()
    assert "No feature matches" in page.info[0].value


def test_a_feature_is_shown_from_its_link(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    page = open_page("Feature", space, sae="s", feature=str(busiest))
    assert not page.exception
    assert page.subheader[0].value == f"s / {busiest}"
    html = rows_of_examples(page)
    assert re.search(r"strength quantile .* · 4 of \d+, \d+\.\d% of its activations", html)
    assert "&lt;" in html
    assert "<script" not in html
    assert len(page.get("plotly_chart")) == 2
    page.button[1].click().run()
    assert page.subheader[0].value == f"s / {(busiest + 1) % 48}"
    page.button[0].click().run()
    assert page.subheader[0].value == f"s / {busiest}"


def test_a_dead_feature_says_so(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Feature", space, sae="s", feature=str(DEAD))
    assert not page.exception
    assert "fires on none" in page.warning[0].value


@pytest.mark.parametrize(
    ("query", "message"),
    [({"sae": "gone"}, "index of 'gone'"), ({"sae": "s", "feature": "48"}, "features 0 to 47"),
     ({"sae": "s", "feature": "-1"}, "features 0 to 47"), ({"sae": "s", "feature": "x"}, "features 0 to 47")],
)  # fmt: skip
def test_a_link_to_what_is_not_there_says_so(
    query: dict[str, str], message: str, space: Workspace, open_page: OpenPage
) -> None:
    page = open_page("Feature", space, **query)
    assert not page.exception
    assert message in page.warning[0].value
    assert page.subheader[0].value == "s / 0"


def score_concepts(space: Workspace, feature: int, f1: float) -> None:
    """Stores concepts of an SAE as workbench/features/concepts/report.py does."""
    row = {"feature": feature, "sign": 1, "concept": "string_literal", "f1": f1, "precision": 0.75, "recall": 0.5,
           "correlation": 0.4, "threshold": 0.1, "calibration_f1": f1, "firings": 100, "positives": 90}  # fmt: skip
    lesser = row | {"sign": -1, "concept": "comment", "f1": None, "recall": None}
    space.results.save("concepts", "s", parameters={}, provenance={}, tables={"features": pd.DataFrame([lesser, row])})


def test_a_concept_labels_a_feature_that_nobody_labelled(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    score_concepts(space, busiest, 0.8)
    page = open_page("Feature", space, sae="s", feature=str(busiest))
    assert not page.exception
    assert page.text[0].value == "string_literal"
    evidence = " ".join(caption.value for caption in page.caption)
    assert "F1 **0.80** on held-out documents" in evidence
    assert "precision 0.75, recall 0.50" in evidence
    table = open_page("Features", space, sae="s", search="STRING_lit").dataframe[0].value
    assert table[["feature", "found in", "name", "F1"]].to_numpy().tolist() == [
        [busiest, "label", "string_literal", 0.8]
    ]
    Notes(space.path).set_label("s", busiest, "mine")
    index = FeatureIndex.open(space, "s")
    assert index.titles()[busiest] == index.feature(busiest).name == "mine"
    assert [concept.name for concept in index.feature(busiest).concepts] == ["string_literal", "comment"]
    assert "string_literal" in index.feature(busiest).to_html()


def test_a_concept_told_badly_is_no_label(space: Workspace, busiest: int) -> None:
    score_concepts(space, busiest, 0.3)
    index = FeatureIndex.open(space, "s")
    assert busiest not in index.titles()
    assert index.feature(busiest).name.startswith('fires on "')
    assert index.feature(busiest).concepts[0].f1 == 0.3


def test_a_bookmark_is_a_list_that_can_be_shown_and_saved(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    page = open_page("Feature", space, sae="s", feature=str(busiest))
    page.button(key="bookmark").click().run()
    assert not page.exception
    assert Notes(space.path).lists_of("s", busiest) == ["bookmarks"]
    listed = open_page("Features", space, sae="s", list="bookmarks")
    assert listed.dataframe[0].value["feature"].tolist() == [busiest]
    labels = [button.label for button in listed.get("download_button")]
    assert labels == ["Table as Parquet", "Table as CSV", "List as HTML", "List as JSON"]
    assert [feature.feature for feature in listed_features(space, "bookmarks")] == [busiest]
    page.button(key="off bookmarks").click().run()
    assert Notes(space.path).lists_of("s", busiest) == []


def test_the_filters_bound_the_table(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    score_concepts(space, busiest, 0.8)
    page = open_page("Features", space, sae="s", f1="0.5")
    assert page.dataframe[0].value["feature"].tolist() == [busiest]
    page = open_page("Features", space, sae="s")
    middle = float(page.dataframe[0].value["strongest"].median())
    page.number_input(key="strongest").set_value(middle).run()
    assert page.dataframe[0].value["strongest"].min() >= middle
    page.checkbox(key="labelled").check().run()
    assert not page.exception


def test_labels_notes_and_lists_are_kept(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    page = open_page("Feature", space, sae="s", feature=str(busiest))
    page.text_input(key=f"label s {busiest}").set_value("<b>quotes</b>").run()
    page.text_area(key=f"note s {busiest}").set_value("fires in [strings](x)").run()
    assert not page.exception
    assert {"<b>quotes</b>", "fires in [strings](x)"} <= {element.value for element in page.text}
    notes = Notes(space.path)
    assert notes.label("s", busiest) == "<b>quotes</b>"
    again = open_page("Feature", space, sae="s", feature=str(busiest))
    assert again.text_input(key=f"label s {busiest}").value == "<b>quotes</b>"
    assert [note.text for note in notes.notes("s", busiest)] == ["fires in [strings](x)"]


def test_my_text_is_run_through_model_and_sae(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    text = "def f1(x):\n    return '<script>x</script>'\n"
    page = open_page("Feature", space, sae="s", feature=str(busiest), text=text)
    assert not page.exception
    html = "".join(element.proto.body for element in page.get("html"))
    assert "your text" in html
    assert "<script" not in html
    page.text_input(key="text").set_value("x = 1\n" * 4000).run()
    assert "Only the beginning was read" in page.info[0].value


def test_without_the_model_the_statistics_still_browse(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    import duckdb

    path = space.path / "indexes" / "s.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            'UPDATE meta SET value = replace(value::VARCHAR, \'"name": "demo"\', \'"name": "/no/model"\') '
            "WHERE key = 'settings'"
        )
    page = open_page("Feature", space, sae="s", feature=str(busiest), text="x = 1")
    assert not page.exception
    assert "cannot be run on text here: no model folder at /no/model" in page.error[0].value
    assert len(page.get("plotly_chart")) == 2


def test_a_point_clicked_in_the_map_leads_to_its_feature(space: Workspace, open_page: OpenPage, busiest: int) -> None:
    """The selection as Streamlit's front end sends it; the harness itself cannot click a plot."""
    page = open_page("Features", space, sae="s")
    points = [{"curve_number": 1, "point_index": 0, "customdata": {"0": number, "1": 0.1}} for number in (busiest, 5)]
    page.session_state["tab"] = "Map"
    page.session_state["map s"] = {"selection": {"points": points, "point_indices": [0, 1], "box": [], "lasso": []}}
    page.run()
    assert sorted(page.dataframe[0].value["feature"]) == sorted([busiest, 5])
    page.session_state["map s"] = {"selection": {"points": points[:1], "point_indices": [0], "box": [], "lasso": []}}
    page.run()
    assert not page.exception
    assert page.subheader[0].value == f"s / {busiest}"


def test_an_attention_feature_says_where_it_reads_from(tmp_path: Path, open_page: OpenPage) -> None:
    hook = "blocks.2.attn.hook_z"
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 3)
    space, model = Workspace(tmp_path / "w"), load_model("demo", device="cpu")
    config = HarvestConfig("demo", str(tmp_path / "texts"), (hook,), context_len=32, max_tokens=300)
    space.harvest("h", config, model=model)
    torch.manual_seed(0)
    sae = SAE(model.info.d_attention, 32, TopK(4), hook_name=hook, model_name="demo")
    torch.nn.init.orthogonal_(sae.W_dec)
    sae.W_enc.data.copy_(sae.W_dec.T)
    sae.save(space.path / "saes" / "z")
    build_index(space, "z", harvest="h", model=model, device="cpu")
    feature = int(FeatureIndex.open(space, "z").table().sort_values("firings")["feature"].iloc[-1])
    page = open_page("Feature", space, sae="z", feature=str(feature))
    assert not page.exception
    without = len(page.get("plotly_chart"))
    page.text_input(key="text").set_value("def f(x): return x").run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == without + 1
    assert any("**Where it reads from**" in shown.value for shown in page.markdown)
    # The other way round: the features of a head, on its own page.
    space.heads("heads", model, n=2, needles=0)
    own = space.head_features("z", model, n=2, texts=1).table("features").query("node == 'a2.h1'")
    heads = open_page("Heads", space, head="a2.h1")
    assert not heads.exception
    assert "Features of z" in [shown.value for shown in heads.subheader]
    labels = [link.proto.label for link in heads.get("page_link")]
    for feature in own.feature:
        assert any(f" · {feature} " in label for label in labels)


def test_hovering_a_token_tells_its_effect_on_the_loss(space: Workspace, busiest: int, open_page: OpenPage) -> None:
    page = open_page("Feature", space, sae="s", feature=str(busiest))
    assert "border-bottom" not in rows_of_examples(page)
    page.toggle(key="loss").set_value(True).run()
    assert not page.exception
    assert "nats of loss" in rows_of_examples(page)
    assert "border-bottom" in rows_of_examples(page)


def test_a_feature_is_explained_where_the_app_was_given_a_model(
    space: Workspace, busiest: int, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page("Feature", space, sae="s", feature=str(busiest))
    assert "Explain it" not in [button.label for button in page.button]
    # Under two names, as two models.
    models = ["demo", str(demo_model_dir())]
    monkeypatch.setenv("WORKBENCH_EXPLAINER", "\n".join(models))
    page = open_page("Feature", space, sae="s", feature=str(busiest))
    for name in models:
        page.button(key=f"explain {name}").click().run()
        assert not page.exception
        assert not page.error
    told = space.results.open("explanations", "s").table("features")
    assert told["feature"].tolist() == [busiest] * 2
    assert set(told["model"]) == set(models)
    assert len([1 for caption in page.caption if "in the words of" in caption.value]) == 2
    assert not [button for button in page.button if button.label.startswith("Explain it")]


def test_documents_like_one_are_listed_with_what_they_share(space: Workspace, open_page: OpenPage) -> None:
    found = space.similar_documents("s", "3.txt")
    page = open_page("Features", space, document="3.txt")
    assert len(page.selectbox(key="document").options) == found.n_documents
    documents, shared = (frame.value for frame in page.dataframe)
    assert documents["document"].tolist() == found.documents["document"].tolist()
    assert documents["cosine"].tolist() == pytest.approx(found.documents["cosine"].tolist())
    first = found.shared[found.shared["doc"] == found.documents["doc"].iloc[0]]
    assert shared["feature"].tolist() == first["feature"].tolist()
    assert "sum in 3.txt" in shared.columns
