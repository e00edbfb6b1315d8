"""Which features fire together: exact counts over all tokens, and the strongest pairs by correlation.

With n_f the number of tokens on which f fires, n_fg on which both fire, N tokens:

    phi(f, g) = (N n_fg - n_f n_g) / sqrt(n_f (N - n_f) n_g (N - n_g))     correlation of the two indicators
    PMI(f, g) = ln(N n_fg / (n_f n_g))                                      nats

Each feature keeps its `NEIGHBOURS` partners of largest phi among those it fires with on `MIN_TOGETHER` tokens or
more. A signed feature fires whether its activation is positive or negative.

For a block of features the tokens of their entries are looked up, and the features of those tokens counted; a
[block, d_sae] table of counts is all that is held. A GPU, where the SAE lies on one, does the counting.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from workbench.features.index.segments import Entries
from workbench.models.devices import free_bytes

NEIGHBOURS = 10
MIN_TOGETHER = 3
COUNTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Of a block; on a CPU its counts stay in a core's cache."""
PAIRS_AT_ONCE = 1 << 22
COPIED_AT_ONCE = 1 << 26
CPU = torch.device("cpu")
ROOM = 2
"""Times the features' size that must be free on a GPU for it to count."""


@dataclass(frozen=True)
class Coactivations:
    """The strongest pairs; every array has one entry a pair."""

    feature: Int[NDArray, "pairs"]
    rank: Int[NDArray, "pairs"]
    other: Int[NDArray, "pairs"]
    together: Int[NDArray, "pairs"]
    phi: Float[NDArray, "pairs"]
    pmi: Float[NDArray, "pairs"]


@dataclass(frozen=True)
class TokenFeatures:
    """Features of every encoded token."""

    place: Int32[NDArray, "rows"]
    """Number of the encoded token in a row."""
    starts: Int[NDArray, "tokens+1"]
    active: Int32[NDArray, "entries"]

    on_device: Int[Tensor, "entries"] | None = None
    """The same features, where a GPU counts them."""

    @classmethod
    def of(cls, tokens: NDArray, starts: NDArray, active: NDArray, device: torch.device = CPU) -> "TokenFeatures":
        """From `Segments.by_token`; `device` counts, a GPU if it has the room."""
        place = np.zeros(int(tokens.max(initial=-1)) + 1, dtype=np.int32)
        place[tokens] = np.arange(len(tokens), dtype=np.int32)
        fits = device.type == "cuda" and ROOM * active.nbytes < free_bytes(device)
        return cls(place, starts, active, _to_device(active, device) if fits else None)

    @property
    def device(self) -> torch.device:
        """What counts."""
        return CPU if self.on_device is None else self.on_device.device


def _to_device(active: Int32[NDArray, "entries"], device: torch.device) -> Int32[Tensor, "entries"]:
    """Piece by piece: what is mapped from a file need not be in memory at once."""
    found = torch.empty(len(active), dtype=torch.int32, device=device)
    for start in range(0, len(active), COPIED_AT_ONCE):
        found[start : start + COPIED_AT_ONCE] = torch.from_numpy(active[start : start + COPIED_AT_ONCE].copy())
    return found


def coactivations(entries: Entries, by_token: TokenFeatures, firings: Int[NDArray, "d_sae"]) -> Coactivations:
    """The strongest partners of the features of `entries`; see the module's description.

    Args:
        firings: n_f of every feature of the SAE.
    """
    d_sae, n_tokens = len(firings), len(by_token.starts) - 1
    at_once = max(1, COUNTS_AT_ONCE[by_token.device.type] // d_sae)
    parts = []
    for low in range(0, len(entries.counts), at_once):
        high = min(low + at_once, len(entries.counts))
        together = _count(entries, by_token, low, high, d_sae)
        parts.append(_strongest(together, entries.first + low, firings, n_tokens))
    return Coactivations(*(np.concatenate([part[number] for part in parts]) for number in range(6)))


def _count(entries: Entries, by_token: TokenFeatures, low: int, high: int, d_sae: int) -> Int[NDArray, "block d_sae"]:
    """n_fg of local features low ... high - 1 with every feature."""
    start, stop = int(entries.starts[low]), int(entries.starts[high - 1] + entries.counts[high - 1])
    counted = torch.zeros((high - low) * d_sae, dtype=torch.int64, device=by_token.device)
    token = by_token.place[entries.row[start:stop]]
    row = np.repeat(np.arange(high - low, dtype=np.int32) * np.int32(d_sae), entries.counts[low:high])
    begin, l0 = by_token.starts[token], by_token.starts[token + 1] - by_token.starts[token]
    ends = np.cumsum(l0)
    keys = _keys if by_token.on_device is None else _keys_there
    cut = 0
    while cut < len(token):
        until = max(cut + 1, int(np.searchsorted(ends, (ends[cut - 1] if cut else 0) + PAIRS_AT_ONCE, side="right")))
        key = keys(by_token, begin[cut:until], l0[cut:until], row[cut:until])
        counted += torch.bincount(key, minlength=len(counted))
        cut = until
    return counted.view(high - low, d_sae).cpu().numpy()


def _keys(
    by_token: TokenFeatures, begin: Int[NDArray, "entries"], l0: Int[NDArray, "entries"], row: Int32[NDArray, "entries"]
) -> Int32[Tensor, "pairs"]:
    """Places in the table of counts of every pair of an entry and a feature of its token; the order is any.

    Args:
        begin, l0: where the features of each entry's token begin, and how many there are.
        row: where in the table its own feature's row begins.
    """
    key = np.empty(int(l0.sum()), dtype=np.int32)
    done = 0
    for width in np.unique(l0):
        # Tokens with as many features are one array: no index is made for every pair.
        alike = np.flatnonzero(l0 == width)
        pairs = key[done : done + len(alike) * width].reshape(-1, width)
        np.add(sliding_window_view(by_token.active, width)[begin[alike]], row[alike, None], out=pairs)
        done += pairs.size
    return torch.from_numpy(key)


def _keys_there(
    by_token: TokenFeatures, begin: Int[NDArray, "entries"], l0: Int[NDArray, "entries"], row: Int32[NDArray, "entries"]
) -> Int[Tensor, "pairs"]:
    """As `_keys`, on the GPU on which the features lie."""
    assert by_token.on_device is not None
    first, repeats, rows = (torch.from_numpy(n).to(by_token.device) for n in (begin - (np.cumsum(l0) - l0), l0, row))
    pairs = int(l0.sum())
    places = first.repeat_interleave(repeats, output_size=pairs) + torch.arange(pairs, device=by_token.device)
    return by_token.on_device[places] + rows.repeat_interleave(repeats, output_size=pairs)


def _strongest(
    together: Int[NDArray, "block d_sae"], first: int, firings: Int[NDArray, "d_sae"], n_tokens: int
) -> tuple[NDArray, ...]:
    features = np.arange(first, first + len(together))
    own, other = firings[features].astype(np.float64)[:, None], firings.astype(np.float64)[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = n_tokens * together.astype(np.float64)
        phi -= own * other
        spread = own * (n_tokens - own) * other
        spread *= n_tokens - other
        phi /= np.sqrt(spread, out=spread)
    phi[together < MIN_TOGETHER] = -np.inf
    phi[np.arange(len(features)), features] = -np.inf
    # A feature that fires on every token correlates with nothing.
    phi[np.isnan(phi)] = -np.inf
    best, column = torch.from_numpy(phi).topk(min(NEIGHBOURS, phi.shape[1]), dim=1)
    row, rank = np.nonzero(np.isfinite(best.numpy()))
    partner = column.numpy()[row, rank]
    both = together[row, partner]
    pmi = np.log(n_tokens * both.astype(np.float64) / (own[row, 0] * other[0, partner]))
    return features[row], rank, partner, both, phi[row, partner], pmi
