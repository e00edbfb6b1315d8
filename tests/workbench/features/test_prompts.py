"""Reading prompts: against the harvest's own activations, naive float64 formulas and TransformerLens."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.effective_weights import effective_unembedding
from sae import SAE
from sae.errors import InputError
from sae.rules import AbsTopK
from workbench.features import prompt_figures as live_figures
from workbench.features.prompt_page import feature_rows, sae_rows
from workbench.features.prompts import KnownFeatures, read_prompt, read_through
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.models.places import KINDS
from workbench.models.prompt_text import MAX_TOKENS, encode_prompt, token_pieces
from workbench.show.grid import grid_html

TEXT = "def f(x):\n    return json.loads(x)  # <script> 😀 e\u0301\n"
D_SAE = 40


def make_sae(model: LoadedModel, hook: str = "blocks.1.hook_resid_post", k: int = 5) -> SAE:
    width = resolve_hook(model, hook).width
    sae = SAE(width, D_SAE, AbsTopK(k), hook_name=hook)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(width))
    return sae


def known(seed: int = 0) -> KnownFeatures:
    random = np.random.default_rng(seed)
    return KnownFeatures([f"label {i}" for i in range(D_SAE)], random.random(D_SAE) / 4, 1 + random.random(D_SAE))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_activations_are_the_saes_on_what_a_harvest_captures(gpt2_model: LoadedModel, kind: str) -> None:
    sae = make_sae(gpt2_model, f"blocks.1.{KINDS[kind]}")
    reading = read_prompt(gpt2_model, sae, TEXT)
    tokens = torch.tensor([reading.tokens])
    hook = resolve_hook(gpt2_model, sae.hook_name)
    assert reading.tokens[0] == gpt2_model.bos_id
    assert "".join(reading.texts) == f"BOS{TEXT}"
    x = capture(gpt2_model, tokens, [hook]).activations[hook.name][0, 1:]
    # No feature is read on BOS.
    dense = np.pad(sae.encode(x).to_dense().numpy(), ((1, 0), (0, 0)))
    for feature in range(D_SAE):
        assert np.array_equal(reading.activations(feature), dense[:, feature])
    assert dense.any()
    assert (dense < 0).any() or "resid" not in kind
    assert (reading.missing is None) == (kind != "mlp_in")


def test_losses_and_predictions_are_the_models(tiny_model: LoadedModel) -> None:
    reading = read_prompt(tiny_model, make_sae(tiny_model), TEXT)
    tokens = torch.tensor([reading.tokens])
    p = tiny_model.hf(tokens).logits[0].double().softmax(-1)
    expected = [-math.log(p[at, token]) for at, token in enumerate(reading.tokens[1:])]
    assert np.isnan(reading.losses[0])
    assert np.allclose(reading.losses[1:], expected, atol=1e-5)
    best = p.topk(10)
    assert np.array_equal(reading.next_tokens, best.indices)
    assert np.allclose(reading.next_probabilities, best.values, atol=1e-6)


def naive_rankings(dense: np.ndarray, density: np.ndarray) -> dict[str, dict[int, float]]:
    fires = [f for f in range(D_SAE) if (dense[:, f] != 0).any()]
    return {
        "max": {f: np.abs(dense[:, f]).max() for f in fires},
        "mean": {f: np.abs(dense[:, f]).sum() / (len(dense) - 1) for f in fires},
        "rare": {f: np.abs(dense[:, f]).max() * math.log(1 / density[f]) for f in fires},
    }


@pytest.mark.parametrize("by", ["max", "mean", "rare"])
def test_rankings_are_their_formulas(gpt2_model: LoadedModel, by: str) -> None:
    reading = read_prompt(gpt2_model, make_sae(gpt2_model), TEXT, known=known())
    dense = np.stack([reading.activations(feature) for feature in range(D_SAE)], axis=1)
    scores = naive_rankings(dense, known().density)[by]
    table = reading.features(by)  # type: ignore[arg-type]
    assert table["feature"].tolist() == sorted(scores, key=lambda f: -scores[f])
    assert np.allclose(table["score"], sorted(scores.values(), reverse=True), rtol=1e-12)
    for row in table.itertuples():
        assert row.activation == dense[row.position, row.feature]
        assert abs(row.activation) == np.abs(dense[:, row.feature]).max()
        assert row.fires == (dense[:, row.feature] != 0).sum()
        assert row.name == f"label {row.feature}"
    rare = reading.features(by, max_density=0.1)  # type: ignore[arg-type]
    assert rare["feature"].tolist() == [f for f in table["feature"] if known().density[f] <= 0.1]


def final_stream(model: LoadedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """TransformerLens' own last residual stream and final LayerNorm scale."""
    _, cache = model.bridge.run_with_cache(tokens)
    return cache[f"blocks.{model.info.n_layers - 1}.hook_resid_post"][0], cache["ln_final.hook_scale"][0]


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"])
def test_attribution_is_the_decoder_row_read_by_the_unembedding(tiny_model: LoadedModel, hook: str) -> None:
    sae = make_sae(tiny_model, hook)
    reading = read_prompt(tiny_model, sae, TEXT)
    tokens = torch.tensor([reading.tokens])
    _, scale = final_stream(tiny_model, tokens)
    U = effective_unembedding(tiny_model.bridge).double()
    block = tiny_model.bridge.blocks[int(hook.split(".")[1])]
    W_out = torch.eye(sae.d_in, dtype=torch.float64)
    if "resid" not in hook:
        module = (block.attn.o if "attn" in hook else block.mlp.out).original_component
        W_out = (module.weight if type(module).__name__ == "Conv1D" else module.weight.T).double()
    for position, target in ((2, 7), (9, 100)):
        table = reading.at(position, target=target)
        for row in table.itertuples():
            d = row.activation * sae.W_dec[row.feature].double() @ W_out
            expected = (d @ (U[:, target] - U.mean(dim=1)) / scale[position].double()).item()
            assert row.attribution == pytest.approx(expected, abs=2e-5)


def test_attributions_with_bias_and_error_add_up_to_the_logit(tiny_model: LoadedModel) -> None:
    """At the last residual stream nothing lies between: features + b_dec + error = the logit, its mean removed."""
    model = tiny_model
    sae = make_sae(model, f"blocks.{model.info.n_layers - 1}.hook_resid_post")
    reading = read_prompt(model, sae, TEXT)
    tokens = torch.tensor([reading.tokens])
    x, scale = final_stream(model, tokens)
    logits = model.hf(tokens).logits[0].double()
    U = effective_unembedding(model.bridge).double()
    norm_bias = getattr(model.bridge.ln_final.original_component, "bias", None)
    unembed = model.bridge.unembed.original_component.weight.double()
    shift = torch.zeros(model.info.d_vocab, dtype=torch.float64)
    if norm_bias is not None:
        shift = unembed @ norm_bias.double()
    position, target = 6, 42
    readout = (U[:, target] - U.mean(dim=1)) / scale[position].double()
    rest = x[position].double() - sae(x[position : position + 1])[0].double() + sae.b_dec.double()
    total = (
        reading.attribution(position, target).sum() + (rest @ readout).item() + (shift[target] - shift.mean()).item()
    )
    at = logits[position]
    assert total == pytest.approx((at[target] - at.mean()).item(), abs=1e-4)


def test_several_saes_read_a_prompt_as_each_by_itself(gpt2_model: LoadedModel) -> None:
    saes = {hook: make_sae(gpt2_model, hook) for hook in ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z")}
    together = read_through(gpt2_model, {hook: (sae, known()) for hook, sae in saes.items()}, TEXT)
    for reading, (hook, sae) in zip(together, saes.items(), strict=True):
        alone = read_prompt(gpt2_model, sae, TEXT, name=hook, known=known())
        assert reading.sae == reading.hook == hook
        assert np.array_equal(reading.activation, alone.activation)
        assert np.array_equal(reading.losses, alone.losses, equal_nan=True)
        assert np.array_equal(reading.effects, alone.effects)


def test_grids_show_every_activation_and_what_it_does(gpt2_model: LoadedModel) -> None:
    reading = read_prompt(gpt2_model, make_sae(gpt2_model), TEXT, name="s", known=known())
    dense = np.stack([reading.activations(feature) for feature in range(D_SAE)], axis=1)
    for row in feature_rows(reading, n_features=D_SAE):
        feature = int(row.key)
        assert {at: cell.value for at, cell in row.cells.items()} == {
            at: dense[at, feature] for at in np.flatnonzero(dense[:, feature])
        }
        assert row.strongest == max(np.abs(dense[:, feature]).max(), known().strongest[feature])
    for position, feature, effect in zip(reading.position, reading.feature, reading.effects, strict=True):
        likeliest = int(reading.next_tokens[position, 0])
        at = reading.at(position, target=likeliest).set_index("feature")["attribution"]
        assert at[feature] == effect
    (row,) = sae_rows([reading])
    shares = np.abs(dense) / np.fmax(np.abs(dense).max(axis=0), known().strongest)
    assert {at: abs(cell.value) for at, cell in row.cells.items()} == pytest.approx(
        {at: shares[at].max() for at in np.flatnonzero(dense.any(axis=1))}
    )
    assert "<script" not in grid_html(reading.texts, [row])


def test_pieces_are_the_text_again(tiny_model: LoadedModel) -> None:
    ids, truncated = encode_prompt(tiny_model, TEXT)
    pieces = token_pieces(tiny_model, ids)
    assert not truncated
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TEXT
    at = pieces.index("😀")
    assert pieces[at + 1] == ""


def test_long_prompts_are_cut_to_the_context(gpt2_model: LoadedModel) -> None:
    reading = read_prompt(gpt2_model, make_sae(gpt2_model), "x = 1\n" * 4000)
    assert reading.truncated
    assert reading.n_read == min(MAX_TOKENS, gpt2_model.info.n_ctx - 1)
    assert not read_prompt(gpt2_model, make_sae(gpt2_model), "x").truncated


CALLS: list[tuple[str, Callable[[LoadedModel], object]]] = [
    ("type some text", lambda m: read_prompt(m, make_sae(m), "")),
    ("features 0 to 39", lambda m: read_prompt(m, make_sae(m), "x").activations(40)),
    ("workbench index", lambda m: read_prompt(m, make_sae(m), "x").features("rare")),
    ("choose max", lambda m: read_prompt(m, make_sae(m), "x").features("best")),  # type: ignore[arg-type]
    ("tokens 0 to", lambda m: read_prompt(m, make_sae(m), "x").at(99)),
    ("vocabulary has", lambda m: read_prompt(m, make_sae(m), "x").attribution(0, 10**6)),
    ("written nowhere", lambda m: read_prompt(m, make_sae(m, "blocks.0.mlp.hook_in"), "x").attribution(0, 1)),
    ("tokens: attribution", lambda m: read_prompt(m, make_sae(m), "x").target("several of them")),
]


@pytest.mark.parametrize(("message", "call"), CALLS, ids=[message for message, _ in CALLS])
def test_mistakes_say_what_to_do(gpt2_model: LoadedModel, message: str, call: Callable[[LoadedModel], object]) -> None:
    with pytest.raises(InputError, match=message) as raised:
        call(gpt2_model)
    assert "\n" not in str(raised.value)


def test_notebook_page_and_figures_escape_tokens(gpt2_model: LoadedModel) -> None:
    reading = read_prompt(gpt2_model, make_sae(gpt2_model), "x <script>alert('&')</script>", name="s", known=known())
    html = reading._repr_html_()
    assert "<script" not in html
    figures = [live_figures.prompt_losses(reading)]
    feature = int(reading.features()["feature"][0])
    figures.append(live_figures.prompt_activations(reading, feature, position=1))
    assert list(figures[-1].data[0].y) == reading.activations(feature).tolist()
    for figure in figures:
        shown = np.array(figure.data[0].customdata).ravel().tolist()
        assert "&lt;" in shown
        assert not any("<" in text for text in [*shown, *figure.layout.xaxis.ticktext])
