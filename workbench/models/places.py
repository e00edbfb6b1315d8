"""Hook points: TransformerLens' names for places in a model, and the bare module that sees each value.

| name                      | value                                     | usually                         |
|---------------------------|-------------------------------------------|---------------------------------|
| blocks.i.hook_resid_pre   | residual stream entering block i          | input of blocks.i               |
| blocks.i.hook_resid_mid   | ... between attention and MLP             | input of blocks.i.ln2           |
| blocks.i.hook_resid_post  | ... leaving block i                       | output of blocks.i              |
| blocks.i.attn.hook_z      | heads' outputs before W_O, concatenated   | input of blocks.i.attn.o        |
| blocks.i.hook_attn_out    | what attention adds to the stream         | output of blocks.i.attn         |
| blocks.i.mlp.hook_in      | what the MLP reads, after LayerNorm       | input of blocks.i.mlp           |
| blocks.i.mlp.hook_post    | MLP activations; of a mixture of experts  | input of blocks.i.mlp.out       |
|                           | all experts', zero where not chosen       | (`workbench.models.mixtures`)   |
| blocks.i.hook_mlp_out     | what the MLP adds to the stream           | output of blocks.i.mlp          |

Where else a family has a value (after a norm, in Gemma 2 and OLMo 2; before the residual stream is added, in BLOOM)
the TransformerBridge knows: the bare module is the one that its hook point of that name sits on. Whether the two agree,
and whether a contribution is what is added, is measured when a model is loaded (`workbench.models.guards`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from circuits.nodes import Bridge

KINDS: dict[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
"""Name within the block, by kind."""


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
    scale: float = 1.0
    """What the module's value is multiplied by before it is added to the residual stream."""
    overwritten: bool = False
    """Whether the model goes on to write into the value's tensor (Falcon adds attention's output to the MLP's)."""
    positions_first: bool = False
    """Whether the module sees [pos, batch, width], as torch's own attention and recurrent layers do by default."""


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module reads: blocks and attention modules get it first or by name, depending on the architecture."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))


def bridge_hooks(bridge: "Bridge", n_layers: int) -> tuple[dict[str, HookSpec], dict[str, str]]:
    """The hook points that a TransformerBridge has, their widths still 0, and why it lacks the others, by name."""
    points = bridge.hook_dict
    found: dict[str, HookSpec] = {}
    lacking: dict[str, str] = {}
    for layer in range(n_layers):
        for kind, inner in KINDS.items():
            name = f"blocks.{layer}.{inner}"
            place = _place(bridge, points[name].name) if name in points else None
            if place is None or (kind == "mlp_post" and not place[0].endswith((".out", ".dense_out"))):
                lacking[name] = _lacking(bridge, layer, kind)
            else:
                component, side, scale = place
                found[name] = HookSpec(name, layer, kind, component, side, 0, scale)
    return found, lacking


def _place(bridge: "Bridge", point: str) -> tuple[str, Literal["input", "output"], float] | None:
    """(component, its side, scale) of a TransformerBridge's own name for a hook point."""
    component, _, local = point.rpartition(".")
    if local == "hook_in":
        return component, "input", 1.0
    if local == "hook_out":
        return component, "output", 1.0
    block = bridge.blocks[int(component.split(".")[1])]
    part = {"hook_attn_out": "scaled_attn_submodule", "hook_mlp_out": "scaled_mlp_submodule"}.get(local)
    if part is None or not hasattr(block, "residual_contribution_scale"):
        return None
    return f"{component}.{getattr(block, part)}", "output", float(block.residual_contribution_scale)


def _lacking(bridge: "Bridge", layer: int, kind: str) -> str:
    if kind == "resid_mid" and bridge.cfg.parallel_attn_mlp:
        return "attention and MLP run side by side, so there is no residual stream between them"
    if kind in ("z", "attn_out") and not hasattr(bridge.blocks[layer], "attn"):
        return f"layer {layer} has no attention heads"
    if kind == "mlp_post":
        return f"layer {layer} has no MLP with a single matrix out (several, or experts that are no such MLP)"
    return f"layer {layer} has no such place"


def in_every_layer(hooks: Iterable[str]) -> str:
    """What to call hook points of all layers: `blocks.*.mlp.hook_in` where they are one place of every block."""
    return ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", hook) for hook in hooks))


def between(read: str, written: str) -> str:
    """What to call the place of an SAE: the hook point it reads, and where a transcoder's is another one the one it
    writes."""
    return f"{read} → {written}" if written not in ("", read) else read
