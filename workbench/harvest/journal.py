"""The journal of a harvest: which blocks it has, one line each.

When all files of a block are in place, one synced line records their rows, sizes and checksums. From then on the block
belongs to the harvest. So whatever a kill or a power cut leaves (temporary files, files without a record, half a line)
is never taken for data, and is overwritten when the harvest goes on.

Each of several ranks writes every so many-th block and a journal of its own; they are one as soon as the harvest is
finished, or goes on. Blocks may then be missing between others.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sae.files import write_atomically

JOURNAL = "journal.jsonl"


def journal_of(rank: int) -> str:
    """Name of a rank's journal; the first one's is that of a single process."""
    return f"journal.{rank}.jsonl" if rank else JOURNAL


@dataclass(frozen=True)
class StoredFile:
    """A block file as the journal records it."""

    file: str
    """Path below the harvest's folder."""
    bytes: int
    crc32: int
    """Of the whole file. It is there to find damage, and is several times cheaper than a cryptographic hash."""
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class Block:
    """Some consecutive rows: one file per hook and one for the token columns."""

    number: int
    first_row: int
    n_rows: int
    hooks: dict[str, StoredFile]
    tokens: StoredFile
    documents: dict[int, str]
    """Names of the documents that these rows touch."""
    gradient_scale: dict[str, float]
    """What gradients were multiplied by before they were stored, by hook."""

    def to_json(self) -> str:
        """The block as one line of the journal."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Block":
        """The inverse of `to_json`."""
        fields = json.loads(line)
        return cls(
            number=fields["number"],
            first_row=fields["first_row"],
            n_rows=fields["n_rows"],
            hooks={name: StoredFile(**stored) for name, stored in fields["hooks"].items()},
            tokens=StoredFile(**fields["tokens"]),
            documents={int(doc): name for doc, name in fields["documents"].items()},
            gradient_scale=fields["gradient_scale"],
        )

    def files(self) -> list[StoredFile]:
        """Every file of the block."""
        return [*self.hooks.values(), self.tokens]


def append_block(folder: Path, block: Block, rank: int = 0) -> None:
    """Records a block whose files are in place, in the journal of a rank."""
    path = folder / journal_of(rank)
    if not path.exists():
        # A rename syncs the folder too, without which a power cut could lose the whole journal.
        write_atomically(path, lambda partial: partial.touch())
    with path.open("a") as journal:
        journal.write(block.to_json() + "\n")
        journal.flush()
        os.fsync(journal.fileno())


def read_journal(folder: Path) -> list[Block]:
    """The recorded blocks, in order; a torn last line is left out. May run while other processes append."""
    blocks = {}
    for path in (folder / JOURNAL, *_of_ranks(folder)):
        content = path.read_bytes() if path.is_file() else b""
        for line in content[: content.rfind(b"\n") + 1].decode().splitlines():
            block = Block.from_json(line)
            blocks[block.number] = block
    return [blocks[number] for number in sorted(blocks)]


def _of_ranks(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal.*.jsonl"))


def leading(blocks: Sequence[Block]) -> list[Block]:
    """The blocks up to the first that is missing."""
    return [block for place, block in enumerate(blocks) if block.number == place]


def recover_journal(folder: Path) -> list[Block]:
    """The blocks that a harvest can go on from; call it with the harvest's lock held.

    Recorded blocks count up to the first one with a file that is missing or has another size than was recorded (a
    restored backup, a copy that was cut short). The journal is cut to those, so a torn last line goes too, and those of
    several ranks become one.
    """
    blocks: list[Block] = []
    for block in read_journal(folder):
        if not all(_has_recorded_size(folder, stored) for stored in block.files()):
            break
        blocks.append(block)
    content = "".join(block.to_json() + "\n" for block in blocks)
    path = folder / JOURNAL
    if (blocks and not path.is_file()) or (path.is_file() and path.read_bytes() != content.encode()):
        write_atomically(path, lambda partial: partial.write_text(content))
    for other in _of_ranks(folder):
        other.unlink()
    return blocks


def _has_recorded_size(folder: Path, stored: StoredFile) -> bool:
    path = folder / stored.file
    return path.is_file() and path.stat().st_size == stored.bytes
