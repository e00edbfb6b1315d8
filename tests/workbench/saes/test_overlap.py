"""Overlap of the features of two SAEs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae import SAE, TopK
from sae.directions import ROWS_AT_ONCE
from sae.errors import InputError
from sae.metrics import decoder_cosine_maxima
from sae.recovery import recovery
from sae.rules.abstopk import AbsTopK
from workbench import Workspace
from workbench.features.index.geometry import decoder_neighbours
from workbench.saes.overlap import overlap, overlap_of


def random_sae(d_sae: int, seed: int, rule: TopK | AbsTopK | None = None, d_in: int = 12) -> SAE:
    sae = SAE(d_in, d_sae, rule or TopK(2), hook_name="blocks.0.hook_resid_post", model_name="m")
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)))
    return sae


@pytest.mark.parametrize("signed", [False, True])
def test_partners_are_those_of_all_pairs_in_float64(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", 7)
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


def test_every_caller_shows_the_same_cosines() -> None:
    """Overlap, recovery, evaluation and the index say of one pair of directions the same, also of a row of zeros."""
    a, b = random_sae(30, 0), random_sae(44, 1)
    with torch.no_grad():
        for sae in (a, b):
            sae.W_dec[3] = 0
    x, active = torch.randn(8, 12), torch.zeros(8, 30)
    found, recovered = overlap(a, b), recovery(b, a.W_dec.detach(), x, active)
    assert found.mean_max_cosine[0] == pytest.approx(recovered.mean_max_cosine, rel=1e-6)
    assert overlap(a, b).cosine_a[3] == 0
    # Among an SAE's own rows: the nearest by size that is not opposed is the largest.
    nearest, _ = decoder_neighbours(b.W_dec, n=43)
    torch.testing.assert_close(nearest.amax(dim=1), decoder_cosine_maxima(b.W_dec))
    assert (decoder_neighbours(b.W_dec, n=43)[0][3] == 0).all()


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
    with pytest.raises(InputError, match="writes vectors of 12, B 8"):
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
