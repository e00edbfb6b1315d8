"""Documents like one of them, or like a text: by the cosine of their weighted codes (`bags`, `pooling`).

1. The codes of every document of the index are pooled and weighted, with idf over the documents.
2. So is the query's: a document of the index, or a text that the model and the SAE read now, with the documents' idf.
3. The documents with the greatest cosines are kept, and of each the features with the greatest parts in its cosine:
   what the two share. The parts of all features add up to the cosine.
"""

from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sae.errors import InputError
from sae.shown import Shown
from workbench.catalog.catalog import Catalog
from workbench.features.documents.bags import Bags
from workbench.features.documents.pooling import Pooling, check_pooling, documents_of, pooled, pooled_reading
from workbench.features.index.query import FeatureIndex
from workbench.features.live import open_live

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel

LIMIT, SHARED = 10, 5
"""Documents that are kept, and features of each."""
NAMED = 3
"""Features of a document that its line in the table names."""


@dataclass(frozen=True, repr=False)
class DocumentCodes(Shown):
    """The documents of an index with their pooled codes."""

    sae: str
    pooling: Pooling
    documents: pd.DataFrame
    """As `documents_of`: doc, document, tokens, first, last."""
    bags: Bags
    d_sae: int

    @classmethod
    def of(cls, index: FeatureIndex, pooling: Pooling = "sum") -> "DocumentCodes":
        """Pools the codes of an index. Raises InputError for a pooling there is not."""
        check_pooling(pooling)
        documents = documents_of(index)
        bags = pooled(index, documents["first"].to_numpy(), documents["last"].to_numpy())[pooling]
        return cls(index.sae, pooling, documents, bags, index.d_sae)

    def place(self, document: str) -> int:
        """Which document is meant: by its name, or by its number `doc` where names repeat.

        Raises:
            InputError: no such document, naming near ones, or several of one name, saying their numbers.
        """
        names, numbers = self.documents["document"], self.documents["doc"].astype(str)
        found = np.flatnonzero(names == document)
        if not len(found):
            found = np.flatnonzero(numbers == document)
        if not len(found):
            near = get_close_matches(document, names.dropna().unique().tolist(), n=3, cutoff=0.4)
            remedy = f"near are {', '.join(near)}" if near else f"the first is {names.iloc[0]!r}"
            raise InputError(f"no document {document!r} in the index of {self.sae}: {remedy}")
        if len(found) > 1:
            given = ", ".join(numbers.iloc[found[:5]])
            raise InputError(f"{len(found)} documents are called {document!r}: give the number of one ({given}, ...)")
        return int(found[0])

    def like_document(
        self, index: FeatureIndex, document: str, *, limit: int = LIMIT, shared: int = SHARED
    ) -> "SimilarDocuments":
        """The documents most like one of them; arguments and InputErrors as `place` and `like`."""
        place = self.place(document)
        name = str(self.documents["document"].iloc[place])
        return self.like(index, self.bags.of(place), name, leave_out=place, limit=limit, shared=shared)

    def like(self, index: FeatureIndex, query: Bags, name: str, *, leave_out: int | None = None,
             limit: int = LIMIT, shared: int = SHARED) -> "SimilarDocuments":  # fmt: skip
        """The documents most like a text, with what they share.

        Args:
            index: whose documents these are, for the features' names.
            query: the text's pooled code, not weighted.
            name: what to call it.
            leave_out: place of a document that is not to be found: the query itself.
            limit: documents that are kept.
            shared: features that are kept of each.

        Raises:
            InputError: a text in which nothing fires that would tell documents apart.
        """
        idf = self.bags.idf(self.d_sae)
        own, theirs = query.weighted(idf), self.bags.weighted(idf)
        if not own.norms[0]:
            raise InputError(f"no feature that tells documents apart fires in {name!r}: give a longer text")
        cosine = own.cosines(theirs)[0]
        cosine[[] if leave_out is None else [leave_out]] = -np.inf
        best = np.argsort(-cosine, kind="stable")[: min(limit, len(cosine) - (leave_out is not None))]
        parts = [_parts(own, theirs.of(place), query, self.bags.of(place), shared) for place in best]
        features = index.names(sorted({feature for part in parts for feature in part["feature"]}))
        found = self.documents.iloc[best].reset_index(drop=True)
        for part, document, doc in zip(parts, found["document"], found["doc"], strict=True):
            part.insert(0, "document", document)
            part.insert(1, "doc", doc)
            part.insert(3, "name", [features[feature] for feature in part["feature"]])
        table = found[["document", "doc", "tokens"]].assign(cosine=cosine[best])
        together = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        return SimilarDocuments(self.sae, name, self.pooling, len(self.documents), table, together)


@dataclass(frozen=True)
class SimilarDocuments:
    """Documents like a query, the most alike first."""

    sae: str
    query: str
    """The document's name, or the text that was read."""
    pooling: Pooling
    n_documents: int
    """That were compared, the query's own among them."""
    documents: pd.DataFrame
    """Columns document, doc, tokens, cosine."""
    shared: pd.DataFrame
    """Columns document, doc, feature, name, part (of the cosine; all features' add up to it), here and there (the
    feature's amount in the query and in the document, as `pooling` says): the greatest parts of each document."""

    def table(self) -> pd.DataFrame:
        """The documents, with the names of the features that they share most, `NAMED` of them."""
        names = self.shared.groupby("doc")["name"].agg(lambda of: "; ".join(of[:NAMED])) if len(self.shared) else {}
        return self.documents.assign(shared=[names.get(doc, "") for doc in self.documents["doc"]])

    def __repr__(self) -> str:
        return f"SimilarDocuments({self.sae!r}, {self.query[:40]!r}): {len(self.documents)} of {self.n_documents:,}"

    def _repr_html_(self) -> str:
        said = f"Documents like {escape(self.query[:80])}, by {self.sae} ({self.pooling})"
        return f"<p>{said}</p>{self.table().drop(columns='doc').to_html(index=False)}"


def names_of(documents: pd.DataFrame) -> list[str]:
    """What `DocumentCodes.place` takes for each of `documents_of`: its name, or its number where names repeat."""
    alone = ~documents["document"].duplicated(keep=False) & documents["document"].notna()
    return documents["document"].where(alone, documents["doc"].astype(str)).tolist()


def similar_documents(
    catalog: Catalog,
    sae: str,
    document: str | None = None,
    *,
    text: str | None = None,
    pooling: Pooling = "sum",
    limit: int = LIMIT,
    shared: int = SHARED,
    model: "LoadedModel | None" = None,
    device: str = "auto",
) -> SimilarDocuments:
    """The documents of an SAE's index most like one of them, or like a text; see the module's description.

    Args:
        document: name of a document of the index, or its number.
        text: in place of one; as much of it is read as of a prompt (`workbench.features.prompts`).
        limit: documents that are kept.
        shared: features that are kept of each.
        model: the SAE's model, already loaded, for a text.
        device: where a model that is not given runs.

    Raises:
        InputError: neither or both of document and text, an SAE without index, no such document, or a text as
            `Workspace.prompt` refuses it.
    """
    if (document is None) == (text is None):
        raise InputError("name a document of the index, or give a --text in its place")
    if limit < 1 or shared < 1:
        raise InputError(f"documents and features to show must be at least 1, got {limit} and {shared}")
    check_pooling(pooling)
    with closing(FeatureIndex.open(catalog, sae)) as index:
        if text is not None:
            reading = open_live(catalog, sae, model=model, device=device).read(text)
            query = pooled_reading(reading.feature, reading.activation, pooling)
            codes = DocumentCodes.of(index, pooling)
            return codes.like(index, query, reading.text, limit=limit, shared=shared)
        return DocumentCodes.of(index, pooling).like_document(index, str(document), limit=limit, shared=shared)


def _parts(own: Bags, other: Bags, here: Bags, there: Bags, most: int) -> pd.DataFrame:
    """The features with the greatest parts in the cosine of two texts: weighted, and as they were before."""
    feature, mine, theirs = np.intersect1d(own.item, other.item, return_indices=True)
    part = own.amount[mine] * other.amount[theirs] / max(own.norms[0] * other.norms[0], 1e-300)
    order = np.argsort(-part, kind="stable")[:most]
    order = order[part[order] > 0]
    return pd.DataFrame(
        {"feature": feature[order], "part": part[order], "here": here.amount[mine][order],
         "there": there.amount[theirs][order]}
    )  # fmt: skip
