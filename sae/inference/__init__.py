"""Sparse inference: codes of rows under a fixed dictionary, found row by row instead of by an encoder.

x = activations - sae.b_dec
codes = matching_pursuit(x, sae.W_dec, [8, 32])
"""

from sae.inference.coder import InferredSAE
from sae.inference.iht import iterative_hard_thresholding
from sae.inference.ista import ista, penalty_for
from sae.inference.least_squares import refit
from sae.inference.omp import least_for, matching_pursuit

__all__ = [
    "InferredSAE",
    "ista",
    "iterative_hard_thresholding",
    "least_for",
    "matching_pursuit",
    "penalty_for",
    "refit",
]
