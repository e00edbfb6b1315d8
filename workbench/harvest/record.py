"""What a harvest's folder says about itself: what is harvested, and which blocks there are. No tensor is touched, so
that listing a workspace loads neither torch nor the model library."""

from pathlib import Path
from typing import Any

from sae.errors import InputError
from workbench.disk.descriptions import read_description
from workbench.harvest.journal import read_journal

SCHEMA = 1
DESCRIPTION, DATABASE = "harvest.json", "harvest.duckdb"
GRADIENT = ".grad"
"""Suffix of the hook name under which gradients are stored."""
SPECIAL_TOKENS = "special_tokens"
"""Recorded as `tokens` where the text of a special token is that token. Harvests without it were begun when it was its
characters, and go on and are read as they began."""


class HarvestRecord:
    """A harvest as its folder describes it, finished or not.

    Attributes:
        directory: its folder.
        name: the folder's name.
        config: the `HarvestConfig` as a dictionary.
        model: the `ModelInfo` as a dictionary.
        corpus: name and fingerprint of the corpus.
        hooks: names of the hook points.
        blocks: the recorded blocks.

    Raises:
        InputError: no description, one of another schema, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, directory.name
        description = read_description(directory / DESCRIPTION)
        if description.get("schema") != SCHEMA:
            raise InputError(
                f"harvest {self.name!r} has schema {description.get('schema')}, this version of the workbench reads "
                f"{SCHEMA}: use the version that made it"
            )
        try:
            self.config: dict[str, Any] = description["config"]
            self.model: dict[str, Any] = description["model"]
            self.corpus: dict[str, Any] = description["corpus"]
            self.hooks: list[str] = description["hooks"]
            self.split_special_tokens: bool = SPECIAL_TOKENS not in description
            self.blocks = read_journal(directory)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"harvest {self.name!r} is damaged ({error}): restore it or remove it with `workbench gc --harvest`"
            ) from None

    def __repr__(self) -> str:
        rows = f"{self.n_rows:,} rows of {self.model.get('name')} on {self.corpus.get('name')}"
        return f"{type(self).__name__}({self.name!r}): {rows} at {', '.join(self.hooks)}"

    @property
    def finished(self) -> bool:
        """Whether all blocks and the database are in place."""
        return self.database.is_file()

    @property
    def database(self) -> Path:
        """Path of its DuckDB file."""
        return self.directory / DATABASE

    @property
    def n_rows(self) -> int:
        """Rows stored so far."""
        return sum(block.n_rows for block in self.blocks)

    @property
    def context_len(self) -> int:
        """Tokens a context, BOS included."""
        return self.config["context_len"]

    @property
    def has_gradients(self) -> bool:
        """Whether it holds the loss' gradients too."""
        return self.config["gradients"]

    @property
    def n_bytes(self) -> int:
        """Bytes of all block files."""
        return sum(stored.bytes for block in self.blocks for stored in block.files())

    def provenance(self) -> dict[str, Any]:
        """What its rows were made from; recorded with everything made from them."""
        return {"name": self.name, "config": self.config, "model": self.model, "corpus": self.corpus}
