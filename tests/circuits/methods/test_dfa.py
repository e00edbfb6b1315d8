"""DFA and its recursion: every decomposition adds up to what the model and the SAE compute, on every architecture."""

from typing import Any

import pytest
import torch

from circuits.dfa import direct_feature_attribution, head_shares
from circuits.passes import activations
from circuits.recursive_dfa import of_head_write, of_residual_feature, recursive_dfa, through_residual_sae
from sae.errors import InputError
from sae.model import SAE
from sae.rules import TopK


def random_sae(width: int, hook_name: str, seed: int, d_sae: int = 40) -> SAE:
    """Biases included; decoder rows of unit norm."""
    sae = SAE(width, d_sae, TopK(k=6), hook_name=hook_name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(width, d_sae, generator=generator) / width**0.5)
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, width, generator=generator), dim=1))
        sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(width, generator=generator))
    return sae


def attention_sae(bridge: Any, layer: int) -> SAE:
    return random_sae(bridge.cfg.n_heads * bridge.cfg.d_head, f"blocks.{layer}.attn.hook_z", layer)


def pre_activation(bridge: Any, sae: SAE, tokens: torch.Tensor, feature: int, position: int) -> float:
    x = activations(bridge, tokens[None], [sae.hook_name])[sae.hook_name][0].flatten(1)
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    return float(z[position, feature].detach())


def test_terms_by_source_and_head_add_up_to_the_pre_activation(bridge: Any, tokens: torch.Tensor) -> None:
    sae = attention_sae(bridge, 1)
    for feature, destination in ((3, -1), (17, 6)):
        found = direct_feature_attribution(bridge, sae, tokens[1], feature, destination)
        expected = pre_activation(bridge, sae, tokens[1], feature, destination)
        assert found.pre_activation == pytest.approx(expected, abs=2e-5)
        assert found.values.shape == (12, bridge.cfg.n_heads)
        # No attention to the future.
        assert found.values[found.destination + 1 :].abs().max() == 0 if found.destination < 11 else True
        assert float(found.by_source().sum()) == pytest.approx(float(found.by_head().sum()), abs=1e-5)
    table = found.table()
    assert table.value.abs().is_monotonic_decreasing


def test_a_heads_term_is_its_z_times_its_encoder(bridge: Any, tokens: torch.Tensor) -> None:
    sae = attention_sae(bridge, 2)
    found = direct_feature_attribution(bridge, sae, tokens[0], 5)
    z = activations(bridge, tokens[:1], [sae.hook_name])[sae.hook_name][0, -1].double()
    encoder = sae.W_enc[:, 5].detach().double().view_as(z)
    torch.testing.assert_close(found.by_head().double(), (z * encoder).sum(dim=1), atol=1e-5, rtol=1e-4)


def test_residual_features_error_and_biases_add_up(bridge: Any, tokens: torch.Tensor) -> None:
    sae = attention_sae(bridge, 2)
    for hook_name in ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"):
        residual = random_sae(bridge.cfg.d_model, hook_name, 7)
        terms = through_residual_sae(bridge, sae, residual, tokens[1], 9, 8)
        expected = pre_activation(bridge, sae, tokens[1], 9, 8)
        assert terms.total == pytest.approx(expected, abs=5e-5)
        kinds = set(terms.table.kind)
        assert kinds == {"feature", "error", "b_dec", "b_V", "constant"}
        assert (terms.table.query("kind == 'feature'").source <= 11).all()
        assert terms.target == "a2/f9@8"


def test_a_residual_feature_adds_up_over_writers(bridge: Any, tokens: torch.Tensor) -> None:
    residual = random_sae(bridge.cfg.d_model, "blocks.2.hook_resid_pre", 7)
    terms = of_residual_feature(bridge, residual, tokens[1], 4, 7)
    assert terms.total == pytest.approx(pre_activation(bridge, residual, tokens[1], 4, 7), abs=5e-5)
    # And one head's share of it once more, by what the residual SAE below sees at the source.
    below = random_sae(bridge.cfg.d_model, "blocks.1.hook_resid_pre", 8)
    whole = terms.table.query("head == 'a1.h2' and source == 3").value.item()
    split = of_head_write(bridge, below, (1, 2), tokens[1], 3, 7, residual, 4)
    assert split.total == pytest.approx(whole, abs=2e-5)
    assert split.target == "a1.h2@3->r2/f4@7"


def test_the_recursion_follows_the_strongest_terms(random_model: Any, tokens: torch.Tensor) -> None:
    sae = attention_sae(random_model, 2)
    residuals = {layer: random_sae(32, f"blocks.{layer}.hook_resid_pre", 20 + layer) for layer in range(3)}
    lengths = []
    for feature in range(8):
        chain = recursive_dfa(random_model, sae, residuals, tokens[0], feature)
        lengths.append(len(chain))
        if len(chain) > 1:
            top = chain[0].table.query("kind == 'feature'").iloc[0]
            assert chain[1].target == f"r2/f{top.feature}@{top.source}"
        if len(chain) > 2:
            top = chain[1].table.query("kind == 'head'").iloc[0]
            assert chain[2].target.startswith(f"{top['head']}@{top.source}->")
    # Attention feature, residual feature, head; twice more unless the head is in layer 0, where it ends sooner.
    assert max(lengths) == 6
    with pytest.raises(InputError, match="needs a residual SAE on the input of layer 2"):
        recursive_dfa(random_model, sae, {1: residuals[1]}, tokens[0], 0)


def test_shares_are_those_of_the_squared_norm(random_model: Any) -> None:
    sae = attention_sae(random_model, 1)
    shares = head_shares(sae.W_dec, 4)
    row = sae.W_dec[11].detach().double()
    squares = torch.stack([row[8 * h : 8 * h + 8].norm() ** 2 for h in range(4)])
    torch.testing.assert_close(shares[11], squares / row.norm() ** 2)
    # Parts of norm 3 and 4 make a row of norm 5.
    torch.testing.assert_close(head_shares(torch.tensor([[3.0, 0.0, 0.0, 4.0]]), 2)[0].tolist(), [0.36, 0.64])
    of_norms = head_shares(torch.tensor([[3.0, 0.0, 0.0, 4.0]]), 2, squared=False)
    torch.testing.assert_close(of_norms[0].tolist(), [3 / 7, 4 / 7])


def test_bad_input(random_model: Any, tokens: torch.Tensor) -> None:
    sae, residual = attention_sae(random_model, 1), random_sae(32, "blocks.1.hook_resid_pre", 3)
    with pytest.raises(InputError, match=r"DFA needs one on attn.hook_z"):
        direct_feature_attribution(random_model, residual, tokens[0], 0)
    with pytest.raises(InputError, match="features 0 to 39"):
        direct_feature_attribution(random_model, sae, tokens[0], 40)
    with pytest.raises(InputError, match="position 12 does not exist"):
        direct_feature_attribution(random_model, sae, tokens[0], 0, 12)
    with pytest.raises(InputError, match="is not the input of layer 2"):
        through_residual_sae(random_model, attention_sae(random_model, 2), residual, tokens[0], 0)
