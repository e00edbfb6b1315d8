"""The level at a given cost: on curves of known form, and on models."""

from dataclasses import replace

import pytest

from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel
from workbench.sparsity.at_cost import STEPS, TOLERANCE, at_costs, level_at
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.enforce import Point, enforce
from workbench.sparsity.methods import method_named

POINT = Point("m", 0.0, 0.0, 1.0, 0.0, 2.7, 0.0, 0.0, None)


def convex(level: float) -> Point:
    """Costs 2 level^4, as many methods' cost rises late; the share of zeros is the level."""
    return replace(POINT, level=level, sparsity=level, added_nats=2 * level**4)


def test_a_convex_curve_over_coarse_levels_is_searched_and_not_interpolated() -> None:
    asked: list[float] = []

    def measured(level: float) -> Point:
        asked.append(level)
        return convex(level)

    curve = [convex(level) for level in (0.0, 0.5, 0.9)]
    found = level_at(curve, 0.05, measured)
    assert found.added_nats == pytest.approx(0.05, rel=TOLERANCE)
    # A straight line from nothing at 0 to 0.125 nats at 0.5 would say 0.2.
    assert found.sparsity == pytest.approx((0.05 / 2) ** 0.25, rel=TOLERANCE)
    assert 1 < len(asked) <= STEPS
    assert all(0 < level < 0.5 for level in asked)


def test_a_method_that_never_costs_as_much_is_given_at_its_last_level() -> None:
    curve = [convex(level) for level in (0.0, 0.1, 0.2)]
    assert level_at(curve, 0.5, convex) == curve[-1]


def test_a_step_in_the_curve_ends_the_search_at_the_nearer_side() -> None:
    """Top-k keeps whole neurons: no level may cost what is asked for."""

    def stepped(level: float) -> Point:
        return replace(convex(level), added_nats=0.04 if level < 0.3 else 0.2)

    found = level_at([convex(0.0), stepped(0.5)], 0.05, stepped)
    assert found.added_nats == 0.04


def test_every_method_is_measured_where_it_costs_what_is_asked(
    model: LoadedModel, calibration: Calibration, held_out: list[ContextBatch]
) -> None:
    methods = [method_named(name) for name in ("topk", "CETT", "TEAL")]
    curves = enforce(model, calibration, held_out, methods=methods)
    found = at_costs(
        model, calibration, held_out, methods, curves.points, clean_loss=curves.clean_loss, costs=(0.02, 0.1)
    )
    assert len(found) == 6
    for row in found.itertuples():
        again = enforce(
            model, calibration, held_out, methods=[replace(method_named(row.method), levels=(0.0, row.level))]
        )
        point = again.points[1]
        assert point.added_nats == pytest.approx(row.added_nats, abs=1e-9)
        assert point.sparsity == row.sparsity
        assert point.flops_saved == row.flops_saved
    for name, rows in found.groupby("method"):
        assert rows["sparsity"].is_monotonic_increasing, name
