"""Variants of families that TransformerLens' adapters do not fit, or whose attention runs in one piece: tiny models."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks import family_trials
from benchmarks.families import VARIANTS, save_tiny, tried
from benchmarks.family_trials import prompts_of, splicing, tiny_sae
from circuits.attribution import logit_attribution
from circuits.composition import composition_scores
from circuits.dfa import direct_feature_attribution
from circuits.eap import Variant, attribute_edges
from circuits.edges import patched_logits, written
from circuits.effective_weights import effective_weights
from circuits.heads import HeadScores, copying_scores, head_scores, repeated_tokens
from circuits.nodes import graph_of
from circuits.ov import ov_effects
from circuits.path_patching import patch_edges
from circuits.recursive_dfa import recursive_dfa
from circuits.scores import EdgeScores
from sae import InputError
from workbench import Workspace
from workbench.circuits.heads import head_on_text
from workbench.features.index.logits import effects_of
from workbench.features.prompts import read_prompt
from workbench.models import load as loading
from workbench.models.capture import capture
from workbench.models.guards import check
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.models.wrapping import wrapped

UNFIT = {
    "Falcon, as 11B": "transformer.h.", "Falcon, as 40B": "transformer.h.", "Cohere, as Command-R+": "model.layers.",
    "Phi, norms of queries and keys": "model.layers.",
}  # fmt: skip
"""Where their blocks lie, by the name of the variant."""
WRITES = {"transformer.h.": ("self_attention", "mlp.dense_4h_to_h"), "model.layers.": ("self_attn", "mlp")}


@pytest.fixture(scope="module")
def unfit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """The variants by name, loaded."""
    return {
        name: load_model(
            str(save_tiny(VARIANTS[name][0], tmp_path_factory.mktemp("v"), **VARIANTS[name][1])), device="cpu"
        )
        for name in UNFIT
    }


@pytest.mark.parametrize("name", UNFIT)
def test_a_variant_that_an_adapter_does_not_fit_is_computed_with_the_modules_own_attention(
    name: str, unfit: dict[str, LoadedModel]
) -> None:
    model, blocks = unfit[name], UNFIT[name]
    tokens = torch.randint(5, 4000, (2, 20), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[path] = (output[0] if isinstance(output, tuple) else output).clone()

        return model.hf.get_submodule(f"{blocks}1.{path}").register_forward_hook(hook)

    with keep(WRITES[blocks][0]), keep(WRITES[blocks][1]), torch.no_grad():
        logits = model.hf(tokens).logits
        torch.testing.assert_close(model.bridge(tokens), logits, rtol=1e-4, atol=1e-4)
    names = {path: f"blocks.1.hook_{part}_out" for path, part in zip(WRITES[blocks], ("attn", "mlp"), strict=True)}
    found = capture(model, tokens, [resolve_hook(model, name) for name in names.values()]).activations
    for path, name in names.items():
        torch.testing.assert_close(found[name], seen[path], rtol=1e-4, atol=1e-5)
    splicing(model)


@pytest.mark.parametrize("name", UNFIT)
def test_a_variant_in_one_piece_has_direct_terms_and_what_needs_more_is_refused_by_name(
    name: str, unfit: dict[str, LoadedModel]
) -> None:
    model = unfit[name]
    prompts = prompts_of(model)
    found = logit_attribution(model.bridge, prompts)
    with torch.no_grad():
        logits = model.hf(prompts.clean, use_cache=False).logits[0, -1]
    assert found.values.sum().item() == pytest.approx((logits[7] - logits[9]).item(), rel=1e-3)
    rows = repeated_tokens(range(5, 500), 0, n=2, length=8)
    attention = tiny_sae(model, "blocks.1.attn.hook_z", model.checks.hooks["blocks.1.attn.hook_z"].width)
    by_module = (
        lambda: head_scores(model.bridge, rows),
        lambda: attribute_edges(model.bridge, prompts),
        lambda: direct_feature_attribution(model.bridge, attention, rows[0], 0),
    )
    if name.startswith("Falcon"):
        # Queries, keys and values lie in one matrix, and its attention never hands a pattern on.
        for run in by_module:
            with pytest.raises(InputError, match="attn") as caught:
                run()
            assert "\n" not in str(caught.value)
        return
    scores = head_scores(model.bridge, rows)
    with torch.no_grad():
        model.hf.set_attn_implementation("eager")
        patterns = model.hf(rows, output_attentions=True).attentions
        model.hf.set_attn_implementation("sdpa")
    previous = torch.stack([pattern.diagonal(-1, dim1=2, dim2=3)[..., 1:].mean(dim=(0, 2)) for pattern in patterns])
    torch.testing.assert_close(scores["previous_token"], previous.double(), rtol=1e-4, atol=1e-6)
    assert scores["copying"].isfinite().all()
    for run in by_module[1:]:
        run()


def test_what_no_adapter_fits_is_one_line_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("split_sizes\nand more")

    from transformer_lens.model_bridge import TransformerBridge

    monkeypatch.setattr(TransformerBridge, "boot_transformers", fails)
    with pytest.raises(InputError, match=r"TransformerLens cannot wrap .*PhiForCausalLM.*split_sizes") as caught:
        load_model(str(save_tiny("PhiForCausalLM", tmp_path)), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_part_that_a_model_lacks_is_not_run(tmp_path: Path) -> None:
    """Without rotary positions a Granite has nothing where its adapter puts a part for them."""
    model = load_model(str(save_tiny("GraniteMoeHybridForCausalLM", tmp_path)), device="cpu")
    assert model.hf.get_submodule("model").rotary_emb is None
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.bridge(tokens), model.hf(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_bridge_that_cannot_be_mended_is_refused_and_harvests_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(*arguments: Any) -> Any:
        """A bridge whose copy of the model adds one to what block 1 writes."""
        bridge = wrapped(*arguments)
        bridge.original_model.model.layers[1].mlp.register_forward_hook(lambda _, __, output: output + 1)
        return bridge

    monkeypatch.setattr(loading, "wrapped", off)
    monkeypatch.setattr(loading, "kept_or_measured", check)
    model = load_model(str(save_tiny("LlamaForCausalLM", tmp_path)), device="cpu")
    with pytest.raises(InputError, match="does not compute what LlamaForCausalLM computes"):
        _ = model.bridge
    hook = resolve_hook(model, "blocks.1.hook_resid_post")
    tokens, found = torch.arange(5, 25)[None], []
    with model.hf.get_submodule("model.layers.1").register_forward_hook(lambda _, __, output: found.append(output)):
        model.hf(tokens, use_cache=False)
    assert torch.equal(capture(model, tokens, [hook]).activations[hook.name], found[0])


def test_attention_in_one_piece_has_direct_terms_and_its_edges_are_refused(tmp_path: Path) -> None:
    """A Falcon with ALiBi keeps its own attention, in which hooks on queries, keys and values never act."""
    architecture, changes = VARIANTS["Falcon, ALiBi"]
    model = load_model(str(save_tiny(architecture, tmp_path, **changes)), device="cpu")
    splicing(model)
    prompts = prompts_of(model)
    found = logit_attribution(model.bridge, prompts)
    with torch.no_grad():
        logits = model.hf(prompts.clean, use_cache=False).logits[0, -1]
    assert found.values.sum().item() == pytest.approx((logits[7] - logits[9]).item(), rel=1e-3)
    for run in by_edges(model):
        with pytest.raises(InputError, match=r"nothing at blocks\.0\.attn\.q\.hook_out"):
            run()


def by_edges(model: LoadedModel) -> list[Callable[[], EdgeScores | torch.Tensor]]:
    """What goes edge by edge."""
    bridge, prompts = model.bridge, prompts_of(model)

    def patched() -> torch.Tensor:
        every = graph_of(bridge).exists
        return patched_logits(bridge, prompts.clean, prompts.last, written(bridge, prompts.corrupted), every)

    return [
        *(partial(attribute_edges, bridge, prompts, variant=variant, steps=1) for variant in get_args(Variant)),
        lambda: patch_edges(bridge, prompts, ["input->m0"]), patched,
    ]  # fmt: skip


def test_edges_are_refused_where_something_else_reads_the_stream(tmp_path: Path) -> None:
    """The gate after Afmoe's attention is made from the residual stream too."""
    model = load_model(str(save_tiny("AfmoeForCausalLM", tmp_path)), device="cpu")
    for run in by_edges(model):
        with pytest.raises(InputError, match="something else than the queries, keys, values and MLPs of this model"):
            run()
    assert logit_attribution(model.bridge, prompts_of(model)).values.isfinite().all()


def test_a_number_of_the_table_of_families_that_is_off_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*arguments: Any) -> HeadScores:
        return HeadScores(1.01 * head_scores(*arguments).values)

    monkeypatch.setattr(family_trials, "head_scores", off)
    said, faults = tried("GPT2LMHeadModel")
    assert faults == ["GPT2LMHeadModel, heads: " + said["heads"]]
    assert "head scores differ from the module's own" in said["heads"]


@pytest.mark.parametrize("architecture", ["CohereForCausalLM", "OlmoForCausalLM"])
def test_norms_without_weight_or_bias_are_indexed_and_prompted(architecture: str, tmp_path: Path) -> None:
    model = load_model(str(save_tiny(architecture, tmp_path)), device="cpu")
    sae = tiny_sae(model, f"blocks.{model.info.n_layers - 1}.hook_resid_post", 32)
    assert read_prompt(model, sae, "def area(width):").missing is None
    rows, gain = sae.W_dec.detach(), getattr(model.hf.model.norm, "weight", None)
    centred = rows - rows.mean(dim=1, keepdim=True)
    scale = getattr(model.hf.config, "logit_scale", 1.0)
    effects = scale * (centred if gain is None else centred * gain) @ model.hf.lm_head.weight.T
    effects = effects - effects.mean(dim=1, keepdim=True)
    found = next(iter(effects_of(model, sae)))
    wanted = effects.max(dim=1)
    assert found.top[:, 0].tolist() == wanted.indices[: len(found.top)].tolist()
    assert found.top_effect[:, 0].tolist() == pytest.approx(wanted.values[: len(found.top)].tolist(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_sums_hold_in_half_precision(architecture: str, tmp_path: Path) -> None:
    """As a model runs on a GPU unless told otherwise; terms agree with those in float32 up to its rounding."""
    folder = str(save_tiny(architecture, tmp_path))
    wide, half = (load_model(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    terms = [logit_attribution(model.bridge, prompts_of(model)).values for model in (wide, half)]
    torch.testing.assert_close(terms[1], terms[0], rtol=0.1, atol=0.05 * terms[0].abs().max().item())
    residuals = {layer: tiny_sae(half, f"blocks.{layer}.hook_resid_pre", 32) for layer in (1, 2)}
    attention = tiny_sae(half, "blocks.2.attn.hook_z", half.checks.hooks["blocks.2.attn.hook_z"].width)
    # Every step of the chain checks its sum.
    chains = [
        recursive_dfa(half.bridge, attention, residuals, prompts_of(half).clean[0], number) for number in range(8)
    ]
    assert max(map(len, chains)) >= 3
    for run in by_edges(half):
        run()


def test_what_is_read_through_an_unembedding_that_is_not_the_models_is_left_out(tmp_path: Path) -> None:
    """Between its last norm and its unembedding ModernBERT's decoder has a layer of its own."""
    model = load_model(str(save_tiny("ModernBertDecoderForCausalLM", tmp_path / "model")), device="cpu")
    scores = Workspace(tmp_path / "w").heads("h", model, n=2, length=8, needles=0).table("scores")
    assert scores.copying.isna().all()
    assert scores.induction.notna().all()
    read = (
        lambda: head_on_text(model, "a1.h0", "def f(x): return x"),
        lambda: ov_effects(model.bridge, "a1.h0", [5, 6]),
        lambda: copying_scores(model.bridge, 1),
    )
    for run in read:
        with pytest.raises(InputError, match="the final norm and the unembedding does not give this model's logits"):
            run()
    direct = head_scores(model.bridge, repeated_tokens(range(5, 500), 0, n=2, length=8))
    assert direct["copying"].isnan().all()
    assert direct["induction"].isfinite().all()


def test_weights_are_not_read_through_a_norm_that_blocks_do_not_read_through(tmp_path: Path) -> None:
    """The first GPT normalises after attention what TransformerLens names as what attention reads through."""
    model = load_model(str(save_tiny("OpenAIGPTLMHeadModel", tmp_path / "model")), device="cpu")
    for part in ("q", "v", "mlp_in"):
        with pytest.raises(InputError, match=r"the attention of layer 0 does not read .* through the norm"):
            effective_weights(model.bridge, part, 1)
    with pytest.raises(InputError, match="the attention of layer 0 does not read"):
        composition_scores(model.bridge, "k")
    scores = Workspace(tmp_path / "w").heads("h", model, n=2, length=8, needles=0)
    assert scores.table("scores").copying.isna().all()
    assert scores.table("composition").empty
