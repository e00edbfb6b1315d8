"""Builds the index of one SAE on one harvest: `indexes/SAE.duckdb`.

1. Encode the harvest into segments (workbench/features/index/segments.py), in `indexes/SAE.partial/`.
2. Feature range by feature range, on all cores, measure statistics, examples and co-activations, and write them with
   the activations, in order.
3. Write what the weights say: logit effects, decoder neighbours, map, heads.
4. Copy the harvest's tokens and vocabulary, so that the index can be read without it, and the texts to search.
5. Rename the file into place and remove the segments.

A reader sees a whole index or none. A build that was killed goes on with the first segment it lacks; a change of
the SAE, the harvest or the number of rows starts it anew. The tables are listed in docs/methods/index.md.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from sae import rules
from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin, versions
from workbench.disk.database import write_duckdb
from workbench.disk.locks import RunLock
from workbench.disk.names import lasting_name
from workbench.features.index import schema
from workbench.features.index import segments as segments_module
from workbench.features.index.coactivation import Coactivations, TokenFeatures, coactivations
from workbench.features.index.examples import CUTS, TOP, Examples, find_examples
from workbench.features.index.geometry import MapMethod
from workbench.features.index.logits import effects_of, output_directions
from workbench.features.index.own_pass import own_pass
from workbench.features.index.segments import Entries, Segments, write_segments
from workbench.features.index.statistics import BINS, QUANTILES, Statistics, feature_statistics, value_order
from workbench.features.index.workers import in_order, workers
from workbench.harvest.parts import Place, SideBySide, check_same_tokens
from workbench.harvest.reading import Harvest, Vectors
from workbench.models.devices import choose_device
from workbench.models.memory import check_fits_memory

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel

SCHEMA = 1
ENTRIES_AT_ONCE = 1 << 22
MAX_ROWS = 2**31 - 1
BYTES_PER_ROW = 2 * (8 + 32)
"""Two numbers of Python in lists, each beside its pointer."""


@dataclass(frozen=True)
class IndexSummary:
    """What a build made."""

    path: Path
    tokens: int
    activations: int
    bytes: int
    missing: str | None
    """Why there are no logit effects, where there are none."""
    seconds: dict[str, float]
    """By step; empty when the index was there already."""
    note: str = ""
    """What there is to say where the rows are not of the model that the SAE was trained on."""


def build_index(
    catalog: Catalog,
    sae_name: str,
    *,
    harvest: str | Sequence[str] | None = None,
    max_rows: int | None = None,
    model: "LoadedModel | None" = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> IndexSummary:
    """Builds the index of an SAE, or returns at once when the same one is there; see the module's description.

    Args:
        harvest: a harvest of the SAE's hook point, for a crosscoder one that holds all its parts or one for each, of
            the same tokens; what it was trained on when left out. An SAE trained straight from a model has none: then
            the model runs over the beginning of the corpus first.
        max_rows: rows to index at most, from the start, BOS and padding counted; all of a harvest when left out,
            2,000,000 without one.
        model: the SAE's model, already loaded, for logit effects; otherwise the one the harvest names is loaded.
        device: where the SAE runs: `auto`, `cpu`, `cuda`, ...
        on_progress: called with (rows encoded, rows in all).

    Raises:
        InputError: an unknown SAE or harvest, a harvest without the SAE's hook point or of another width, another model
            than the harvest's, more rows or features than memory holds, or a disk that is full.

    A model that cannot be loaded costs the logit effects only; the summary and the index say so.
    """
    sae = catalog.coder(sae_name, device=str(choose_device(device)))
    origin, path = catalog.origin(sae_name), catalog.index_path(sae_name)
    own, source, behind = own_pass(origin, sae, max_rows) if harvest is None else None, None, origin
    if own is not None:
        read = own.settings
    else:
        given = [harvest] if isinstance(harvest, str) else list(harvest or ())
        source, vectors = _held(catalog, sae, sae_name, given)
        n_rows, behind = min(max_rows or source.n_rows, source.n_rows), Origin.of_sae({"harvest": source.provenance()})
        read = {"harvest": source.name, "corpus": source.corpus, "model": source.model, "rows": n_rows}
        read |= {"harvests": given} if len(given) > 1 else {}
        _check_memory(sae, vectors, n_rows)
    if read["rows"] > MAX_ROWS:
        raise InputError(f"an index holds at most {MAX_ROWS:,} rows, these are {read['rows']:,}: give --rows")
    if model is not None:
        behind.check_model(model, f"what SAE {sae_name!r} is indexed on")
    settings = {"schema": SCHEMA, "sae": sae_name, "weights": sae.fingerprint(), "hook": sae.hook_name, **read}
    if sae.written_hook != sae.hook_name:
        settings["target_hook"] = sae.written_hook
    note = _note(sae_name, origin, behind)
    same = path.exists() and read_meta(path)["settings"] == settings
    # What lacked its model is built again once the model can be had.
    if same and (read_meta(path)["missing"] is None or _why_missing(behind, sae, model, device) is not None):
        return _summary(path, {}, note)
    partial = path.with_suffix(".partial")
    with RunLock(partial):
        _begin(partial, settings)
        if own is not None:
            model = origin.load(f"SAE {sae_name!r}", model, device)
            source = own.run(partial / "rows", model, on_progress)
            vectors = _vectors(sae.hook_name, sae.d_in, f"SAE {sae_name!r}", source)
            _check_memory(sae, vectors, source.n_rows)
        assert source is not None
        n_rows = min(settings["rows"], source.n_rows)
        build = _Build(source, vectors, sae, settings, n_rows, partial, behind, model, device)
        build.encode(on_progress)
        write_duckdb(path, build.fill, remedy="what is encoded is kept: make room and repeat the command")
    shutil.rmtree(partial)
    return _summary(path, build.laps.seconds, note)


class _Laps:
    """Seconds by step: each lap adds the time since the one before to its step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    def lap(self, step: str) -> None:
        now = time.monotonic()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._start
        self._start = now


@dataclass(frozen=True)
class _Measured:
    """What is measured on the tokens of some consecutive features."""

    entries: Entries
    statistics: Statistics
    examples: Examples
    coactivations: Coactivations


class _Build:
    """One build, in the folder `scratch` that it has locked: encoding into segments, then filling the DuckDB file."""

    def __init__(
        self,
        source: Harvest,
        vectors: Vectors | SideBySide,
        sae: SAE,
        settings: dict[str, Any],
        n_rows: int,
        scratch: Path,
        behind: Origin,
        model: "LoadedModel | None",
        device: str,
    ) -> None:
        self.source, self.vectors, self.sae = source, vectors, sae
        self.settings, self.scratch, self.n_rows = settings, scratch, n_rows
        self.behind, self.model, self.device = behind, model, device
        self.laps = _Laps()

    def encode(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Writes the segments that are missing."""
        folder, n_rows = self.scratch / "segments", self.n_rows
        try:
            write_segments(self.vectors, self.source.ordinary, self.sae, folder, n_rows, on_progress)
        except OSError as error:
            raise InputError(
                f"cannot write to {self.scratch}: {error.strerror}; make room and repeat the command"
            ) from None
        self.segments = Segments(folder, self.sae.d_sae)
        if not self.segments.n_tokens:
            raise InputError(f"the first {n_rows:,} rows of {self.source.name!r} are BOS and padding: index more")
        self.laps.lap("encode")

    def fill(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Fills a new DuckDB file."""
        # Parallel insertion would keep no order, and order is what makes a feature one contiguous range.
        connection.execute("SET preserve_insertion_order = true")
        schema.create(connection)
        self._features(connection)
        missing, method = self._weights(connection)
        schema.copy_tokens(connection, self.source, self.n_rows)
        schema.insert_texts(connection)
        self.laps.lap("texts")
        meta = {
            "settings": self.settings, "d_in": self.sae.d_in, "d_sae": self.sae.d_sae,
            "rule": rules.to_dict(self.sae.rule), "tokens": self.segments.n_tokens,
            "activations": int(self.segments.firings.sum()), "context_len": self.source.context_len,
            "missing": missing, "versions": versions(), "map": method, "quantiles": QUANTILES, "bins": BINS,
            "cuts": CUTS, "top": TOP, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [[key, json.dumps(meta[key])] for key in meta])

    def _features(self, connection: duckdb.DuckDBPyConnection) -> None:
        """What is measured on the tokens, feature range by feature range."""
        segments = self.segments
        by_token = TokenFeatures.of(*segments.by_token(self.scratch / "active.bin"), device=self.sae.W_dec.device)

        def measured(features: tuple[int, int]) -> _Measured:
            entries = segments.features(*features)
            order = value_order(entries)
            return _Measured(
                entries,
                feature_statistics(entries, order, segments.n_tokens),
                find_examples(entries, order, self.source.context_len),
                coactivations(entries, by_token, segments.firings),
            )

        groups = segments.groups(ENTRIES_AT_ONCE)
        for found in in_order(measured, groups, workers(len(groups))):
            self.laps.lap("measuring")
            schema.insert_activations(connection, found.entries)
            schema.insert_statistics(connection, found.entries.first, found.statistics)
            schema.insert_examples(connection, found.examples)
            schema.insert_coactivations(connection, found.coactivations)
            self.laps.lap("writing")

    def _weights(self, connection: duckdb.DuckDBPyConnection) -> tuple[str | None, MapMethod]:
        """What the weights say; returns why there are no logit effects, and how the map was made."""
        missing = n_heads = None
        try:
            model = self.behind.load(f"harvest {self.source.name!r}", self.model, self.device)
            n_heads = model.info.n_heads
            _check_promotes(model)
            for effects in effects_of(model, self.sae):
                schema.insert_logit_effects(connection, effects)
        except InputError as error:
            missing = str(error)
        self.laps.lap("logit effects")
        method = schema.insert_geometry(
            connection, self.sae, n_heads if self.sae.written_hook.endswith("hook_z") else None
        )
        self.laps.lap("geometry")
        return missing, method


def _begin(scratch: Path, settings: dict[str, Any]) -> None:
    """Removes what an earlier build has left of another SAE, harvest or number of rows."""
    description = scratch / "settings.json"
    begun = {**settings, "span": segments_module.SPAN_ROWS}
    if not description.exists() or json.loads(description.read_text()) != begun:
        shutil.rmtree(scratch / "segments", ignore_errors=True)
        shutil.rmtree(scratch / "rows", ignore_errors=True)
        description.write_text(json.dumps(begun))


def _held(catalog: Catalog, sae: SAE, name: str, given: Sequence[str]) -> tuple[Harvest, Vectors | SideBySide]:
    """The harvest that is indexed, and what of it, or of several, the SAE reads."""
    if sae.parts:
        places = _places(catalog, name, sae, given)
        return places[0].harvest, SideBySide(places)
    if len(given) > 1:
        raise InputError(f"SAE {name!r} reads one activation: give one --harvest")
    source = catalog.open_harvest(given[0] if given else _harvest_of(catalog, name))
    return source, _vectors(sae.hook_name, sae.d_in, f"SAE {name!r}", source)


def _harvest_of(catalog: Catalog, sae_name: str) -> str:
    name = catalog.origin(sae_name).harvest
    if name is None:
        raise InputError(f"SAE {sae_name!r} does not say which harvest it was trained on: name one with --harvest")
    return name


def _vectors(hook: str, width: int, reader: str, harvest: Harvest) -> Vectors:
    """What `reader`, as error messages name it, reads of a harvest.

    Raises:
        InputError: a harvest where that is not there, or of another width.
    """
    if hook not in harvest.hooks:
        raise InputError(
            f"harvest {harvest.name!r} does not hold {hook!r}, which {reader} reads: it has "
            f"{', '.join(harvest.hooks)}; harvest that hook point and name the harvest with --harvest"
        )
    vectors = harvest.vectors(hook)
    if vectors.width != width:
        raise InputError(
            f"{reader} reads activations of width {width}, harvest {harvest.name!r} has {vectors.width}: "
            "it was trained on another model; name another --harvest"
        )
    return vectors


def _places(catalog: Catalog, name: str, sae: SAE, given: Sequence[str]) -> list[Place]:
    """Where the parts of a crosscoder lie: in the harvests given, one for each or one of all, else in those it was
    trained on.

    Raises:
        InputError: harvests that are gone, not known, of other models or widths, or of different tokens.
    """
    record, parts = catalog.origin(name).record.get("parts") or [], sae.parts
    wanted = list(given) or [part["harvest"]["name"] for part in record]
    if len(wanted) == 1 and len({part.model_name for part in parts}) == 1:
        wanted *= len(parts)
    if len(wanted) != len(parts):
        listed = ", ".join(f"{part.name} ({part.hook_name} of {part.model_name})" for part in parts)
        raise InputError(
            f"crosscoder {name!r} is indexed on a harvest of each of its parts, or one of all where they have one "
            f"model: give --harvest for {listed}, in this order"
        )
    places = [Place(catalog.open_harvest(one), part.hook_name) for one, part in zip(wanted, parts, strict=True)]
    for place, part in zip(places, parts, strict=True):
        reader = f"part {part.name!r} of the crosscoder"
        if lasting_name(place.harvest.config["model"]) != lasting_name(part.model_name):
            raise InputError(
                f"{reader} reads {part.model_name}, and harvest {place.harvest.name!r} is of "
                f"{place.harvest.config['model']}: give the harvests in the order of the parts"
            )
        _vectors(part.hook_name, part.width, reader, place.harvest)
    check_same_tokens([place.harvest for place in places])
    return places


def _check_memory(sae: SAE, vectors: Vectors | SideBySide, n_rows: int) -> None:
    """A span, every row's token and document as Python's numbers, or the decoder twice in double precision."""
    span = min(n_rows, segments_module.SPAN_ROWS) * vectors.width * next(vectors.pieces(0, 1)).element_size()
    check_fits_memory(f"indexing {n_rows:,} rows", max(span, n_rows * BYTES_PER_ROW), "cpu", "index fewer with --rows")
    check_fits_memory(
        f"the map of {sae.d_sae:,} features", 2 * 8 * sae.W_dec.numel(), sae.W_dec.device,
        "use an SAE with fewer, or free memory",
    )  # fmt: skip


def _check_promotes(model: "LoadedModel") -> None:
    """Raises InputError where outputs are no tokens: an index names those that features promote by their text."""
    if not model.gives_tokens:
        raise InputError("this model's outputs are no tokens, so the index says of none that a feature promotes it")


def _why_missing(behind: Origin, sae: SAE, model: "LoadedModel | None", device: str) -> str | None:
    """Why logit effects cannot be computed; None when they can."""
    try:
        loaded = behind.load("these rows", model, device)
        _check_promotes(loaded)
        output_directions(loaded, sae)
    except InputError as error:
        return str(error)
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """The description stored in an index."""
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute("SELECT key, value FROM meta").fetchall()
    return {key: json.loads(value) for key, value in rows}


def _note(sae_name: str, origin: Origin, behind: Origin) -> str:
    trained, read = origin.weights_sha256, behind.weights_sha256
    if trained is None or read is None or trained == read:
        return ""
    return (
        f"these are activations of {behind.model}, whose weights are not those of {origin.model} that {sae_name!r} was "
        "trained on"
    )


def _summary(path: Path, seconds: dict[str, float], note: str) -> IndexSummary:
    meta = read_meta(path)
    return IndexSummary(
        path, meta["tokens"], meta["activations"], path.stat().st_size, meta["missing"],
        {step: round(took, 2) for step, took in seconds.items()}, note,
    )  # fmt: skip
