"""Sizes in which the kernels cut their work, where a test on tiny batches wants them small."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSizes:
    """Sums differ in their rounding with `window`, `dense_share` and, over several ranks, `pieces`; results do not
    depend on the others."""

    window: int = 32
    """Entries of a feature that are summed by a program of their own; a power of two."""
    min_rows: int = 128
    """Rows below which the encoder's product no longer fills the device."""
    scores: int = 2**27
    """Scores that an encoder's buffer may hold in any case: of small batches, launches cost more than memory."""
    cached: int = 2**25
    """Bytes of the rows that gradients are summed from up to which the L2 cache keeps them whole."""
    candidates: int = 4
    """Candidates of each of the first rows, as a multiple of the mean number of entries (BatchTopK)."""
    pieces: int = 1
    """Into which a batch is cut where ranks tell each other of one while they encode the next: more than one, of which
    none has gained anything yet (docs/scale.md)."""
    dense_share: int = 128
    """A threshold rule's batch of which more than one entry in so many counts is learnt by dense products."""


SIZES = KernelSizes()
