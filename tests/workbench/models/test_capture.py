"""Captured values equal TransformerBridge's, captured gradients a finite difference and an independent autograd."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2Config, PreTrainedConfig

from sae.errors import InputError
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.models.places import KINDS, HookSpec


def random_tokens(model: LoadedModel, batch: int = 2, pos: int = 12) -> Tensor:
    return torch.randint(0, model.info.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(1))


def all_hooks(model: LoadedModel, layers: tuple[int, ...] = (0, 2)) -> list[HookSpec]:
    kinds = [kind for kind in KINDS if kind != "resid_mid" or not model.info.parallel_attention]
    return [resolve_hook(model, f"blocks.{layer}.{KINDS[kind]}") for layer in layers for kind in kinds]


def assert_equals_bridge(model: LoadedModel, tokens: Tensor) -> None:
    hooks = all_hooks(model)
    captured = capture(model, tokens, hooks)
    assert captured.gradients == {}
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(tokens, names_filter=[hook.name for hook in hooks])
    for hook in hooks:
        value = captured.activations[hook.name]
        assert value.shape == (*tokens.shape, hook.width)
        assert not value.requires_grad
        torch.testing.assert_close(value, cache[hook.name].flatten(2), atol=1e-5, rtol=0)


def test_every_kind_of_hook_equals_the_bridge(tiny_model: LoadedModel) -> None:
    assert_equals_bridge(tiny_model, random_tokens(tiny_model))


def gemma2_config(_: Any) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=64,
        sliding_window=8,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda tiny: tiny.neox(use_parallel_residual=False), id="sequential GPT-NeoX"),
        pytest.param(lambda tiny: tiny.llama(head_dim=16), id="heads wider than the model"),
        pytest.param(gemma2_config, id="Gemma 2's norms after each part"),
    ],
)
def test_every_kind_of_hook_equals_the_bridge_in_other_shapes(
    tmp_path: Path, tiny_models: Any, config: Callable[[Any], PreTrainedConfig]
) -> None:
    model = load_model(str(tiny_models.save(tmp_path, config(tiny_models), with_bos=True)), device="cpu")
    assert_equals_bridge(model, random_tokens(model))


def test_every_kind_of_hook_equals_the_bridge_on_a_real_model(shared_data: Path) -> None:
    model = load_model(str(shared_data / "stories260k"), device="cpu")
    ids = model.tokenizer.encode("Once upon a time, there was a little girl named Lily.", add_special_tokens=False)
    assert_equals_bridge(model, torch.tensor([[model.bos_id, *ids]]))


def test_capture_stops_after_the_last_layer_needed(gpt2_model: LoadedModel) -> None:
    ran: list[str] = []
    modules = {"block 1": "blocks.1", "block 2": "blocks.2", "unembedding": "unembed"}
    handles = [
        gpt2_model.bridge.adapter.get_component(gpt2_model.hf, path).register_forward_pre_hook(
            lambda *_, label=label: ran.append(label)
        )
        for label, path in modules.items()
    ]
    tokens = random_tokens(gpt2_model)
    try:
        capture(gpt2_model, tokens, [resolve_hook(gpt2_model, "blocks.1.hook_resid_pre")])
        assert ran == ["block 1"]
        ran.clear()
        capture(gpt2_model, tokens, [resolve_hook(gpt2_model, "blocks.0.hook_mlp_out")], gradients=True)
        assert ran == ["block 1", "block 2", "unembedding"]
    finally:
        for handle in handles:
            handle.remove()


def test_no_hook_stays_behind_and_the_models_output_is_untouched(gpt2_model: LoadedModel) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gpt2_model.hf.modules()]

    tokens = random_tokens(gpt2_model)
    before = gpt2_model.hf(tokens).logits
    # transformers leaves hooks of its own in a model that was once asked for its hidden states.
    hooks_before = hooks()
    capture(gpt2_model, tokens, all_hooks(gpt2_model))
    capture(gpt2_model, tokens, all_hooks(gpt2_model), gradients=True)
    assert hooks() == hooks_before
    assert torch.equal(gpt2_model.hf(tokens).logits, before)
    with pytest.raises(IndexError):
        capture(gpt2_model, tokens + 10_000, all_hooks(gpt2_model))
    assert hooks() == hooks_before


def summed_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def test_gradients_equal_autograd_through_additive_probes_on_the_bridge(tiny_model: LoadedModel) -> None:
    """d loss / d value is d loss / d probe, where the bridge adds a probe of zeros to the value at the hook point."""
    tokens = random_tokens(tiny_model)
    hooks = [hook for hook in all_hooks(tiny_model, layers=(1,)) if hook.kind != "resid_mid"]
    found = capture(tiny_model, tokens, hooks, gradients=True).gradients
    probes = {hook.name: torch.zeros(*tokens.shape, hook.width, requires_grad=True) for hook in hooks}
    logits = tiny_model.bridge.run_with_hooks(
        tokens,
        fwd_hooks=[
            (name, lambda value, hook, probe=probe: value + probe.reshape(value.shape))
            for name, probe in probes.items()
        ],
    )
    expected = torch.autograd.grad(summed_loss(logits, tokens), list(probes.values()))
    for name, gradient in zip(probes, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_equal_finite_differences_in_float64(gpt2_model: LoadedModel, kind: str) -> None:
    """Central differences of the loss along a random direction at layer 0, the first place a graph could be cut.

    GPT-2 alone: Hugging Face's RMSNorm and rotary embedding compute in float32 whatever the model's precision.
    """
    model = replace(gpt2_model, hf=copy.deepcopy(gpt2_model.hf).double())
    tokens = random_tokens(model)
    hook = resolve_hook(model, f"blocks.0.{KINDS[kind]}")
    gradient = capture(model, tokens, [hook], gradients=True).gradients[hook.name]
    assert gradient.dtype == torch.float64
    assert torch.equal(gradient[:, -1], torch.zeros_like(gradient[:, -1]))
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss_at(step: float) -> float:
        # The value and everything that reads the same tensor moves: in place, as a residual stream has two readers.
        def move(_, args, kwargs=None, output=None):  # type: ignore[no-untyped-def]
            seen = args[0] if hook.side == "input" else (output[0] if isinstance(output, tuple) else output)
            seen.add_(step * direction)

        module = model.bridge.adapter.get_component(model.hf, hook.component)
        handle = (
            module.register_forward_pre_hook(lambda m, args: move(m, args))
            if hook.side == "input"
            else module.register_forward_hook(lambda m, args, output: move(m, args, output=output))
        )
        try:
            with torch.no_grad():
                return float(summed_loss(model.hf(tokens, use_cache=False).logits, tokens))
        finally:
            handle.remove()

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_what_is_added_to_the_residual_stream_has_the_gradient_of_the_sum(tiny_model: LoadedModel) -> None:
    """resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out, so each pair has the same gradient."""
    by_kind = {hook.kind: hook.name for hook in all_hooks(tiny_model, layers=(1,))}
    found = capture(tiny_model, random_tokens(tiny_model), all_hooks(tiny_model, layers=(1,)), gradients=True).gradients
    torch.testing.assert_close(found[by_kind["resid_post"]], found[by_kind["mlp_out"]], atol=0, rtol=0)
    total = "resid_post" if tiny_model.info.parallel_attention else "resid_mid"
    torch.testing.assert_close(found[by_kind[total]], found[by_kind["attn_out"]], atol=1e-5, rtol=1e-5)


def test_targets_that_do_not_count_have_no_gradient(gpt2_model: LoadedModel) -> None:
    tokens = random_tokens(gpt2_model, batch=1, pos=12)
    hook = resolve_hook(gpt2_model, "blocks.1.hook_resid_pre")
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 8:] = False
    masked = capture(gpt2_model, tokens, [hook], gradients=True, counted=counted).gradients[hook.name]
    short = capture(gpt2_model, tokens[:, :8], [hook], gradients=True).gradients[hook.name]
    torch.testing.assert_close(masked[:, :8], short, atol=1e-5, rtol=1e-5)
    assert not masked[:, 8:].any()


def test_float16_gradients_do_not_underflow_and_come_back_unscaled(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = load_model(str(tiny_llama), device="cpu", dtype="float16")
    half.hf.get_submodule("lm_head").weight.mul_(1e-5)  # gradients near float16's smallest number, 6e-8
    exact = replace(half, hf=copy.deepcopy(half.hf).float())
    tokens = random_tokens(half)
    hook = resolve_hook(half, "blocks.1.hook_resid_pre")
    expected = capture(exact, tokens, [hook], gradients=True).gradients[hook.name]

    def relative_error() -> float:
        captured = capture(half, tokens, [hook], gradients=True)
        assert captured.activations[hook.name].dtype == torch.float16
        assert captured.gradients[hook.name].dtype == torch.float32
        return float((captured.gradients[hook.name] - expected).norm() / expected.norm())

    assert relative_error() < 0.01
    monkeypatch.setattr("workbench.models.capture.FP16_LOSS_SCALE", 1.0)
    assert relative_error() > 0.05


def test_gradients_that_float16_cannot_hold_are_refused(tiny_llama: Path) -> None:
    half = load_model(str(tiny_llama), device="cpu", dtype="float16")
    half.hf.get_submodule("lm_head").weight.mul_(1e5)
    hook = resolve_hook(half, "blocks.1.hook_resid_pre")
    with pytest.raises(InputError, match="overflow float16"):
        capture(half, random_tokens(half), [hook], gradients=True)


def test_unknown_hook_points_are_refused_with_the_nearest_names(gpt2_model: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"unknown hook point 'blocks.1.resid_pre'.*blocks.1.hook_resid_pre"):
        resolve_hook(gpt2_model, "blocks.1.resid_pre")
    with pytest.raises(InputError, match=r"nearest are .*blocks.0.attn.hook_z"):
        resolve_hook(gpt2_model, "attn.hook_z")


def test_a_layer_out_of_range_is_refused(gpt2_model: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"layer 3 does not exist.*3 layers \(0 to 2\)"):
        resolve_hook(gpt2_model, "blocks.3.hook_resid_pre")


def test_parallel_attention_has_no_resid_mid(neox_model: LoadedModel) -> None:
    with pytest.raises(InputError, match="side by side"):
        resolve_hook(neox_model, "blocks.0.hook_resid_mid")
