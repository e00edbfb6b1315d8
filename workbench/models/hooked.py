"""HookedTransformers, live or as checkpoints, with the hook points of a TransformerBridge.

1. The weights are copied into TransformerLens' native module, which computes a HookedTransformer with any norm or none,
   learned or rotary positions, causal or bidirectional attention, plain or gated MLPs or none, and class outputs.
2. A TransformerBridge is put around a copy that shares every tensor. Its attention is written out here, so that what a
   hook does to scores and pattern changes the pass.
3. Its logits must be those of the HookedTransformer on random tokens, to `TOLERANCE` of their largest; what is not
   (models of kinds that the native module does not know) is refused.

A checkpoint is a file of a state dict with its configuration, in one of these forms:

    model.pt, model.pth          {"state_dict" or "model" or "model_state_dict": ..., "config" or "cfg": ...}
    weights.pt, .safetensors     the state dict, with the configuration as JSON beside it: weights.json, config.json or
                                 cfg.json
"""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuits.nodes import Bridge
from sae.errors import InputError

TOLERANCE = 1e-5
WEIGHT_KEYS, CONFIG_KEYS = ("state_dict", "model_state_dict", "model"), ("config", "cfg")
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
KEPT = (
    "d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_mlp", "d_vocab", "d_vocab_out", "act_fn", "eps",
    "normalization_type", "attention_dir", "attn_only", "final_rms", "gated_mlp", "n_key_value_heads",
    "positional_embedding_type", "rotary_dim", "rotary_base", "attn_scores_soft_cap", "output_logits_soft_cap",
)  # fmt: skip
"""Of a HookedTransformer's configuration, what the native module reads."""
UNREAD = (
    "parallel_attn_mlp", "use_local_attn", "post_embedding_ln", "use_qk_norm", "use_normalization_before_and_after",
    "use_NTK_by_parts_rope", "use_dynamic_ntk_rope", "use_logn_attn", "clip_qkv", "num_experts",
)  # fmt: skip
"""What it does not read, and what changes the logits where it is set."""
SAME_AS = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
"""Activation functions under the name that the native module has for them."""


def hooked_classes() -> tuple[Any, Any]:
    """HookedTransformer and its configuration. Raises InputError where TransformerLens has none, from 4.0 on."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        raise InputError(
            f"TransformerLens {version('transformer-lens')} has no HookedTransformer, which this needs: install "
            '"transformer-lens<4"'
        ) from None
    return HookedTransformer, HookedTransformerConfig


def is_hooked(module: Any) -> bool:
    """Whether a live object is a HookedTransformer."""
    return any(kind.__name__ == "HookedTransformer" for kind in type(module).__mro__)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a file of weights."""
    return path.is_file() and path.suffix.lower() in SUFFIXES


def read_checkpoint(path: Path) -> Any:
    """The HookedTransformer of a checkpoint; see the module's description.

    Raises:
        InputError: files that cannot be read, no configuration, or weights that do not fit it.
    """
    HookedTransformer, HookedTransformerConfig = hooked_classes()
    weights, found = _contents(path)
    if found is None:
        raise InputError(
            f"{path} holds weights without a configuration: put HookedTransformer's as JSON beside it, "
            f"{path.with_suffix('.json').name}, or save {{'state_dict': ..., 'config': model.cfg.to_dict()}}"
        )
    known = {field.name for field in dataclasses.fields(HookedTransformerConfig)}
    settings = {key: value for key, value in found.items() if key in known and key not in ("dtype", "n_devices")}
    try:
        config = HookedTransformerConfig(**(settings | {"device": "cpu", "init_weights": False}))
        hooked = HookedTransformer(config, move_to_device=False)
        dtype = next(iter(weights.values())).dtype
        missing, unexpected = hooked.to(dtype, print_details=False).load_state_dict(dict(weights), strict=False)
    except Exception as error:  # configurations that do not fit fail in many ways
        # torch names the tensor that does not fit in a second line.
        reason = (str(error).splitlines() or [type(error).__name__])[:2][-1].strip()
        raise InputError(f"{path} is no HookedTransformer: {reason}") from None
    # Masks and constants are no weights; older versions stored others than this one.
    parameters = {name for name, _ in hooked.named_parameters()}
    wrong = [name for name in missing if name in parameters]
    wrong += [name for name in unexpected if name.rpartition(".")[2] not in ("mask", "IGNORE")]
    if wrong:
        raise InputError(f"the weights of {path} do not fit its configuration: {len(wrong)} tensors, first {wrong[0]}")
    return hooked.eval()


def _contents(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any] | None]:
    """State dict and configuration of a checkpoint file, the configuration None where there is none."""
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_plain_classes()):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files and foreign pickles fail in many ways
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if foreign is not None:
            raise InputError(
                f"{path} holds a {foreign[1]}, and only tensors and settings are read, since anything else can run: "
                "save {'state_dict': model.state_dict(), 'config': model.cfg.to_dict()}"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read {path}: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path} holds a {type(loaded).__name__}, expected a state dict, or one with a configuration")
    weights = next((loaded[key] for key in WEIGHT_KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} holds no state dict: expected tensors by name, alone or under 'state_dict'")
    found = next((loaded[key] for key in CONFIG_KEYS if key in loaded), None)
    if found is not None:
        return weights, found if isinstance(found, Mapping) else vars(found)
    for beside in (path.with_suffix(".json"), path.with_name("config.json"), path.with_name("cfg.json")):
        if beside.is_file():
            try:
                read = json.loads(beside.read_text())
            except ValueError as error:
                raise InputError(f"{beside} is not JSON ({error})") from None
            return weights, read
    return weights, None


def _plain_classes() -> list[Any]:
    """What a checkpoint may hold beside tensors: a configuration, under its old name too, and NumPy's numbers in it."""
    _, HookedTransformerConfig = hooked_classes()
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    old = "transformer_lens.HookedTransformerConfig.HookedTransformerConfig"
    numbers = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.int64))]
    return [
        HookedTransformerConfig, (HookedTransformerConfig, old),
        scalar, (scalar, "numpy.core.multiarray.scalar"), *numbers,
    ]  # fmt: skip


def native_pair(hooked: Any, name: str) -> tuple[nn.Module, Bridge]:
    """The native module of a HookedTransformer and a TransformerBridge that shares its tensors.

    Raises:
        InputError: a kind of model that the native module does not compute.
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.model_bridge.sources.native import NativeModel

    settings = {key: getattr(hooked.cfg, key) for key in KEPT}
    settings["act_fn"] = SAME_AS.get(settings["act_fn"], settings["act_fn"])
    try:
        config = TransformerBridgeConfig(**(settings | {"d_mlp": hooked.cfg.d_mlp or 1, "init_weights": False}))
        bare = NativeModel(config).to(hooked.cfg.device)
        _copy_weights(hooked, bare)
    except (AttributeError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name} is a HookedTransformer of a kind that is not loaded here: {reason}") from None
    bare = bare.to(next(hooked.parameters()).dtype).eval().requires_grad_(False)
    _refuse_other_logits(hooked, bare, name)
    shared = {id(tensor): tensor for tensor in (*bare.parameters(), *bare.buffers())}
    bridge = build_bridge_from_module(
        copy.deepcopy(bare, shared), architecture="TransformerLensNative", tl_config=config, model_name=name
    )
    for block in bridge.blocks:
        # A bridge's own __setattr__ hands unknown attributes to the module it wraps.
        object.__setattr__(block.attn, "forward", MethodType(_attention, block.attn))
    return bare, bridge.eval().requires_grad_(False)


@torch.no_grad()
def _refuse_other_logits(hooked: Any, bare: nn.Module, name: str) -> None:
    shape = (2, min(16, hooked.cfg.n_ctx))
    tokens = torch.randint(hooked.cfg.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(hooked.parameters()).device)
    wanted, found = hooked(tokens, return_type="logits"), bare(tokens)
    error = (found - wanted).abs().max() / wanted.abs().max()
    if not error <= max(TOLERANCE, 16 * torch.finfo(found.dtype).eps):
        unread = [f"{key}={getattr(hooked.cfg, key)}" for key in UNREAD if getattr(hooked.cfg, key, None)]
        biases = [value for key, value in hooked.named_parameters() if key.endswith("mlp.b_in")]
        if hooked.cfg.gated_mlp and any(bool(bias.any()) for bias in biases):
            unread.append("a bias added after the gate (mlp.b_in)")
        raise InputError(
            f"{name} is a HookedTransformer that TransformerLens' native module does not compute (logits differ by "
            f"{error:.1e}): {', '.join(unread) or 'something it uses'} is not supported here"
        )


def _copy_weights(hooked: Any, bare: Any) -> None:
    """A HookedTransformer's weights, head by head, as the native module's matrices."""
    weights = hooked.state_dict()
    bare.tok_embed.weight = nn.Parameter(weights["embed.W_E"])
    if bare.pos is not None:
        bare.pos.weight = nn.Parameter(weights["pos_embed.W_pos"])
    for number, block in enumerate(bare.layers):
        own = {key.removeprefix(f"blocks.{number}."): value for key, value in weights.items()
               if key.startswith(f"blocks.{number}.")}  # fmt: skip
        for part in "QKV":
            # Keys and values of grouped attention are stored under names with an underscore.
            found = [own.get(f"attn.{kind}{part}", own.get(f"attn._{kind}{part}")) for kind in ("W_", "b_")]
            W, b = (value for value in found if value is not None)
            if part in "QK" and bare.rotary is not None and not hooked.cfg.rotary_adjacent_pairs:
                W, b = _adjacent(W, bare.rotary.rotary_dim), _adjacent(b, bare.rotary.rotary_dim)
            setattr(block.attn, part.lower(), _linear(rearrange(W, "h d z -> d (h z)"), b.flatten()))
        block.attn.o = _linear(rearrange(own["attn.W_O"], "h z d -> (h z) d"), own["attn.b_O"])
        block.attn.scale = float(hooked.blocks[number].attn.attn_scale)
        if "mlp.W_in" in own:
            names = {"mlp.W_in": "in", "mlp.W_out": "out", "mlp.W_gate": "gate"}
            if "mlp.W_gate" not in own:
                names = {"mlp.W_in": "fc_in", "mlp.W_out": "fc_out"}
            for key, name in names.items():
                setattr(block.mlp, name, _linear(own[key], own.get(key.replace("W_", "b_"))))
        _copy_norms({"ln1": block.ln1, "ln2": getattr(block, "ln2", None)}, own)
    _copy_norms({"ln_final": bare.ln_out}, weights)
    bare.head = _linear(weights["unembed.W_U"], weights["unembed.b_U"])


def _copy_norms(norms: Mapping[str, nn.Module | None], weights: Mapping[str, Tensor]) -> None:
    for name, norm in norms.items():
        if f"{name}.w" in weights:
            norm.weight = nn.Parameter(weights[f"{name}.w"])  # type: ignore[union-attr]
        if f"{name}.b" in weights:
            norm.bias = nn.Parameter(weights[f"{name}.b"])  # type: ignore[union-attr]


def _linear(W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"] | None) -> nn.Linear:
    d_in, d_out = W.shape
    linear = nn.Linear(d_in, d_out, bias=b is not None and bool(b.any()), device="meta")
    linear.weight = nn.Parameter(W.T.contiguous())
    if linear.bias is not None:
        linear.bias = nn.Parameter(b.clone())  # type: ignore[union-attr]
    return linear


def _adjacent(weight: Float[Tensor, "heads *d d_head"], rotary_dim: int) -> Float[Tensor, "heads *d d_head"]:
    """Coordinates that turn together put side by side, where a HookedTransformer has them half the width apart."""
    order = torch.arange(weight.shape[-1])
    order[:rotary_dim] = order[:rotary_dim].view(2, -1).T.flatten()
    return weight[..., order]


def _attention(self: Any, hidden_states: Float[Tensor, "batch pos d_model"], **_: Any) -> tuple[Tensor, Tensor]:
    """The native attention with hooks at scores and pattern where they are used."""
    native = self.original_component
    x = self.hook_in(hidden_states)
    q, k, v = (
        rearrange(part(x).flatten(2), "b p (h z) -> b h p z", z=native.d_head) for part in (self.q, self.k, self.v)
    )
    if native.rotary is not None:
        q, k = native.rotary.apply_rope(q, k)
    k, v = (part.repeat_interleave(native.kv_repeats, dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) / native.scale
    if (cap := native.attn_scores_soft_cap) > 0:
        scores = cap * (scores / cap).tanh()
    if native.causal:
        n = x.shape[1]
        scores = scores.masked_fill(native.causal_mask[:n, :n], float("-inf"))
    pattern = self.hook_pattern(self.hook_attn_scores(scores).softmax(dim=-1))
    return self.hook_out(self.o(rearrange(pattern @ v, "b h p z -> b p (h z)"))), pattern
