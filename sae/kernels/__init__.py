"""The three products every SAE is made of: exact selection, sparse decoding, sparse gradients.

The caller does not choose a device's implementation: `dispatch` does. The modules beside it are plain torch, the
reference and the CPU path; `triton` holds the GPU's kernels behind the same signatures.
"""

from sae.kernels.backward import Gradients, bias_gradient, entry_gradients, sum_entries
from sae.kernels.dispatch import (
    MAX_K,
    batch_topk_encode,
    best_of_shards,
    decode,
    feature_topk_encode,
    gradient_topk_encode,
    gradients,
    has_triton,
    topk_encode,
)
from sae.kernels.gradient_topk import mean_influence
from sae.kernels.scores import Encoder
from sae.kernels.shards import best_of_columns, largest_of_shards
from sae.kernels.sparse import by_feature, feature_block, ragged_code
from sae.kernels.threshold import count_positive, is_above, threshold_encode
from sae.kernels.topk import topk_reference

__all__ = [
    "MAX_K",
    "Encoder",
    "Gradients",
    "batch_topk_encode",
    "best_of_columns",
    "best_of_shards",
    "bias_gradient",
    "by_feature",
    "count_positive",
    "decode",
    "entry_gradients",
    "feature_block",
    "feature_topk_encode",
    "gradient_topk_encode",
    "gradients",
    "has_triton",
    "is_above",
    "largest_of_shards",
    "mean_influence",
    "ragged_code",
    "sum_entries",
    "threshold_encode",
    "topk_encode",
    "topk_reference",
]
