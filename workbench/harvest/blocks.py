"""Writing a harvest's blocks: safetensors files that are complete or absent, and the journal that records them.

1. A file is written under a temporary name, synced, renamed, and its folder synced.
2. When all files of a block are in place, one synced line in the journal records their rows, sizes and checksums.
   From then on the block belongs to the harvest.

So whatever a kill or a power cut leaves (temporary files, files without a record, half a line) is never taken for
data, and is overwritten when the harvest goes on.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae.errors import InputError
from sae.files import write_atomically

JOURNAL = "journal.jsonl"
TOKEN_COLUMNS = ("token", "doc", "pos", "flags")
_SAFETENSORS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in _SAFETENSORS.items()}
ALIGNMENT = 64
CHUNK = 1 << 20


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


def write_file(folder: Path, file: str, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Writes CPU tensors to a safetensors file, straight from their memory.

    Args:
        folder: the harvest's folder.
        file: path below it.
        tensors: contiguous, float32, float16, bfloat16, int32 or uint8.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    parts: list[bytes | memoryview] = [_header(tensors)]
    parts += [tensor.view(-1).view(torch.uint8).numpy().data for tensor in tensors.values()]
    crc32 = 0

    def write(partial: Path) -> None:
        nonlocal crc32
        with partial.open("wb") as opened:
            for part in parts:
                # Piece by piece, so that what is written is still in the cache from being summed.
                for start in range(0, len(part), CHUNK):
                    piece = part[start : start + CHUNK]
                    crc32 = zlib.crc32(piece, crc32)
                    opened.write(piece)

    try:
        write_atomically(path, write)
    except OSError:
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        raise
    first = next(iter(tensors.values()))
    return StoredFile(
        file, sum(len(part) for part in parts), crc32, str(first.dtype).removeprefix("torch."), list(first.shape)
    )


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON of a safetensors header, padded with spaces so that the data starts at a multiple of 64."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped: nothing is read until it is used.

    The mapping is private: writing to a tensor changes this process' copy of it and never the file.

    Raises:
        InputError: a missing or damaged file.
    """
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        size = path.stat().st_size
        # torch's mapping keeps no file open, so the number of blocks is not bounded by the limit on open files.
        content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        header.pop("__metadata__", None)
        return {
            name: content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
            .view(_TORCH[entry["dtype"]])
            .view(entry["shape"])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is missing or damaged ({reason}): run `workbench doctor` on its workspace") from None


def append_block(folder: Path, block: Block) -> None:
    """Records a block whose files are in place."""
    path = folder / JOURNAL
    if not path.exists():
        # A rename syncs the folder too, without which a power cut could lose the whole journal.
        write_atomically(path, lambda partial: partial.touch())
    with path.open("a") as journal:
        journal.write(block.to_json() + "\n")
        journal.flush()
        os.fsync(journal.fileno())


def read_journal(folder: Path) -> list[Block]:
    """The recorded blocks, in order; a torn last line is left out. May run while another process appends."""
    path = folder / JOURNAL
    if not path.is_file():
        return []
    content = path.read_bytes()
    return [Block.from_json(line) for line in content[: content.rfind(b"\n") + 1].decode().splitlines()]


def recover_journal(folder: Path) -> list[Block]:
    """The blocks that a harvest can go on from; call it with the harvest's lock held.

    Recorded blocks count up to the first one with a file that is missing or has another size than was recorded (a
    restored backup, a copy that was cut short). The journal is cut to those, so a torn last line goes too.
    """
    blocks: list[Block] = []
    for block in read_journal(folder):
        if not all(_has_recorded_size(folder, stored) for stored in block.files()):
            break
        blocks.append(block)
    content = "".join(block.to_json() + "\n" for block in blocks)
    path = folder / JOURNAL
    if path.is_file() and path.read_bytes() != content.encode():
        write_atomically(path, lambda partial: partial.write_text(content))
    return blocks


def _has_recorded_size(folder: Path, stored: StoredFile) -> bool:
    path = folder / stored.file
    return path.is_file() and path.stat().st_size == stored.bytes
