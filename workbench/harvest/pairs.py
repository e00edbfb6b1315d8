"""Shuffled rows at several hook points, or pairs of them, in one order: what SAEs, and transcoders, train on side by
side. A hook point that several pairs share is there once.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.ranks import ALONE, Ranks
from sae.source import Pair, Rows
from workbench.harvest.loader import RowLoader, gradients_at
from workbench.harvest.reading import Harvest
from workbench.harvest.shuffled import ShuffledRows
from workbench.text.packing import FLAG_OK

Names = Sequence[tuple[str, str]]
"""(hook point that is read, hook point that is predicted), one or several; nothing is predicted for an SAE: ""."""


def hooks_of(names: Names) -> list[str]:
    """The hook points of some pairs, each once."""
    return list(dict.fromkeys(hook for pair in names for hook in pair if hook))


def targets_of(names: Names) -> list[str]:
    """Where gradients belong: what is predicted, which for an SAE is what it reads."""
    return list(dict.fromkeys(target or hook for hook, target in names))


def described(names: Names) -> str:
    """The pairs as the name of a stream has them."""
    return ", ".join(f"{hook} to {target}" if target else hook for hook, target in names)


class PairSource:
    """A `sae.source.TargetSource` over rows whose columns are those of `hooks_of(names)`, and behind them, where there
    are gradients, those of `targets_of(names)`.

    Args:
        rows: the stream.
        names: the pairs of hook points.
        widths: of the hook points, by name.
        scales: what the gradients were multiplied by, by hook point; empty without gradients.
    """

    def __init__(
        self, rows: ShuffledRows, names: Names, widths: Mapping[str, int], scales: Mapping[str, float]
    ) -> None:
        self._rows, self._scales = rows, scales
        self._hooks, self._targets = hooks_of(names), targets_of(names)
        self._pairs = [Pair(hook, target, widths[hook], widths[target or hook]) for hook, target in names]
        self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict

    @property
    def pairs(self) -> Sequence[Pair]:
        """The pairs of hook points."""
        return self._pairs

    def next_rows(self, n: int, *, gradients: bool = False) -> Sequence[Rows]:
        """The next n rows of the stream, for every pair."""
        found = self._rows.next_columns(n, len(self._hooks) + gradients * len(self._targets))
        slopes = {
            target: column.float() / self._scales[target]
            for target, column in zip(self._targets, found[len(self._hooks) :], strict=False)
        }
        return self._of_pairs(found, slopes)

    def sample_rows(self, n: int) -> Sequence[Rows]:
        """At most n usable rows for every pair, always the same ones."""
        return self._of_pairs(self._rows.sampled(n, len(self._hooks)), {})

    def _of_pairs(self, columns: Sequence[Float[Tensor, "n width"]], slopes: Mapping[str, Tensor]) -> list[Rows]:
        by_hook = dict(zip(self._hooks, columns, strict=False))
        return [
            Rows(by_hook[pair.hook_name], by_hook.get(pair.target_hook_name),
                 slopes.get(pair.target_hook_name or pair.hook_name))
            for pair in self._pairs
        ]  # fmt: skip


class PairLoader(PairSource):
    """Rows of one harvest at pairs of hook points; those of a sample come in harvest order.

    Args:
        harvest: where the rows lie.
        pairs: (hook point that is read, hook point that is predicted), one or several; "" for an SAE's second.
        seed: of the permutations.
        device: where rows are delivered, in the stored precision.
        with_gradients: rows can be had with gradients at what is predicted, and those without a gradient are left out.
        ranks: as for `RowLoader`.

    Raises:
        InputError: a hook point or gradients that the harvest does not have, or no usable rows.
    """

    def __init__(
        self,
        harvest: Harvest,
        pairs: Names,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        with_gradients: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        vectors = {hook: harvest.vectors(hook) for hook in hooks_of(pairs)}
        slopes = {target: gradients_at(harvest, target) for target in targets_of(pairs)} if with_gradients else {}
        usable = harvest.flags == FLAG_OK if with_gradients else harvest.ordinary
        sources = [*vectors.values(), *slopes.values()]
        rows = RowLoader(harvest, sources, usable, name=described(pairs), seed=seed, device=device, ranks=ranks)
        widths = {hook: found.width for hook, found in vectors.items()}
        super().__init__(rows, pairs, widths, {target: harvest.gradient_scale(target) for target in slopes})
