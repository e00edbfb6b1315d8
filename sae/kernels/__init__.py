"""The three products every SAE is made of: exact selection, sparse decoding, sparse gradients.

Each exists once for every device it is fast on; the caller does not choose. What is here is plain torch, the
reference and the CPU path; kernels for a device come in behind the same functions.
"""

from sae.kernels.gradients import Gradients, gradients
from sae.kernels.sparse import decode
from sae.kernels.topk import topk_encode, topk_reference

__all__ = ["Gradients", "decode", "gradients", "topk_encode", "topk_reference"]
