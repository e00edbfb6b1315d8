"""Exact top-k of every row of a score matrix, read once: the canonical order of `sae.kernels.topk`.

Scores become int32 keys whose order is the canonical one: 0 for no activation (not positive, or zero where absolute
values are ranked), the bits of the positive float otherwise, the largest integer for NaN. There are two kernels, since
one program that did all of it would stream nothing while it bisects and sorts:

1. The largest key of every group of columns. A group is made of runs of RUN columns, which step 3 reads as whole
   sectors, as far apart as can be, since features that fire often may lie side by side: of G groups, the i-th run
   belongs to group i mod G.
2. By one program a row: tau, reached by at least k and hardly more group maxima, by bisection. At least k keys are
   >= tau, so no key below tau can win; tau = 1 where fewer than k groups hold a positive key.
3. Compact the groups whose maximum is >= tau (about k of them), gather their members, compact those >= tau.
4. Sort the candidates by (key descending, column ascending) as 64-bit integers and write the first k.
5. Where ties or clustering overflow a list, bisect for the k-th key over the whole row instead, and take the equal
   keys in the order of their columns. This is decided and done inside the program: no host synchronisation.

The gradient rule ranks z + beta z |u| and returns z: then U is a second matrix beside Z.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

NAN_KEY = tl.constexpr(0x7FFFFFFF)
LAST_COLUMN = tl.constexpr(0x3FFFFFFF)
TILE = 512
# Groups of a warp of a program that chooses. Its steps are short and wait for each other: what counts is how many
# programs run beside each other, which registers bound, and so what a program holds at once (TILE).
GROUPS_OF_A_WARP = 1024
# Groups of a row, about; of one program of the streaming pass; and columns of each side by side.
GROUPS, LANES, RUN = 2048, 512, 8


@triton.jit
def _scores(z_row, u_row, bias, columns, mask, beta, GRADIENT: tl.constexpr):
    """(z, ranked score) of some columns of a row."""
    z = tl.load(z_row + columns, mask=mask, other=0.0) + tl.load(bias + columns, mask=mask, other=0.0)
    score = z
    if GRADIENT:
        u = tl.load(u_row + columns, mask=mask, other=0.0)
        score = z + beta * z * tl.abs(u)
    return z, score


@triton.jit
def keys_of(score, ABSOLUTE: tl.constexpr):
    """int32 keys that order as the scores rank; 0 for no activation."""
    bits = score.to(tl.int32, bitcast=True)
    if ABSOLUTE:
        key = bits & NAN_KEY
    else:
        key = tl.where(score > 0, bits, 0)
    return tl.where(score != score, NAN_KEY, key)


@triton.jit
def _keys(z_row, u_row, bias, columns, mask, beta, ABSOLUTE: tl.constexpr, GRADIENT: tl.constexpr):
    _, score = _scores(z_row, u_row, bias, columns, mask, beta, GRADIENT)
    return keys_of(score, ABSOLUTE)


@triton.jit
def packed_entry(key, column, z):
    """An int64 that orders as (key descending, column ascending) does, and whose last bit is the sign of z."""
    negative = (z < 0).to(tl.int64)
    return (key.to(tl.int64) << 32) | ((column ^ LAST_COLUMN).to(tl.int64) << 1) | negative


@triton.jit
def bound(keys, k, limit):
    """A key that at least k and, ties apart, at most `limit` of `keys` reach; 0 where fewer than k are positive.

    Integer order of keys is logarithmic in the score, so a sixteenth of the largest is tried before bisecting.
    """
    high = tl.max(keys)
    low = tl.maximum(high - 4 * (1 << 23), 0)
    n_reached = tl.sum((keys >= low).to(tl.int32))
    low = tl.where(n_reached >= k, low, 0)
    n_reached = tl.where(low > 0, n_reached, limit + 1)
    while (low < high) & (n_reached > limit):
        middle = high - (high - low) // 2
        n = tl.sum((keys >= middle).to(tl.int32))
        enough = n >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        n_reached = tl.where(enough, n, n_reached)
    return low


@triton.jit
def _select_again(
    z_row, u_row, bias, candidates, n_columns, k, beta,
    N_GROUPS: tl.constexpr, ABSOLUTE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Writes the k best of a row whose groups hold too many, ties to the earlier column; returns their number.

    The k-th largest key is found bit by bit, with one pass over the row each.
    """
    lane = tl.arange(0, N_GROUPS)
    tau = 0
    for step in range(31):
        candidate = tau | (1 << (30 - step))
        reached = tl.zeros([N_GROUPS], tl.int32)
        for first in range(0, n_columns, N_GROUPS):
            columns = first + lane
            keys = _keys(z_row, u_row, bias, columns, columns < n_columns, beta, ABSOLUTE, GRADIENT)
            reached += (keys >= candidate).to(tl.int32)
        tau = tl.where(tl.sum(reached) >= k, candidate, tau)
    tau = tl.maximum(tau, 1)
    above = tl.zeros([N_GROUPS], tl.int32)
    for first in range(0, n_columns, N_GROUPS):
        columns = first + lane
        keys = _keys(z_row, u_row, bias, columns, columns < n_columns, beta, ABSOLUTE, GRADIENT)
        above += (keys > tau).to(tl.int32)
    n_equal_wanted = k - tl.sum(above)
    n_candidates = 0
    n_equal = 0
    for first in range(0, n_columns, N_GROUPS):
        columns = first + lane
        z, score = _scores(z_row, u_row, bias, columns, columns < n_columns, beta, GRADIENT)
        keys = keys_of(score, ABSOLUTE)
        equal = (keys == tau).to(tl.int32)
        rank = n_equal + tl.cumsum(equal, 0)
        kept = (keys > tau) | ((keys == tau) & (rank <= n_equal_wanted))
        kept_position = n_candidates + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(candidates + kept_position, packed_entry(keys, columns, z), mask=kept)
        n_candidates += tl.sum(kept.to(tl.int32))
        n_equal += tl.sum(equal)
    return n_candidates


@triton.jit
def _maxima_kernel(
    Z, U, bias, maxima, stride, n_columns, n_groups, beta,
    LANES: tl.constexpr, MEMBERS: tl.constexpr, RUN: tl.constexpr, ABSOLUTE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The largest keys of some of a row's groups."""
    row = tl.program_id(0).to(tl.int64)
    z_row, u_row = Z + row * stride, U + row * stride
    lane = tl.arange(0, LANES)
    largest = tl.zeros([LANES], tl.int32)
    run = (tl.program_id(1) * LANES + lane[:, None]) * RUN + tl.arange(0, RUN)[None, :]
    for first in range(0, MEMBERS, RUN):
        columns = first * n_groups + run
        keys = _keys(z_row, u_row, bias, columns, columns < n_columns, beta, ABSOLUTE, GRADIENT)
        largest = tl.maximum(largest, tl.max(keys, 1))
    tl.store(maxima + row * n_groups + tl.program_id(1) * LANES + lane, largest)


@triton.jit
def _select_kernel(
    Z, U, bias, maxima, values, indices, ranks, groups, candidates, stride, n_columns, n_groups, k, beta,
    N_GROUPS: tl.constexpr, CAPACITY: tl.constexpr, GROUPS_AT_ONCE: tl.constexpr, AGAIN: tl.constexpr,
    MEMBERS: tl.constexpr, RUN: tl.constexpr, ABSOLUTE: tl.constexpr, GRADIENT: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row, u_row = Z + row * stride, U + row * stride
    groups += row * CAPACITY
    candidates += row * CAPACITY
    lane = tl.arange(0, N_GROUPS)
    maxima = tl.load(maxima + row * n_groups + lane, mask=lane < n_groups, other=0)
    tau = tl.maximum(bound(maxima, k, k + (CAPACITY - k) // 4), 1)

    chosen = maxima >= tau
    chosen_position = tl.cumsum(chosen.to(tl.int32), 0) - 1
    n_chosen = tl.sum(chosen.to(tl.int32))
    n_candidates = 0
    if n_chosen <= CAPACITY:
        tl.store(groups + chosen_position, lane, mask=chosen)
        tl.debug_barrier()
        slot = tl.arange(0, GROUPS_AT_ONCE)
        member = tl.arange(0, MEMBERS)
        for first in range(0, n_chosen, GROUPS_AT_ONCE):
            group = tl.load(groups + first + slot, mask=first + slot < n_chosen, other=n_groups)
            # Lanes that were not filled begin behind all columns.
            begin = tl.where(group < n_groups, group * RUN, n_columns)
            columns = begin[:, None] + ((member // RUN) * (n_groups * RUN) + member % RUN)[None, :]
            z, score = _scores(z_row, u_row, bias, columns, columns < n_columns, beta, GRADIENT)
            keys = keys_of(score, ABSOLUTE)
            packed = packed_entry(keys, columns, z)
            packed = tl.reshape(packed, [GROUPS_AT_ONCE * MEMBERS])
            kept = (packed >> 32) >= tau
            position = n_candidates + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(candidates + position, packed, mask=kept & (position < CAPACITY))
            n_candidates += tl.sum(kept.to(tl.int32))

    if (n_chosen > CAPACITY) | (n_candidates > CAPACITY):
        n_candidates = _select_again(z_row, u_row, bias, candidates, n_columns, k, beta, AGAIN, ABSOLUTE, GRADIENT)

    tl.debug_barrier()
    slot = tl.arange(0, CAPACITY)
    packed = tl.load(candidates + slot, mask=slot < n_candidates, other=0)
    packed = tl.sort(packed, descending=True)
    active = packed > 0
    columns = tl.where(active, ((packed >> 1).to(tl.int32) & LAST_COLUMN) ^ LAST_COLUMN, 0)
    if GRADIENT:
        z, score = _scores(z_row, u_row, bias, columns, active, beta, GRADIENT)
        # A score that is NaN is shown, also where the value it stands for is not.
        z = tl.where(score != score, score, z)
    else:
        # The key is the magnitude's bits.
        z = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        z = tl.where((packed & 1) == 1, -z, z)
    tl.store(values + row * k + slot, tl.where(active, z, 0.0), mask=slot < k)
    tl.store(indices + row * k + slot, columns, mask=slot < k)
    if RANKED:
        tl.store(ranks + row * k + slot, (packed >> 32).to(tl.int32), mask=slot < k)


@triton.jit
def _merge_kernel(
    part_values, part_indices, ranks, values, indices, stride, k, width, PARTS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """The k best of a row's parts, each sorted: of equal keys, the earlier part has the earlier columns."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    place = (slot // k) * stride + row * k + slot % k
    key = tl.load(ranks + place, mask=slot < PARTS * k, other=0)
    packed = tl.sort((key.to(tl.int64) << 32) | (slot ^ NAN_KEY).to(tl.int64), descending=True)
    active = (packed >> 32) > 0
    chosen = tl.where(active, (packed & NAN_KEY).to(tl.int32) ^ NAN_KEY, 0)
    place = (chosen // k) * stride + row * k + chosen % k
    wanted = slot < k
    value = tl.load(part_values + place, mask=active & wanted, other=0.0)
    column = tl.load(part_indices + place, mask=active & wanted, other=0) + (chosen // k) * width
    tl.store(values + row * k + slot, value, mask=wanted)
    tl.store(indices + row * k + slot, tl.where(active, column, 0), mask=wanted)


def merge_rows(
    part_values: Float[Tensor, "parts rows k"],
    part_indices: Int[Tensor, "parts rows k"],
    ranks: Int[Tensor, "parts rows k"],
    width: int,
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
) -> None:
    """Writes the top k of the first n rows, whose columns were selected from part by part, `width` a part."""
    (n, k), parts = values.shape, len(ranks)
    slots = triton.next_power_of_2(parts * k)
    _merge_kernel[(n,)](
        part_values, part_indices, ranks, values, indices, ranks.stride(0), k, width,
        PARTS=parts, SLOTS=slots, num_warps=max(1, min(4, slots // 128)),
    )  # fmt: skip


def select_rows(
    scores: Float[Tensor, "n columns"],
    bias: Float[Tensor, "columns"],
    k: int,
    values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"],
    *,
    absolute: bool = False,
    gradient: tuple[Float[Tensor, "n columns"], float] | None = None,
    ranks: Int[Tensor, "n k"] | None = None,
    n_groups: int | None = None,
) -> None:
    """Writes the top k of every row of `scores` + `bias` (fp32) to `values` and `indices`, in the canonical order.

    Args:
        scores: rows may be strided; columns lie side by side.
        absolute: rank by magnitude and keep the sign; otherwise only positive scores count.
        gradient: (u, beta) to rank z + beta z |u| with z = scores + bias, u laid out like `scores`.
        ranks: receives the int32 keys that `merge_rows` orders by; 0 for an empty slot.
        n_groups: groups of columns, about; chosen by k when not given.
    """
    n, n_columns = scores.shape
    if n_groups is None:
        n_groups = max(GROUPS, triton.next_power_of_2(8 * k))
    members = triton.next_power_of_2(triton.cdiv(n_columns, n_groups))
    lanes = min(LANES, triton.next_power_of_2(triton.cdiv(n_columns, members)))
    parts = triton.cdiv(n_columns, lanes * members)
    n_groups = parts * lanes
    capacity = max(32, triton.next_power_of_2(k + max(16, k * k // n_groups)))
    at_once = min(capacity, max(1, TILE // members))
    maxima = torch.empty(n, n_groups, dtype=torch.int32, device=scores.device)
    groups = torch.empty(n, capacity, dtype=torch.int32, device=scores.device)
    candidates = torch.empty(n, capacity, dtype=torch.int64, device=scores.device)
    u, beta = (scores, 0.0) if gradient is None else gradient
    ranked = {"ABSOLUTE": absolute, "GRADIENT": gradient is not None}
    room = triton.next_power_of_2(n_groups)
    _maxima_kernel[(n, parts)](
        scores, u, bias, maxima, scores.stride(0), n_columns, n_groups, beta,
        LANES=lanes, MEMBERS=members, RUN=min(members, RUN), **ranked, num_warps=max(1, lanes // 128),
    )  # fmt: skip
    _select_kernel[(n,)](
        scores, u, bias, maxima, values, indices, indices if ranks is None else ranks, groups, candidates,
        scores.stride(0), n_columns, n_groups, k, beta,
        N_GROUPS=room, CAPACITY=capacity, GROUPS_AT_ONCE=at_once, AGAIN=max(32, room // 4), MEMBERS=members,
        RUN=min(members, RUN), RANKED=ranks is not None, **ranked, num_warps=max(1, room // GROUPS_OF_A_WARP),
    )  # fmt: skip
