"""What the index's tests share.

`dense` is a matrix of signed activations with every awkward kind of feature, `entries_of` its entries as the index
sees them; `space` is a workspace with an indexed SAE of random weights on a tiny model.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sae import SAE, TopK
from workbench import Workspace
from workbench.features.index.build import build_index
from workbench.features.index.segments import Entries
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel

N_TOKENS, D_SAE, CONTEXT = 400, 24, 16
HOOK = "blocks.1.hook_resid_post"
DEAD = 3


def entries_of(dense: NDArray, rows: NDArray, first: int = 0) -> Entries:
    """Entries of a [tokens, features] matrix whose tokens lie at `rows`."""
    parts = [np.flatnonzero(dense[:, feature]) for feature in range(dense.shape[1])]
    return Entries(
        first,
        np.array([len(part) for part in parts]),
        rows[np.concatenate(parts)].astype(np.int32),
        np.concatenate([dense[part, feature] for feature, part in enumerate(parts)]).astype(np.float32),
    )


@pytest.fixture
def rows() -> NDArray:
    """Rows of the tokens: the first of every context is BOS and left out."""
    every = np.arange(2 * N_TOKENS)
    return every[every % CONTEXT != 0][:N_TOKENS]


@pytest.fixture
def dense() -> NDArray:
    """[N_TOKENS, D_SAE] float32. Feature 0 is dead, 1 fires once, 2 always, 3 always alike, 4 negative only; 5 and 6
    fire together; the others are positive or signed, with densities between 0.01 and 0.5 and repeated values."""
    random = np.random.default_rng(0)
    density = np.geomspace(0.01, 0.5, D_SAE)
    values = np.round(random.gamma(2.0, 1.0, (N_TOKENS, D_SAE)) + 0.25, 1)
    values *= np.where(random.random((N_TOKENS, D_SAE)) < 0.3, -1, 1) ** (np.arange(D_SAE) % 2)
    values[random.random((N_TOKENS, D_SAE)) > density] = 0
    values[:, 0] = 0
    values[:, 1] = 0
    values[77, 1] = 1.5
    values[:, 2] = random.gamma(2.0, 1.0, N_TOKENS) + 0.1
    values[:, 3] = np.where(values[:, 3] != 0, 0.7, 0)
    values[:, 4] = -np.abs(values[:, 4])
    values[:, 6] = 2 * values[:, 5]
    return values.astype(np.float32)


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory, gpt2_model: LoadedModel) -> Path:
    """What `space` is a copy of."""
    root = tmp_path_factory.mktemp("query")
    (root / "texts").mkdir()
    for number in range(30):
        (root / "texts" / f"{number}.txt").write_text(
            f"def f{number}(x):\n    return '<script>{number}</script>' & x\n"
        )
    space = Workspace(root / "w")
    config = HarvestConfig(gpt2_model.info.name, str(root / "texts"), (HOOK,), context_len=32, max_tokens=1500)
    space.harvest("h", config, model=gpt2_model)
    sae = SAE(gpt2_model.info.d_model, 40, TopK(4), hook_name=HOOK, model_name="tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
        sae.b_enc[DEAD] = -1e6
    sae.save(space.path / "saes" / "s")
    build_index(space, "s", harvest="h", model=gpt2_model, device="cpu")
    return space.path


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, indexed: Path) -> Workspace:
    shutil.copytree(indexed, path := tmp_path_factory.mktemp("query") / "w")
    return Workspace(path)
