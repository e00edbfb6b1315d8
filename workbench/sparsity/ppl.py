"""PPL-p% sparsity (2411.02335): how many activations a model can do without for a perplexity p higher.

1. A CETT target c gives every MLP its threshold (`methods.cett`, on the calibration sample).
2. The largest c is searched by bisection for which, on the held-out tokens,
       loss with the thresholds - clean loss <= ln(1 + p)
   so that the perplexity grows by the factor 1 + p at most.
3. The sparsity is the mean share of zeros among the MLPs' activations at that c.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sae.errors import InputError
from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.enforce import Tally, enforced, mean_loss
from workbench.sparsity.methods import cett

STEPS = 10
"""Bisections: the CETT target is found to 1/1024."""


@dataclass(frozen=True)
class PPLSparsity:
    """The result for one p."""

    p: float
    cett: float
    """Largest CETT target that keeps to the allowance."""
    sparsity: float
    added_nats: float
    allowed_nats: float
    """ln(1 + p)."""


def ppl_sparsity(
    model: LoadedModel,
    calibration: Calibration,
    batches: Sequence[ContextBatch],
    ps: Sequence[float] = (0.01, 0.05, 0.1),
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[PPLSparsity]:
    """Searches the CETT of every p on held-out contexts; passes are shared between the searches.

    Args:
        on_progress: called with (losses asked for, losses in all); those known already cost nothing.

    Raises:
        InputError: a p that is not positive, or one that no threshold reaches: dropping every activation of the MLPs
            costs less than ln(1 + p).
    """
    for p in ps:
        if not (math.isfinite(p) and p > 0):
            raise InputError(f"p must be a positive share (0.01 allows a 1% higher perplexity), got {p}")
    clean = mean_loss(model, batches)
    tried: dict[float, tuple[float, float]] = {}
    passes, expected = 0, search_passes(len(ps))

    def at(target: float) -> tuple[float, float]:
        """(added nats, sparsity) at a CETT target."""
        nonlocal passes
        if target not in tried:
            tally = Tally()
            with enforced(model, calibration, cett.keeps(target, calibration), tally):
                loss = mean_loss(model, batches)
            tried[target] = (loss - clean, tally.sparsity())
        passes += 1
        if on_progress is not None:
            on_progress(passes, expected)
        return tried[target]

    return [_search(p, at) for p in ps]


def search_passes(n: int) -> int:
    """How many times the search for `n` values of p asks for a loss: the end, the steps and the outcome of each."""
    return n * (STEPS + 2)


def _search(p: float, at: Callable[[float], tuple[float, float]]) -> PPLSparsity:
    allowed = math.log1p(p)
    most, _ = at(1.0)
    if most <= allowed:
        raise InputError(
            f"no threshold reaches p = {p:g}: dropping the MLPs' activations altogether costs {most:.3g} nats and "
            f"ln(1 + p) is {allowed:.3g}; ask for a smaller p, or leave PPL-p% out with --no-ppl (in Python ps=())"
        )
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if at(middle)[0] <= allowed:
            low = middle
        else:
            high = middle
    added, sparsity = at(low)
    return PPLSparsity(p, low, sparsity, added, allowed)
