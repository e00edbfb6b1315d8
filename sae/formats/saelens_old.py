"""Configurations from before SAELens 6.0 as SAELens 6 would write them.

1. A configuration is old when it names no version (`sae_lens_version`, at the top or in `metadata`) or one below 6.
2. Keys that were renamed get their new names: hook_point, hook_point_head_index, activation_fn_str. A hook_point with
   {layer} in it takes hook_point_layer.
3. `activation_fn` "topk" with `activation_fn_kwargs` {"k": ...} is the architecture topk; without an architecture it
   is standard. Any other activation than relu is refused.
4. `normalize_activations` null or false is "none", true "expected_average_only_in".
5. What stood at the top about the model and the hook point goes to `metadata`.

SAELens' own conversion (`handle_pre_6_0_config`) does the same where both accept a configuration. It drops a nested
`metadata` and a k that stands beside an activation function, both of which are used here.
"""

from collections.abc import Mapping
from typing import Any

from sae.errors import InputError

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
METADATA = (
    "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_head_index", "hf_hook_name",
    "hook_name_out", "hook_head_index_out", "prepend_bos", "exclude_special_tokens", "context_size", "seqpos_slice",
    "dataset_path", "neuronpedia_id",
)  # fmt: skip
"""Keys about what an SAE reads."""


def is_old(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is from before SAELens 6.0."""
    version = config.get("sae_lens_version") or nested(config).get("sae_lens_version")
    major = str(version or "0").partition(".")[0]
    return not major.isdigit() or int(major) < 6


def modern(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration as SAELens 6 writes it; one that is no older is returned as it is.

    Raises:
        InputError: an activation function that is not the architecture's; `where` begins the message.
    """
    if not is_old(config):
        _check_activation(config, config.get("architecture"), where)
        return dict(config)
    renamed = {RENAMED.get(key, key): value for key, value in config.items() if key not in RENAMED or value is not None}
    hook, layer = renamed.get("hook_name"), renamed.get("hook_point_layer")
    if isinstance(hook, str) and "{layer}" in hook and isinstance(layer, int):
        renamed["hook_name"] = hook.replace("{layer}", str(layer))
    architecture = _architecture(renamed, where)
    about = {key: renamed[key] for key in METADATA if renamed.get(key) is not None}
    converted = {
        **renamed,
        "architecture": architecture,
        "normalize_activations": _normalisation(renamed.get("normalize_activations")),
        "metadata": {**about, **nested(config)},
    }
    if architecture in ("topk", "abstopk"):
        converted["k"] = _k(renamed)
    return {key: value for key, value in converted.items() if value is not None}


def nested(config: Mapping[str, Any], key: str = "metadata") -> dict[str, Any]:
    """The object under `key`; empty where there is none."""
    found = config.get(key)
    return dict(found) if isinstance(found, Mapping) else {}


def _architecture(config: Mapping[str, Any], where: str) -> str:
    architecture = config.get("architecture") or "standard"
    if architecture == "standard" and config.get("activation_fn") == "topk":
        architecture = "topk"
    _check_activation(config, architecture, where)
    return str(architecture)


def _check_activation(config: Mapping[str, Any], architecture: Any, where: str) -> None:
    """Raises InputError where a named activation function says another SAE than the architecture does."""
    activation = config.get("activation_fn") or config.get("activation_fn_str")
    if activation is None or activation == "relu" or (activation == "topk" and architecture == "topk"):
        unknown = sorted(nested(config, "activation_fn_kwargs").keys() - {"k", "use_sparse_activations"})
        if not unknown:
            return
        raise InputError(f"{where} has activation_fn_kwargs {', '.join(unknown)}, which is not supported: expected k")
    raise InputError(
        f"{where} is of the architecture {architecture!r} with the activation function {activation!r}, which is not "
        "supported: expected relu, or topk with the architecture standard or topk"
    )


def _k(config: Mapping[str, Any]) -> Any:
    k = nested(config, "activation_fn_kwargs").get("k")
    return config.get("k") if k is None else k


def _normalisation(value: Any) -> Any:
    if isinstance(value, bool):
        return "expected_average_only_in" if value else "none"
    return "none" if value is None else value
