"""Activations from elsewhere: stored, trained on, indexed and asked by SQL, with no model behind them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae import InputError, TopK, TrainConfig
from workbench.workspace import Workspace

CONTEXTS, LENGTH, WIDTH = 40, 6, 8


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(CONTEXTS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


def test_given_activations_are_a_harvest(tmp_path: Path, x: torch.Tensor) -> None:
    space = Workspace(tmp_path / "w")
    tokens = np.arange(CONTEXTS * LENGTH).reshape(CONTEXTS, LENGTH) % 5
    counted = np.ones((CONTEXTS, LENGTH), dtype=bool)
    counted[:, -1] = False
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    made = space.add_harvest(
        "theirs", {"layer 3": mapped, "again": x.half()}, tokens=tokens, counted=counted, vocabulary=list("abcde")
    )
    rows = np.arange(made.n_rows)
    assert torch.equal(made.vectors("layer 3").rows(rows), x.flatten(0, 1))
    assert (made.ordinary.reshape(CONTEXTS, LENGTH) == counted).all()
    found = space.sql("SELECT text, count(*) AS n FROM tokens JOIN vocabulary USING (token) GROUP BY text").df()
    assert dict(zip(found["text"], found["n"], strict=True)) == dict.fromkeys("abcde", CONTEXTS * LENGTH // 5)
    config = TrainConfig(name="a", rule=TopK(2), d_sae=16, total_tokens=400, batch_size=50)
    (sae,) = space.train("r", "theirs", [config], hook="layer 3", device="cpu")
    summary = space.build_index("a", device="cpu")
    assert summary.missing is not None
    index = space.index("a")
    code = sae.encode(x.flatten(0, 1)[made.ordinary]).to_dense()
    stored = index.frame("SELECT feature, count(*) AS n FROM feature_activations GROUP BY feature")
    wanted = (code != 0).sum(dim=0)
    assert dict(zip(stored["feature"], stored["n"], strict=True)) == {
        feature: n for feature, n in enumerate(wanted.tolist()) if n
    }
    with pytest.raises(InputError) as caught:
        space.evaluate(["a"], device="cpu")
    assert "\n" not in str(caught.value)


def test_rows_without_tokens_are_contexts_of_one_row(tmp_path: Path, x: torch.Tensor) -> None:
    made = Workspace(tmp_path).add_harvest("rows", {"h": x.flatten(0, 1).double()})
    assert (made.n_rows, made.context_len, made.vectors("h").dtype) == (CONTEXTS * LENGTH, 1, torch.float32)


def test_what_does_not_fit_is_one_line(tmp_path: Path, x: torch.Tensor) -> None:
    space = Workspace(tmp_path)
    space.add_harvest("there", {"h": x})
    wrong = [
        ("there", {"h": x}, {}, "harvest 'there' exists"),
        ("n", {}, {}, "at the same rows"),
        ("n", {"h": x, "g": x[1:]}, {}, "at the same rows"),
        ("n", {"h": x.long()}, {}, "expected floating-point activations"),
        ("n", {"h": x}, {"tokens": torch.zeros(3, dtype=torch.long)}, "tokens must be whole numbers of shape"),
        ("n", {"h": x}, {"tokens": torch.full((CONTEXTS, LENGTH), 9), "vocabulary": ["a"]}, "the vocabulary has 1"),
        ("nan", {"h": x.where(x < 2, torch.nan)}, {}, "NaN at h"),
    ]
    for name, activations, described, message in wrong:
        with pytest.raises(InputError, match=message):
            space.add_harvest(name, activations, **described)
