"""How much each method thins for a given cost: the level at which it costs that many nats, found by search.

1. The standard curve brackets the crossing: the first level that costs more than allowed, and the one before it.
2. Between the two the level is searched by false position, the end that stays being halved in weight each time it
   stays (Illinois): the curves are convex, and a straight line between levels that lie apart says much too little.
3. The search ends when the cost is met to TOLERANCE of it, or after STEPS measurements; the level of nearest cost is
   taken, with the share of zeros and the weight products saved that were measured there. Methods that stay below the
   cost at their last level are given with that level.
"""

from collections.abc import Callable, Sequence

import pandas as pd

from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.enforce import Point, Tally, enforced, mean_loss, point_of
from workbench.sparsity.methods import Method

COSTS = (0.05, 0.1, 0.5)
"""Added nats."""
STEPS = 8
TOLERANCE = 0.01


def at_costs(
    model: LoadedModel,
    calibration: Calibration,
    batches: Sequence[ContextBatch],
    methods: Sequence[Method],
    curves: Sequence[Point],
    *,
    clean_loss: float,
    costs: Sequence[float] = COSTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row per method and cost: method, cost, level, sparsity, added_nats, flops_saved, flops_saved_predictor.

    Args:
        curves: points of these methods on the same tokens, levels upwards, the first one costing nothing.
        clean_loss: on these tokens.
        on_progress: called with (searches ended, searches in all).
    """
    rows: list[dict[str, object]] = []
    for method in methods:
        own = [point for point in curves if point.method == method.name]

        def measured(level: float, method: Method = method) -> Point:
            tally = Tally()
            with enforced(model, calibration, method.keeps(level, calibration), tally):
                loss = mean_loss(model, batches)
            return point_of(calibration, method, level, tally, (loss, float("nan")), clean_loss)

        for cost in costs:
            found = level_at(own, cost, measured)
            rows.append(
                {
                    "method": method.name, "cost": cost, "level": found.level, "sparsity": found.sparsity,
                    "added_nats": found.added_nats, "flops_saved": found.flops_saved,
                    "flops_saved_predictor": found.flops_saved_predictor,
                }
            )  # fmt: skip
            if on_progress is not None:
                on_progress(len(rows), len(methods) * len(costs))
    return pd.DataFrame(rows)


def level_at(curve: Sequence[Point], cost: float, measured: Callable[[float], Point]) -> Point:
    """The point of nearest cost found; see steps 1 to 3 of the module's description."""
    over = next((number for number, point in enumerate(curve) if point.added_nats > cost), None)
    if over is None or over == 0:
        return curve[-1 if over is None else 0]
    low, high = curve[over - 1], curve[over]
    below, above = low.added_nats - cost, high.added_nats - cost
    best = min(low, high, key=lambda point: abs(point.added_nats - cost))
    last = 0
    for _ in range(STEPS):
        if abs(best.added_nats - cost) <= TOLERANCE * cost:
            break
        point = measured(low.level + (high.level - low.level) * below / (below - above))
        best = min(best, point, key=lambda point: abs(point.added_nats - cost))
        if point.added_nats > cost:
            high, above, below = point, point.added_nats - cost, below / 2 if last == 1 else below
            last = 1
        else:
            low, below, above = point, point.added_nats - cost, above / 2 if last == -1 else above
            last = -1
    return best
