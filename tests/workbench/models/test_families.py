"""Hook points, passes and weights of families that do things their own way, against plain transformers.

Models are random, three or four layers of width 32, with norm weights off 1 and biases off 0 (`benchmarks.families`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.families import PAGE, VARIANTS, families, family_name, save_tiny, tried
from benchmarks.family_trials import prompts_of, splicing, tiny_sae
from circuits.ablation import ablate_heads
from circuits.attribution import logit_attribution
from circuits.blocks import head_outputs
from circuits.composition import composition_scores
from circuits.dfa import direct_feature_attribution
from circuits.eap import attribute_edges
from circuits.effective_weights import effective_weights
from circuits.graph.frozen import freeze
from circuits.nodes import graph_of
from circuits.norms import measured_norm
from circuits.path_patching import patch_edges
from sae import InputError
from workbench.features.prompts import read_prompt
from workbench.features.steering import Edit, steer
from workbench.models.capture import capture
from workbench.models.contexts import context_batches
from workbench.models.guards import delegate_attention
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.models.places import KINDS
from workbench.saes.evaluation import evaluate_sae
from workbench.text.corpora import open_corpus

TEXT = "def area(width, height):\n    return width * height\n"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """Loads a family's tiny model, once."""
    loaded: dict[str, LoadedModel] = {}

    def load(architecture: str, **changes: Any) -> LoadedModel:
        key = repr((architecture, sorted(changes.items())))
        if key not in loaded:
            folder = save_tiny(architecture, tmp_path_factory.mktemp("family"), **changes)
            loaded[key] = load_model(str(folder), device="cpu")
        return loaded[key]

    return load


def tokens_of(model: LoadedModel) -> Tensor:
    return torch.randint(5, 4000, (2, 20), generator=torch.Generator().manual_seed(1))


def seen(model: LoadedModel, path: str, tokens: Tensor, side: str = "output") -> Tensor:
    """What a module of the bare model gives (or gets), with a hook of this test's own."""
    found: list[Tensor] = []

    def keep_output(_: Any, __: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    def keep_input(_: Any, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).clone())

    module = model.hf.get_submodule(path)
    register = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
    handle = register(*((keep_output,) if side == "output" else (keep_input,)), with_kwargs=side == "input")
    with handle, torch.no_grad():
        model.hf(tokens, use_cache=False)
    return found[0].view(*tokens.shape, -1)


BLOOM, MPT, OPT, LLAMA = "transformer.h.1.", "transformer.blocks.1.", "model.decoder.layers.1.", "model.layers.1."
RIGHT: list[tuple[str, dict[str, Any], str, Callable[[Callable[..., Tensor]], Tensor]]] = [
    ("BloomForCausalLM", {}, "attn_out", lambda at: at(BLOOM + "self_attention.dense")),
    ("BloomForCausalLM", {}, "mlp_out", lambda at: at(BLOOM + "mlp.dense_4h_to_h")),
    ("MptForCausalLM", {}, "mlp_out", lambda at: at(MPT + "ffn.down_proj")),
    ("OPTForCausalLM", {}, "mlp_out", lambda at: at(OPT + "fc2")),
    ("OPTForCausalLM", {}, "mlp_in", lambda at: at(OPT + "final_layer_norm")),
    ("OPTForCausalLM", {}, "mlp_post", lambda at: at(OPT + "fc1").relu()),
    ("GraniteForCausalLM", {}, "attn_out", lambda at: 0.5 * at(LLAMA + "self_attn")),
    ("GraniteForCausalLM", {}, "mlp_out", lambda at: 0.5 * at(LLAMA + "mlp")),
    ("GraniteMoeForCausalLM", {}, "attn_out", lambda at: 0.5 * at(LLAMA + "self_attn")),
    ("FalconForCausalLM", {}, "mlp_out", lambda at: at("transformer.h.1.mlp.dense_4h_to_h")),
    *[
        (name, {}, kind, right)
        for name in ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM")
        for kind, right in {
            "resid_mid": lambda at: at("model.layers.0") + at(LLAMA + "post_attention_layernorm"),
            "attn_out": lambda at: at(LLAMA + "post_attention_layernorm"),
            "mlp_out": lambda at: at(LLAMA + "post_feedforward_layernorm"),
        }.items()
    ],
]


@pytest.mark.parametrize(
    ("architecture", "changes", "kind", "right"), RIGHT, ids=[f"{name}-{kind}" for name, _, kind, _ in RIGHT]
)
def test_a_hook_point_holds_what_its_name_says(
    architecture: str, changes: dict[str, Any], kind: str, right: Callable[[Callable[..., Tensor]], Tensor],
    family: Callable[..., LoadedModel],
) -> None:  # fmt: skip
    model = family(architecture, **changes)
    tokens, name = tokens_of(model), f"blocks.1.{KINDS[kind]}"
    every = [hook for hook in model.checks.hooks.values() if hook.layer == 1]
    wanted = right(lambda path, side="output": seen(model, path, tokens, side))
    # Alone and beside every other: a harvest of several hook points stores the same.
    alone = capture(model, tokens, [resolve_hook(model, name)]).activations[name]
    together = capture(model, tokens, every).activations
    torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[name], wanted, rtol=1e-5, atol=1e-5)
    if "mlp_out" in (hook.kind for hook in every) and "attn_out" in (hook.kind for hook in every):
        pre, post, attention, mlp = (
            together[f"blocks.1.{KINDS[part]}"] for part in ("resid_pre", "resid_post", "attn_out", "mlp_out")
        )
        torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_scaled_contribution_are_those_of_what_is_added(family: Callable[..., LoadedModel]) -> None:
    """In Granite a contribution c = 0.5 output moves the stream as much as the stream itself does."""
    model = family("GraniteForCausalLM")
    hooks = [resolve_hook(model, f"blocks.1.{KINDS[kind]}") for kind in ("mlp_out", "resid_post")]
    found = capture(model, tokens_of(model), hooks, gradients=True).gradients
    torch.testing.assert_close(found[hooks[0].name], found[hooks[1].name], rtol=1e-4, atol=1e-5)


OWN_ATTENTION = [
    ("CohereForCausalLM", {}),
    ("Cohere2ForCausalLM", {}),
    ("DeepseekV2ForCausalLM", {}),
    ("DeepseekV3ForCausalLM", {}),
    ("HunYuanDenseV1ForCausalLM", {}),
    ("FalconForCausalLM", {"alibi": True}),
    ("GPT2LMHeadModel", {"scale_attn_weights": False}),
]


@pytest.mark.parametrize(("architecture", "changes"), OWN_ATTENTION, ids=[name for name, _ in OWN_ATTENTION])
def test_a_bridge_that_would_compute_another_model_is_mended(
    architecture: str, changes: dict[str, Any], family: Callable[..., LoadedModel]
) -> None:
    model = family(architecture, **changes)
    tokens = tokens_of(model)
    with torch.no_grad():
        torch.testing.assert_close(model.bridge(tokens), model.hf(tokens).logits, rtol=1e-4, atol=1e-4)
    splicing(model)


@pytest.mark.parametrize("architecture", ["CohereForCausalLM", "DeepseekV3ForCausalLM", "GraniteForCausalLM"])
def test_reading_through_an_sae_costs_what_plain_transformers_says(
    architecture: str, family: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    model = family(architecture)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(TEXT.replace("area", f"area_{number}") * 2)
    sae = tiny_sae(model, "blocks.1.hook_resid_post", 32)
    options = {"max_tokens": 128, "context_len": 32}
    corpus = open_corpus(str(tmp_path))
    found = evaluate_sae(model, [sae], corpus, **options)[0]

    def loss(replace: bool) -> float:
        total, count = 0.0, 0
        for batch in context_batches(model, corpus, "heldout", **options):

            def put(_: Any, __: Any, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                new = torch.where(batch.ordinary[..., None], sae(stream), stream) if replace else stream  # noqa: B023
                return (new, *output[1:]) if isinstance(output, tuple) else new

            with model.hf.get_submodule("model.layers.1").register_forward_hook(put), torch.no_grad():
                log_q = model.hf(batch.tokens, use_cache=False).logits.double().log_softmax(-1)
            picked = log_q[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]
            total -= picked[batch.counted].sum().item()
            count += int(batch.counted.sum())
        return total / count

    assert found.ce_clean == pytest.approx(loss(False), rel=1e-4)
    assert found.ce_spliced == pytest.approx(loss(True), rel=1e-4)


NORMS = ["GraniteForCausalLM", "NemotronForCausalLM", "Qwen3NextForCausalLM", "CohereForCausalLM", "OlmoForCausalLM",
         "Olmo2ForCausalLM", "GemmaForCausalLM", "BloomForCausalLM"]  # fmt: skip


@pytest.mark.parametrize("architecture", NORMS)
def test_the_effective_unembedding_gives_the_models_logits(
    architecture: str, family: Callable[..., LoadedModel]
) -> None:
    model = family(architecture)
    tokens = tokens_of(model)
    last = resolve_hook(model, f"blocks.{model.info.n_layers - 1}.hook_resid_post")
    x = capture(model, tokens, [last]).activations[last.name]
    scale = measured_norm(model.bridge.ln_final, x[0, 0]).scale(x)
    read = effective_weights(model.bridge, "unembed")
    with torch.no_grad():
        logits = model.hf(tokens, use_cache=False).logits
    torch.testing.assert_close(x / scale[..., None] @ read.W + read.b, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["NemotronForCausalLM", "Olmo2ForCausalLM", "OlmoForCausalLM"])
def test_effective_queries_are_what_the_projection_gives(architecture: str, family: Callable[..., LoadedModel]) -> None:
    model = family(architecture)
    tokens = tokens_of(model)
    x, wanted = seen(model, "model.layers.0", tokens), seen(model, LLAMA + "self_attn.q_proj", tokens)
    if architecture != "Olmo2ForCausalLM":
        x = x / measured_norm(model.bridge.blocks[1].ln1, x[0, 0]).scale(x)[..., None]
    read = effective_weights(model.bridge, "q", 1)
    torch.testing.assert_close(x @ read.W.flatten(1) + read.b.flatten(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["GraniteForCausalLM", "NemotronForCausalLM", "Qwen3NextForCausalLM"])
def test_prompt_attribution_is_what_taking_a_feature_out_does_at_a_frozen_scale(
    architecture: str, family: Callable[..., LoadedModel]
) -> None:
    model = family(architecture)
    last = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
    sae = tiny_sae(model, last, 32)
    reading = read_prompt(model, sae, TEXT)
    position, target = 4, 123
    found = reading.attribution(position, target)
    features = reading.feature[reading.position == position]
    tokens = torch.tensor([reading.tokens])
    x = capture(model, tokens, [resolve_hook(model, last)]).activations[last][0, position].requires_grad_()
    norm, scaling = model.hf.model.norm, {"GraniteForCausalLM": 4.0}.get(architecture, 1.0)

    def logits(stream: Tensor) -> Tensor:
        frozen = measured_norm(model.bridge.ln_final, x.detach())
        centred = stream - stream.mean() if frozen.centred else stream
        given = norm(x.detach()) - norm(torch.zeros_like(x))
        gain = given / ((x - x.mean() if frozen.centred else x).detach() / frozen.scale(x.detach()))
        return model.hf.lm_head(gain * centred / frozen.scale(x.detach())) / scaling

    with torch.no_grad():
        effects = [logits(reading.activations(f)[position] * sae.W_dec[f]) for f in features.tolist()]
    wanted = [float(effect[target] - effect.mean()) for effect in effects]
    assert found.tolist() == pytest.approx(wanted, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize(
    "architecture", ["MambaForCausalLM", "Mamba2ForCausalLM", "RwkvForCausalLM", "MptForCausalLM", "LlamaForCausalLM"]
)
def test_steering_continues_as_plain_transformers_does(architecture: str, family: Callable[..., LoadedModel]) -> None:
    model = family(architecture)
    # Recurrent models have no cache of keys and values; TransformerLens mended MPT's in 4.0.
    if architecture != "MptForCausalLM":
        assert model.checks.cached == (architecture == "LlamaForCausalLM")
    tokens = torch.tensor([[model.bos_id, *model.encode(TEXT)]])
    wanted: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            new = model.hf(torch.cat([tokens, torch.tensor([wanted], dtype=torch.long)], dim=1), use_cache=False)
            wanted.append(int(new.logits[0, -1].argmax()))
    sae = tiny_sae(model, "blocks.1.hook_resid_post", 32)
    for where in ("everywhere", "generated"):
        found = steer(model, sae, Edit(0, strength=0.0, where=where), TEXT, new_tokens=6)  # type: ignore[arg-type]
        assert found.clean == found.steered == model.text(wanted)


ADDS_UP = ["GraniteForCausalLM", "NemotronForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "BloomForCausalLM",
           "MptForCausalLM", "OPTForCausalLM", "FalconForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
           "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Exaone4ForCausalLM"]  # fmt: skip


@pytest.mark.parametrize("architecture", ADDS_UP)
def test_direct_logit_attribution_adds_up_to_the_modules_logits(
    architecture: str, family: Callable[..., LoadedModel]
) -> None:
    model = family(architecture)
    found = logit_attribution(model.bridge, prompts_of(model))
    with torch.no_grad():
        logits = model.hf(prompts_of(model).clean, use_cache=False).logits[0, -1].double()
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    assert found.capped == (cap is not None)
    if cap is not None:
        logits = cap * torch.atanh(logits / cap)
    assert found.values.sum().item() == pytest.approx((logits[7] - logits[9]).item(), rel=1e-3, abs=1e-3)


POST_NORMS = {
    "Gemma2ForCausalLM": "post_attention_layernorm", "Gemma3ForCausalLM": "post_attention_layernorm",
    "Olmo2ForCausalLM": "post_attention_layernorm", "Exaone4ForCausalLM": "post_attention_layernorm",
}  # fmt: skip


@pytest.mark.parametrize("architecture", POST_NORMS)
def test_a_heads_term_is_what_it_adds_behind_the_norm_at_the_runs_scale(
    architecture: str, family: Callable[..., LoadedModel]
) -> None:
    """By a norm written down here: the head's part of W_O z, over the scale of the whole, times the measured gain."""
    model = family(architecture)
    tokens, layer = tokens_of(model), 1
    block = model.hf.get_submodule(f"model.layers.{layer}")
    z = seen(model, f"model.layers.{layer}.self_attn.o_proj", tokens, "input")
    norm: Any = block.get_submodule(POST_NORMS[architecture])
    with torch.no_grad():
        whole = block.self_attn.o_proj(z)
        gain = norm(torch.ones(32)) / torch.ones(32).square().mean().sqrt()
        scale = whole.square().mean(dim=-1, keepdim=True).sqrt()
        apart = z.unflatten(2, (4, -1))
        wanted = []
        for head in range(4):
            alone = torch.zeros_like(apart)
            alone[:, :, head] = apart[:, :, head]
            wanted.append(block.self_attn.o_proj(alone.flatten(2)) / scale * gain)
        found = head_outputs(model.bridge, layer, apart)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-4)
    added = seen(model, f"model.layers.{layer}.{POST_NORMS[architecture]}", tokens)
    torch.testing.assert_close(found.sum(dim=0), added, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["Olmo2ForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM"])
def test_edges_of_the_input_are_the_gradient_of_plain_transformers(
    architecture: str, family: Callable[..., LoadedModel]
) -> None:
    """EAP's `input` node: (clean - corrupted embedding) . gradient of the metric, by a hook on the module's block 0."""
    model = family(architecture)
    prompts = prompts_of(model)
    found = attribute_edges(model.bridge, prompts, variant="eap")
    streams: list[Tensor] = []

    def probe(_: Any, args: Any, kwargs: Any) -> Any:
        stream = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        streams.append(stream)
        return ((stream, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": stream})

    with model.hf.get_submodule("model.layers.0").register_forward_pre_hook(probe, with_kwargs=True):
        values = []
        for tokens in (prompts.clean, prompts.corrupted):
            logits = model.hf(tokens, use_cache=False).logits[0, -1]
            values.append(logits[7] - logits[9])
    (gradient,) = torch.autograd.grad(values[0], streams[0])
    wanted = ((streams[0] - streams[1]) * gradient).sum().item()
    assert found.nodes()["input"] == pytest.approx(wanted, rel=2e-3)
    assert (found.clean, found.corrupted) == pytest.approx([value.item() for value in values], rel=1e-3)
    # Integrated along the way from one prompt to the other, the input has the whole difference.
    whole = attribute_edges(model.bridge, prompts, variant="ig-inputs", steps=64)
    assert whole.nodes()["input"] == pytest.approx(whole.clean - whole.corrupted, rel=0.02)


def test_blocks_that_scale_the_stream_have_no_terms_and_other_scores_work(family: Callable[..., LoadedModel]) -> None:
    model = family("Gemma4ForCausalLM", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    for run in (logit_attribution, attribute_edges):
        with pytest.raises(InputError, match=r"does not split into heads|misses the last residual stream"):
            run(model.bridge, prompts_of(model))
    assert ablate_heads(model.bridge, prompts_of(model), kind="zero").scores.isfinite().all()


def test_latent_attention_has_sources_and_direct_terms_and_no_edges(family: Callable[..., LoadedModel]) -> None:
    model = family("DeepseekV3ForCausalLM")
    prompts, tokens = prompts_of(model), tokens_of(model)[0]
    hook = resolve_hook(model, "blocks.1.attn.hook_z")
    sae = tiny_sae(model, hook.name, hook.width)
    z = seen(model, "model.layers.1.self_attn.o_proj", tokens[None], "input")[0, -1]
    wanted = (z - sae.b_dec) @ sae.W_enc[:, 0] + sae.b_enc[0]
    found = direct_feature_attribution(model.bridge, sae, tokens, 0)
    assert found.pre_activation == pytest.approx(wanted.item(), rel=1e-3)
    assert logit_attribution(model.bridge, prompts).values.isfinite().all()
    for run in (attribute_edges, patch_edges):
        with pytest.raises(InputError, match=r"nothing at blocks\.0\.attn\.q\.hook_out"):
            run(model.bridge, prompts)
    with pytest.raises(InputError, match=r"cannot be frozen: .* latent attention \(MLA\)"):
        freeze(model.bridge, tokens)


def test_layers_without_heads_are_no_graph(family: Callable[..., LoadedModel]) -> None:
    with pytest.raises(InputError, match="layer 0 of this model has no attention heads"):
        graph_of(family("MambaForCausalLM").bridge)
    for architecture in ("MambaForCausalLM", "JambaForCausalLM"):
        with pytest.raises(InputError, match=r"has no . matrix of its own|does not split into heads"):
            composition_scores(family(architecture).bridge, "k")


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        ("MambaForCausalLM", "blocks.1.attn.hook_z", "no attention heads; use blocks.1.hook_resid_pre"),
        ("Qwen3NextForCausalLM", "blocks.0.attn.hook_z", "no attention heads"),
        ("FalconH1ForCausalLM", "blocks.1.hook_attn_out", "not what this block adds"),
        ("Gemma4ForCausalLM", "blocks.1.hook_mlp_out", "not what this block adds"),
        ("OpenAIGPTLMHeadModel", "blocks.1.hook_resid_mid", "not the residual stream after attention"),
    ],
)
def test_what_a_layer_does_not_have_is_refused_by_name(
    architecture: str, name: str, message: str, family: Callable[..., LoadedModel]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_hook(family(architecture), name)
    assert "\n" not in str(caught.value)


PART = ["FalconH1ForCausalLM", "JambaForCausalLM", "OPTForCausalLM", "Qwen3NextForCausalLM", "LlamaForCausalLM"]


@pytest.mark.parametrize("architecture", PART)
def test_what_a_family_does_not_have_is_refused_and_nothing_else_is_raised(architecture: str) -> None:
    """A part of what `python -m benchmarks.families` does for every family."""
    said, faults = tried(architecture)
    assert not faults
    assert {"load", "splicing", "evaluation", "prompt", "steering"} <= {
        name for name, cell in said.items() if cell == "works"
    }


def test_the_page_of_families_names_every_one() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [name for name in [*families(), *VARIANTS] if f"| {family_name(name)} |" not in page]
    assert not missing, "run python -m benchmarks.families"
    assert "FAULT" not in page


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "MambaForCausalLM", "GPT2LMHeadModel"])
def test_rounding_of_half_precision_is_no_disagreement(architecture: str, tmp_path: Path) -> None:
    folder = str(save_tiny(architecture, tmp_path))
    wide, half = (load_model(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.checks.hooks.keys() == wide.checks.hooks.keys()
    assert (half.checks.wrong_bridge, half.checks.unread) == (None, None)
    assert half.hf.config._attn_implementation == wide.hf.config._attn_implementation


def test_delegated_attention_changes_nothing_where_the_bridge_was_right(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    tokens = torch.arange(20)[None]
    before = model.bridge(tokens)
    delegate_attention(model.structure)
    torch.testing.assert_close(model.bridge(tokens), before, rtol=1e-5, atol=1e-5)
