"""Coding rates against their other form (tokens by tokens), closed forms, and a naive pass over the bare model."""

import math
from typing import Any

import pytest
import torch

from workbench.models.contexts import context_batches
from workbench.models.load import LoadedModel
from workbench.sparsity.coding_rate import EPS, CodingRates, coding_rate, largest_rate, rate_within
from workbench.text.corpora import Corpus


def test_the_rate_is_that_of_the_gram_matrix_of_the_tokens() -> None:
    Z = torch.randn(40, 12, dtype=torch.float64)
    gram = torch.eye(40, dtype=torch.float64) + 12 / (40 * EPS**2) * Z @ Z.T
    torch.testing.assert_close(coding_rate(Z.T @ Z / 40), torch.logdet(gram) / 2, rtol=1e-12, atol=0)


def test_closed_forms_and_rotations() -> None:
    d = 16
    everywhere = torch.eye(d, dtype=torch.float64) / d
    assert math.isclose(float(coding_rate(everywhere)), largest_rate(d), rel_tol=1e-12)
    one_direction = torch.zeros(d, d, dtype=torch.float64)
    one_direction[3, 3] = 1
    assert math.isclose(float(coding_rate(one_direction)), math.log1p(d / EPS**2) / 2, rel_tol=1e-12)
    Z = torch.randn(50, d, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    moment, rotated = Z.T @ Z / 50, (Z @ rotation).T @ (Z @ rotation) / 50
    torch.testing.assert_close(coding_rate(rotated), coding_rate(moment), rtol=1e-12, atol=0)
    # One subspace that is everything is the whole rate; its halves, d/2 wide, see each half of the tokens' length.
    assert math.isclose(rate_within(moment, torch.eye(d, dtype=torch.float64)[None]), float(coding_rate(moment)))
    halves = torch.eye(d, dtype=torch.float64).view(d, 2, d // 2).movedim(1, 0)
    assert math.isclose(rate_within(everywhere, halves), d / 2 * math.log1p(1 / 2 / EPS**2), rel_tol=1e-12)


def test_a_step_down_its_gradient_compresses() -> None:
    """What CRATE's attention is made to do: Z - step * grad R^c(Z) lies nearer to the heads' subspaces' origins."""
    generator = torch.Generator().manual_seed(0)
    Z = torch.nn.functional.normalize(torch.randn(64, 12, dtype=torch.float64, generator=generator), dim=1)
    U = torch.linalg.qr(torch.randn(3, 12, 4, dtype=torch.float64, generator=generator)).Q
    Z.requires_grad_()
    within = coding_rate(U.mT @ (Z.T @ Z / 64) @ U).sum()
    (slope,) = torch.autograd.grad(within, Z)
    stepped = (Z - slope).detach()
    assert rate_within(stepped.T @ stepped / 64, U) < within.item() - 0.01


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_models_rates_are_those_of_its_bare_layers(kind: str, request: pytest.FixtureRequest, corpus: Corpus) -> None:
    model: LoadedModel = request.getfixturevalue(f"{kind}_model")
    batches = list(context_batches(model, corpus, "heldout", max_tokens=256, context_len=32))
    rates = CodingRates(model)
    for batch in batches:
        with torch.no_grad(), rates.seeing(batch):
            model.hf(batch.tokens)
    table = rates.table(draws=2)
    layer, d = 1, model.info.d_model
    rows: dict[str, list[torch.Tensor]] = {"before": [], "attention": [], "after": []}
    block: Any = model.hf.transformer.h[layer] if kind == "gpt2" else model.hf.model.layers[layer]
    attention = block.attn if kind == "gpt2" else block.self_attn

    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.update(before=args[0])),
        attention.register_forward_hook(lambda _, __, out: seen.update(attention=out[0])),
        block.register_forward_hook(lambda _, __, out: seen.update(after=out[0] if isinstance(out, tuple) else out)),
    ]
    for batch in batches:
        with torch.no_grad():
            model.hf(batch.tokens)
        at = {place: value[batch.ordinary].double() for place, value in seen.items()}
        rows["before"].append(at["before"])
        rows["attention"].append(at["before"] + at["attention"])
        rows["after"].append(at["after"])
    for hook in hooks:
        hook.remove()
    for place, parts in rows.items():
        Z = torch.cat(parts)
        Z = Z / Z.norm(dim=1, keepdim=True)
        expected = torch.linalg.eigvalsh(torch.eye(d, dtype=torch.float64) + d / (len(Z) * EPS**2) * Z.T @ Z)
        assert table.loc[layer, f"rate_{place}"] == pytest.approx(
            float(expected.log().sum() / 2 / largest_rate(d)), rel=1e-5
        )
    assert table["heads_before"].notna().all()
    assert (table["random_change_sd"] > 0).all()
