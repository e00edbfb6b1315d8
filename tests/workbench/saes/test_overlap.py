"""Overlap of the features of two SAEs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae import SAE, TopK
from sae.errors import InputError
from sae.rules.abstopk import AbsTopK
from workbench import Workspace
from workbench.saes.overlap import overlap, overlap_of


def random_sae(d_sae: int, seed: int, rule: TopK | AbsTopK | None = None, d_in: int = 12) -> SAE:
    sae = SAE(d_in, d_sae, rule or TopK(2), hook_name="blocks.0.hook_resid_post", model_name="m")
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)))
    return sae


@pytest.mark.parametrize("signed", [False, True])
def test_partners_are_those_of_all_pairs_in_float64(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.saes.overlap.FEATURES_AT_ONCE", 7)
    a, b = random_sae(30, 0, AbsTopK(2) if signed else TopK(2)), random_sae(44, 1)
    left, right = (sae.W_dec.detach().double().numpy() for sae in (a, b))
    cosine = np.array([[x @ y / np.sqrt((x @ x) * (y @ y)) for y in right] for x in left])
    if signed:
        cosine = np.abs(cosine)
    found = overlap(a, b)
    assert found.partner_in_b.tolist() == cosine.argmax(axis=1).tolist()
    assert found.partner_in_a.tolist() == cosine.argmax(axis=0).tolist()
    np.testing.assert_allclose(found.cosine_a, cosine.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(found.cosine_b, cosine.max(axis=0), atol=1e-6)


def test_a_shuffled_and_scaled_copy_overlaps_wholly() -> None:
    a, b = random_sae(20, 0), random_sae(20, 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        b.W_dec.copy_(2.5 * a.W_dec[order])
    found = overlap(a, b)
    assert found.mean_max_cosine == pytest.approx((1.0, 1.0), abs=1e-6)
    table = found.table()
    assert order[table["partner"].tolist()].tolist() == table["feature"].tolist()
    assert table["mutual"].all()
    assert sum(found.figure().data[0].y) == pytest.approx(1.0)


def test_opposed_directions_are_one_feature_for_signed_rules_only() -> None:
    a = random_sae(1, 0, TopK(1))
    for rule, cosine in ((TopK(1), -1.0), (AbsTopK(1), 1.0)):
        b = random_sae(1, 0, rule)
        with torch.no_grad():
            b.W_dec.neg_()
        assert overlap(a, b).cosine_a.tolist() == pytest.approx([cosine])


def test_saes_of_different_width_or_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reads vectors of 12, B 8"):
        overlap(random_sae(4, 0), random_sae(4, 0, d_in=8))
    space = Workspace(tmp_path / "w")
    random_sae(4, 0).save(space.path / "saes" / "one")
    with pytest.raises(InputError, match="no SAE 'two'"):
        overlap_of(space, "one", "two")
    other = random_sae(4, 1)
    other.model_name = "another"
    other.save(space.path / "saes" / "two")
    with pytest.raises(InputError, match="one is of the model m, two another"):
        overlap_of(space, "one", "two")
