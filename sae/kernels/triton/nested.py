"""Several reconstructions from parts of one code, in one pass over its entries: nested prefixes, and multi-k.

The entries of a code fall into cells: by the block of their feature (Matryoshka), by whether the code at k has them or
only the one at 4 k (multi-k), or by both. Reconstruction j is made of the cells c with I[j, c] = 1, and

    L = sum_j w_j ||r_j||^2 / V,    r_j = target - sum of value * W_dec[feature] over the entries of its cells

An entry of cell c works for every reconstruction that has the cell: its gradients are those of a loss with one
residual, of which there is one a cell,

    E_c = sum_j w_j I[j, c] r_j

Cell 0, the first block's features at k, is in every reconstruction, as b_dec is: E_0 makes b_dec's gradient.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.sparse import SLICE, alignment, spans_of, token_span, written_rows
from sae.ranks import Ranks

# Entries whose rows are loaded at once.
ENTRIES = 8


@dataclass(frozen=True)
class Nesting:
    """Which cells there are, and what is reconstructed from them."""

    block: Int[Tensor, "d_sae"]
    """Block of each feature, int32."""
    includes: Float[Tensor, "reconstructions cells"]
    """1 where a reconstruction has a cell; cell = block, or block + n_blocks for entries that only 4 k has."""
    weights: Float[Tensor, "reconstructions"]
    n_blocks: int

    @classmethod
    def of(cls, features: slice, widths: Sequence[int], wider: float, device: torch.device) -> "Nesting":
        """Prefixes of `widths` (none: the whole dictionary alone), and all again at 4 k with weight `wider`, if any.

        Args:
            features: those that there are here, of all.
        """
        edges = torch.tensor(list(widths[:-1]), dtype=torch.int64)
        block = torch.bucketize(torch.arange(features.start, features.stop), edges, right=True)
        n_blocks, levels = len(edges) + 1, 2 if wider else 1
        part, level = torch.arange(n_blocks * levels) % n_blocks, torch.arange(n_blocks * levels) // n_blocks
        includes = (part <= part[:, None]) & (level <= level[:, None])
        weights = torch.where(level > 0, wider, 1.0) / n_blocks
        return cls(block.int().to(device), includes.float().to(device), weights.float().to(device), n_blocks)

    def parts_of(self, code: SparseCode, narrow: Bool[Tensor, "entries"] | None) -> "Parts":
        """The cells of a code's entries.

        Args:
            narrow: entries that the code at k has too; None where there is no other k.
        """
        block = self.block[code.indices.reshape(-1)]
        return Parts(self, block if narrow is None else block + self.n_blocks * (~narrow).int(), narrow)


@dataclass(frozen=True)
class Parts:
    """Where the entries of one code belong."""

    nesting: Nesting
    cells: Int[Tensor, "entries"]
    """int32."""
    narrow: Bool[Tensor, "entries"] | None
    """Entries that the code at k has, whose firings count; None for all."""


@dataclass(frozen=True)
class NestedResiduals:
    """What the reconstructions leave of a batch."""

    by_cell: Float[Tensor, "cells*n d"]
    """E_c of every token, cell after cell."""
    residual: Float[Tensor, "n d"]
    """Target less prediction by all features at k."""
    squared_error: Float[Tensor, ""]
    """Of that; fp64."""
    loss: Float[Tensor, ""]
    """L V; fp64."""


@triton.jit
def _sums_by_cell(
    values, indices, cells, W_dec, start, stop, d, columns, part,
    CELLS: tl.constexpr, ROOM: tl.constexpr, ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """What a token's entries of each cell add up to, some columns of it."""
    sums = tl.zeros([ROOM, SLICE], tl.float32)
    for first in range(start, stop, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        value, rows = written_rows(values, indices, W_dec, slot, stop, d, columns)
        cell = tl.load(cells + slot, mask=slot < stop, other=-1)
        last = tl.max(cell)
        if tl.min(tl.where(cell < 0, last, cell)) == last:
            # As of a list whose first k entries are those at k.
            of_cell = tl.sum(rows * value[:, None], 0)
            sums += tl.where((part == last)[:, None], of_cell[None, :], 0.0)
        else:
            for c in tl.static_range(CELLS):
                of_cell = tl.sum(rows * tl.where(cell == c, value, 0.0)[:, None], 0)
                sums += tl.where((part == c)[:, None], of_cell[None, :], 0.0)
    return sums


@triton.jit
def _leave_residuals(
    sums, x, includes, weights, out, residual, errors, token, piece, pieces, n, d, columns, part,
    CELLS: tl.constexpr, ROOM: tl.constexpr, MAIN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """E_c of every cell, and the squares of every reconstruction's residual."""
    inside = columns < d
    at = token * d + columns
    centred = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    made = tl.zeros([ROOM, SLICE], tl.float32)
    for j in tl.static_range(CELLS):
        included = tl.load(includes + j * CELLS + part, mask=part < CELLS, other=0.0)
        left = tl.where(inside, centred - tl.sum(sums * included[:, None], 0), 0.0)
        tl.store(errors + (j * pieces + piece) * n + token, tl.sum(left * left))
        made += (included * tl.load(weights + j))[:, None] * left[None, :]
        if j == MAIN:
            tl.store(residual + at, left.to(residual.dtype.element_ty), mask=inside)
    place = (part.to(tl.int64) * n)[:, None] * d + at[None, :]
    tl.store(out + place, made.to(out.dtype.element_ty), mask=(part < CELLS)[:, None] & inside[None, :])


@triton.jit
def _nested_kernel(
    values, indices, cells, offsets, W_dec, x, includes, weights, out, residual, errors, n, units, k,
    ALIGN: tl.constexpr, RAGGED: tl.constexpr, CELLS: tl.constexpr, ROOM: tl.constexpr, MAIN: tl.constexpr,
    ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """A slice of one token."""
    d = units * ALIGN
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    columns = piece * SLICE + tl.arange(0, SLICE)
    part = tl.arange(0, ROOM)
    start, stop = token_span(offsets, token, k, RAGGED)
    sums = _sums_by_cell(
        values, indices, cells, W_dec, start, stop, d, columns, part, CELLS, ROOM, ENTRIES, SLICE
    )  # fmt: skip
    _leave_residuals(
        sums, x, includes, weights, out, residual, errors, token, piece, tl.num_programs(1), n, d, columns, part,
        CELLS, ROOM, MAIN, SLICE,
    )  # fmt: skip


@triton.jit
def _written_kernel(
    values, indices, cells, offsets, W_dec, written, share, units, k,
    ALIGN: tl.constexpr, RAGGED: tl.constexpr, CELLS: tl.constexpr, ROOM: tl.constexpr, ENTRIES: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """A slice of what one token's entries of each cell add up to: [share of tokens, cell, token of the share, d]."""
    d = units * ALIGN
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    part = tl.arange(0, ROOM)
    start, stop = token_span(offsets, token, k, RAGGED)
    sums = _sums_by_cell(
        values, indices, cells, W_dec, start, stop, d, columns, part, CELLS, ROOM, ENTRIES, SLICE
    )  # fmt: skip
    row = (token // share * CELLS + part) * share + token % share
    at = row[:, None] * d + columns[None, :]
    tl.store(written + at, sums, mask=(part < CELLS)[:, None] & (columns < d)[None, :])


@triton.jit
def _summed_kernel(
    summed, x, includes, weights, out, residual, errors, share, units,
    ALIGN: tl.constexpr, CELLS: tl.constexpr, ROOM: tl.constexpr, MAIN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """A slice of one token, of which all ranks' sums are there: [cell, token, d]."""
    d = units * ALIGN
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    columns = piece * SLICE + tl.arange(0, SLICE)
    part = tl.arange(0, ROOM)
    at = (part.to(tl.int64) * share + token)[:, None] * d + columns[None, :]
    sums = tl.load(summed + at, mask=(part < CELLS)[:, None] & (columns < d)[None, :], other=0.0)
    _leave_residuals(
        sums, x, includes, weights, out, residual, errors, token, piece, tl.num_programs(1), share, d, columns, part,
        CELLS, ROOM, MAIN, SLICE,
    )  # fmt: skip


def nested_residuals(
    code: SparseCode,
    parts: Parts,
    W_dec: Float[Tensor, "d_sae d"],
    target: Float[Tensor, "n d"],
) -> NestedResiduals:
    """All reconstructions of a batch, whose target is centred; residuals in W_dec's precision."""
    nesting = parts.nesting
    n, d = target.shape
    n_cells, slices = len(nesting.weights), triton.cdiv(d, SLICE)
    out = torch.empty(n_cells + 1, n, d, dtype=W_dec.dtype, device=W_dec.device)
    errors = torch.empty(n_cells, slices, n, dtype=torch.float32, device=W_dec.device)
    offsets, k = spans_of(code)
    main = nesting.n_blocks - 1
    _nested_kernel[(n, slices)](
        code.values, code.indices, parts.cells, offsets, W_dec, target, nesting.includes, nesting.weights,
        out, out[-1], errors, n, d // alignment(d), k,
        ALIGN=alignment(d), RAGGED=code.offsets is not None, CELLS=n_cells,
        ROOM=triton.next_power_of_2(n_cells), MAIN=main, ENTRIES=ENTRIES, SLICE=SLICE, num_warps=1,
    )  # fmt: skip
    squares = errors.sum((1, 2), dtype=torch.float64)
    return NestedResiduals(out[:-1].view(-1, d), out[-1], squares[main], squares @ nesting.weights.double())


def residuals_over_ranks(
    code: SparseCode,
    parts: Parts,
    W_dec: Float[Tensor, "d_sae d"],
    target: Float[Tensor, "n d"],
    ranks: Ranks,
) -> NestedResiduals:
    """The same where code and W_dec are one rank's features: every rank gets the ranks' sums of its share of the
    tokens, cell by cell, and tells the others what they leave."""
    nesting = parts.nesting
    (n, d), size = target.shape, ranks.size
    n_cells, slices, share = len(nesting.weights), triton.cdiv(d, SLICE), -(-n // size)
    room, dtype, device = triton.next_power_of_2(n_cells), W_dec.dtype, W_dec.device
    offsets, k = spans_of(code)
    # Rows that stand for no token, at the end of the last share, are 0.
    written = torch.zeros if n % size else torch.empty
    sums = written(size * n_cells * share, d, dtype=torch.float32, device=device)
    _written_kernel[(n, slices)](
        code.values, code.indices, parts.cells, offsets, W_dec, sums, share, d // alignment(d), k,
        ALIGN=alignment(d), RAGGED=code.offsets is not None, CELLS=n_cells, ROOM=room, ENTRIES=ENTRIES, SLICE=SLICE,
        num_warps=1,
    )  # fmt: skip
    own = torch.zeros(share, d, dtype=target.dtype, device=device)
    mine = target[share * ranks.rank : share * (ranks.rank + 1)]
    own[: len(mine)] = mine
    made = torch.empty(n_cells + 1, share, d, dtype=dtype, device=device)
    errors = torch.empty(n_cells, slices, share, dtype=torch.float32, device=device)
    main = nesting.n_blocks - 1
    _summed_kernel[(share, slices)](
        ranks.send_rows(sums).get(), own, nesting.includes, nesting.weights, made, made[-1], errors, share,
        d // alignment(d), ALIGN=alignment(d), CELLS=n_cells, ROOM=room, MAIN=main, SLICE=SLICE, num_warps=1,
    )  # fmt: skip
    out = torch.empty(n_cells + 1, size, share, d, dtype=dtype, device=device)
    told = [ranks.send(one, everyone) for one, everyone in zip(made, out, strict=True)]
    squares = ranks.sum_(errors.sum((1, 2), dtype=torch.float64))
    for one in told:
        one.get()
    whole = out.view(n_cells + 1, -1, d)[:, :n].contiguous()
    return NestedResiduals(whole[:-1].view(-1, d), whole[-1], squares[main], squares @ nesting.weights.double())
