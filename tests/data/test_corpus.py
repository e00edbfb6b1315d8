"""The corpus keeps held-out text unseen, and the training windows and the baseline are what they claim to be."""

import numpy as np
import pytest
import torch
from corpus_duplicates import deduplicate
from corpus_sources import STANDARD_LIBRARY, Document, documents, standard_library
from ngram_baseline import fit, log_probabilities
from train_demo_model import batches

from workbench.text.python_source import split_of


def lines(name: str, count: int = 20) -> str:
    return "".join(f"{name}_variable_number_{i} = compute_{name}({i})\n" for i in range(count))


def path(split: str, number: int = 0) -> str:
    """The number-th of some module paths on a side of the split."""
    paths = (f"package/module_{i}.py" for i in range(10_000))
    return [p for p in paths if split_of(p) == split][number]


def test_exact_duplicates_keep_the_first_whatever_the_blank_space() -> None:
    first = Document("a", path("train", 0), lines("x"))
    copy = Document("b", path("train", 1), lines("x").replace("\n", "  \n\n"))
    assert deduplicate([first, copy]).train == [first]


def test_training_files_like_a_heldout_stdlib_file_are_dropped() -> None:
    heldout = Document(STANDARD_LIBRARY, path("heldout"), lines("x"))
    backport = Document("backports", path("train", 0), lines("x", 12) + lines("y", 8))
    other = Document("other", path("train", 1), lines("z"))
    result = deduplicate([heldout, backport, other])
    assert result.train == [other]
    assert result.heldout == [heldout]


def test_heldout_package_files_mostly_seen_in_training_are_not_used() -> None:
    train = Document("a", path("train"), lines("x"))
    seen = Document("b", path("heldout", 0), lines("x", 15) + lines("y", 5))
    unseen = Document("b", path("heldout", 1), lines("x", 5) + lines("w", 15))
    assert deduplicate([train, seen, unseen]).heldout == [unseen]


def test_training_files_that_mostly_repeat_others_are_dropped() -> None:
    original = Document("a", path("train", 0), lines("x"))
    repeated = Document("b", path("train", 1), lines("x", 18) + lines("y", 2))
    assert deduplicate([original, repeated]).train == [original]


def test_the_cap_takes_whole_files_in_a_stable_order() -> None:
    library = standard_library()
    capped = list(documents(library, max_bytes=300_000))
    assert sum(document.bytes for document in capped[:-1]) < 300_000 <= sum(document.bytes for document in capped)
    assert capped == list(documents(library, max_bytes=300_000))


def test_training_windows_begin_with_bos_and_follow_the_stream() -> None:
    stream = torch.arange(1, 6001, dtype=torch.int32)
    stream[::50] = 0
    batch = next(batches(stream, windows=4, generator=torch.Generator().manual_seed(0)))
    assert batch.shape == (4, 513)
    assert (batch[:, 0] == 0).all()
    assert (batch[:, 1] != 0).all()
    for window in batch[:, 1:]:
        start = int((stream == window[0]).nonzero()[0])
        assert torch.equal(window, stream[start : start + 512].long())


@pytest.mark.parametrize("context", [[], [1, 2, 3, 4], [7, 4000, 7, 7, 7]])
def test_ngram_probabilities_sum_to_one(context: list[int]) -> None:
    stream = np.minimum(np.random.default_rng(0).zipf(1.3, 5000), 4095).astype(np.uint16)
    levels = fit(stream)
    candidates = [np.array([*context, token], np.uint16) for token in range(4096)]
    total = sum(np.exp(log_probabilities(levels, candidate)[-1]) for candidate in candidates)
    assert total == pytest.approx(1.0, abs=1e-9)


def test_ngram_model_learns_a_repeated_sequence() -> None:
    stream = np.tile(np.arange(1, 9, dtype=np.uint16), 200)
    levels = fit(stream)
    assert np.exp(log_probabilities(levels, stream[:40])[10:]).min() > 0.9
