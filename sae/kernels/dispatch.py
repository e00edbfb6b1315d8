"""One name for each operation: Triton's kernels where the tensors lie on a GPU, plain torch everywhere else.

Triton launches on the current device, which each operation makes that of its tensors.

float64, codes of more than `MAX_K` entries a token, and machines without triton take the plain path on a GPU too.
"""

from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels import backward, batch_topk, feature_topk, gradient_topk, shards, sparse, topk
from sae.kernels.backward import Gradients
from sae.ranks import Ranks

MAX_K = 512


@cache
def _triton() -> ModuleType | None:
    try:
        from sae.kernels import triton
    except ImportError:
        return None
    return triton


def has_triton() -> bool:
    """Whether triton can be imported; imports it."""
    return _triton() is not None


def _kernels_for(tensor: Tensor) -> ModuleType | None:
    return _triton() if tensor.is_cuda and tensor.dtype != torch.float64 else None


def topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    k: int,
    *,
    absolute: bool = False,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """See `sae.kernels.topk.topk_encode`."""
    kernels = _kernels_for(x)
    if kernels is None or k > MAX_K:
        return topk.topk_encode(x, W_enc, b_enc, k, absolute=absolute)
    with torch.cuda.device_of(x):
        values, indices = kernels.topk_encode(x, W_enc, b_enc, k, absolute=absolute)
    return values, indices


def gradient_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    g: Float[Tensor, "n d_in"],
    k: int,
    beta: float,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """See `sae.kernels.gradient_topk.gradient_topk_encode`."""
    kernels = _kernels_for(x)
    if kernels is None or k > MAX_K:
        return gradient_topk.gradient_topk_encode(x, W_enc, b_enc, W_dec, g, k, beta)
    with torch.cuda.device_of(x):
        values, indices = kernels.gradient_topk_encode(x, W_enc, b_enc, W_dec, g, k, beta)
    return values, indices


def batch_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    n_entries: int,
    *,
    absolute: bool = False,
) -> SparseCode:
    """See `sae.kernels.batch_topk.batch_topk_encode`."""
    kernels = _kernels_for(x)
    if kernels is None:
        return batch_topk.batch_topk_encode(x, W_enc, b_enc, n_entries, absolute=absolute)
    with torch.cuda.device_of(x):
        return _without_empty_slots(kernels.batch_topk_encode(x, W_enc, b_enc, n_entries, absolute=absolute))


def feature_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    budgets: Int[Tensor, "d_sae"],
) -> SparseCode:
    """See `sae.kernels.feature_topk.feature_topk_encode`."""
    kernels = _kernels_for(x)
    if kernels is None:
        return feature_topk.feature_topk_encode(x, W_enc, b_enc, budgets)
    with torch.cuda.device_of(x):
        return _without_empty_slots(kernels.feature_topk_encode(x, W_enc, b_enc, budgets))


def best_of_shards(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], ranks: Ranks
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """See `sae.kernels.shards.best_of_shards`."""
    kernels = _kernels_for(values)
    if kernels is None or values.shape[1] > MAX_K:
        return shards.best_of_shards(values, indices, ranks)
    with torch.cuda.device_of(values):
        kept, features = kernels.best_of_shards(values, indices, ranks)
    return kept, features


def _without_empty_slots(code: SparseCode) -> SparseCode:
    """A ragged code without what lies behind its last token's entries; waits for the device."""
    assert code.offsets is not None
    used = int(code.offsets[-1])
    return SparseCode(code.values[:used], code.indices[:used], code.d_sae, code.offsets)


def decode(
    code: SparseCode, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, "d_in"] | None = None
) -> Float[Tensor, "n d_in"]:
    """See `sae.kernels.sparse.decode`."""
    kernels = _kernels_for(W_dec)
    if kernels is None or code.n_tokens == 0:
        return sparse.decode(code, W_dec, b_dec)
    with torch.cuda.device_of(W_dec):
        x_hat: Tensor = kernels.decode(code, W_dec, b_dec)
    return x_hat


def gradients(
    code: SparseCode,
    x_centred: Float[Tensor, "n d_in"],
    grad_x_hat: Float[Tensor, "n d_out"],
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    decoder: bool = True,
    centred: bool = True,
    out: Gradients | None = None,
) -> Gradients:
    """See `sae.kernels.backward.gradients`; with widths that differ, of a transcoder, it is always that."""
    kernels = _kernels_for(W_dec)
    if kernels is None or x_centred.shape[1] != grad_x_hat.shape[1]:
        return backward.gradients(code, x_centred, grad_x_hat, W_enc, W_dec, decoder=decoder, centred=centred, out=out)
    with torch.cuda.device_of(W_dec):
        made: Gradients = kernels.gradients(code, x_centred, grad_x_hat, W_enc, W_dec, decoder=decoder, centred=centred)
    return made
