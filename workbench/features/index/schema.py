"""The tables of an index, and how results become their rows. docs/methods/index.md says what each column holds."""

from collections.abc import Iterable
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from circuits.dfa import head_shares
from sae.model import SAE
from workbench.features.index.coactivation import Coactivations
from workbench.features.index.examples import Examples
from workbench.features.index.geometry import MapMethod, decoder_map, decoder_neighbours
from workbench.features.index.logits import LogitEffects
from workbench.features.index.segments import Entries
from workbench.features.index.statistics import QUANTILES, Statistics
from workbench.harvest.reading import Harvest
from workbench.text.token_bytes import alone, joined, piece_at

SCHEMA = """
    CREATE TABLE meta (key VARCHAR, value JSON);
    CREATE TABLE feature_activations (feature INTEGER, row INTEGER, activation FLOAT);
    CREATE TABLE feature_stats (
        feature INTEGER, firings BIGINT, positive BIGINT, density DOUBLE, mean DOUBLE, std DOUBLE, skewness DOUBLE,
        kurtosis DOUBLE, minimum DOUBLE, maximum DOUBLE, quantiles DOUBLE[], histogram BIGINT[]);
    CREATE TABLE feature_examples (
        feature INTEGER, sign TINYINT, "interval" TINYINT, rank SMALLINT, row INTEGER, activation FLOAT);
    CREATE TABLE feature_intervals (
        feature INTEGER, sign TINYINT, "interval" TINYINT, count BIGINT, low FLOAT, high FLOAT);
    CREATE TABLE coactivations (
        feature INTEGER, rank SMALLINT, other INTEGER, together BIGINT, phi DOUBLE, pmi DOUBLE);
    CREATE TABLE logit_stats (
        feature INTEGER, std DOUBLE, skewness DOUBLE, kurtosis DOUBLE, low FLOAT, high FLOAT, histogram BIGINT[]);
    CREATE TABLE logit_effects (feature INTEGER, sign TINYINT, rank SMALLINT, token INTEGER, effect FLOAT);
    CREATE TABLE decoder_neighbours (feature INTEGER, rank SMALLINT, other INTEGER, cosine FLOAT);
    CREATE TABLE decoder_map (feature INTEGER, x DOUBLE, y DOUBLE, norm DOUBLE, encoder_cosine DOUBLE);
    CREATE TABLE feature_heads (feature INTEGER, head SMALLINT, share DOUBLE);
    CREATE TABLE feature_texts (feature INTEGER, peaks VARCHAR, promoted VARCHAR, examples VARCHAR);
"""
TEXT_EXAMPLES, TEXT_TOKENS = 8, 8
"""Examples of a feature that text search covers, and tokens on either side of their peaks."""


def create(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes the empty tables."""
    connection.execute(SCHEMA)


def _insert(connection: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Any]) -> None:
    content = pa.table(columns)
    connection.register("content", content)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM content")
    connection.unregister("content")


def _lists(values: NDArray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]).cast(
        pa.list_(pa.from_numpy_dtype(values.dtype))
    )


def _numbers(values: NDArray) -> pa.Array:
    """NaN, which stands for a number that is not defined, as NULL."""
    return pa.array(values, from_pandas=True)


def insert_activations(connection: duckdb.DuckDBPyConnection, entries: Entries) -> None:
    """Rows of `feature_activations`."""
    feature = (entries.first + entries.local).astype(np.int32)
    _insert(
        connection,
        "feature_activations",
        {"feature": feature, "row": entries.row, "activation": entries.activation},
    )


def insert_statistics(connection: duckdb.DuckDBPyConnection, first: int, found: Statistics) -> None:
    """Rows of `feature_stats`, features counted from `first`."""
    names = ("density", "mean", "std", "skewness", "kurtosis", "minimum", "maximum")
    silent = found.firings == 0
    quantiles = _lists(found.quantiles)
    _insert(
        connection,
        "feature_stats",
        {
            "feature": np.arange(first, first + len(found.firings)),
            "firings": found.firings,
            "positive": found.positive,
            "quantiles": pa.array([None if dead else q for dead, q in zip(silent, quantiles.to_pylist(), strict=True)],
                                  pa.list_(pa.float64())),
            "histogram": _lists(found.histogram),
        }
        | {name: _numbers(getattr(found, name)) for name in names},
    )  # fmt: skip
    assert found.quantiles.shape[1] == len(QUANTILES)


def insert_examples(connection: duckdb.DuckDBPyConnection, found: Examples) -> None:
    """Rows of `feature_examples` and `feature_intervals`."""
    names = ("feature", "sign", "interval", "rank", "row", "activation")
    _insert(connection, "feature_examples", {name: getattr(found, name) for name in names})
    _insert(connection, "feature_intervals", found.intervals)


def insert_coactivations(connection: duckdb.DuckDBPyConnection, found: Coactivations) -> None:
    """Rows of `coactivations`."""
    names = ("feature", "rank", "other", "together", "phi", "pmi")
    _insert(connection, "coactivations", {name: getattr(found, name) for name in names})


def insert_logit_effects(connection: duckdb.DuckDBPyConnection, found: LogitEffects) -> None:
    """Rows of `logit_stats` and `logit_effects`."""
    feature = np.arange(found.first, found.first + len(found.std))
    _insert(
        connection,
        "logit_stats",
        {
            "feature": feature,
            "std": found.std,
            "skewness": _numbers(found.skewness),
            "kurtosis": _numbers(found.kurtosis),
            "low": found.bottom_effect[:, 0],
            "high": found.top_effect[:, 0],
            "histogram": _lists(found.histogram),
        },
    )
    n = found.top.shape[1]
    for sign, token, effect in ((1, found.top, found.top_effect), (-1, found.bottom, found.bottom_effect)):
        _insert(
            connection,
            "logit_effects",
            {
                "feature": np.repeat(feature, n),
                "sign": np.full(len(feature) * n, sign),
                "rank": np.tile(np.arange(n), len(feature)),
                "token": token.reshape(-1),
                "effect": effect.reshape(-1),
            },
        )


def insert_geometry(connection: duckdb.DuckDBPyConnection, sae: SAE, n_heads: int | None) -> MapMethod:
    """Rows of `decoder_neighbours`, `decoder_map` and, where the number of heads is given, `feature_heads`.

    Returns:
        How the map was made.
    """
    W_dec, W_enc = sae.W_dec.detach().float(), sae.W_enc.detach().float()
    feature = np.arange(sae.d_sae)
    cosine, other = (tensor.cpu().numpy() for tensor in decoder_neighbours(W_dec))
    n = cosine.shape[1]
    _insert(
        connection,
        "decoder_neighbours",
        {
            "feature": np.repeat(feature, n),
            "rank": np.tile(np.arange(n), sae.d_sae),
            "other": other.reshape(-1),
            "cosine": cosine.reshape(-1),
        },
    )
    method, found = decoder_map(W_dec)
    place = found.cpu().numpy()
    norm = W_dec.double().norm(dim=1)
    aligned = norm.new_full(norm.shape, float("nan"))
    # A transcoder's two sides may have different widths.
    if sae.d_in == sae.d_out:
        aligned = (W_dec.double() * W_enc.T.double()).sum(1) / (norm * W_enc.T.double().norm(dim=1))
    _insert(
        connection,
        "decoder_map",
        {
            "feature": feature,
            "x": place[:, 0],
            "y": place[:, 1],
            "norm": norm.cpu().numpy(),
            "encoder_cosine": _numbers(aligned.cpu().numpy()),
        },
    )
    if n_heads is not None:
        shares = head_shares(W_dec, n_heads).cpu().numpy()
        _insert(
            connection,
            "feature_heads",
            {
                "feature": np.repeat(feature, n_heads),
                "head": np.tile(np.arange(n_heads), sae.d_sae),
                "share": _numbers(shares.reshape(-1)),
            },
        )
    return method


def copy_tokens(connection: duckdb.DuckDBPyConnection, source: Harvest, n_rows: int) -> None:
    """Copies `tokens` (first n_rows), `vocabulary`, `token_bytes` and `documents` of the harvest."""
    path = str(source.database).replace("'", "''")
    connection.execute(f"ATTACH '{path}' AS source (READ_ONLY)")
    connection.execute(
        f"CREATE TABLE tokens AS SELECT row::INTEGER AS row, doc, pos, token, flags FROM source.tokens "
        f"WHERE row < {n_rows} ORDER BY row"
    )
    connection.execute("CREATE TABLE vocabulary AS SELECT * FROM source.vocabulary ORDER BY token")
    connection.execute("CREATE TABLE token_bytes (token INTEGER, bytes BLOB)")
    # Harvests made before bytes were kept have none: their parts of characters stay U+FFFD.
    if connection.execute(
        "SELECT 1 FROM duckdb_tables() WHERE database_name = 'source' AND table_name = 'token_bytes'"
    ).fetchone():
        connection.execute("INSERT INTO token_bytes SELECT * FROM source.token_bytes ORDER BY token")
    connection.execute("CREATE TABLE documents AS SELECT * FROM source.documents ORDER BY doc")
    connection.execute("DETACH source")


def insert_texts(connection: duckdb.DuckDBPyConnection) -> None:
    """Rows of `feature_texts`: per feature its peak tokens, promoted tokens and example windows, in lower case."""
    found = connection.execute(
        "SELECT token, text, bytes FROM vocabulary LEFT JOIN token_bytes USING (token)"
    ).fetchall()
    vocabulary = {token: (text or "", part) for token, text, part in found}
    nothing: tuple[str, bytes | None] = ("", None)

    def text_of(tokens: Iterable[int]) -> list[str]:
        return joined(*zip(*[vocabulary.get(token, nothing) for token in tokens], strict=True))

    columns = connection.execute("SELECT token, doc FROM tokens ORDER BY row").fetchnumpy()
    token, doc = columns["token"].tolist(), columns["doc"].tolist()
    peaks: dict[int, list[str]] = {}
    windows: dict[int, list[str]] = {}
    for feature, row in connection.execute(
        f'SELECT feature, row FROM feature_examples WHERE "interval" = -1 AND rank < {TEXT_EXAMPLES} '
        "ORDER BY feature, sign DESC, rank"
    ).fetchall():
        near = range(max(0, row - TEXT_TOKENS), min(len(token), row + TEXT_TOKENS + 1))
        shown = [at for at in near if doc[at] == doc[row]]
        pieces = text_of(token[at] for at in shown)
        peaks.setdefault(feature, []).append(piece_at(pieces, shown.index(row)))
        windows.setdefault(feature, []).append("".join(pieces))
    promoted: dict[int, list[str]] = {}
    for feature, number in connection.execute(
        "SELECT feature, token FROM logit_effects ORDER BY feature, sign DESC, rank"
    ).fetchall():
        promoted.setdefault(feature, []).append(alone(*vocabulary.get(number, nothing)))
    features = [row[0] for row in connection.execute("SELECT feature FROM feature_stats ORDER BY feature").fetchall()]
    _insert(
        connection,
        "feature_texts",
        {
            "feature": features,
            "peaks": [" ".join(peaks.get(feature, [])).lower() for feature in features],
            "promoted": [" ".join(promoted.get(feature, [])).lower() for feature in features],
            "examples": ["\n".join(windows.get(feature, [])).lower() for feature in features],
        },
    )
