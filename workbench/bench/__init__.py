"""A training step's speed on this machine, beside its floor and the libraries that are installed."""

from workbench.bench.arms import DEFAULT_SIZES, SIZES, Size
from workbench.bench.timing import Measured, measure

__all__ = ["DEFAULT_SIZES", "SIZES", "Measured", "Size", "measure"]
