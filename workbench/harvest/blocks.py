"""Files of a harvest's blocks: safetensors that are complete or absent when written, and memory-mapped when read.

A file is written under a temporary name, synced, renamed, and its folder synced. It belongs to the harvest once the
journal records it (workbench/harvest/journal.py).
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sae.errors import InputError
from sae.files import write_atomically
from workbench.harvest.journal import StoredFile

TOKEN_COLUMNS = ("token", "doc", "pos", "flags")
_SAFETENSORS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in _SAFETENSORS.items()}
ALIGNMENT = 64
CHUNK = 1 << 20


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
