"""Documents by pooled codes: against a dense float64 computation, by the cosine's own sum, and what is refused."""

import json

import duckdb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sae.errors import InputError
from workbench import Workspace
from workbench.cli.main import run
from workbench.features.documents.bags import Bags
from workbench.features.documents.halves import KEPT, draw_windows, score
from workbench.features.documents.pooling import POOLINGS, Pooling, pooled_reading
from workbench.features.index.query import FeatureIndex
from workbench.harvest.reading import Harvest
from workbench.models.load import LoadedModel

from .conftest import HOOK


@pytest.fixture(scope="module")
def dense(space: Workspace) -> dict[str, NDArray]:
    """Of every document its [tokens, features] activations, from the SAE and the harvest, without the index."""
    harvest, sae = space.open_harvest("h"), space.sae("s")
    with duckdb.connect(str(harvest.database), read_only=True) as connection:
        rows = connection.execute(
            "SELECT name, list(row ORDER BY row) FROM tokens JOIN documents USING (doc) WHERE flags = 0 GROUP BY name"
        ).fetchall()
    return {
        name: sae.encode(harvest.vectors(HOOK).rows(np.array(own)).float()).to_dense().double().numpy()
        for name, own in rows
    }


def weights(dense: dict[str, NDArray], pooling: Pooling) -> tuple[list[str], NDArray]:
    """Names and weighted codes, text by text and feature by feature."""
    names = sorted(dense)
    amount = {
        "count": lambda a: (a != 0).sum(axis=0), "sum": lambda a: np.abs(a).sum(axis=0),
        "max": lambda a: np.abs(a).max(axis=0),
    }[pooling]  # fmt: skip
    table = np.array([amount(dense[name]) for name in names], dtype=float)
    found = np.zeros_like(table)
    for feature in range(table.shape[1]):
        having = sum(value > 0 for value in table[:, feature])
        for text in range(len(names)):
            if table[text, feature] > 0:
                found[text, feature] = np.log(1 + table[text, feature]) * np.log(len(names) / having)
    return names, found


@pytest.mark.parametrize("pooling", POOLINGS)
def test_documents_are_ranked_as_by_a_dense_computation(
    space: Workspace, dense: dict[str, NDArray], pooling: Pooling
) -> None:
    names, w = weights(dense, pooling)
    found = space.similar_documents("s", "7.txt", pooling=pooling, limit=100, shared=100)
    query = w[names.index("7.txt")]
    cosine = {
        name: float(query @ row / (np.linalg.norm(query) * np.linalg.norm(row)))
        for name, row in zip(names, w, strict=True)
        if name != "7.txt"
    }
    assert found.n_documents == len(names) == 27
    assert set(found.documents["document"]) == set(cosine)
    assert found.documents["cosine"].is_monotonic_decreasing
    for row in found.documents.itertuples():
        assert row.cosine == pytest.approx(cosine[row.document], abs=1e-9)
        assert row.tokens == len(dense[row.document])
    # What documents share adds up to their cosine.
    parts = found.shared.groupby("document")["part"].sum()
    assert len(parts) > 20
    for name, part in parts.items():
        assert part == pytest.approx(cosine[str(name)], abs=1e-9)
    one = found.shared.iloc[0]
    there = dense[one["document"]][:, one["feature"]]
    expected = {"count": (there != 0).sum(), "sum": np.abs(there).sum(), "max": np.abs(there).max()}
    assert one["there"] == pytest.approx(expected[pooling], rel=1e-6)


def test_a_text_is_compared_as_the_model_reads_it(
    space: Workspace, dense: dict[str, NDArray], gpt2_model: LoadedModel
) -> None:
    text = "def f7(x):\n    return x & '<script>'\n"
    found = space.similar_documents("s", text=text, model=gpt2_model, limit=30)
    ids = torch.tensor([gpt2_model.begun(gpt2_model.encode(text))])
    with torch.no_grad():
        x = gpt2_model.hf(ids, output_hidden_states=True).hidden_states[2][0, gpt2_model.n_bos :]
    total = space.sae("s").encode(x).to_dense().double().sum(dim=0).numpy()
    names, w = weights(dense, "sum")
    having = sum((dense[name] != 0).any(axis=0) for name in names)
    query = np.log1p(total) * np.log(len(names) / np.maximum(having, 1)) * (having > 0)
    cosine = w @ query / np.linalg.norm(w, axis=1) / np.linalg.norm(query)
    assert found.query == text
    assert len(found.documents) == 27
    for row in found.documents.itertuples():
        assert row.cosine == pytest.approx(cosine[names.index(row.document)], abs=1e-6)
    assert str(found.documents["document"].iloc[0]) in found._repr_html_()


def test_signed_activations_keep_the_sign_of_their_sum() -> None:
    feature, activation = np.array([4, 1, 4, 1, 4]), np.array([-2.0, 1.0, 0.5, 3.0, -1.0])
    for pooling, amounts in (("count", [2, -3]), ("sum", [4, -3.5]), ("max", [3, -2])):
        found = pooled_reading(feature, activation, pooling)  # type: ignore[arg-type]
        assert found.item.tolist() == [1, 4]
        assert found.amount.tolist() == amounts


def test_bags_in_blocks_and_their_strongest_are_those_of_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.features.documents.bags.ITEMS_AT_ONCE", 3)
    random = np.random.default_rng(0)
    table = np.where(random.random((6, 11)) < 0.5, random.normal(size=(6, 11)), 0)
    table[2] = 0
    text, item = np.nonzero(table)
    bags = Bags(text, item, table[text, item], 6)
    norms = np.linalg.norm(table, axis=1)
    scale = np.where(np.outer(norms, norms) > 0, np.outer(norms, norms), np.inf)
    assert bags.cosines(bags) == pytest.approx(table @ table.T / scale)
    kept = bags.strongest(2)
    for row in range(6):
        mine = kept.text == row
        largest = np.argsort(-np.abs(table[row]), kind="stable")[: min(2, np.count_nonzero(table[row]))]
        assert kept.item[mine].tolist() == sorted(largest.tolist())
    counted = Bags.counted(np.array([[3, 1, 3, 3], [0, 0, 1, 7]]))
    assert list(zip(counted.text, counted.item, counted.amount, strict=True)) == [
        (0, 1, 1), (0, 3, 3), (1, 0, 2), (1, 1, 1), (1, 7, 1),
    ]  # fmt: skip
    assert bags.of(4).item.tolist() == np.flatnonzero(table[4]).tolist()


def test_halves_share_no_context_and_lie_on_either_side_of_the_same_boundary() -> None:
    # A document of 90 rows, one of 20, which is too short, and many of 70; every context begins with a row left out.
    lengths = [90, 20, *[70] * 12]
    every = np.arange(sum(lengths))
    doc, counts = np.repeat(np.arange(len(lengths)), lengths), every % 16 != 0
    seen = set()
    for seed in range(40):
        windows = draw_windows(every[counts], doc[counts], 16, tokens=20, seed=seed, documents=12)
        assert windows.rows.shape == (24, 20)
        for early, late in windows.rows.reshape(12, 2, 20):
            assert len({*doc[early], *doc[late]}) == 1
            assert early.max() // 16 < late.min() // 16
            assert counts[early].all()
            assert counts[late].all()
            # As many rows that count lie from the first to the last as there are tokens.
            assert all(counts[part.min() : part.max() + 1].sum() == 20 for part in (early, late))
            seen.add((early[0], late[0]))
        assert windows.first.tolist() == windows.rows[:, 0].tolist()
    assert len(seen) > 200
    with pytest.raises(InputError, match="0 documents have 40 tokens on both sides"):
        draw_windows(every[counts], doc[counts], 16, tokens=40, seed=0, documents=12)


def test_a_partner_that_is_only_as_near_as_another_is_not_first() -> None:
    cosines = np.array([[0.9, 0.9, 0.1], [0.2, 0.8, 0.3], [0.0, 0.9, 0.5]])
    # Rows find theirs at 2, 1, 2; columns at 1, 3, 1.
    top1, reciprocal = score(cosines)
    assert top1 == pytest.approx(3 / 6)
    assert reciprocal == pytest.approx((1 / 2 + 1 + 1 / 2 + 1 + 1 / 3 + 1) / 6)


def test_halves_are_scored_as_by_dense_computations(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny workspace's documents are of one context or two: every row a context, so that there are boundaries.
    index = FeatureIndex.open(space, "s")
    monkeypatch.setitem(index.meta, "context_len", 2)
    monkeypatch.setattr(FeatureIndex, "open", lambda catalog, sae: index)
    found = space.document_halves("s", tokens=4, draws=1, seed=3)
    summary = found.table("summary").set_index(["method", "kept"])
    harvest, sae = space.open_harvest("h"), space.sae("s")
    with duckdb.connect(str(harvest.database), read_only=True) as connection:
        row, doc, token = zip(
            *connection.execute("SELECT row, doc, token FROM tokens WHERE flags = 0 ORDER BY row").fetchall(),
            strict=True,
        )
    windows = draw_windows(np.array(row), np.array(doc), 2, tokens=4, seed=3, documents=500).rows
    x = [harvest.vectors(HOOK).rows(own).double() for own in windows]
    codes = np.array([(sae.encode(own.float()).to_dense() != 0).sum(dim=0).numpy() for own in x], dtype=float)
    words = np.zeros((len(windows), max(token) + 1))
    for text, own in enumerate(windows):
        for one in own:
            words[text, token[row.index(one)]] += 1
    tokens = torch.cat(x)
    means = torch.stack([own.mean(dim=0) for own in x]) - tokens.mean(dim=0)
    _, spread, directions = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    turned = means @ directions.T

    def weighed(table: NDArray) -> NDArray:
        having = (table > 0).sum(axis=0)
        return np.log(1 + table) * np.log(len(table) / np.maximum(having, 1)) * (having > 0)

    def reached(table: NDArray) -> tuple[float, float]:
        ranks = []
        for one, other in ((table[::2], table[1::2]), (table[1::2], table[::2])):
            for place, mine in enumerate(one):
                near = [mine @ his / max(np.linalg.norm(mine) * np.linalg.norm(his), 1e-300) for his in other]
                ranks.append(sum(value >= near[place] - 1e-9 for value in near))
        return np.mean([rank == 1 for rank in ranks]), np.mean([1 / rank for rank in ranks])

    expected = {
        ("codes, count", 0): weighed(codes), ("tokens", 0): weighed(words), ("mean vector", 0): means.numpy(),
        ("PCA", 4): turned[:, :4].numpy(), ("whitened", 0): (turned / spread).numpy(),
    }  # fmt: skip
    for key, table in expected.items():
        got = summary.loc[key]
        assert (got["top1"], got["reciprocal_rank"]) == pytest.approx(reached(table), abs=1e-9), key
    assert {kept for method, kept in summary.index if method == "codes, sum"} == {0, *KEPT}
    assert (summary["documents"] == len(windows) // 2).all()
    assert space.document_halves("s", tokens=4, draws=1, seed=3).created == found.created


def test_sparse_codes_are_trained_on_one_half_and_judged_on_the_other(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["documents", "sparse", "h", "-w", str(space.path), "--device", "cpu", "--json"]
    assert run([*command, "--tokens", "1"]) == 2
    assert "half of the documents have 0 passages of at least 32 tokens" in capsys.readouterr().err
    assert run([*command, "--k", "2000"]) == 2
    assert "lie between 1 and the width, 1024" in capsys.readouterr().err
    assert run([*command, "--k", "128"]) == 2
    assert "annealing starts between the largest k, 128, and the width, 1024; got 64" in capsys.readouterr().err
    # As above: so many boundaries that the short documents have passages.
    monkeypatch.setattr(Harvest, "context_len", 2)
    monkeypatch.setattr("workbench.features.documents.sparse.LEAST", 1)
    small = ["--tokens", "4", "--k", "2", "--k", "2", "--width", "32", "--anneal-from", "8", "--steps", "4"]
    assert run([*command, *small, "--draws", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    codes = [row for row in found["summary"] if row["code"] == "k-sparse"]
    assert [(row["k"], row["annealed"], row["labels"]) for row in codes] == [
        (2, annealed, labels) for annealed in (False, True) for labels in (False, True)
    ]
    assert [row["code"] for row in found["summary"]][:4] == ["tokens", "mean vector", "PCA", "k-sparse"]
    assert len(found["draws"]) == 2 * len(found["summary"])
    for row in codes:
        own = [one for one in found["draws"] if [one[key] for key in ("code", "k", "annealed", "labels")]
               == ["k-sparse", row["k"], row["annealed"], row["labels"]]]  # fmt: skip
        assert row["top1"] == pytest.approx(np.mean([one["top1"] for one in own]))
        assert row["least"] == min(one["top1"] for one in own)
        assert 0 <= row["dead"] < 1
        assert row["fvu"] > 0
    # Half of 27 documents is judged.
    assert all(row["documents"] <= 14 for row in found["summary"])


def test_the_command_says_what_is_shared_and_refuses_in_one_line(
    space: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["documents", "like", "s", "-w", str(space.path)]
    assert run([*command, "3.txt", "--top", "2"]) == 0
    said = capsys.readouterr().out
    assert "Of 27 documents those most like '3.txt', by s" in said
    assert "part of the cosine" in said
    for more, message in (
        (["3.text"], "no document '3.text' in the index of s: near are 3.txt"),
        ([], "name a document of the index, or give a --text in its place"),
        (["3.txt", "--text", "x"], "name a document of the index, or give a --text in its place"),
    ):
        assert run([*command, *more]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert run(["documents", "halves", "s", "-w", str(space.path)]) == 2
    assert "0 documents have 600 tokens on both sides" in capsys.readouterr().err
    with pytest.raises(InputError, match="no pooling 'mean': choose sum, count, max"):
        space.similar_documents("s", "3.txt", pooling="mean")
