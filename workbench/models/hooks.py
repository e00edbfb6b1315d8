"""Hook points: TransformerLens' names for places in a model, and the bare module that sees each value.

| name                      | value                                     | seen by (TransformerLens path)  |
|---------------------------|-------------------------------------------|---------------------------------|
| blocks.i.hook_resid_pre   | residual stream entering block i          | input of blocks.i               |
| blocks.i.hook_resid_mid   | ... between attention and MLP             | input of blocks.i.ln2           |
| blocks.i.hook_resid_post  | ... leaving block i                       | output of blocks.i              |
| blocks.i.attn.hook_z      | heads' outputs before W_O, concatenated   | input of blocks.i.attn.o        |
| blocks.i.hook_attn_out    | attention's contribution                  | output of blocks.i.attn         |
| blocks.i.mlp.hook_in      | what the MLP reads, after LayerNorm       | input of blocks.i.mlp           |
| blocks.i.mlp.hook_post    | MLP activations                           | input of blocks.i.mlp.out       |
| blocks.i.hook_mlp_out     | MLP's contribution                        | output of blocks.i.mlp          |

Where a model normalises the contributions before it adds them (Gemma 2), they are read after that.
"""

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sae.errors import InputError

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel

# kind: (name within the block, component within the block, its input or output, width)
KINDS: dict[str, tuple[str, str, Literal["input", "output"], str]] = {
    "resid_pre": ("hook_resid_pre", "", "input", "d_model"),
    "resid_mid": ("hook_resid_mid", ".ln2", "input", "d_model"),
    "resid_post": ("hook_resid_post", "", "output", "d_model"),
    "z": ("attn.hook_z", ".attn.o", "input", "d_attention"),
    "attn_out": ("hook_attn_out", ".attn", "output", "d_model"),
    "mlp_in": ("mlp.hook_in", ".mlp", "input", "d_model"),
    "mlp_post": ("mlp.hook_post", ".mlp.out", "input", "d_mlp"),
    "mlp_out": ("hook_mlp_out", ".mlp", "output", "d_model"),
}

# Gemma 2 and 3 normalise what attention and MLP hand to the residual stream; the contribution is what is added.
_POST_NORMS = {"attn_out": "ln1_post", "mlp_out": "ln2_post"}


@dataclass(frozen=True)
class HookSpec:
    """One hook point of one model."""

    name: str
    layer: int
    kind: str
    component: str
    """TransformerLens path of the module that sees the value."""
    side: Literal["input", "output"]
    width: int


def resolve_hook(model: "LoadedModel", name: str) -> HookSpec:
    """The hook point `name` of a model.

    Raises:
        InputError: unknown name (with the nearest ones), a layer the model does not have, or a point that an
            architecture with parallel attention and MLP does not have.
    """
    info = model.info
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    kinds = {inner: kind for kind, (inner, *_) in KINDS.items()}
    if match is None or match[2] not in kinds:
        layer = min(int(match[1]), info.n_layers - 1) if match else 0
        known = [f"blocks.{layer}.{inner}" for inner in kinds]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise InputError(f"unknown hook point {name!r}: the nearest are {', '.join(near)}")
    layer, kind = int(match[1]), kinds[match[2]]
    if layer >= info.n_layers:
        raise InputError(
            f"{name}: layer {layer} does not exist, {info.name} has {info.n_layers} layers (0 to {info.n_layers - 1})"
        )
    if kind == "resid_mid" and info.parallel_attention:
        raise InputError(
            f"{name}: {info.architecture} runs attention and MLP side by side, so there is no residual stream between "
            f"them; use blocks.{layer}.hook_resid_pre or blocks.{layer}.hook_resid_post"
        )
    _, component, side, width = KINDS[kind]
    if kind in _POST_NORMS and hasattr(model.bridge.blocks[layer], _POST_NORMS[kind]):
        component = f".{_POST_NORMS[kind]}"
    return HookSpec(name, layer, kind, f"blocks.{layer}{component}", side, getattr(info, width))
