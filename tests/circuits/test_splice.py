"""Splicing: what is replaced, what is spared, and that nothing is left behind."""

from typing import Any

import pytest
import torch

from circuits.splice import splice
from sae.errors import InputError

RESIDUAL, Z, MID = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid"


def value_at(bridge: Any, tokens: torch.Tensor, name: str) -> torch.Tensor:
    with torch.no_grad():
        return bridge.run_with_cache(tokens)[1][name]


def skip_without(bridge: Any, name: str) -> None:
    if name not in bridge.hook_dict:
        pytest.skip(f"this architecture has no {name}")


@torch.no_grad()
@pytest.mark.parametrize("name", [RESIDUAL, Z, MID, "blocks.0.mlp.hook_post"])
def test_the_identity_changes_nothing(bridge: Any, tokens: torch.Tensor, name: str) -> None:
    skip_without(bridge, name)
    clean = bridge(tokens)
    with splice(bridge, name, lambda x: x, bos_id=0):
        assert torch.equal(bridge(tokens), clean)


@torch.no_grad()
@pytest.mark.parametrize("name", [RESIDUAL, Z])
def test_values_are_replaced_except_at_bos(bridge: Any, tokens: torch.Tensor, name: str) -> None:
    clean = value_at(bridge, tokens, name)
    with splice(bridge, name, lambda x: 2 * x + 1, bos_id=0):
        spliced = value_at(bridge, tokens, name)
    bos = tokens == 0
    assert bos.sum() == 4
    torch.testing.assert_close(spliced[~bos], 2 * clean[~bos] + 1)
    assert torch.equal(spliced[bos], clean[bos])


@torch.no_grad()
def test_kept_positions_keep_their_value(bridge: Any, tokens: torch.Tensor) -> None:
    clean = value_at(bridge, tokens, RESIDUAL)
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    keep[2, 7:] = True
    with splice(bridge, RESIDUAL, torch.zeros_like, keep=keep):
        spliced = value_at(bridge, tokens, RESIDUAL)
    assert torch.equal(spliced[keep], clean[keep])
    assert not spliced[~keep].any()


@torch.no_grad()
def test_heads_are_handed_over_side_by_side(bridge: Any, tokens: torch.Tensor) -> None:
    seen = []
    with splice(bridge, Z, lambda x: seen.append(x) or x):
        bridge(tokens)
    z = value_at(bridge, tokens, Z)
    assert torch.equal(seen[0], z.flatten(0, 1).flatten(1))


@torch.no_grad()
def test_with_its_error_an_unmodified_function_changes_nothing_exactly(bridge: Any, tokens: torch.Tensor) -> None:
    def lossy(x: torch.Tensor) -> torch.Tensor:
        return (x * 3).round() / 7

    clean = bridge(tokens)
    with splice(bridge, RESIDUAL, lossy, error_of=lossy, bos_id=0):
        assert torch.equal(bridge(tokens), clean)
    with splice(bridge, RESIDUAL, lossy, bos_id=0):
        assert not torch.allclose(bridge(tokens), clean)


@torch.no_grad()
def test_an_edit_on_top_of_the_error_is_the_edit_alone(bridge: Any, tokens: torch.Tensor) -> None:
    def lossy(x: torch.Tensor) -> torch.Tensor:
        return x.round()

    with splice(bridge, RESIDUAL, lambda x: lossy(x) + 0.5, error_of=lossy):
        through_error = bridge(tokens)
    with splice(bridge, RESIDUAL, lambda x: x + 0.5):
        torch.testing.assert_close(bridge(tokens), through_error)


@torch.no_grad()
def test_splices_nest(bridge: Any, tokens: torch.Tensor) -> None:
    with splice(bridge, "blocks.0.hook_resid_post", torch.zeros_like), splice(bridge, RESIDUAL, lambda x: x + 1):
        inner = value_at(bridge, tokens, RESIDUAL)
    with splice(bridge, "blocks.0.hook_resid_post", torch.zeros_like):
        torch.testing.assert_close(inner, value_at(bridge, tokens, RESIDUAL) + 1)


@torch.no_grad()
def test_hooks_go_with_the_context_also_by_an_exception(bridge: Any, tokens: torch.Tensor) -> None:
    clean = bridge(tokens)
    with pytest.raises(RuntimeError, match="inside"), splice(bridge, RESIDUAL, torch.zeros_like, bos_id=0):
        raise RuntimeError("inside")
    assert torch.equal(bridge(tokens), clean)


def test_an_unknown_hook_point_is_refused(bridge: Any) -> None:
    with pytest.raises(InputError, match="no hook point"), splice(bridge, "blocks.9.hook_resid_post", lambda x: x):
        pass


@torch.no_grad()
def test_at_resid_mid_the_stream_itself_is_replaced(bridge: Any, tokens: torch.Tensor) -> None:
    """resid_post = resid_mid + mlp(ln2(resid_mid)) holds of the replaced value, not of the one going past ln2."""
    skip_without(bridge, MID)
    with splice(bridge, MID, lambda x: 0.5 * x + 1):
        _, cache = bridge.run_with_cache(tokens)
    contribution = "blocks.1.ln2_post.hook_out" if hasattr(bridge.blocks[1], "ln2_post") else "blocks.1.hook_mlp_out"
    torch.testing.assert_close(cache[RESIDUAL], cache[MID] + cache[contribution], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache[MID], 0.5 * value_at(bridge, tokens, MID) + 1)
