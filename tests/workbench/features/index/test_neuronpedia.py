"""An index as Neuronpedia reads it: the tables of its database, its importer's way of reading, and its own client.

TABLES is its schema as far as an import has to do with it (apps/webapp/prisma/schema.prisma, read on 2026-11-27): the
columns with their types, `!` where a value must be there, and the keys by which rows point at each other. The importer
creates release, model, source set and source from single lines, which may have no other key, and the rest by
`jsonb_to_recordset` with the columns of a file's first line.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from sae.errors import InputError
from workbench import Workspace
from workbench.catalog.notes import Notes
from workbench.cli.main import run

TABLES = {
    "SourceRelease": """name VARCHAR!, visibility VARCHAR, isNewUi BOOLEAN, featured BOOLEAN, description VARCHAR!,
        descriptionShort VARCHAR, urls VARCHAR[], creatorEmail VARCHAR, creatorName VARCHAR!, creatorNameShort VARCHAR,
        creatorId VARCHAR!, defaultSourceSetName VARCHAR, defaultSourceId VARCHAR, defaultUmapSourceIds VARCHAR[],
        createdAt TIMESTAMP""",
    "Model": """id VARCHAR!, displayNameShort VARCHAR, displayName VARCHAR, creatorId VARCHAR!, tlensId VARCHAR,
        openRouterId VARCHAR, dimension INTEGER, thinking BOOLEAN, visibility VARCHAR, inferenceEnabled BOOLEAN,
        instruct BOOLEAN, layers INTEGER!, neuronsPerLayer INTEGER!, owner VARCHAR!, website VARCHAR""",
    "SourceSet": """modelId VARCHAR!, name VARCHAR!, hasDashboards BOOLEAN, visibility VARCHAR, description VARCHAR!,
        type VARCHAR, creatorName VARCHAR!, urls VARCHAR[], creatorEmail VARCHAR, creatorId VARCHAR!,
        releaseName VARCHAR, defaultRange INTEGER, showDfa BOOLEAN""",
    "Source": """id VARCHAR!, modelId VARCHAR!, hasDashboards BOOLEAN, inferenceEnabled BOOLEAN, saelensConfig JSON,
        saelensRelease VARCHAR, saelensSaeId VARCHAR, hfRepoId VARCHAR, hfFolderId VARCHAR, visibility VARCHAR,
        setName VARCHAR!, creatorId VARCHAR!, num_prompts INTEGER, num_tokens_in_prompt INTEGER, dataset VARCHAR,
        notes VARCHAR""",
    "Neuron": """modelId VARCHAR!, layer VARCHAR!, index VARCHAR!, sourceSetName VARCHAR, creatorId VARCHAR,
        maxActApprox DOUBLE, frac_nonzero DOUBLE!, topkCosSimIndices INTEGER[], topkCosSimValues DOUBLE[],
        neg_str VARCHAR[], neg_values DOUBLE[], pos_str VARCHAR[], pos_values DOUBLE[],
        freq_hist_data_bar_heights DOUBLE[], freq_hist_data_bar_values DOUBLE[],
        logits_hist_data_bar_heights DOUBLE[], logits_hist_data_bar_values DOUBLE[], decoder_weights_dist DOUBLE[]""",
    "Activation": """id VARCHAR!, tokens VARCHAR[], index VARCHAR!, layer VARCHAR!, modelId VARCHAR!,
        maxValue DOUBLE!, maxValueTokenIndex INTEGER!, minValue DOUBLE!, values DOUBLE[], creatorId VARCHAR!,
        binMin DOUBLE, binMax DOUBLE, binContains DOUBLE, qualifyingTokenIndex INTEGER""",
    "Explanation": """id VARCHAR!, modelId VARCHAR!, layer VARCHAR!, index VARCHAR!, description VARCHAR!,
        authorId VARCHAR!, notes VARCHAR, typeName VARCHAR, explanationModelName VARCHAR""",
}
METADATA = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
BATCHES = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}


def columns(table: str) -> dict[str, str]:
    """Type by column."""
    return dict(column.split() for column in TABLES[table].split(","))


def lines(file: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line) for line in text.splitlines()]


def imported(folder: Path) -> duckdb.DuckDBPyConnection:
    """A database of TABLES with what lies in a source's folder."""
    connection = duckdb.connect()
    for table in TABLES:
        made = ", ".join(
            f'"{name}" {kind.rstrip("!")} {"NOT NULL" * kind.endswith("!")}' for name, kind in columns(table).items()
        )
        connection.execute(f'CREATE TABLE "{table}" ({made})')
    found = [(folder / f"{name}.jsonl", table) for name, table in METADATA.items()]
    found += [(file, table) for name, table in BATCHES.items() for file in folder.glob(f"{name}/batch-*.jsonl.gz")]
    for file, table in found:
        first = lines(file)[0]
        assert first.keys() <= columns(table).keys(), "a key that is no column"
        assert all(line.keys() == first.keys() for line in lines(file))
        typed = ", ".join(f"'{name}': '{columns(table)[name].rstrip('!')}'" for name in first)
        named = ", ".join(f'"{name}"' for name in first)
        connection.execute(
            f"INSERT INTO \"{table}\" ({named}) SELECT {named} FROM read_json('{file}', format = 'newline_delimited', "
            f"columns = {{{typed}}})"
        )
    return connection


@pytest.fixture(scope="module")
def folder(space: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the indexed SAE, one feature of which has a label."""
    Notes(space.path).set_label("s", 5, 'ends a "return"')
    out = tmp_path_factory.mktemp("neuronpedia") / "out"
    arguments = ["--format", "neuronpedia", "--model-id", "tiny", "--source-set", "res-s", "--creator", "us"]
    assert run(["export", "s", str(out), *arguments, "--workspace", str(space.path)]) == 0
    return out / "tiny" / "1-res-s"


def test_every_line_fits_the_tables_and_every_row_points_at_one_that_is_there(folder: Path) -> None:
    database = imported(folder)
    counts = {table: database.execute(f'SELECT count(*) FROM "{table}"').fetchall()[0][0] for table in TABLES}
    assert [counts[table] for table in METADATA.values()] == [1, 1, 1, 1]
    assert counts["Neuron"] == 40
    assert counts["Activation"] > 400
    assert counts["Explanation"] == 1
    for child, parent, keys in (
        ("SourceSet", "SourceRelease", {"releaseName": "name"}),
        ("SourceSet", "Model", {"modelId": "id"}),
        ("Source", "SourceSet", {"modelId": "modelId", "setName": "name"}),
        ("Neuron", "Source", {"modelId": "modelId", "layer": "id"}),
        ("Neuron", "SourceSet", {"modelId": "modelId", "sourceSetName": "name"}),
        ("Activation", "Neuron", {"modelId": "modelId", "layer": "layer", "index": "index"}),
        ("Explanation", "Neuron", {"modelId": "modelId", "layer": "layer", "index": "index"}),
    ):
        same = " AND ".join(f'c."{own}" = p."{other}"' for own, other in keys.items())
        lost = database.execute(f'SELECT count(*) FROM "{child}" c ANTI JOIN "{parent}" p ON {same}').fetchall()
        assert lost == [(0,)], (child, parent)
    ids = database.execute('SELECT count(*), count(DISTINCT id) FROM "Activation"').fetchall()[0]
    assert ids[0] == ids[1]


def test_features_and_examples_are_those_of_the_index(space: Workspace, folder: Path) -> None:
    features = {int(line["index"]): line for line in lines(folder / "features" / "batch-0.jsonl.gz")}
    examples: dict[int, list[dict[str, Any]]] = {}
    for line in lines(folder / "activations" / "batch-0.jsonl.gz"):
        examples.setdefault(int(line["index"]), []).append(line)
    index = space.index("s")
    for number in (3, 5, 20):
        feature, line = index.feature(number), features[number]
        assert line["frac_nonzero"] == pytest.approx(feature.stats.density, rel=1e-5)
        assert line["freq_hist_data_bar_heights"] == (feature.stats.histogram if feature.stats.firings else [])
        assert line["pos_str"] == [effect.text for effect in feature.promotes]
        assert line["neg_values"] == pytest.approx([effect.effect for effect in feature.suppresses], rel=1e-5)
        assert line["topkCosSimIndices"] == [near.feature for near in feature.neighbours]
        shown = [(group, example) for group in feature.groups for example in group.examples]
        assert len(examples.get(number, [])) == len(shown)
        for got, (group, example) in zip(examples.get(number, []), shown, strict=True):
            at = got["qualifyingTokenIndex"]
            assert got["values"][at] == pytest.approx(example.activation, rel=1e-5)
            # The pages show a part of the same text.
            assert "".join(example.tokens) in "".join(got["tokens"])
            assert got["maxValue"] == max(got["values"]) == got["values"][got["maxValueTokenIndex"]]
            if group.title == "strongest":
                assert got["binMin"] is None
            else:
                assert [got["binMin"], got["binMax"]] == pytest.approx([group.low, group.high], rel=1e-5)
                assert got["binContains"] == pytest.approx(group.share, rel=1e-5)
    index.close()
    centres = np.array(features[5]["freq_hist_data_bar_values"])
    assert np.allclose(np.diff(centres), np.diff(centres)[0], rtol=1e-3)
    assert features[3]["maxActApprox"] == 0.0, "feature 3 never fires"
    [label] = lines(folder / "explanations" / "batch-0.jsonl.gz")
    assert (label["index"], label["description"]) == ("5", 'ends a "return"')


def test_its_own_client_reads_the_rows(folder: Path) -> None:
    activation = pytest.importorskip("neuronpedia.np_activation", reason="Neuronpedia's client is not installed")
    rows = lines(folder / "activations" / "batch-0.jsonl.gz")
    # Its server calls the column by this name too.
    read = [activation.Activation.from_np_db_json({**row, "source": row["layer"]}) for row in rows]
    assert {one.source for one in read} == {"1-res-s"}
    assert all(len(one.tokens) == len(one.values) for one in read)


def test_the_same_index_gives_the_same_bytes(space: Workspace, folder: Path, tmp_path: Path) -> None:
    made = space.export_neuronpedia("s", tmp_path / "again", model_id="tiny", source_set="res-s", creator="us")
    assert made.path.name == folder.name
    for file in folder.rglob("*.jsonl*"):
        assert (made.path / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_what_neuronpedia_does_not_take_is_refused(
    space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="small letters"):
        space.export_neuronpedia("s", tmp_path / "a", model_id="My Model")
    with pytest.raises(InputError, match="no SAE 't'"):
        space.export_neuronpedia("t", tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").touch()
    with pytest.raises(InputError, match="new or an empty"):
        space.export_neuronpedia("s", tmp_path / "c")
    assert run(["export", "s", str(tmp_path / "d"), "--model-id", "x", "--workspace", str(space.path)]) == 2
    assert "--format neuronpedia" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
