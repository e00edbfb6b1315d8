"""The n-th largest magnitude of many numbers, by its bits, without a sort.

The bits of a positive float order as it does. Eleven of the 31 are found first, then ten, then ten: every program
counts how often each value of these bits occurs in its block, among numbers that begin with the bits found before, and
adds its counts to everybody's; the next pass reads from them where the n-th largest lies. Counts are integers: the
order in which they are added leaves no trace.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

# Numbers of a program, passes, and values that the bits of one may have.
BLOCK, PASSES, BINS = 2048, 3, 2048
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _own_bits(key, PASS: tl.constexpr):
    """The bits that a pass looks at: the highest eleven, the next ten, or the last ten."""
    if PASS == 0:
        bits = key >> 20
    elif PASS == 1:
        bits = (key >> 10) & 1023
    else:
        bits = key & 1023
    return bits


@triton.jit
def _bits_of(counts, wanted, BINS: tl.constexpr):
    """The bits of the `wanted`-th largest, by how often each value of them occurs; which it is of those with these."""
    value = tl.arange(0, BINS)
    n = tl.load(counts + value)
    reached = tl.sum(n) - tl.cumsum(n, 0) + n
    bits = tl.max(tl.where(reached >= wanted, value, 0))
    return bits, wanted - tl.sum(tl.where(value > bits, n, 0))


@triton.jit
def _count_kernel(values, counts, size, wanted, PASS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to the counts of a pass."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.abs(tl.load(values + at, mask=at < size, other=0.0))
    key = tl.where(magnitude != magnitude, INFINITY, magnitude.to(tl.int32, bitcast=True))
    counted = at < size
    for earlier in tl.static_range(PASS):
        bits, wanted = _bits_of(counts + earlier * BINS, wanted, BINS)
        counted &= _own_bits(key, earlier) == bits
    value = tl.arange(0, BINS)
    found = tl.histogram(tl.where(counted, _own_bits(key, PASS), 0), BINS)
    # Those that do not count are among the zeros.
    found -= tl.where(value == 0, tl.sum(1 - counted.to(tl.int32)), 0)
    tl.atomic_add(counts + PASS * BINS + value, found, mask=found > 0, sem="relaxed")


@triton.jit
def _nth_kernel(counts, out, wanted, BINS: tl.constexpr):
    first, wanted = _bits_of(counts, wanted, BINS)
    second, wanted = _bits_of(counts + BINS, wanted, BINS)
    third, _ = _bits_of(counts + 2 * BINS, wanted, BINS)
    key = (first << 20) | (second << 10) | third
    tl.store(out, key.to(tl.float32, bitcast=True))


def nth_largest(values: Float[Tensor, "*shape"], n: int) -> Float[Tensor, ""]:
    """The n-th largest magnitude, counted from 1, of at least n numbers; NaN counts as infinity. Waits for nothing."""
    size = values.numel()
    counts = torch.zeros(PASSES, BINS, dtype=torch.int32, device=values.device)
    out = torch.empty((), dtype=torch.float32, device=values.device)
    for number in range(PASSES):
        _count_kernel[(triton.cdiv(size, BLOCK),)](
            values, counts, size, n, PASS=number, BINS=BINS, BLOCK=BLOCK, num_warps=8
        )
    _nth_kernel[(1,)](counts, out, n, BINS=BINS, num_warps=8)
    return out
