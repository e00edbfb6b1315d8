"""Thresholds of the adaptive patterns at which queries see as many keys, in the mean, as a fixed budget gives.

A budget of B keys gives the query at position q min(B, q + 1) of them. An adaptive pattern keeps the keys whose weight
reaches t, so the mean number of keys at t is the number of weights of at least t over the number of queries: the t of
a budget is a quantile of the weights of all keys, heads and layers. They are counted in bins of log10(weight), so that
memory does not grow with the text; t is exact to a bin, 1 / PER_DECADE of a decade.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.sparsity.attention_patterns import Weight

DECADES = 12
"""Weights below 10^-DECADES are counted as nothing."""
PER_DECADE = 2000


class LevelSearch:
    """Counts the weights of one adaptive pattern over passes."""

    def __init__(self, weight: Weight, device: torch.device) -> None:
        self.weight = weight
        self._counts = torch.zeros(DECADES * PER_DECADE + 1, dtype=torch.int64, device=device)
        self._queries = torch.zeros(0, dtype=torch.int64, device=device)
        """By position: rows of attention seen."""

    def add(self, attention: Float[Tensor, "batch head query key"], ordinary: Bool[Tensor, "batch query"]) -> None:
        """Counts the keys of the queries where `ordinary` is true."""
        length = attention.shape[-2]
        causal = torch.ones(length, length, dtype=torch.bool, device=attention.device).tril()
        rows = ordinary[:, None, :, None] & causal
        weights = self.weight(attention)[rows.expand_as(attention)]
        bins = ((weights.double().log10() + DECADES) * PER_DECADE).clamp(0, DECADES * PER_DECADE).long()
        self._counts += torch.bincount(bins, minlength=len(self._counts))
        seen = ordinary.sum(dim=0) * attention.shape[1]
        if len(self._queries) < length:
            self._queries = torch.nn.functional.pad(self._queries, (0, length - len(self._queries)))
        self._queries[:length] += seen

    def thresholds(self, budgets: Sequence[int]) -> list[float]:
        """The t of every budget; 0, which keeps all keys, where the budget takes in every key seen."""
        positions = torch.arange(len(self._queries), device=self._queries.device) + 1
        at_least = self._counts.flip(0).cumsum(0).flip(0)
        found = []
        for budget in budgets:
            wanted = int((self._queries * positions.clamp(max=budget)).sum())
            # at_least falls: the last bin in which enough keys are left.
            place = int((at_least >= wanted).sum()) - 1
            everything = place <= 0 or wanted == int(at_least[0])
            found.append(0.0 if everything else 10.0 ** (place / PER_DECADE - DECADES))
        return found
