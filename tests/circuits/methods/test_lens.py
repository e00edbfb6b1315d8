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


def exact(bridge: Any, tokens: Tensor, counted: list[int]) -> Tensor:
    """The mean over counted p of the sum over counted p' of d h_L(p') / d h_l(p), [layers, d_model, d_model], of one
    row of tokens, by autograd's own Jacobian."""
    names = stream_names(bridge)
    streams = activations(bridge, tokens, names)
    found = []
    for name in names[:-1]:

        def last(value: Tensor, name: str = name) -> Tensor:
            whole = streams[name].clone()
            whole[0, counted] = value
            kept: dict[str, Tensor] = {}
            hooks = [(name, lambda _, hook: whole), (names[-1], lambda value, hook: kept.update(last=value))]
            with bridge.hooks(fwd_hooks=hooks):
                bridge(tokens)
            return kept["last"][0, counted].sum(dim=0)

        found.append(torch.autograd.functional.jacobian(last, streams[name][0, counted]).mean(dim=1))
    return torch.stack(found)


def test_the_last_layer_is_the_model_in_both_lenses(bridge: Any) -> None:
    tokens = rows(bridge)
    with torch.no_grad():
        own = bridge(tokens)
    for jacobians, centred in ((None, False), (identity(bridge), False), (identity(bridge), True)):
        *_, last = lens_logits(bridge, tokens, jacobians, centred=centred)
        assert torch.equal(last, own)


@pytest.mark.parametrize("centred", [False, True])
def test_identity_jacobians_with_equal_means_are_the_logit_lens(bridge: Any, centred: bool) -> None:
    tokens = rows(bridge)
    through = lens_logits(bridge, tokens, identity(bridge), centred=centred)
    pairs = list(zip(lens_logits(bridge, tokens), through, strict=True))
    assert len(pairs) == bridge.cfg.n_layers + 1
    for plain, same in pairs:
        torch.testing.assert_close(plain, same, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pairs[0][0], pairs[-1][0])


@pytest.mark.parametrize("places", [[3], [1, 2, 4, 5]])
def test_mean_jacobians_are_those_of_autograd(bridge: Any, places: list[int]) -> None:
    tokens = rows(bridge)
    counted = torch.zeros(2, 6, dtype=torch.bool)
    counted[:, places] = True
    found = mean_jacobians(bridge, [(tokens, counted)], n_batches=1)
    assert found.n_positions == 2 * len(places)
    expected = torch.stack([exact(bridge, row[None], places) for row in tokens]).mean(dim=0)
    torch.testing.assert_close(found.matrices, expected.float(), rtol=1e-3, atol=1e-3)
    streams = activations(bridge, tokens, stream_names(bridge))
    means = torch.stack([s[:, places].flatten(0, 1).mean(dim=0) for s in streams.values()])
    torch.testing.assert_close(found.means, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bridge", ["gpt2"], indirect=True)
def test_what_a_position_does_to_itself(bridge: Any) -> None:
    tokens, places = rows(bridge, n=1), [1, 3, 5]
    own = torch.stack([exact(bridge, tokens, [place]) for place in places]).mean(dim=0).float()
    counted = torch.zeros(512, 6, dtype=torch.bool)
    counted[:, places] = True
    found = mean_jacobians(bridge, [(tokens.expand(512, -1), counted)], n_batches=1, own=True)

    def off(matrices: Tensor) -> Tensor:
        return (matrices - own).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1)

    assert (off(found.matrices) < 0.1).all()
    assert (off(exact(bridge, tokens, places).float()) > 0.2).any()


@pytest.mark.parametrize("bridge", ["gpt2"], indirect=True)
def test_the_average_converges_and_says_how_far_it_is(bridge: Any) -> None:
    def averaged(seed: int, n: int, size: int) -> Jacobians:
        texts = torch.randint(5, 100, (n, size, 6), generator=torch.Generator().manual_seed(seed))
        counted = torch.ones(size, 6, dtype=torch.bool)
        return mean_jacobians(bridge, [(tokens, counted) for tokens in texts], n_batches=n)

    true = averaged(0, 2, 256).matrices
    errors = []
    for n in (2, 8):
        found = averaged(1, n, 8)
        error = (found.matrices - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
        assert ((found.noise > error / 2) & (found.noise < error * 2)).all()
        errors.append(error)
    assert (errors[1] < errors[0] / 1.5).all()


def test_nothing_to_average_over_is_refused(bridge: Any) -> None:
    tokens = rows(bridge)
    with pytest.raises(InputError, match="no position"):
        mean_jacobians(bridge, [(tokens, torch.zeros_like(tokens, dtype=torch.bool))], n_batches=1)


def test_jacobians_of_another_shape_are_refused(bridge: Any) -> None:
    fitted = Jacobians(torch.zeros(1, 8, 8), torch.zeros(2, 8), 1, torch.zeros(1))
    with pytest.raises(InputError, match="1 layers of width 8"):
        list(lens_logits(bridge, rows(bridge), fitted))
