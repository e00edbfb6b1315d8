"""Reads what prepare_corpus.py packed: the training stream, and the held-out files to measure on."""

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_metrics import document_windows
from jaxtyping import Int
from torch import Tensor

from workbench.text.python_source import TEST_FOLDERS

PACKAGE_FILES = 120
"""Held-out package files scored, evenly spread over packages; all of them would take a CPU too long."""


@dataclass(frozen=True)
class HeldoutFiles:
    documents: list[np.ndarray]
    bytes: int

    def windows(self, count: int) -> Tensor:
        """Full windows of the first files."""
        full = [windows[:-1] for windows in map(document_windows, self.documents)]
        return torch.cat(full)[:count]


def read_stream(path: Path) -> Int[Tensor, " token"]:
    with lzma.open(path) as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint16).astype(np.int32))


def corpus_heldout(corpus: Path) -> dict[str, HeldoutFiles]:
    """The held-out files that `stdlib_files` lists (no tests), and an even choice of held-out package files."""
    heldout = np.load(corpus / "heldout.npz")
    documents = np.split(heldout["tokens"], np.cumsum(heldout["lengths"])[:-1])
    is_test = np.array([not TEST_FOLDERS.isdisjoint(path.split("/")) for path in heldout["module_paths"]])
    stdlib, packages = np.flatnonzero(heldout["stdlib"] & ~is_test), np.flatnonzero(~heldout["stdlib"])
    packages = packages[:: max(1, -(-len(packages) // PACKAGE_FILES))]

    def choose(indices: Sequence[int] | np.ndarray) -> HeldoutFiles:
        return HeldoutFiles([documents[i] for i in indices], int(heldout["bytes"][indices].sum()))

    return {"standard library": choose(stdlib), "packages": choose(packages)}
