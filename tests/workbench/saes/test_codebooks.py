"""Codebooks of a workspace: fitted to a harvest, and found as SAEs are."""

from pathlib import Path

import pytest
import torch

from sae import Codebook, InputError
from workbench import Workspace

HOOK = "blocks.0.hook_resid_post"


def test_a_codebook_is_fitted_to_a_harvest_and_is_an_sae(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    space.add_harvest("h", {HOOK: torch.randn(64, 48, 8)}, model="m")
    made = space.fit_codebook("book", "h", n_codes=16, k=2, total_tokens=3 * 2048, seed=1)
    read = space.sae("book")
    assert read.rule == Codebook(2)
    assert (read.hook_name, read.model_name) == (HOOK, "m")
    assert read.fingerprint() == made.fingerprint()
    origin = space.origin("book")
    assert (origin.harvest, origin.training["seed"], origin.rule["name"]) == ("h", 1, "codebook")
    assert space.compare(["book"])["rule"].tolist() == ["codebook"]
    with pytest.raises(InputError, match="exists"):
        space.fit_codebook("book", "h")
    with pytest.raises(InputError, match="no hook point"):
        space.fit_codebook("other", "h", hook="blocks.9.hook_resid_post")
