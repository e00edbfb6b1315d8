"""Texts as bags of what occurs in them, weighted and compared as text retrieval does with words.

Of item i (a feature, a token) in text u, with a_ui the amount of it there (times, a sum, a maximum) and N texts, n_i of
which have it (Salton and Buckley 1988, "Term-weighting approaches in automatic text retrieval"):

    w_ui = sign(a_ui) log(1 + |a_ui|) log(N / n_i)        cos(u, v) = sum_i w_ui w_vi / (|w_u| |w_v|)

An item that every text has weighs nothing. The summands of the cosine are the parts that the items have in it.

Nothing of [texts, items] is formed but a block of `ITEMS_AT_ONCE` items.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

ITEMS_AT_ONCE = 4096


@dataclass(frozen=True)
class Bags:
    """How much of which item occurs in which text: the entries of a sparse [texts, items] matrix, ordered by text and
    item, each pair once."""

    text: Int[NDArray, "entries"]
    item: Int[NDArray, "entries"]
    amount: Float[NDArray, "entries"]
    n_texts: int

    @classmethod
    def counted(cls, items: Int[NDArray, "texts tokens"]) -> "Bags":
        """How often which item stands in each row."""
        texts = np.repeat(np.arange(len(items)), items.shape[1])
        pairs, amount = np.unique(np.stack([texts, items.reshape(-1)]), axis=1, return_counts=True)
        return cls(pairs[0], pairs[1], amount.astype(float), len(items))

    def idf(self, n_items: int) -> Float[NDArray, "n_items"]:
        """log(N / n_i) of every item; 0 of those that no text has."""
        having = np.bincount(self.item[self.amount != 0], minlength=n_items)
        return np.log(self.n_texts / np.where(having > 0, having, self.n_texts))

    def weighted(self, idf: Float[NDArray, "items"]) -> "Bags":
        """The weights w_ui, by the idf of these texts or of others."""
        amount = np.sign(self.amount) * np.log1p(np.abs(self.amount)) * idf[self.item]
        return replace(self, amount=amount)

    def by_own_idf(self) -> "Bags":
        """The weights w_ui, by the idf of these texts."""
        return self.weighted(self.idf(int(self.item.max(initial=-1)) + 1))

    def strongest(self, k: int) -> "Bags":
        """The k items of every text whose amounts are largest, whatever their sign; of equals the first."""
        order = np.lexsort((self.item, -np.abs(self.amount), self.text))
        starts = np.searchsorted(self.text, np.arange(self.n_texts))
        kept = np.sort(order[np.arange(len(order)) - starts[self.text[order]] < k])
        return replace(self, text=self.text[kept], item=self.item[kept], amount=self.amount[kept])

    def of(self, text: int) -> "Bags":
        """One text alone, as the only one."""
        mine = slice(*np.searchsorted(self.text, [text, text + 1]))
        return Bags(np.zeros_like(self.text[mine]), self.item[mine], self.amount[mine], 1)

    def every_second(self, first: int) -> "Bags":
        """The texts first, first + 2, ..."""
        mine = self.text % 2 == first
        return Bags(self.text[mine] // 2, self.item[mine], self.amount[mine], (self.n_texts + 1 - first) // 2)

    @property
    def norms(self) -> Float[NDArray, "n_texts"]:
        """|w_u| of every text."""
        return np.sqrt(np.bincount(self.text, self.amount**2, self.n_texts))

    def cosines(self, other: "Bags") -> Float[NDArray, "n_texts others"]:
        """Cosine of every text with every one of `other`; 0 where either has no weight at all."""
        dots = np.zeros((self.n_texts, other.n_texts))
        for mine, theirs in zip(self._blocks(other), other._blocks(self), strict=True):
            dots += mine @ theirs.T
        scale = self.norms[:, None] * other.norms
        return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)

    def _blocks(self, other: "Bags") -> Iterator[Float[NDArray, "n_texts block"]]:
        """The dense matrix, some items of both at a time."""
        n_items = max((int(one.item.max()) + 1 for one in (self, other) if len(one.item)), default=0)
        order = np.argsort(self.item, kind="stable")
        item = self.item[order]
        for first in range(0, n_items, ITEMS_AT_ONCE):
            mine = order[slice(*np.searchsorted(item, [first, first + ITEMS_AT_ONCE]))]
            block = np.zeros((self.n_texts, min(ITEMS_AT_ONCE, n_items - first)))
            block[self.text[mine], self.item[mine] - first] = self.amount[mine]
            yield block
