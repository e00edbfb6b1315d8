"""The curves of the activation ratio over training find what was planted."""

import numpy as np
import pytest

from benchmarks.activation_over_training import falling, rising

TOKENS = np.array([4.0, 8.0, 16.0, 31.0, 63.0, 126.0])


def test_curves_over_training_find_planted_parameters() -> None:
    down = falling(TOKENS, 0.1 + np.exp(-1.0 - 0.4 * TOKENS**0.5))
    assert [down[name] for name in ("A0", "alpha", "b", "c")] == pytest.approx([0.1, 0.5, -1.0, 0.4], abs=0.02)
    up = rising(TOKENS, 0.9 - 0.8 * TOKENS**-0.3)
    assert [up[name] for name in ("A0", "alpha", "c")] == pytest.approx([0.9, 0.3, 0.8], abs=0.01)
    # Neither takes the other's data for its own.
    assert down["rms"] < 1e-3 < falling(TOKENS, 0.9 - 0.8 * TOKENS**-0.3)["rms"]
    assert up["rms"] < 1e-3
    assert not np.isfinite(rising(TOKENS, 0.1 + np.exp(-1.0 - 0.4 * TOKENS**0.5))["rms"])
