"""The three products every SAE is made of: exact selection, sparse decoding, sparse gradients.

Each exists once for every device it is fast on; the caller does not choose. What is here is plain torch, the
reference and the CPU path; kernels for a device come in behind the same functions.
"""

from sae.kernels.batch_topk import batch_topk_encode
from sae.kernels.feature_topk import feature_topk_encode
from sae.kernels.gradient_topk import gradient_topk_encode, mean_influence
from sae.kernels.gradients import Gradients, entry_gradients, gradients, sum_entries
from sae.kernels.scores import Encoder
from sae.kernels.sparse import by_feature, decode, feature_block, ragged_code
from sae.kernels.threshold import count_positive, is_above, threshold_encode
from sae.kernels.topk import topk_encode, topk_reference

__all__ = [
    "Encoder",
    "Gradients",
    "batch_topk_encode",
    "by_feature",
    "count_positive",
    "decode",
    "entry_gradients",
    "feature_block",
    "feature_topk_encode",
    "gradient_topk_encode",
    "gradients",
    "is_above",
    "mean_influence",
    "ragged_code",
    "sum_entries",
    "threshold_encode",
    "topk_encode",
    "topk_reference",
]
