"""Removes duplicates from the corpus, so that held-out text really is unseen.

1. Exact duplicates (equal after dropping blank lines and trailing space) keep their first occurrence.
2. Training files that share much with one held-out standard-library file (vendored copies, backports, ports) go.
3. Training files most of whose lines earlier training files already contain go.
4. Held-out files more than half of whose lines the remaining training files contain are not used for evaluation.

"Lines" are distinct non-trivial lines: at least 20 characters after stripping.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from corpus_sources import Document

NON_TRIVIAL = 20
SHARED_WITH_HELDOUT = 0.4
"""Step 2's limit on the shared lines' share of the smaller of the two files."""
MIN_SHARED_LINES = 4
"""Below this, files of a few lines would go because of a licence header or an import."""
REPEATED_TRAINING = 0.7
"""Step 3's limit on the share of lines seen before."""
SEEN_HELDOUT = 0.5
"""Step 4's limit on the share of lines found in training."""


@dataclass(frozen=True)
class Deduplicated:
    train: list[Document]
    heldout: list[Document]
    dropped: dict[str, int]
    """Number of files by reason."""


def deduplicate(documents: Iterable[Document]) -> Deduplicated:
    """Applies the four steps. The order of the documents decides which of several copies stays."""
    dropped: Counter[str] = Counter()
    seen_files: set[bytes] = set()
    kept: list[tuple[Document, frozenset[int]]] = []
    for document in documents:
        key = content_key(document.text)
        if key in seen_files:
            dropped["exact duplicate"] += 1
            continue
        seen_files.add(key)
        kept.append((document, line_keys(document.text)))

    heldout = [(document, lines) for document, lines in kept if document.split == "heldout"]
    owners = _owners([lines for document, lines in heldout if document.from_stdlib])
    sizes = [len(lines) for document, lines in heldout if document.from_stdlib]

    train: list[Document] = []
    seen_lines: set[int] = set()
    for document, lines in kept:
        if document.split != "train":
            continue
        if _copies_heldout(lines, owners, sizes):
            dropped["training file like a held-out standard-library file"] += 1
        elif lines and len(lines & seen_lines) / len(lines) > REPEATED_TRAINING:
            dropped["training file mostly repeated"] += 1
        else:
            train.append(document)
            seen_lines |= lines

    unseen: list[Document] = []
    for document, lines in heldout:
        if not lines or len(lines & seen_lines) / len(lines) > SEEN_HELDOUT:
            dropped["held-out file mostly seen in training"] += 1
        else:
            unseen.append(document)
    return Deduplicated(train, unseen, dict(dropped))


def content_key(text: str) -> bytes:
    """Digest of a text without blank lines and trailing space."""
    lines = (line.rstrip() for line in text.splitlines())
    return blake2b("\n".join(line for line in lines if line).encode(), digest_size=16).digest()


def line_keys(text: str) -> frozenset[int]:
    """64-bit digests of a text's distinct non-trivial lines."""
    lines = {line.strip() for line in text.splitlines()}
    return frozenset(
        int.from_bytes(blake2b(line.encode(), digest_size=8).digest(), "big")
        for line in lines
        if len(line) >= NON_TRIVIAL
    )


def _owners(files: list[frozenset[int]]) -> dict[int, list[int]]:
    """For every line, the files that hold it."""
    owners: dict[int, list[int]] = defaultdict(list)
    for index, lines in enumerate(files):
        for line in lines:
            owners[line].append(index)
    return owners


def _copies_heldout(lines: frozenset[int], owners: dict[int, list[int]], sizes: list[int]) -> bool:
    shared: Counter[int] = Counter()
    for line in lines & owners.keys():
        shared.update(owners[line])
    return any(
        count >= MIN_SHARED_LINES and count / min(len(lines), sizes[index]) > SHARED_WITH_HELDOUT
        for index, count in shared.items()
    )
