"""Shuffled batches of pairs of hook points from one harvest, for transcoders: what one reads and what it predicts.

The rows of all pairs come in one order, that of `workbench.harvest.loader`; a hook point that several pairs share is
read once.
"""

from collections.abc import Sequence

import torch

from sae.source import Pair, Rows
from workbench.harvest.loader import RowLoader, gradients_at
from workbench.harvest.reading import Harvest
from workbench.text.packing import FLAG_OK


class PairLoader(RowLoader):
    """Rows at pairs of hook points; a `sae.source.TargetSource`.

    Args:
        harvest: where the rows lie.
        pairs: (hook point that is read, hook point that is predicted), one or several.
        seed: of the permutations.
        device: where rows are delivered, in the stored precision.
        with_gradients: rows can be had with gradients at what is predicted, and those without a gradient are left out.

    Raises:
        InputError: a hook point or gradients that the harvest does not have, or no usable rows.
    """

    def __init__(
        self,
        harvest: Harvest,
        pairs: Sequence[tuple[str, str]],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        with_gradients: bool = False,
    ) -> None:
        hooks = list(dict.fromkeys(hook for pair in pairs for hook in pair))
        vectors = {hook: harvest.vectors(hook) for hook in hooks}
        targets = list(dict.fromkeys(target for _, target in pairs)) if with_gradients else []
        slopes = {target: gradients_at(harvest, target) for target in targets}
        usable = harvest.flags == FLAG_OK if with_gradients else harvest.ordinary
        name = ", ".join(f"{hook} to {target}" for hook, target in pairs)
        sources = [*vectors.values(), *slopes.values()]
        super().__init__(harvest, sources, usable, name=name, seed=seed, device=device)
        self._scales = {target: harvest.gradient_scale(target) for target in targets}
        self._hooks, self._targets = hooks, targets
        self._pairs = [Pair(hook, target, vectors[hook].width, vectors[target].width) for hook, target in pairs]

    @property
    def pairs(self) -> Sequence[Pair]:
        """The pairs of hook points."""
        return self._pairs

    def next_rows(self, n: int, *, gradients: bool = False) -> Sequence[Rows]:
        """The next n rows of the stream, for every pair."""
        wanted = self._sources if gradients else self._sources[: len(self._hooks)]
        found = self._next_rows(n, wanted)
        by_hook = dict(zip(self._hooks, found, strict=False))
        slopes = {
            target: column.float() / self._scales[target]
            for target, column in zip(self._targets, found[len(self._hooks) :], strict=False)
        }
        return [
            Rows(by_hook[pair.hook_name], by_hook[pair.target_hook_name], slopes.get(pair.target_hook_name))
            for pair in self._pairs
        ]

    def sample_rows(self, n: int) -> Sequence[Rows]:
        """At most n usable rows for every pair, always the same for a harvest and n, in harvest order."""
        rows = self._sampled(n)
        columns = zip(self._hooks, self._sources, strict=False)
        by_hook = {hook: source.rows(rows).to(self._device) for hook, source in columns}
        return [Rows(by_hook[pair.hook_name], by_hook[pair.target_hook_name]) for pair in self._pairs]
