"""Lenses against the model itself, and mean Jacobians against autograd's own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.lens import Jacobians, lens_logits, mean_jacobians, stream_names
from circuits.passes import activations
from sae.errors import InputError


def rows(bridge: Any, n: int = 2, positions: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, bridge.cfg.d_vocab, (n, positions), generator=generator)


def identity(bridge: Any) -> Jacobians:
    n_layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    means = torch.randn(1, d_model).expand(n_layers + 1, -1)
    return Jacobians(torch.eye(d_model).expand(n_layers, -1, -1), means, 1, torch.zeros(n_layers))


def exact(bridge: Any, tokens: Tensor, position: int) -> Tensor:
    """d h_L / d h_l at one position of one row, [layers, d_model, d_model], by autograd's own Jacobian."""
    names = stream_names(bridge)
    streams = activations(bridge, tokens, names)
    found = []
    for name in names[:-1]:

        def last(value: Tensor, name: str = name) -> Tensor:
            whole = streams[name].clone()
            whole[:, position] = value
            kept: dict[str, Tensor] = {}
            hooks = [(name, lambda _, hook: whole), (names[-1], lambda value, hook: kept.update(last=value))]
            with bridge.hooks(fwd_hooks=hooks):
                bridge(tokens)
            return kept["last"][0, position]

        found.append(torch.autograd.functional.jacobian(last, streams[name][0, position]))
    return torch.stack(found)


def test_the_last_layer_is_the_model_in_both_lenses(bridge: Any) -> None:
    tokens = rows(bridge)
    with torch.no_grad():
        own = bridge(tokens)
    for jacobians in (None, identity(bridge)):
        *_, last = lens_logits(bridge, tokens, jacobians)
        assert torch.equal(last, own)


def test_identity_jacobians_with_equal_means_are_the_logit_lens(bridge: Any) -> None:
    tokens = rows(bridge)
    pairs = list(zip(lens_logits(bridge, tokens), lens_logits(bridge, tokens, identity(bridge)), strict=True))
    assert len(pairs) == bridge.cfg.n_layers + 1
    for plain, through in pairs:
        torch.testing.assert_close(plain, through, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pairs[0][0], pairs[-1][0])


def test_one_position_is_exact(bridge: Any) -> None:
    tokens = rows(bridge, n=1)
    counted = torch.zeros(1, 6, dtype=torch.bool)
    counted[0, 3] = True
    found = mean_jacobians(bridge, [(tokens, counted)], n_batches=1)
    assert found.n_positions == 1
    expected = exact(bridge, tokens, 3)
    torch.testing.assert_close(found.matrices, expected.float(), rtol=1e-3, atol=1e-4)
    streams = activations(bridge, tokens, stream_names(bridge))
    torch.testing.assert_close(found.means, torch.stack([s[0, 3] for s in streams.values()]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bridge", ["gpt2"], indirect=True)
def test_the_estimate_converges_and_says_how_far_it_is(bridge: Any) -> None:
    tokens, counted = rows(bridge, n=1), torch.ones(1, 6, dtype=torch.bool)
    expected = torch.stack([exact(bridge, tokens, position) for position in range(6)]).mean(dim=0)
    errors = []
    for repeats in (4, 48):
        found = mean_jacobians(bridge, [(tokens, counted)] * repeats, n_batches=repeats, seed=repeats)
        error = (found.matrices - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        errors.append(error)
        assert ((found.noise > error / 2) & (found.noise < error * 2)).all()
    # Twelve times the draws: 0.29 of the error.
    assert (errors[1] < errors[0] / 2).all()
    assert (errors[1] < 0.2).all()


def test_nothing_to_average_over_is_refused(bridge: Any) -> None:
    tokens = rows(bridge)
    with pytest.raises(InputError, match="no position"):
        mean_jacobians(bridge, [(tokens, torch.zeros_like(tokens, dtype=torch.bool))], n_batches=1)


def test_jacobians_of_another_shape_are_refused(bridge: Any) -> None:
    fitted = Jacobians(torch.zeros(1, 8, 8), torch.zeros(2, 8), 1, torch.zeros(1))
    with pytest.raises(InputError, match="1 layers of width 8"):
        list(lens_logits(bridge, rows(bridge), fitted))
