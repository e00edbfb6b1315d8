"""Triton kernels for a training step on NVIDIA GPUs: the operations of `sae.kernels`, and whole steps made of them.

Operations that have a plain-torch counterpart take the same arguments, with three differences that
`sae.kernels.dispatch` takes care of: encoders over the batch and by feature return codes whose last slots may be
empty, so that nothing waits for the device; W_enc may have columns of zeros beyond b_enc's; `gradients` makes new
tensors each time. Beside them stand the parts of a step that only the fused step uses.

Importing this package imports triton; nothing in `sae` does so before a CUDA tensor asks for it.
"""

from sae.kernels.triton.aux import aux_gradients
from sae.kernels.triton.backward import gradients
from sae.kernels.triton.batch import (
    MAX_MEAN,
    MAX_TOKENS,
    Listing,
    batch_topk_encode,
    best_of_features,
    feature_topk_encode,
    largest,
    list_batch_topk,
)
from sae.kernels.triton.dense import DensePass, dense_pass
from sae.kernels.triton.encode import gradient_topk_encode, paired_topk_encode, topk_encode
from sae.kernels.triton.features import AuxGradients, FeatureGradients, WindowSums
from sae.kernels.triton.nested import Nesting, Parts
from sae.kernels.triton.parameters import AdamStep, Moments, Parameters, step_scalars
from sae.kernels.triton.report import add_to_report
from sae.kernels.triton.shards import Errors, best_of_shards, encode_over_ranks
from sae.kernels.triton.side import Side
from sae.kernels.triton.sizes import SIZES, KernelSizes
from sae.kernels.triton.sparse import Centred, CentredRows, centre, centre_pair, centre_rows, decode, residual, spread
from sae.kernels.triton.step import (
    GraphedStep,
    OwnTensor,
    StepResult,
    ThresholdTerms,
    learn,
    learn_densely,
    topk_rule,
    training_step,
)
from sae.kernels.triton.threshold import ListedAbove, entries_of, list_above
from sae.kernels.triton.update import (
    clip_factor,
    update_from_code,
    update_from_gradients,
)

__all__ = [
    "MAX_MEAN",
    "MAX_TOKENS",
    "SIZES",
    "AdamStep",
    "AuxGradients",
    "Centred",
    "CentredRows",
    "DensePass",
    "Errors",
    "FeatureGradients",
    "GraphedStep",
    "KernelSizes",
    "ListedAbove",
    "Listing",
    "Moments",
    "Nesting",
    "OwnTensor",
    "Parameters",
    "Parts",
    "Side",
    "StepResult",
    "ThresholdTerms",
    "WindowSums",
    "add_to_report",
    "aux_gradients",
    "batch_topk_encode",
    "best_of_features",
    "best_of_shards",
    "centre",
    "centre_pair",
    "centre_rows",
    "clip_factor",
    "decode",
    "dense_pass",
    "encode_over_ranks",
    "entries_of",
    "feature_topk_encode",
    "gradient_topk_encode",
    "gradients",
    "largest",
    "learn",
    "learn_densely",
    "list_above",
    "list_batch_topk",
    "paired_topk_encode",
    "residual",
    "spread",
    "step_scalars",
    "topk_encode",
    "topk_rule",
    "training_step",
    "update_from_code",
    "update_from_gradients",
]
