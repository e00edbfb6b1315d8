"""Reading an index: features, table, search, labels, exports, text that looks like HTML."""

import json
import math
import re
import shutil
import threading
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch

from sae.errors import InputError
from workbench import Workspace
from workbench.catalog.notes import Notes
from workbench.features.index import figures
from workbench.features.index.build import build_index
from workbench.features.index.feature import Concept, Example, ExampleGroup, Feature, FeatureStats
from workbench.features.index.loss import with_loss_effects
from workbench.features.index.page import document, fragment
from workbench.features.index.query import FeatureIndex, search_features
from workbench.features.index.search import said
from workbench.models.load import LoadedModel
from workbench.show.html import edged, marked

from .conftest import DEAD, HOOK


@pytest.fixture
def index(space: Workspace) -> FeatureIndex:
    return FeatureIndex.open(space, "s")


@pytest.fixture
def busiest(index: FeatureIndex) -> Feature:
    return index.feature(int(index.table().sort_values("firings")["feature"].iloc[-1]))


def test_examples_carry_the_text_and_activations_of_their_place(
    space: Workspace, index: FeatureIndex, busiest: Feature, gpt2_model: LoadedModel
) -> None:
    harvest = space.open_harvest("h")
    with duckdb.connect(str(harvest.database), read_only=True) as connection:
        columns = connection.execute("SELECT token, doc, pos FROM tokens ORDER BY row").fetchnumpy()
        names = dict(connection.execute("SELECT doc, name FROM documents").fetchall())
    rows = np.flatnonzero(harvest.flags == 0)
    dense = space.sae("s").encode(harvest.vectors(HOOK).rows(rows).float()).to_dense()[:, busiest.feature].numpy()
    activation_of = dict(zip(rows.tolist(), dense.tolist(), strict=True))
    assert sum(len(group.examples) for group in busiest.groups) > 20
    for group in busiest.groups:
        for example in group.examples:
            assert (example.document, example.pos) == (names[columns["doc"][example.row]], columns["pos"][example.row])
            shown = range(example.row - example.peak, example.row - example.peak + len(example.tokens))
            assert [columns["doc"][row] for row in shown] == [columns["doc"][example.row]] * len(shown)
            assert example.tokens == [gpt2_model.tokenizer.decode([columns["token"][row]]) for row in shown]
            assert example.activations == pytest.approx([activation_of[row] for row in shown], rel=1e-5)
            assert example.activations[example.peak] == example.activation
    top = busiest.groups[0]
    assert top.title == "strongest"
    assert top.examples[0].activation == busiest.stats.maximum
    shares = [group.share for group in busiest.groups[1:]]
    assert sum(shares) == pytest.approx(1)


def test_a_feature_agrees_with_the_tables(index: FeatureIndex, busiest: Feature) -> None:
    row = index.table().set_index("feature").loc[busiest.feature]
    assert (busiest.stats.density, busiest.stats.maximum) == (row["density"], row["maximum"])
    assert busiest.promotes[0].text == row["top_token"]
    assert busiest.promotes[0].effect >= busiest.promotes[1].effect > 0 > busiest.suppresses[0].effect
    assert len(busiest.neighbours) == 10
    assert busiest.coactivations[0].phi == row["best_phi"]
    assert sum(busiest.stats.histogram) == busiest.stats.firings
    assert busiest.heads == []


def test_a_dead_feature_says_so(index: FeatureIndex) -> None:
    dead = index.feature(DEAD)
    assert dead.dead
    assert not dead.groups
    assert "Dead: this feature fires on none" in dead.to_html()
    assert json.loads(dead.to_json())["stats"]["mean"] is None
    assert not figures.activation_histogram(dead).data


class Tags(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile(text: str) -> Feature:
    example = Example(0, text, 0, -2.0, ["a", text, "é\u0301👩\u200d🔬"], [0.0, -2.0, 1.0], 1)
    stats = FeatureStats(3, 1, 0.1, 0.0, 1.0, None, None, -2.0, 1.0, {"0.5": 1.0}, [2] + [0] * 38 + [1])
    group = ExampleGroup(-1, text, 1.0, 2.0, 0.5, 2, [example])
    return Feature(
        text, 7, text, text, text, 30, text, text, [text], stats, [group], None, [], [], [], [], [], 1.0, None, text
    )  # fmt: skip


def test_a_name_says_what_a_feature_fires_on_and_promotes(index: FeatureIndex) -> None:
    """From the rows of the examples and the logit effects, counted here one by one."""
    names, table = index.names(), index.table()
    assert list(names) == list(range(index.d_sae))
    assert table["name"].tolist() == list(names.values())
    for number in table.query("firings > 0")["feature"].head(10).tolist():
        feature = index.feature(number)
        peaks = [
            example.tokens[example.peak]
            for group in feature.groups
            if group.title in ("strongest", "most negative")
            for example in group.examples[:8]
        ]
        counts = Counter(peaks)
        most = max(counts.values())
        assert names[number].startswith(tuple(f'fires on "{marked(one)}"' for one in peaks if counts[one] == most))
        assert f' · promotes "{marked(feature.promotes[0].text)}"' in names[number]
        assert names[number].startswith(index.names([number])[number])
        near = [other.feature for other in (*feature.neighbours, *feature.coactivations)]
        assert feature.name == index.names([number, *near])[number]
        # Every token that the table lists is one of these, with its spaces.
        assert set(table["peak_tokens"][number].split(" ")) <= set(map(edged, peaks))
    for number in table.query("firings == 0")["feature"].tolist():
        assert names[number].startswith(f'dead · promotes "{marked(index.feature(number).promotes[0].text)}"')


def test_features_called_alike_are_told_apart(index: FeatureIndex) -> None:
    """By as many of the tokens they promote as it takes, in every table alike where a concept of them all calls them
    so; a name that one feature alone has stays as it is."""
    shared = Concept("self", 1, 0.9, 0.9, 0.9, 0.9, 0.0, "f1", 10, 10)
    firing = index.table().query("firings > 0")["feature"].tolist()
    index._concepts = {number: [shared] for number in firing[:-1]} | {firing[-1]: [replace(shared, name="alone")]}
    names = index.names()
    assert names[firing[-1]] == "alone"
    for number in firing[:-1]:
        promotes = [f'"{marked(one.text)}"' for one in index.feature(number).promotes]
        forms = [f"self · promotes {', '.join(promotes[:n])}" for n in (1, 2, 3)]
        assert names[number] in forms
        assert index.names([number]) == {number: forms[0]}
    assert names[firing[0]] != names[firing[1]]
    assert max(Counter(names[number] for number in firing).values()) == 1


def test_of_a_concept_that_hardly_tells_a_feature_no_name_is_made(index: FeatureIndex) -> None:
    number = int(index.table().query("firings > 0")["feature"].iloc[0])
    plain = index.names([number])[number]
    for f1, name in ((0.01, plain), (0.49, plain), (math.nan, plain), (0.5, "self")):
        index._concepts = {number: [Concept("self", 1, f1, 0.9, 0.9, 0.9, 0.0, "f1", 10, 10)]}
        assert index.names([number]) == {number: name}


def test_a_document_is_whole(index: FeatureIndex, busiest: Feature) -> None:
    example = busiest.groups[0].examples[0]
    whole = index.document(busiest.feature, example.row)
    assert whole.document == example.document
    assert whole.tokens[whole.peak] == example.tokens[example.peak]
    assert whole.activations[whole.peak] == example.activation
    assert "".join(example.tokens) in "".join(whole.tokens)
    assert len(whole.tokens) > len(example.tokens)
    with pytest.raises(InputError, match="no row 1000000000"):
        index.document(busiest.feature, 10**9)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "&lt;b&gt;</title>"])
def test_every_text_stays_text(text: str) -> None:
    feature = hostile(text)
    for page in (feature.to_html(), feature._repr_html_(), document([feature, feature], text)):
        parsed = Tags(page)
        assert not {"script", "img", "b"} & set(parsed.tags)
        assert not [name for name, _ in parsed.attributes if name.startswith("on")]
        assert parsed.text.count(text) >= 8
        assert "é\u0301👩\u200d🔬" in parsed.text


def test_negative_activations_are_red_and_positive_green() -> None:
    page = fragment(hostile("t"))
    opacity = np.log10(1 + 9 * 1.0 / 2.0)
    assert "rgba(218,54,51,1.00)" in page
    assert f"rgba(46,160,67,{opacity:.2f})" in page
    assert "of them negative" in page


def test_pages_fetch_nothing(busiest: Feature) -> None:
    parsed = Tags(busiest.to_html())
    assert not [value for name, value in parsed.attributes if name in ("src", "href", "srcset")]
    assert not re.search(r"url\(|@import|https?:", busiest.to_html().replace("http-equiv", ""))


def test_json_holds_the_whole_feature(busiest: Feature) -> None:
    found = json.loads(busiest.to_json())
    assert found["feature"] == busiest.feature
    assert found["groups"][0]["examples"][0]["tokens"] == busiest.groups[0].examples[0].tokens
    assert found["groups"][0]["share"] is None


def test_search_finds_labels_then_peaks_then_texts(index: FeatureIndex, busiest: Feature, space: Workspace) -> None:
    Notes(space.path).set_label("s", DEAD, "The Unused One")
    found = index.search("unused")
    assert found[["feature", "where"]].to_numpy().tolist() == [[DEAD, "label"]]
    hits = index.search("SCRIPT")
    texts = {
        number: "\n".join("".join(e.tokens) for e in index.feature(number).groups[0].examples).lower()
        for number in hits["feature"]
    }
    assert len(hits) > 3
    assert all("script" in text for text in texts.values())
    assert index.search("%_%").empty
    assert index.search("no such text'; --").empty
    with pytest.raises(InputError, match="empty search"):
        index.search("  ")
    Notes(space.path).set_label("s", DEAD, "")
    assert index.search("unused").empty


def test_words_are_ranked_by_the_formula(index: FeatureIndex, busiest: Feature, space: Workspace) -> None:
    """BM25F as the module states it, in plain Python over the texts of every feature."""
    Notes(space.path).set_label("s", busiest.feature, "returns of scripts")
    with duckdb.connect(str(index.path), read_only=True) as connection:
        texts = {
            feature: ["", *fields]
            for feature, *fields in connection.execute(
                "SELECT feature, peaks, promoted, examples FROM feature_texts"
            ).fetchall()
        }
    texts[busiest.feature][0] = "returns of scripts"
    lengths = [[len(fields[at]) for fields in texts.values() if fields[at]] for at in range(4)]
    mean = [sum(found) / len(found) for found in lengths]
    expected = dict.fromkeys(texts, 0.0)
    for word in ("return", "script"):
        tf = {
            feature: sum(
                weight * len(re.findall(rf"(?<![a-z0-9]){word}", text)) / (0.25 + 0.75 * len(text) / average)
                for weight, text, average in zip((3, 3, 1, 1), fields, mean, strict=True)
                if text
            )
            for feature, fields in texts.items()
        }
        n = sum(value > 0 for value in tf.values())
        for feature, value in tf.items():
            expected[feature] += np.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) * value / (1.2 + value)
    found = index.search("Return, script", by="words", limit=1000)
    assert found.set_index("feature")["where"][busiest.feature] == "label"
    assert found["score"].is_monotonic_decreasing
    positive = {feature: score for feature, score in expected.items() if score > 0}
    assert dict(zip(found["feature"], found["score"], strict=True)) == pytest.approx(positive)
    with pytest.raises(InputError, match="no word in"):
        index.search("%_%", by="words")
    Notes(space.path).set_label("s", busiest.feature, "")


def test_all_saes_are_searched_and_the_count_is_of_all(index: FeatureIndex, space: Workspace) -> None:
    shutil.copytree(space.path, other := space.path.parent / "other")
    shutil.copy(other / "indexes" / "s.duckdb", other / "indexes" / "t.duckdb")
    with duckdb.connect(str(other / "indexes" / "t.duckdb")) as connection:
        connection.execute(
            'UPDATE meta SET value = replace(value::VARCHAR, \'"sae": "s"\', \'"sae": "t"\') WHERE key = \'settings\''
        )
    one = search_features(space, "script", limit=1000)
    both = search_features(Workspace(other), "script", limit=5)
    assert both.n == 2 * one.n
    assert len(both.table) == 5
    assert said(both) == f"first 5 of {both.n} features"
    assert both.table["sae"].tolist()[:2] == ["s", "t"]
    assert (both.table["name"] != "").all()
    assert said(search_features(space, "no such text")) == "no feature"


def test_a_part_of_the_table_holds_the_same_rows(index: FeatureIndex) -> None:
    whole, some = index.table(), [3, 1]
    part = whole[whole["feature"].isin(some)].reset_index(drop=True)
    pd.testing.assert_frame_equal(index.table(some), part)
    assert list(index.table([]).columns) == list(whole.columns)
    assert index.table([]).empty


def test_the_table_goes_to_parquet(index: FeatureIndex, tmp_path: Path) -> None:
    index.write_table(tmp_path / "t.parquet")
    found = pd.read_parquet(tmp_path / "t.parquet")
    assert found["feature"].tolist() == list(range(40))
    assert found["firings"].tolist() == index.table()["firings"].tolist()


def test_an_index_stays_readable_by_threads_while_it_is_replaced(space: Workspace, gpt2_model: LoadedModel) -> None:
    opened = FeatureIndex.open(space, "s")
    before = opened.feature(5).to_json()
    build_index(space, "s", harvest="h", max_rows=300, model=gpt2_model, device="cpu")
    try:
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(opened.feature(5).to_json())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [before] * 4
        assert FeatureIndex.open(space, "s").n_tokens < opened.n_tokens
    finally:
        build_index(space, "s", harvest="h", model=gpt2_model, device="cpu")


def test_what_is_not_there_is_said_in_one_line(space: Workspace, index: FeatureIndex, tmp_path: Path) -> None:
    assert space.indexes() == ["s"]
    with pytest.raises(InputError, match=r"no SAE 'other' .* it has s"):
        FeatureIndex.open(space, "other")
    for number in (-1, 40):
        with pytest.raises(InputError, match="features 0 to 39"):
            index.feature(number)
    (tmp_path / "x.duckdb").write_text("not a database")
    with pytest.raises(InputError, match="build it again"):
        FeatureIndex(tmp_path / "x.duckdb", Notes(tmp_path))


def test_figures_show_what_the_feature_holds(index: FeatureIndex, busiest: Feature) -> None:
    table = index.table()
    histogram = figures.activation_histogram(busiest, mark=1.0)
    assert list(histogram.data[0].y) == busiest.stats.histogram
    assert len(histogram.layout.shapes) == 1
    assert sum(figures.logit_histogram(busiest).data[0].y) == 300
    assert len(figures.logit_bars(busiest).data[0].x) == 20
    assert len(figures.density_spectrum(table).data[0].x) == (table["firings"] > 0).sum()
    dead, alive = figures.decoder_map(table, selected=5).data[:2]
    assert (len(dead.x), len(alive.x)) == ((table["firings"] == 0).sum(), (table["firings"] > 0).sum())
    assert list(alive.customdata[:, 0]) == table[table["firings"] > 0]["feature"].tolist()


def test_effects_on_the_loss_are_those_of_a_hook_that_takes_the_feature_out(
    space: Workspace, index: FeatureIndex, busiest: Feature, gpt2_model: LoadedModel
) -> None:
    sae, harvest = space.sae("s"), space.open_harvest("h")
    measured = with_loss_effects(index, busiest, gpt2_model, sae)
    assert measured.groups[0].examples[0].tokens == busiest.groups[0].examples[0].tokens
    with duckdb.connect(str(harvest.database), read_only=True) as connection:
        tokens = torch.tensor(connection.execute("SELECT token FROM tokens ORDER BY row").fetchnumpy()["token"]).long()

    def losses(ids: torch.Tensor, remove: bool) -> torch.Tensor:
        def hook(value: torch.Tensor, hook: object) -> torch.Tensor:
            part = sae.encode(value[0]).to_dense()[:, busiest.feature, None] * sae.W_dec[busiest.feature]
            part[ids == gpt2_model.bos_id] = 0
            return value - part

        with torch.no_grad(), gpt2_model.bridge.hooks(fwd_hooks=[(HOOK, hook)] if remove else []):
            logits = gpt2_model.bridge(ids[None])[0]
        return -logits[:-1].double().log_softmax(1).gather(1, ids[1:, None])[:, 0]

    context = index.meta["context_len"]
    for group in measured.groups[:2]:
        example = group.examples[0]
        start = example.row // context * context
        ids = tokens[start : start + context]
        expected = torch.cat([torch.zeros(1), losses(ids, True) - losses(ids, False)])
        first = example.row - example.peak - start
        assert example.effects == pytest.approx(expected[first : first + len(example.tokens)].tolist(), abs=1e-5)
        assert max(map(abs, example.effects)) > 1e-4
    page = fragment(measured)
    assert "nats of loss without the feature" in page
    assert "nats of loss without the feature" not in fragment(busiest)
