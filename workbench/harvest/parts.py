"""Several activations of the same tokens side by side, for crosscoders: hook points of one harvest, or of several whose
tokens are equal row by row, as those of two models over one corpus are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from sae.ranks import ALONE, Ranks
from sae.source import Part, part_scales
from workbench.harvest.blocks import TOKEN_COLUMNS, map_tensors
from workbench.harvest.loader import RowLoader
from workbench.harvest.reading import Harvest

SCALE_ROWS = 16_384
"""Rows on which the parts' sizes are measured."""


@dataclass(frozen=True)
class Place:
    """Where a part's rows lie."""

    harvest: Harvest
    hook: str


def check_same_tokens(harvests: Sequence[Harvest]) -> None:
    """Raises InputError unless the harvests hold the same tokens row by row, read by one tokenizer."""
    first = harvests[0]
    for other in harvests[1:]:
        if other.directory == first.directory:
            continue
        if _vocabulary(first) != _vocabulary(other):
            raise InputError(
                f"harvests {first.name!r} and {other.name!r} are of models with different tokenizers, so their rows "
                "are not the same tokens: take models that share one"
            )
        again = "harvest both from one corpus with the same --tokens, --context, --split and --separate"
        if other.n_rows != first.n_rows:
            raise InputError(
                f"harvest {first.name!r} has {first.n_rows:,} rows and {other.name!r} {other.n_rows:,}: {again}"
            )
        for column in TOKEN_COLUMNS:
            differ = np.flatnonzero(_column(first, column) != _column(other, column))
            if len(differ):
                raise InputError(
                    f"harvests {first.name!r} and {other.name!r} differ at row {differ[0]:,} ({column}), so their rows "
                    f"are not the same tokens: {again}"
                )


def _vocabulary(harvest: Harvest) -> list[tuple[int, str]]:
    with duckdb.connect(str(harvest.database), read_only=True) as connection:
        return connection.execute("SELECT token, text FROM vocabulary ORDER BY token").fetchall()


def _column(harvest: Harvest, name: str) -> "np.ndarray":
    return torch.cat([map_tensors(harvest.directory / block.tokens.file)[name] for block in harvest.blocks]).numpy()


class SideBySide:
    """Rows of several places concatenated, in float32; `pieces` as of `Vectors`."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._vectors = [place.harvest.vectors(place.hook) for place in places]
        self.widths = [vectors.width for vectors in self._vectors]

    @property
    def width(self) -> int:
        """Of a concatenated row."""
        return sum(self.widths)

    def pieces(self, start: int, stop: int) -> Iterator[Float[Tensor, "rows width"]]:
        """Rows start to stop, in one piece."""
        columns = [torch.cat(list(vectors.pieces(start, stop))).float() for vectors in self._vectors]
        yield torch.cat(columns, dim=1)


class PartLoader(RowLoader):
    """Rows of several places side by side, every part times its scale; a `sae.source.PartSource`.

    Args:
        places: where the parts lie, in the order in which they are concatenated.
        names: what the parts are called.
        seed: of the permutations.
        device: where rows are delivered, in float32.
        ranks: as for `RowLoader`.

    Raises:
        InputError: harvests of other tokens than the first, a hook point that one does not have, or no usable rows.
    """

    def __init__(
        self,
        places: Sequence[Place],
        names: Sequence[str],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        check_same_tokens([place.harvest for place in places])
        harvest = places[0].harvest
        vectors = [place.harvest.vectors(place.hook) for place in places]
        name = " + ".join(f"{place.harvest.name}/{place.hook}" for place in places)
        super().__init__(harvest, vectors, harvest.ordinary, name=name, seed=seed, device=device, ranks=ranks)
        sample = self.sampled(SCALE_ROWS, len(vectors))
        norms = [float(torch.linalg.vector_norm(rows.float(), dim=1).mean()) for rows in sample]
        scales = part_scales(norms, [source.width for source in vectors])
        self.parts: Sequence[Part] = [
            Part(name, place.hook, place.harvest.config["model"], source.width, scale)
            for name, place, source, scale in zip(names, places, vectors, scales, strict=True)
        ]

    @property
    def d_in(self) -> int:
        """Width of a concatenated row."""
        return sum(part.width for part in self.parts)

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        """The next n rows of the stream."""
        return self._scaled(self.next_columns(n, len(self.parts)))

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """At most n usable rows drawn without replacement, always the same for a harvest and n, in harvest order."""
        return self._scaled(self.sampled(n, len(self.parts)))

    def _scaled(self, columns: Sequence[Tensor]) -> Float[Tensor, "n d_in"]:
        return torch.cat([column.float() * part.scale for column, part in zip(columns, self.parts, strict=True)], dim=1)
