"""A hook point by its name, or one line that says why there is none (`workbench.models.places`, `...guards`)."""

import difflib
import re
from collections.abc import Sequence

from sae.errors import InputError
from sae.model import SAE
from workbench.models.checkpoints import layers_told
from workbench.models.model import LoadedModel
from workbench.models.places import KINDS, HookSpec


def resolve_hook(model: LoadedModel, name: str) -> HookSpec:
    """The hook point `name` of a model.

    Raises:
        InputError: unknown name (with the nearest ones), a layer the model does not have, or a point that this layer
            does not have or whose value is not what its name says.
    """
    info = model.info
    if name in model.checks.hooks:
        return model.checks.hooks[name]
    if not info.n_layers:
        if name in model.checks.refused:
            raise InputError(f"{name}: {model.checks.refused[name]}")
        raise InputError(f"unknown hook point {name!r}: {info.name} names {', '.join(model.checks.hooks)}")
    layer = _layer(name, info.n_layers, info.name)
    if name in model.checks.refused:
        usable = [
            f"blocks.{layer}.{inner}" for inner in KINDS.values() if f"blocks.{layer}.{inner}" in model.checks.hooks
        ]
        raise InputError(f"{name}: {model.checks.refused[name]}; use {', '.join(usable)}")
    return model.checks.hooks[name]


def check_hooks(model: str, names: Sequence[str]) -> None:
    """Raises InputError, before a model is loaded, for names that no model has and layers beyond those that its
    description tells of."""
    n_layers = layers_told(model)
    for name in names if n_layers else ():
        _layer(name.replace("*", "0"), n_layers or 0, model)


def _layer(name: str, n_layers: int, model: str) -> int:
    """The layer that a hook point's name names. Raises InputError for an unknown name or a layer there is not."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None or match[2] not in KINDS.values():
        layer = min(int(match[1]), n_layers - 1) if match else 0
        known = [f"blocks.{layer}.{inner}" for inner in KINDS.values()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise InputError(f"unknown hook point {name!r}: the nearest are {', '.join(near)}")
    if (layer := int(match[1])) >= n_layers:
        raise InputError(f"{name}: layer {layer} does not exist, {model} has {n_layers} layers (0 to {n_layers - 1})")
    return layer


def resolve_hooks(model: LoadedModel, names: Sequence[str]) -> list[HookSpec]:
    """The hook points of some names, each once; a * for the layer stands for every layer of the model.

    Raises:
        InputError: as `resolve_hook`.
    """
    layers = range(model.info.n_layers or 1)
    found = dict.fromkeys(name.replace("*", str(layer)) for name in names for layer in layers)
    return [resolve_hook(model, name) for name in found]


def read_hook(model: LoadedModel, sae: SAE) -> HookSpec:
    """The hook point that an SAE or a transcoder reads.

    Raises:
        InputError: the model has no such hook point, or one of another width.
    """
    return _of_width(model, sae, sae.hook_name, sae.d_in, "reads")


def written_hook(model: LoadedModel, sae: SAE) -> HookSpec:
    """The hook point whose value an SAE's reconstruction, or a transcoder's prediction, takes the place of.

    Raises:
        InputError: the model has no such hook point, or one of another width.
    """
    return _of_width(model, sae, sae.written_hook, sae.d_out, "writes")


def _of_width(model: LoadedModel, sae: SAE, name: str, width: int, does: str) -> HookSpec:
    if sae.parts:
        names = ", ".join(part.name for part in sae.parts)
        raise InputError(f"a crosscoder {does} several activations ({names}) and this needs one")
    hook = resolve_hook(model, name)
    if hook.width != width:
        raise InputError(
            f"the SAE {does} {width} values and {hook.name} of {model.info.name} has {hook.width}: "
            "it belongs to another model"
        )
    return hook
