"""Concepts of a harvest's tokens: which row of the harvest has which concept.

1. The documents of the harvest are read again from its corpus and tokenised with character offsets; the ids must be
   those of the harvest.
2. `python_spans` or `text_spans` says where each concept holds; a token has it when its anchor does (`spans`).
3. Documents whose concepts are unknown (Python that does not parse) are left out, and counted.

Users' own concepts are a table with the columns row and concept (`from_table`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sae.errors import InputError
from workbench.features.concepts.python_spans import python_spans
from workbench.features.concepts.spans import Span, anchors, tokens_of
from workbench.features.concepts.text_spans import text_spans
from workbench.harvest.blocks import map_tensors
from workbench.harvest.reading import Harvest
from workbench.text.chats import write
from workbench.text.corpora import Corpus, Document
from workbench.text.python_source import Split

Language = Literal["auto", "python", "text"]
"""auto: Python for documents named *.py, text for the others."""
DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class ConceptTruth:
    """Which tokens of a harvest have which concepts. Concepts may overlap."""

    names: tuple[str, ...]
    """The concepts, sorted."""
    rows: Int[NDArray, "tokens"]
    """Rows of the harvest whose concepts are known, ascending."""
    document: Int[NDArray, "tokens"]
    """Document of each of these rows."""
    entry_token: Int[NDArray, "entries"]
    """Place in `rows` of every (token, concept), ascending."""
    entry_concept: Int[NDArray, "entries"]
    """Place in `names` of every (token, concept)."""
    n_documents: int
    """Documents whose concepts are known."""
    n_unparsed: int
    """Documents left out since they are not valid source."""

    @property
    def counts(self) -> Int[NDArray, "concepts"]:
        """Tokens of each concept."""
        return np.bincount(self.entry_concept, minlength=len(self.names))

    def dense(self, start: int, stop: int) -> Bool[NDArray, "tokens concepts"]:
        """Concepts of rows[start:stop]."""
        first, last = np.searchsorted(self.entry_token, [start, stop])
        matrix = np.zeros((stop - start, len(self.names)), dtype=bool)
        matrix[self.entry_token[first:last] - start, self.entry_concept[first:last]] = True
        return matrix

    def select(self, places: Int[NDArray, "chosen"]) -> "ConceptTruth":
        """The truth of rows[places] alone; `places` ascend."""
        new_place = np.full(len(self.rows), -1)
        new_place[places] = np.arange(len(places))
        token = new_place[self.entry_token]
        kept = token >= 0
        return replace(
            self,
            rows=self.rows[places],
            document=self.document[places],
            entry_token=token[kept],
            entry_concept=self.entry_concept[kept],
        )

    def table(self) -> pd.DataFrame:
        """Columns row and concept: the table that `from_table` reads."""
        names = np.array(self.names, dtype=object)
        return pd.DataFrame({"row": self.rows[self.entry_token], "concept": names[self.entry_concept]})


class _Tokens(NamedTuple):
    """The ordinary tokens of a harvest: neither BOS nor padding."""

    row: Int[NDArray, "tokens"]
    token: Int[NDArray, "tokens"]
    document: Int[NDArray, "tokens"]
    position: Int[NDArray, "tokens"]


def from_corpus(
    harvest: Harvest,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    language: Language = "auto",
    on_progress: Callable[[int, int], None] | None = None,
    max_tokens: int | None = None,
) -> ConceptTruth:
    """The concepts of a harvest's tokens.

    Args:
        corpus: the one the harvest was made from.
        tokenizer: the model's.
        language: how documents are read.
        on_progress: called with (documents done, documents in all).
        max_tokens: about so many tokens, of documents evenly spaced over the harvest; all of them when None.

    Raises:
        InputError: another corpus or tokenizer than the harvest's, no offsets, or no document that parses.
    """
    if language not in get_args(Language):
        raise InputError(f"unknown language {language!r}: choose {', '.join(get_args(Language))}")
    if corpus.fingerprint != harvest.corpus["fingerprint"]:
        raise InputError(
            f"corpus {corpus.name} is not what harvest {harvest.name!r} was made from (its contents changed): "
            "harvest again, or give the corpus as it was"
        )
    return _of_documents(
        _ordinary_tokens(harvest), corpus, harvest.config.get("split", "train"), tokenizer,
        language=language, split_special_tokens=harvest.split_special_tokens, whose=f"harvest {harvest.name!r}",
        on_progress=on_progress, max_tokens=max_tokens,
    )  # fmt: skip


def from_contexts(
    token: Int[NDArray, "tokens"],
    document: Int[NDArray, "tokens"],
    position: Int[NDArray, "tokens"],
    corpus: Corpus,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    language: Language = "auto",
) -> ConceptTruth:
    """The concepts of tokens that were read from a corpus without a harvest; rows are places in the arrays.

    Args:
        token, document, position: of ordinary tokens, as `workbench.models.contexts` hands them over.
        tokenizer: the model's.
        language: how documents are read.

    Raises:
        InputError: a corpus of token ids, no offsets, or no document that parses.
    """
    order = np.lexsort((position, document))
    tokens = _Tokens(order, token[order], document[order], position[order])
    return _of_documents(tokens, corpus, split, tokenizer, language=language, whose="what was read")


def _of_documents(
    tokens: _Tokens,
    corpus: Corpus,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    language: Language,
    whose: str,
    split_special_tokens: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    max_tokens: int | None = None,
) -> ConceptTruth:
    """The concepts of tokens, sorted by document and position, from their documents."""
    wanted = np.unique(tokens.document)
    wanted = wanted[:: 1 if max_tokens is None else max(1, len(tokens.row) // max_tokens)]
    bounds = np.searchsorted(tokens.document, wanted), np.searchsorted(tokens.document, wanted, side="right")
    place = {int(document): (int(a), int(b)) for document, a, b in zip(wanted, *bounds, strict=True)}
    found: dict[str, list[NDArray[np.int64]]] = {}
    known: list[NDArray[np.int64]] = []
    read = unparsed = 0
    for document, ids, offsets in _encoded(_wanted(corpus, split, place, whose), tokenizer, split_special_tokens):
        here = np.arange(*place[document.index])
        position = tokens.position[here]
        if position.max() >= len(ids) or (ids[position] != tokens.token[here]).any():
            raise InputError(
                f"the tokens of document {document.name!r} are not those of {whose}: "
                "use the model and corpus it was made with"
            )
        read += 1
        spans = _spans(document, language)
        if spans is None:
            unparsed += 1
        else:
            known.append(here)
            # A document may be cut off by the end of the harvest: only tokens that were harvested count.
            order = np.full(len(ids), -1)
            order[position] = here
            for concept, covered in tokens_of(spans, anchors(document.text, offsets)).items():
                harvested = order[covered]
                found.setdefault(concept, []).append(harvested[harvested >= 0])
        if on_progress is not None:
            on_progress(read, len(wanted))
    if not known:
        raise InputError(f"none of the {unparsed} documents of {whose} is valid Python: use language 'text'")
    chosen = np.sort(np.concatenate(known))
    names = tuple(sorted(concept for concept, parts in found.items() if any(len(part) for part in parts)))
    entries = [np.concatenate(found[name]) for name in names]
    return _truth(tokens, chosen, names, entries, n_documents=read - unparsed, n_unparsed=unparsed)


def from_table(harvest: Harvest, table: pd.DataFrame) -> ConceptTruth:
    """Concepts of the user's own.

    Args:
        table: columns row (of the harvest) and concept (its name), one line for each concept of each token. A token
            that is not named has none of the concepts.

    Raises:
        InputError: other columns, nothing in it, or rows that are no ordinary tokens of the harvest.
    """
    missing = [column for column in ("row", "concept") if column not in table]
    if missing:
        raise InputError(f"a table of concepts needs the columns row and concept: {missing[0]} is missing")
    if not len(table):
        raise InputError("the table of concepts is empty: give one line for each concept of each token")
    if not pd.api.types.is_integer_dtype(table["row"]) or table["concept"].isna().any():
        raise InputError("in a table of concepts row must be whole numbers and concept must not be missing")
    tokens = _ordinary_tokens(harvest, by_document=False)
    rows = table["row"].to_numpy(dtype=np.int64)
    place = np.searchsorted(tokens.row, rows)
    wrong = tokens.row[np.minimum(place, len(tokens.row) - 1)] != rows
    if wrong.any():
        raise InputError(
            f"row {rows[wrong][0]} of the table of concepts is BOS, padding or outside harvest {harvest.name!r}: "
            "name rows of ordinary tokens"
        )
    concepts = table["concept"].astype(str).to_numpy()
    names = tuple(sorted(set(concepts)))
    entries = [np.unique(place[concepts == name]) for name in names]
    every = np.arange(len(tokens.row))
    return _truth(tokens, every, names, entries, n_documents=len(np.unique(tokens.document)), n_unparsed=0)


def _truth(
    tokens: _Tokens,
    chosen: Int[NDArray, "chosen"],
    names: tuple[str, ...],
    entries: Sequence[Int[NDArray, "entries"]],
    *,
    n_documents: int,
    n_unparsed: int,
) -> ConceptTruth:
    """From places among `tokens`; sorted by row of the harvest."""
    by_row = chosen[np.argsort(tokens.row[chosen])]
    new_place = np.full(len(tokens.row), -1)
    new_place[by_row] = np.arange(len(by_row))
    token = np.concatenate([new_place[entry] for entry in entries]) if names else np.zeros(0, np.int64)
    concept = np.repeat(np.arange(len(names)), [len(entry) for entry in entries])
    order = np.lexsort((concept, token))
    return ConceptTruth(
        names=names,
        rows=tokens.row[by_row],
        document=tokens.document[by_row],
        entry_token=token[order],
        entry_concept=concept[order],
        n_documents=n_documents,
        n_unparsed=n_unparsed,
    )


def _ordinary_tokens(harvest: Harvest, by_document: bool = True) -> _Tokens:
    """Sorted by document and position, or by row."""
    columns = [map_tensors(harvest.directory / block.tokens.file) for block in harvest.blocks]
    row = np.flatnonzero(harvest.ordinary)
    token, document, position = (
        np.concatenate([column[name].numpy() for column in columns])[row].astype(np.int64)
        for name in ("token", "doc", "pos")
    )
    if by_document:
        order = np.lexsort((position, document))
        row, token, document, position = row[order], token[order], document[order], position[order]
    return _Tokens(row, token, document, position)


def _wanted(corpus: Corpus, split: Split, place: dict[int, tuple[int, int]], whose: str) -> Iterator[Document]:
    """The documents that tokens came from; reading stops after the last."""
    missing = set(place)
    for document in corpus.documents(split):
        if document.index in missing:
            if document.tokens is not None:
                raise InputError("concepts are read from text, and this corpus holds token ids: give them with --table")
            missing.remove(document.index)
            yield document
            if not missing:
                return
    raise InputError(f"corpus {corpus.name} lacks {len(missing)} documents of {whose}")


def _encoded(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool
) -> Iterator[tuple[Document, Int[NDArray, "tokens"], list[tuple[int, int]]]]:
    """Documents with token ids and offsets, tokenised as `workbench.text.packing` does."""
    if not tokenizer.is_fast:
        raise InputError("this model's tokenizer gives no character offsets: give the concepts as a table")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens
    some: list[Document] = []
    for document in documents:
        if document.messages is not None:
            document = replace(document, text=write(document.messages, tokenizer, document.name).text)
        some.append(document)
        if len(some) == DOCUMENTS_AT_ONCE:
            yield from _encode(some, backend)
            some = []
    yield from _encode(some, backend)


def _encode(
    some: list[Document], backend: Tokenizer
) -> Iterator[tuple[Document, Int[NDArray, "tokens"], list[tuple[int, int]]]]:
    encodings = backend.encode_batch([document.text for document in some], add_special_tokens=False)
    for document, encoding in zip(some, encodings, strict=True):
        yield document, np.asarray(encoding.ids, dtype=np.int64), encoding.offsets


def _spans(document: Document, language: Language) -> list[Span] | None:
    is_python = document.name.partition("#")[0].endswith(".py") if language == "auto" else language == "python"
    return python_spans(document.text) if is_python else text_spans(document.text)
