"""What a model's own passes over a few random tokens show: which hook points hold what their names say.

No list of families is kept; every loaded model is measured on `TOKENS` random tokens:

1. The TransformerBridge's logits against the bare module's. Where they differ, the bridge's attention is taken from the
   module itself instead of rebuilt (`delegate_attention`), and compared again.
2. Every hook point of the bare module against the bridge's of the same name.
3. What the names promise, in every block:

       resid_pre + attn_out = resid_mid        resid_mid + mlp_out = resid_post
       resid_pre + attn_out + mlp_out = resid_post      where attention and MLP run side by side

4. Norm and unembedding on the last residual stream against the logits.
5. A step with keys and values of the tokens before it against the whole pass, a pass by the module's own attention
   (`workbench.models.fused_attention`), and whether a changed attention pattern changes the logits.

Two values agree when their median relative difference over the tokens is below `tolerance`: rounding of fast and
explicit attention, and a token that a router sends elsewhere because of it, are no disagreement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge
from circuits.unembedding import difference, tolerance, unread
from sae.errors import InputError
from workbench.models.capture import as_added, hooked
from workbench.models.fused_attention import fused_attention
from workbench.models.model import Checks, LoadedModel
from workbench.models.places import KINDS, HookSpec, bridge_hooks

TOKENS = 16


def check(model: LoadedModel) -> Checks:
    """Measures a model; see the module's description. Mends its bridge where that is possible.

    Raises:
        InputError: a bridge without blocks, where nothing could be read.
    """
    hf: Any = model.hf
    fast = getattr(getattr(hf, "config", None), "_attn_implementation", None)
    # In half precision a router sends tokens elsewhere for the rounding of another attention: both run the same.
    explicit = fast is not None and torch.finfo(model.dtype).eps > torch.finfo(torch.float32).eps
    try:
        if explicit:
            hf.set_attn_implementation("eager")
        return _checked(model)
    finally:
        if explicit:
            hf.set_attn_implementation(fast)


@torch.no_grad()
def _checked(model: LoadedModel) -> Checks:
    bridge = model.structure
    if not hasattr(bridge, "blocks"):
        raise InputError(
            f"TransformerLens' {model.info.architecture} has no list of blocks to read from: not supported"
        )
    prepare(bridge, delegated=False)
    tokens = random_tokens(model)
    logits = model.hf(tokens, use_cache=False).logits
    delegated, wrong = _mended(bridge, tokens, logits, model.info.architecture)
    hooks, refused = bridge_hooks(bridge, model.info.n_layers)
    native, overwritten = _native_values(model, tokens, hooks)
    bridged = {} if wrong else _bridge_values(bridge, tokens, list(hooks))
    for name in hooks:
        if reason := _problem(name, native, None if wrong else bridged, tokens):
            refused[name] = reason
    for layer in range(model.info.n_layers):
        refused |= _not_added(layer, {name: native[name] for name in native if name not in refused})
    usable = {
        name: replace(hook, width=native[name].shape[-1], overwritten=name in overwritten)
        for name, hook in hooks.items()
        if name not in refused
    }
    return Checks(
        usable, refused, wrong, delegated,
        cached=not wrong and _cached_step_agrees(bridge, tokens, logits),
        fused=not wrong and _fused_pass_agrees(model, tokens, logits),
        editable_patterns=not wrong and _pattern_edits_act(bridge, tokens, logits),
        unread=unread(bridge, native.get(f"blocks.{model.info.n_layers - 1}.hook_resid_post"), logits, model.dtype),
    )  # fmt: skip


def prepare(bridge: Any, *, delegated: bool) -> None:
    """What is done to every bridge before it is used, and its attention delegated where it was found to need it."""
    _place_loose_mlps(bridge)
    if hasattr(bridge.original_model, "set_attn_implementation"):
        # Only explicit attention hands its pattern on.
        bridge.original_model.set_attn_implementation("eager")
    if delegated:
        delegate_attention(bridge)


def _place_loose_mlps(bridge: Bridge) -> None:
    """An MLP without a module of its own (OPT: two matrices in the block) reads what its first matrix reads."""
    for block in bridge.blocks:
        mlp = getattr(block, "mlp", None)
        if mlp is not None and getattr(mlp, "name", "") is None and hasattr(mlp, "in"):
            mlp.hook_aliases = {**mlp.hook_aliases, "hook_in": "in.hook_in"}


def random_tokens(model: LoadedModel) -> Int[Tensor, "1 pos"]:
    """BOS and random tokens of the vocabulary, always the same for a model."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.info.d_vocab, (1, min(TOKENS, model.info.n_ctx)), generator=generator)
    if model.bos_id is not None:
        tokens[0, 0] = model.bos_id
    return tokens.to(model.device)


def agree(one: Float[Tensor, "1 pos *width"], other: Float[Tensor, "1 pos *width"]) -> bool:
    """Whether two values are the same up to rounding; what is not finite in the second cannot be compared and does."""
    return difference(one, other) <= tolerance(other.dtype)


def delegate_attention(bridge: Bridge) -> None:
    """Has every block's attention run the module's own forward, hooks at its projections, pattern and output kept."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    for block in bridge.blocks:
        attention = getattr(block, "attn", None)
        if isinstance(attention, AttentionBridge):
            # A bridge's own __setattr__ hands unknown attributes to the module it wraps.
            object.__setattr__(attention, "forward", MethodType(AttentionBridge.forward, attention))


def _mended(
    bridge: Bridge, tokens: Int[Tensor, "1 pos"], logits: Float[Tensor, "1 pos vocab"], architecture: str
) -> tuple[bool, str | None]:
    """(whether attention was delegated, why the bridge cannot be used)."""
    if _bridge_agrees(bridge, tokens, logits):
        return False, None
    delegate_attention(bridge)
    if _bridge_agrees(bridge, tokens, logits):
        return True, None
    return True, (
        f"TransformerLens' bridge does not compute what {architecture} computes (other logits on random tokens): "
        "harvests, training, prompts and the index work, evaluation, steering and circuits do not"
    )


def _bridge_agrees(bridge: Bridge, tokens: Int[Tensor, "1 pos"], logits: Float[Tensor, "1 pos vocab"]) -> bool:
    try:
        return agree(bridge(tokens, return_type="logits"), logits)
    except Exception:  # whatever a bridge that does not fit its model fails with
        return False


def _native_values(
    model: LoadedModel, tokens: Int[Tensor, "1 pos"], hooks: Mapping[str, HookSpec]
) -> tuple[dict[str, Tensor], set[str]]:
    """Values of the bare module by name, and the names of those that it writes over later in the pass."""
    values: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, int]] = {}

    def keep(hook: HookSpec, value: Tensor) -> None:
        if isinstance(value, Tensor):
            values[hook.name] = as_added(hook, value, tokens).clone()
            seen[hook.name] = value, value._version

    with hooked(model, list(hooks.values()), keep):
        model.hf(tokens, use_cache=False)
    return values, {name for name, (value, version) in seen.items() if value._version != version}


def _bridge_values(bridge: Bridge, tokens: Int[Tensor, "1 pos"], names: Sequence[str]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}

    def taker(name: str) -> Any:
        def take(value: Any, hook: Any) -> None:
            values[name] = value.clone() if isinstance(value, Tensor) else value

        return take

    with bridge.hooks(fwd_hooks=[(name, taker(name)) for name in names]):
        bridge(tokens, return_type="logits")
    return values


def _problem(
    name: str, native: Mapping[str, Any], bridged: Mapping[str, Any] | None, tokens: Int[Tensor, "1 pos"]
) -> str | None:
    """Why a hook point is not used, None where it can be."""
    value = native.get(name)
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[:2] != tokens.shape:
        return "no module of this model sees it as one vector a token"
    if bridged is None:
        return None
    if name not in bridged:
        return "it never fires in TransformerLens' bridge, so nothing could be put in its place"
    if not isinstance(bridged[name], Tensor) or not agree(value, bridged[name]):
        return "TransformerLens' hook of that name holds another value than the module's"
    return None


def _not_added(layer: int, values: Mapping[str, Tensor]) -> dict[str, str]:
    """Hook points of a block whose sums are not what their names promise, with the reason."""
    at = {kind: values.get(f"blocks.{layer}.{inner}") for kind, inner in KINDS.items()}
    pre, mid, post = at["resid_pre"], at["resid_mid"], at["resid_post"]
    attention, mlp = at["attn_out"], at["mlp_out"]
    if mid is None:
        added = [value for value in (attention, mlp) if value is not None]
        together = pre is not None and post is not None and agree(sum(added, pre), post)
        wrong = [] if together else ["attn_out", "mlp_out"]
    else:
        attention_adds = pre is not None and attention is not None and agree(pre + attention, mid)
        mlp_adds = mlp is not None and post is not None and agree(mid + mlp, post)
        wrong = [] if attention_adds else ["attn_out"]
        wrong += [] if mlp_adds else ["mlp_out"]
        wrong += [] if attention_adds or mlp_adds else ["resid_mid"]
    reason = "is not what this block adds to the residual stream (measured on random tokens)"
    mid_reason = "what the MLP reads is not the residual stream after attention (measured on random tokens)"
    return {
        f"blocks.{layer}.{KINDS[kind]}": mid_reason if kind == "resid_mid" else f"it {reason}"
        for kind in wrong
        if at[kind] is not None
    }


def _cached_step_agrees(bridge: Bridge, tokens: Int[Tensor, "1 pos"], logits: Float[Tensor, "1 pos vocab"]) -> bool:
    options = {"return_type": "logits_and_cache", "use_cache": True}
    try:
        _, cache = bridge(tokens[:, :-1], past_key_values=None, **options)
        last, _ = bridge(tokens[:, -1:], past_key_values=cache, **options)
    except Exception:  # whatever a cache that a family does not have fails with
        return False
    return cache is not None and agree(last, logits[:, -1:])


def _fused_pass_agrees(model: LoadedModel, tokens: Int[Tensor, "1 pos"], logits: Float[Tensor, "1 pos vocab"]) -> bool:
    # A HookedTransformer's weights have no configuration of transformers', and no other attention.
    if getattr(getattr(model.hf, "config", None), "_attn_implementation", "eager") == "eager":
        return False
    try:
        with fused_attention(model.structure, model.hf):
            return agree(model.structure(tokens, return_type="logits"), logits)
    except Exception:  # whatever an attention that does not fit its bridge fails with
        return False


def _pattern_edits_act(bridge: Bridge, tokens: Int[Tensor, "1 pos"], logits: Float[Tensor, "1 pos vocab"]) -> bool:
    names = [name for name in bridge.hook_dict if name.endswith("attn.hook_pattern")]
    with bridge.hooks(fwd_hooks=[(name, lambda pattern, hook: torch.zeros_like(pattern)) for name in names]):
        changed = bridge(tokens, return_type="logits")
    return bool(names) and not agree(changed, logits)
