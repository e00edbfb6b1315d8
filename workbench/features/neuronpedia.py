"""An indexed SAE as the JSON lines that Neuronpedia imports: one folder of its public data sets.

    MODEL/SOURCE/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl    one line each: what the features are of
    MODEL/SOURCE/features/batch-0.jsonl.gz                                    a line a feature, 1,024 a file
    MODEL/SOURCE/activations/batch-0.jsonl.gz                                 the examples of these features
    MODEL/SOURCE/explanations/batch-0.jsonl.gz                                what they are called, where they are

SOURCE is the layer and the name of the source set, as `6-res-jb`. A line's keys are columns of Neuronpedia's tables
(SourceRelease, Model, SourceSet, Source, Neuron, Activation, Explanation); its importer takes the columns of a file
from the file's first line, so all lines of a file have the same keys, and a file without lines is not written.

Of the index come density, histograms (as centres of bars and heights), logit effects, decoder neighbours, shares of
heads, and every example with the text around it. The strongest contexts have no bin; those of an interval of strength
have its bounds and the share of activations in it. What the index does not measure, correlations of activations, stays
empty. The same index gives the same bytes.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.features.index.query import FeatureIndex
from workbench.text.packing import NO_TEXT
from workbench.text.token_bytes import alone, joined

FEATURES_AT_ONCE = 1024
BEFORE, AFTER = 64, 63
"""Tokens around an example's: as many in all as Neuronpedia's own dashboards have in a prompt."""
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The user that every instance of Neuronpedia is seeded with and gives imported rows to."""
ITS_NAMES = {"gpt2": "gpt2-small"}
"""Models that Neuronpedia calls otherwise than the hub."""
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
_ID = re.compile(r"[a-z0-9_-]{1,128}")

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class NeuronpediaExport:
    """What was written."""

    path: Path
    """The source's folder."""
    model_id: str
    source_id: str
    features: int
    activations: int
    explanations: int


def export_neuronpedia(
    catalog: Catalog,
    sae: str,
    folder: Path,
    *,
    model_id: str | None = None,
    source_set: str | None = None,
    creator: str | None = None,
    on_progress: OnProgress | None = None,
) -> NeuronpediaExport:
    """Writes the index of an SAE for Neuronpedia; see the module's description.

    Args:
        folder: new or empty; what lies in it can be copied into a bucket or served as it is.
        model_id, source_set: names there; made of the model's and the SAE's when left out.
        creator: who is named as the one who made the SAE; the source set when left out.
        on_progress: called with (features written, features in all).

    Raises:
        InputError: an SAE without an index, one whose hook point is in no layer, names that Neuronpedia does not take,
            or a folder that is in use or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists: name a new or an empty folder")
    with closing(FeatureIndex.open(catalog, sae)) as index:
        place = _LAYER.fullmatch(index.settings["hook"])
        if place is None:
            raise InputError(f"Neuronpedia keeps features by layer, and {sae!r} reads {index.settings['hook']}")
        called = Path(index.settings["model"]["name"]).name
        model_id = model_id or ITS_NAMES.get(called) or _id_of(called)
        source_set = source_set or _id_of(sae)
        for what, given in (("model id", model_id), ("source set", source_set)):
            if not _ID.fullmatch(given):
                raise InputError(f"{given!r} is no {what} of Neuronpedia's: small letters, digits, - and _ are taken")
        writer = _Writer(index, model_id, f"{place[1]}-{source_set}", source_set)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            source = partial / model_id / writer.source_id
            source.mkdir(parents=True)
            records = _records(index, writer, catalog.origin(sae), place[2], creator or source_set)
            for name, record in records.items():
                (source / f"{name}.jsonl").write_text(_line(record), encoding="utf-8")
            counts = writer.write_features(source, on_progress)
            os.replace(partial, folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    return NeuronpediaExport(folder / model_id / writer.source_id, model_id, writer.source_id, **counts)


def _id_of(name: str) -> str:
    """A name as Neuronpedia takes names."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")[:128] or "unnamed"


def _records(
    index: FeatureIndex, writer: "_Writer", origin: Origin, place: str, creator: str
) -> dict[str, dict[str, Any]]:
    """The lines about release, model, source set and source, by file."""
    model, imported = index.settings["model"], origin.imported or {}
    by = {"creatorId": CREATOR_ID, "visibility": "PUBLIC"}
    named = {"creatorName": creator, "urls": []}
    corpus = Path(str(index.settings["corpus"]["name"])).name
    return {
        "release": {
            "name": writer.source_set, "description": f"{index.sae} on {writer.model_id}", "creatorNameShort": creator,
            "descriptionShort": index.sae, "defaultSourceSetName": writer.source_set, **named, **by,
        },
        "model": {
            "id": writer.model_id, "displayName": writer.model_id, "displayNameShort": writer.model_id,
            "dimension": model["d_model"], "layers": model["n_layers"],
            "neuronsPerLayer": model["d_mlp"], "owner": creator, **by,
        },
        "sourceset": {
            "modelId": writer.model_id, "name": writer.source_set, "releaseName": writer.source_set,
            "description": f"{place}, {index.d_sae:,} features", **named, **by,
        },
        "source": {
            "id": writer.source_id, "modelId": writer.model_id, "setName": writer.source_set, "dataset": corpus,
            "num_prompts": -(-writer.n_rows // writer.context_len), "num_tokens_in_prompt": writer.context_len,
            "saelensRelease": imported.get("release"), "saelensSaeId": imported.get("id"),
            "notes": f"Indexed on {index.n_tokens:,} tokens by interp-workbench", **by,
        },
    }  # fmt: skip


class _Writer:
    """Writes the batches of one index."""

    def __init__(self, index: FeatureIndex, model_id: str, source_id: str, source_set: str) -> None:
        self.index, self.model_id, self.source_id, self.source_set = index, model_id, source_id, source_set
        self.context_len: int = index.meta["context_len"]
        tokens = index.frame("SELECT token, doc, flags FROM tokens ORDER BY row")
        self.token, self.doc = tokens["token"].to_numpy(), tokens["doc"].to_numpy()
        # Tokens that were left out are text all the same.
        self.of_text = (tokens["flags"].to_numpy() & NO_TEXT) == 0
        self.n_rows = len(tokens)
        words = index.frame(f"SELECT token, text, bytes FROM {index.words}")
        self.words = {
            token: (text if isinstance(text, str) else "", bytes(part) if isinstance(part, bytes | bytearray) else None)
            for token, text, part in words.itertuples(index=False)
        }

    def write_features(self, source: Path, on_progress: OnProgress | None) -> dict[str, int]:
        """Writes every batch; how many lines of each kind there are."""
        kinds = ("features", "activations", "explanations")
        counts = dict.fromkeys(kinds, 0)
        titles = self.index.titles()
        for number, first in enumerate(range(0, self.index.d_sae, FEATURES_AT_ONCE)):
            last = min(first + FEATURES_AT_ONCE, self.index.d_sae)
            named = {feature: titles[feature] for feature in range(first, last) if feature in titles}
            for kind, lines in zip(kinds, (self._features(first, last), self._activations(first, last),
                                           self._explanations(named)), strict=True):  # fmt: skip
                counts[kind] += _write_lines(source / kind / f"batch-{number}.jsonl.gz", lines)
            if on_progress is not None:
                on_progress(last, self.index.d_sae)
        return counts

    def _where(self, feature: int) -> dict[str, Any]:
        return {"modelId": self.model_id, "layer": self.source_id, "index": str(feature)}

    def _of(self, columns: str, table: str, first: int, last: int, order: str = "feature") -> dict[int, pd.DataFrame]:
        """Rows of a table by feature."""
        found = self.index.frame(
            f"SELECT feature, {columns} FROM {table} WHERE feature >= ? AND feature < ? ORDER BY {order}", [first, last]
        )
        return {int(feature): rows for feature, rows in found.groupby("feature")}

    def _features(self, first: int, last: int) -> Iterable[dict[str, Any]]:
        stats = self._of("density, minimum, maximum, histogram", "feature_stats", first, last)
        logits = self._of("low, high, histogram", "logit_stats", first, last)
        effects = self._of("sign, token, effect", "logit_effects", first, last, "feature, rank")
        near = self._of("other, cosine", "decoder_neighbours", first, last, "feature, rank")
        heads = self._of("share", "feature_heads", first, last, "feature, head")
        for feature in range(first, last):
            found = stats[feature].iloc[0]
            fires = pd.notna(found["maximum"])
            bars = _bars(found["histogram"], min(0.0, found["minimum"]), max(0.0, found["maximum"])) if fires else None
            told = logits[feature].iloc[0] if feature in logits else None
            spread = None if told is None else _bars(told["histogram"], told["low"], told["high"])
            yield {
                **self._where(feature), "sourceSetName": self.source_set, "creatorId": CREATOR_ID,
                "maxActApprox": _number(found["maximum"]) if fires else 0.0, "frac_nonzero": _number(found["density"]),
                **_named("freq_hist_data", bars), **_named("logits_hist_data", spread),
                **self._effects("pos", effects.get(feature), 1), **self._effects("neg", effects.get(feature), -1),
                "topkCosSimIndices": near[feature]["other"].tolist() if feature in near else [],
                "topkCosSimValues": _numbers(near[feature]["cosine"]) if feature in near else [],
                "decoder_weights_dist": _numbers(heads[feature]["share"].dropna()) if feature in heads else [],
            }  # fmt: skip

    def _effects(self, name: str, found: pd.DataFrame | None, sign: int) -> dict[str, Any]:
        rows = None if found is None else found[found["sign"] == sign]
        tokens = [] if rows is None else [_text(alone(*self.words[token])) for token in rows["token"]]
        return {f"{name}_str": tokens, f"{name}_values": [] if rows is None else _numbers(rows["effect"])}

    def _activations(self, first: int, last: int) -> Iterable[dict[str, Any]]:
        order = 'feature, "interval" = -1 DESC, "interval" DESC, sign DESC, rank'
        examples = self._of('sign, "interval" AS bin, row', "feature_examples", first, last, order)
        intervals = self._of('sign, "interval" AS bin, count, low, high', "feature_intervals", first, last)
        for feature, chosen in examples.items():
            fired = self.index.frame(
                "SELECT row, activation FROM feature_activations WHERE feature = ? ORDER BY row", [feature]
            )
            rows, values = fired["row"].to_numpy(), fired["activation"].to_numpy()
            bins = {
                (one.sign, one.bin): (*sorted((one.sign * one.low, one.sign * one.high)), one.count / len(rows))
                for one in intervals[feature].itertuples()
            }
            for sign, interval, row in chosen[["sign", "bin", "row"]].itertuples(index=False):
                at = self._around(row)
                shown = np.zeros(len(at))
                low, high = np.searchsorted(rows, [at[0], at[-1] + 1])
                shown[np.searchsorted(at, rows[low:high])] = values[low:high]
                pieces = joined(*zip(*(self.words[token] for token in self.token[at]), strict=True))
                bounds = bins[sign, interval] if interval >= 0 else (None, None, None)
                peak = int(shown.argmax())
                yield {
                    "id": _id(self.model_id, self.source_id, feature, sign, interval, row), **self._where(feature),
                    "creatorId": CREATOR_ID, "tokens": [_text(piece) for piece in pieces], "values": _numbers(shown),
                    "maxValue": _number(shown[peak]), "maxValueTokenIndex": peak, "minValue": _number(shown.min()),
                    "qualifyingTokenIndex": int(np.searchsorted(at, row)),
                    **{name: None if bound is None else _number(bound) for name, bound in
                       zip(("binMin", "binMax", "binContains"), bounds, strict=True)},
                }  # fmt: skip

    def _around(self, row: int) -> NDArray[np.int64]:
        """Rows of the text around one, in its context and document."""
        context = row // self.context_len * self.context_len
        last = min(context + self.context_len, row + AFTER + 1, self.n_rows)
        at = np.arange(max(context, row - BEFORE), last)
        return at[(self.doc[at] == self.doc[row]) & self.of_text[at]]

    def _explanations(self, named: Mapping[int, str]) -> Iterable[dict[str, Any]]:
        # The tables that these two would name have rows for Neuronpedia's own kinds and models only.
        unknown = {"typeName": None, "explanationModelName": None}
        for feature, title in named.items():
            yield {
                "id": _id(self.model_id, self.source_id, feature, title), **self._where(feature),
                "description": _text(title), "authorId": CREATOR_ID, **unknown,
            }  # fmt: skip


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records as compressed lines; how many there were. No file is made of none."""
    lines = [_line(record) for record in records]
    if lines:
        path.parent.mkdir(exist_ok=True)
        # Neither time nor name in the header: the same lines are the same bytes.
        path.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=5, mtime=0))
    return len(lines)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _bars(heights: NDArray, low: float, high: float) -> tuple[list[int], list[float]]:
    """Heights of a histogram's bars, and where their centres lie."""
    edges = np.linspace(low, high, len(heights) + 1)
    return [int(height) for height in heights], _numbers((edges[:-1] + edges[1:]) / 2)


def _named(name: str, bars: tuple[list[int], list[float]] | None) -> dict[str, Any]:
    heights, values = bars or ([], [])
    return {f"{name}_bar_heights": heights, f"{name}_bar_values": values}


def _number(value: float) -> float:
    """Six digits, which is what single precision holds."""
    return float(f"{value:.6g}")


def _numbers(values: Iterable[float]) -> list[float]:
    return [_number(value) for value in values]


def _text(text: str) -> str:
    """Without the one character that PostgreSQL's text cannot hold."""
    return text.replace("\0", " ")


def _id(*parts: object) -> str:
    """An id of the form of Neuronpedia's own, the same for the same parts."""
    return "c" + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]
