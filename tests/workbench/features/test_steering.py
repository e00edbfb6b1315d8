"""Steering: against hooks written by hand, naive generation, and identities."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sae import SAE, TopK
from sae.errors import InputError
from sae.rules import AbsTopK
from workbench.features import prompt_figures as live_figures
from workbench.features.steering import Edit, _generate, _gumbel, apply_edit, edited, steer
from workbench.features.steering_sweep import sweep
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.models.prompt_text import encode_prompt
from workbench.models.readout import unembedding

TEXT = "def f(x):\n    return json"
HOOK, UNIT = "blocks.1.hook_resid_post", 2.5


def make_sae(model: LoadedModel, hook: str = HOOK) -> SAE:
    width = resolve_hook(model, hook).width
    sae = SAE(width, 40, AbsTopK(6), hook_name=hook)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(width))
    return sae


def prompt_tokens(model: LoadedModel) -> Tensor:
    return torch.tensor([[model.bos_id, *encode_prompt(model, TEXT)[0]]])


def busiest(model: LoadedModel, sae: SAE) -> int:
    """The feature with the largest activations on the prompt, so that edits show."""
    _, cache = model.bridge.run_with_cache(prompt_tokens(model))
    return int(sae.encode(cache[sae.hook_name][0, 1:]).to_dense().abs().sum(0).argmax())


def naive(sae: SAE, edit: Edit, x: Tensor) -> Tensor:
    """One row at a time in float64, from the dense code."""
    W, rows = sae.W_dec.double(), []
    for row in x:
        a = sae.encode(row[None]).to_dense()[0].double()
        new = a.clone()
        s = edit.strength * UNIT
        new[edit.feature] = {"add": a[edit.feature] + s, "clamp": torch.tensor(s), "ablate": torch.tensor(0.0)}[
            edit.kind
        ]
        x_hat, edited_hat = a @ W + sae.b_dec.double(), new @ W + sae.b_dec.double()
        rows.append(row.double() - x_hat + edited_hat if edit.keep_error else edited_hat)
    return torch.stack(rows)


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("kind", ["add", "clamp", "ablate"])
def test_an_edited_forward_pass_equals_a_hook_written_by_hand(
    tiny_model: LoadedModel, kind: str, keep_error: bool
) -> None:
    sae = make_sae(tiny_model)
    edit = Edit(busiest(tiny_model, sae), kind, 1.5, keep_error=keep_error)  # type: ignore[arg-type]
    tokens = prompt_tokens(tiny_model)

    def by_hand(value: Tensor, hook: object) -> Tensor:
        return torch.cat([value[:, :1], naive(sae, edit, value[0, 1:])[None].to(value)], dim=1)

    expected = tiny_model.bridge.run_with_hooks(tokens, fwd_hooks=[(HOOK, by_hand)])
    with edited(tiny_model, sae, edit, UNIT):
        found = tiny_model.bridge(tokens)
    assert torch.allclose(found, expected, atol=2e-4)
    assert not torch.allclose(found, tiny_model.bridge(tokens), atol=1e-2)


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("kind", ["add", "clamp", "ablate"])
def test_several_features_are_edited_at_once(tiny_model: LoadedModel, kind: str, keep_error: bool) -> None:
    sae, units = make_sae(tiny_model), {4: 1.5, 9: 0.5, 23: 2.0}
    edit = Edit(9, kind, 1.0, keep_error=keep_error, also=((23, -2.0), (4, 0.5)))  # type: ignore[arg-type]
    x = torch.randn(30, sae.d_in, generator=torch.Generator().manual_seed(2))
    a = sae.encode(x).to_dense().double()
    assert (a[:, [4, 9, 23]] != 0).any(dim=0).all()
    new = a.clone()
    for feature, strength in ((9, 1.0), (23, -2.0), (4, 0.5)):
        wanted = strength * units[feature]
        new[:, feature] = {"add": a[:, feature] + wanted, "clamp": torch.full((30,), wanted).double(),
                           "ablate": torch.zeros(30).double()}[kind]  # fmt: skip
    W = sae.W_dec.double()
    expected = x.double() + (new - a) @ W if keep_error else new @ W + sae.b_dec.double()
    assert torch.allclose(apply_edit(sae, edit, units, x, x).double(), expected, atol=1e-5)


def test_a_sweep_is_the_edit_at_every_strength(gpt2_model: LoadedModel) -> None:
    sae = make_sae(gpt2_model)
    edit = Edit(busiest(gpt2_model, sae), also=((3, 1.0),))
    found = sweep(gpt2_model, sae, edit, TEXT, unit=UNIT, strengths=(2.0, 0.0))
    assert found.table["strength"].tolist() == [0.0, 2.0]
    effect = sae.W_dec[edit.feature] @ unembedding(gpt2_model)
    own = effect.topk(10).indices
    assert found.tokens == [gpt2_model.label_of(token, len(effect)) for token in own.tolist()]
    for row in found.table.itertuples():
        alone = steer(gpt2_model, sae, replace(edit, strength=row.strength), TEXT, unit=UNIT, new_tokens=0)
        assert row.kl == pytest.approx(alone.mean_kl, abs=1e-6)
        assert row.loss == pytest.approx(alone.mean_losses[1], abs=1e-5)
        with edited(gpt2_model, sae, replace(edit, strength=row.strength), UNIT):
            p = gpt2_model.bridge(prompt_tokens(gpt2_model))[0, 1:].softmax(-1)
        assert row.promoted == pytest.approx(p[:, own].sum(-1).mean().item(), abs=1e-5)
    drawn = live_figures.sweep_curves(found, 2.0)
    assert [list(line.y) for line in drawn.data] == [found.table["kl"].tolist(), found.table["promoted"].tolist()]


def test_strength_zero_leaves_the_logits_bitwise_alone(tiny_model: LoadedModel) -> None:
    sae, tokens = make_sae(tiny_model), prompt_tokens(tiny_model)
    with edited(tiny_model, sae, Edit(busiest(tiny_model, sae), "add", 0.0), UNIT):
        assert torch.equal(tiny_model.bridge(tokens), tiny_model.bridge(tokens))
        spliced = tiny_model.bridge(tokens)
    assert torch.equal(spliced, tiny_model.bridge(tokens))


def test_ablating_what_does_not_fire_changes_nothing(tiny_model: LoadedModel) -> None:
    sae = make_sae(tiny_model)
    with torch.no_grad():
        sae.W_enc[:, 3] = 0
        sae.b_enc[3] = 0
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(1))
    assert torch.equal(apply_edit(sae, Edit(3, "ablate"), {3: UNIT}, x, x), x)


def test_clamping_to_the_activation_of_one_token_changes_nothing_there(gpt2_model: LoadedModel) -> None:
    sae = make_sae(gpt2_model)
    x = torch.randn(1, sae.d_in, generator=torch.Generator().manual_seed(1))
    _, feature, value = sae.encode(x).entries()
    edit = Edit(int(feature[0]), "clamp", float(value[0]))
    assert torch.equal(apply_edit(sae, edit, {edit.feature: 1.0}, x, x), x)


def test_generated_edits_start_at_the_last_prompt_token(gpt2_model: LoadedModel) -> None:
    sae = make_sae(gpt2_model)
    found = steer(gpt2_model, sae, Edit(busiest(gpt2_model, sae), "add", 4.0, "generated"), TEXT, new_tokens=0)
    assert (found.kl[:-1] == 0).all()
    assert found.kl[-1] > 0
    assert np.array_equal(found.clean_loss, found.steered_loss, equal_nan=True)


@pytest.mark.parametrize("where", ["everywhere", "generated"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_equals_reading_everything_again_for_every_token(
    tiny_model: LoadedModel, where: str, temperature: float
) -> None:
    sae, tokens = make_sae(tiny_model), prompt_tokens(tiny_model)
    edit = Edit(busiest(tiny_model, sae), "add", 2.0, where)  # type: ignore[arg-type]
    noise = -(-torch.rand(8, tiny_model.info.d_vocab, generator=torch.Generator().manual_seed(3)).log()).log()
    expected, text = [], tokens
    first = tokens.shape[1] - 1 if where == "generated" else None
    for step in range(8):
        with edited(tiny_model, sae, edit, UNIT, first=first):
            scores = tiny_model.bridge(text)[0, -1]
        token = int((scores / temperature + noise[step] if temperature else scores).argmax())
        if token == tiny_model.tokenizer.eos_token_id:
            break
        expected.append(token)
        text = torch.cat([text, torch.tensor([[token]])], dim=1)
    found = _generate(
        tiny_model, tokens, 8, temperature, noise if temperature else None, (sae, edit, {edit.feature: UNIT})
    )
    assert found == expected


@torch.no_grad()
def test_side_effects_are_their_formulas(gpt2_model: LoadedModel) -> None:
    sae, tokens = make_sae(gpt2_model), prompt_tokens(gpt2_model)
    edit = Edit(busiest(gpt2_model, sae), "add", 1.0)
    found = steer(gpt2_model, sae, edit, TEXT, unit=UNIT, new_tokens=5, temperature=1.0, seed=4)
    with edited(gpt2_model, sae, edit, UNIT):
        q = gpt2_model.bridge(tokens)[0].double().softmax(-1)
    p = gpt2_model.bridge(tokens)[0].double().softmax(-1)
    assert np.allclose(found.kl, (p * (p / q).log()).sum(-1), atol=1e-5)
    assert found.mean_kl == found.kl[1:].mean()
    assert found.texts[0] == "BOS"
    for losses, probabilities in ((found.clean_loss, p), (found.steered_loss, q)):
        assert np.isnan(losses[0])
        assert np.allclose(losses[1:], [-math.log(probabilities[i, t]) for i, t in enumerate(tokens[0, 1:])], atol=1e-5)
    table = found.next_tokens
    change = (q - p)[-1]
    assert set(table["token"]) == set(change.abs().topk(len(table)).indices.tolist())
    assert np.allclose(table["difference"], change[torch.tensor(table["token"].to_numpy())], atol=1e-6)
    clean = _generate(gpt2_model, tokens, 5, 1.0, _gumbel(5, gpt2_model.info.d_vocab, 4))
    assert found.clean == gpt2_model.text(clean)
    all_tokens = torch.cat([tokens, torch.tensor([clean])], dim=1)
    p = gpt2_model.bridge(all_tokens)[0].double().log_softmax(-1)
    n = tokens.shape[1]
    expected = -np.mean([p[n - 1 + i, t].item() for i, t in enumerate(clean)])
    assert found.clean_nats == pytest.approx(expected, abs=1e-4)


def test_the_same_seed_gives_the_same_text_and_strength_zero_the_clean_one(gpt2_model: LoadedModel) -> None:
    sae = make_sae(gpt2_model)
    one = steer(gpt2_model, sae, Edit(5, "add", 0.0), TEXT, new_tokens=12, temperature=1.0, seed=1)
    assert one.clean == one.steered
    assert one.kl.max() == 0
    assert one.next_tokens.empty
    again = steer(gpt2_model, sae, Edit(5, "add", 0.0), TEXT, new_tokens=12, temperature=1.0, seed=1)
    assert again.clean == one.clean
    assert steer(gpt2_model, sae, Edit(5), TEXT, new_tokens=12, temperature=1.0, seed=2).clean != one.clean


def at_place(model: LoadedModel, hook: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """A PyTorch hook on the Hugging Face module itself that changes the values which `hook` names."""
    block = model.hf.transformer.h[1]
    if hook.endswith("hook_resid_mid"):
        # What attention adds to the residual stream is not read elsewhere before it.
        return block.attn.register_forward_hook(lambda _, __, output: (change(output[0]), *output[1:]))
    module = block.attn.c_proj if hook.endswith("hook_z") else block.mlp
    return module.register_forward_pre_hook(lambda _, values: (change(values[0]), *values[1:]))


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_in"])
@torch.no_grad()
def test_every_kind_of_hook_point_is_steered_at_its_place_and_in_its_direction(
    gpt2_model: LoadedModel, hook: str
) -> None:
    sae, tokens = make_sae(gpt2_model, hook), prompt_tokens(gpt2_model)
    found = steer(gpt2_model, sae, Edit(2, "add", 2.0), TEXT, unit=UNIT, new_tokens=2)

    def change(values: Tensor) -> Tensor:
        new = values.clone()
        new[:, 1:] += 2.0 * UNIT * sae.W_dec[2]
        return new

    before = gpt2_model.hf(tokens).logits[0].double().log_softmax(-1)
    handle = at_place(gpt2_model, hook, change)
    after = gpt2_model.hf(tokens).logits[0].double().log_softmax(-1)
    handle.remove()
    kl = (before.exp() * (before - after)).sum(-1)
    assert kl.mean() > 0.01
    assert np.allclose(found.kl, kl, rtol=1e-3, atol=1e-5)
    losses = [-after[position, token].item() for position, token in enumerate(tokens[0, 1:])]
    assert np.allclose(found.steered_loss[1:], losses, atol=1e-4)


CALLS: list[tuple[str, Callable[[LoadedModel], object]]] = [
    ("features 0 to 39", lambda m: steer(m, make_sae(m), Edit(40), TEXT)),
    ("choose add", lambda m: steer(m, make_sae(m), Edit(1, "turn"), TEXT)),  # type: ignore[arg-type]
    ("choose everywhere", lambda m: steer(m, make_sae(m), Edit(1, where="here"), TEXT)),  # type: ignore[arg-type]
    ("strength of nan", lambda m: steer(m, make_sae(m), Edit(1, strength=math.nan), TEXT)),
    ("give one up to 1,000,000", lambda m: steer(m, make_sae(m), Edit(1, strength=1e300), TEXT)),
    ("temperature of -1", lambda m: steer(m, make_sae(m), Edit(1), TEXT, temperature=-1)),
    ("cannot generate 900", lambda m: steer(m, make_sae(m), Edit(1), TEXT, new_tokens=900)),
    ("type some text", lambda m: steer(m, make_sae(m), Edit(1), "")),
    ("feature is given twice", lambda m: steer(m, make_sae(m), Edit(1, also=((1, 2.0),)), TEXT)),
    ("features 0 to 39", lambda m: steer(m, make_sae(m), Edit(1, also=((40, 2.0),)), TEXT)),
    ("no chat template", lambda m: steer(m, make_sae(m), Edit(1), TEXT, chat=True)),
    ("has no strength", lambda m: sweep(m, make_sae(m), Edit(1, "ablate"), TEXT)),
    ("another model", lambda m: steer(m, SAE(8, 16, TopK(2), hook_name=HOOK), Edit(1), TEXT)),
]


@pytest.mark.parametrize(("message", "call"), CALLS, ids=[message for message, _ in CALLS])
def test_mistakes_say_what_to_do(gpt2_model: LoadedModel, message: str, call: Callable[[LoadedModel], object]) -> None:
    with pytest.raises(InputError, match=message) as raised:
        call(gpt2_model)
    assert "\n" not in str(raised.value)


def test_notebook_page_and_figures(gpt2_model: LoadedModel) -> None:
    found = steer(gpt2_model, make_sae(gpt2_model), Edit(2, "add", 5.0), "<script>x", new_tokens=4, names={2: "<b>"})
    html = found._repr_html_()
    assert "<script" not in html
    assert "<b>" not in html
    bars = live_figures.next_token_bars(found)
    assert [trace.name for trace in bars.data] == ["clean", "steered"]
    assert np.array_equal(bars.data[1].x, found.next_tokens["steered"])
    effects = live_figures.side_effects(found)
    assert np.array_equal(effects.data[0].y, found.kl)
    assert np.allclose(effects.data[1].y, found.steered_loss - found.clean_loss, equal_nan=True)
