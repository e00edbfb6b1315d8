"""What the weights say: neighbours, map, heads and logit effects against plain float64 and the model itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from circuits.dfa import head_shares
from circuits.effective_weights import effective_unembedding
from sae import SAE, TopK
from sae.directions import ROWS_AT_ONCE, unit_rows
from sae.errors import InputError
from workbench.features.index.geometry import decoder_map, decoder_neighbours, principal_map
from workbench.features.index.logits import TOKENS, effects_of, logit_effects, output_directions
from workbench.features.index.statistics import BINS
from workbench.models.load import LoadedModel


@pytest.fixture
def W_dec() -> torch.Tensor:
    W = torch.randn(37, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 37)[:, None]
    W[5] = -3 * W[4]
    return W


@pytest.mark.parametrize("at_once", [1024, 5])
def test_neighbours_are_the_largest_absolute_cosines(
    at_once: int, W_dec: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", at_once)
    cosine, other = decoder_neighbours(W_dec, 6)
    W = W_dec.double().numpy()
    for feature in range(len(W)):
        expected = W @ W[feature] / np.linalg.norm(W, axis=1) / np.linalg.norm(W[feature])
        expected[feature] = 0
        # Features 4 and 5 are opposed, so their places are tied everywhere: compare sizes, then signs.
        assert np.abs(cosine[feature].numpy()) == pytest.approx(np.sort(np.abs(expected))[::-1][:6], abs=1e-6)
        assert cosine[feature].numpy() == pytest.approx(expected[other[feature].numpy()], abs=1e-6)
        assert len(set(other[feature].tolist())) == 6
    assert (other[4, 0], cosine[4, 0].item()) == (5, pytest.approx(-1, abs=1e-6))


def test_few_features_have_all_others_as_neighbours() -> None:
    cosine, other = decoder_neighbours(torch.eye(3), 10)
    assert cosine.shape == (3, 2)
    assert sorted(other[0].tolist()) == [1, 2]


def test_the_map_is_the_leading_part_of_the_singular_value_decomposition(W_dec: torch.Tensor) -> None:
    unit = unit_rows(W_dec.double()).numpy()
    centred = unit - unit.mean(0)
    U, S, _ = np.linalg.svd(centred, full_matrices=False)
    found = principal_map(W_dec).numpy()
    assert decoder_map(W_dec)[0] == "PCA"
    expected = U[:, :2] * S[:2]
    assert np.abs(found) == pytest.approx(np.abs(expected), abs=1e-9)
    assert np.abs((found * expected).sum(0)) == pytest.approx(S[:2] ** 2, abs=1e-9)


def test_a_one_dimensional_map_has_zeros_beside_it() -> None:
    assert principal_map(torch.tensor([[1.0], [-2.0], [1.0]])).tolist() == [
        [pytest.approx(2 / 3), 0], [pytest.approx(-4 / 3), 0], [pytest.approx(2 / 3), 0],
    ]  # fmt: skip


def test_umap_makes_the_map_where_it_is_installed() -> None:
    """Four tight bundles of directions come out as four clusters, the same every time."""
    pytest.importorskip("umap", reason="umap-learn is not installed")
    generator = torch.Generator().manual_seed(0)
    bundle = torch.arange(80) % 4
    W_dec = torch.randn(4, 32, generator=generator)[bundle] + 0.1 * torch.randn(80, 32, generator=generator)
    method, found = decoder_map(W_dec)
    assert method == "UMAP"
    assert torch.equal(found, decoder_map(W_dec)[1])
    apart = torch.cdist(found, found)
    same = bundle[:, None] == bundle
    assert apart[same].max() < apart[~same].min()


def test_head_shares_are_those_of_the_squared_norm_and_sum_to_one(W_dec: torch.Tensor) -> None:
    shares = head_shares(W_dec, 4).numpy()
    blocks = (W_dec.double().numpy() ** 2).reshape(37, 4, 3).sum(2)
    assert shares == pytest.approx(blocks / blocks.sum(1, keepdims=True), rel=1e-12)
    assert shares.sum(1) == pytest.approx(np.ones(37))


@pytest.mark.parametrize(("at_once", "in_cache"), [(1 << 23, 1 << 20), (50 * 3, 1 << 20), (50 * 9, 50 * 2)])
def test_logit_effects_equal_numpy_in_float64(
    at_once: int, in_cache: int, W_dec: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.features.index.logits.EFFECTS_AT_ONCE", at_once)
    monkeypatch.setattr("workbench.features.index.logits.IN_CACHE", in_cache)
    U = torch.randn(12, 50, generator=torch.Generator().manual_seed(1)) + 0.5
    W_dec[7] = 0
    effects = W_dec.double().numpy() @ U.double().numpy()
    effects -= effects.mean(1, keepdims=True)
    seen = 0
    for found in logit_effects(W_dec, U):
        for local in range(len(found.std)):
            effect = effects[found.first + local]
            seen += 1
            assert found.std[local] == pytest.approx(effect.std(), rel=1e-5, abs=1e-12)
            assert found.top_effect[local] == pytest.approx(np.sort(effect)[::-1][:TOKENS], abs=1e-4)
            assert found.bottom_effect[local] == pytest.approx(np.sort(effect)[:TOKENS], abs=1e-4)
            assert effect[found.top[local]] == pytest.approx(found.top_effect[local], abs=1e-4)
            assert effect[found.bottom[local]] == pytest.approx(found.bottom_effect[local], abs=1e-4)
            assert found.histogram[local].sum() == 50
            if found.first + local == 7:
                assert np.isnan(found.skewness[local])
                continue
            z = effect / effect.std()
            assert found.skewness[local] == pytest.approx((z**3).mean(), abs=1e-4)
            assert found.kurtosis[local] == pytest.approx((z**4).mean() - 3, abs=1e-4)
            assert np.abs(found.histogram[local] - np.histogram(effect, BINS)[0]).sum() <= 2
    assert seen == 37


def sae_of(model: LoadedModel, hook: str, width: int) -> SAE:
    sae = SAE(width, 6, TopK(2), hook_name=hook, model_name=model.info.name)
    torch.manual_seed(0)
    with torch.no_grad():
        sae.W_dec.normal_()
    return sae


@pytest.mark.parametrize("hook", ["hook_resid_post", "attn.hook_z", "mlp.hook_post", "hook_mlp_out"])
def test_directions_pass_the_models_own_output_map(tiny_model: LoadedModel, hook: str) -> None:
    model = tiny_model
    layer = model.info.n_layers - 1
    width = {"attn.hook_z": model.info.d_attention, "mlp.hook_post": model.info.d_mlp}.get(hook, model.info.d_model)
    sae = sae_of(model, f"blocks.{layer}.{hook}", width)
    directions = output_directions(model, sae)
    if hook in ("attn.hook_z", "mlp.hook_post"):
        block = model.bridge.blocks[layer]
        component = block.attn.o if hook == "attn.hook_z" else block.mlp.out
        zero = component.original_component(torch.zeros(1, width))
        expected = component.original_component(sae.W_dec.detach()) - zero
    else:
        expected = sae.W_dec.detach()
    torch.testing.assert_close(directions, expected, atol=1e-5, rtol=1e-5)
    U = effective_unembedding(model.bridge).double()
    effect = directions.double() @ U
    effect -= effect.mean(1, keepdim=True)
    found = next(effects_of(model, sae))
    expected_top = effect.topk(TOKENS, dim=1).values
    torch.testing.assert_close(torch.from_numpy(found.top_effect).double(), expected_top, atol=1e-4, rtol=1e-4)


def test_what_is_written_nowhere_or_belongs_elsewhere_is_refused(gpt2_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="written nowhere"):
        output_directions(gpt2_model, sae_of(gpt2_model, "blocks.0.mlp.hook_in", gpt2_model.info.d_model))
    with pytest.raises(InputError, match="belongs to another model"):
        output_directions(gpt2_model, sae_of(gpt2_model, "blocks.0.hook_resid_post", 8))
