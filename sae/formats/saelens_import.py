"""SAEs that SAELens itself trained or downloaded, from their configuration and state dict.

The native format (`sae.formats.saelens`) is the part of SAELens' that needs no conversion. SAELens has more:

- `apply_b_dec_to_input` false: the shift goes into b_enc (`sae.formats.conversion`);
- decoder rows of any norm, which are folded; with `rescale_acts_by_decoder_norm`, TopK compares z ||W_dec[f]||, and
  folding is exact for it too;
- `gated`: y = (x - b) W fires where y + b_gate > 0, at relu(e^r y + b_mag): thresholds, as in dictionary_learning;
- configurations from before 6.0 (`sae.formats.saelens_old`);
- transcoders: the prediction's hook point is `metadata.hook_name_out`, W_skip is added as x W_skip^T; what the registry
  calls `hook_mlp_in` in Gemma Scope 2 is mlp.hook_in by its `hf_hook_name`;
- `normalize_activations` that scales every token by its own norm, an SAE of one head, a finetuning's scaling factor:
  no SAE here has these, and they are refused by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sae import rules
from sae.errors import InputError
from sae.formats import saelens_old
from sae.formats.conversion import Weights, build, fold, gated, subtracting
from sae.formats.reading import DTYPES, check_numbers
from sae.formats.saelens import TRANSCODER
from sae.model import SAE

_LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS: dict[str, tuple[str, ...]] = {
    "standard": _LINEAR,
    "topk": _LINEAR,
    "abstopk": _LINEAR,
    "jumprelu": (*_LINEAR, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    "transcoder": _LINEAR,
    "skip_transcoder": (*_LINEAR, "W_skip"),
    "jumprelu_transcoder": (*_LINEAR, "threshold"),
    "jumprelu_skip_transcoder": (*_LINEAR, "threshold", "W_skip"),
}
"""SAELens' architectures that can be expressed here, and the tensors of each."""


def from_parts(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str,
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
) -> SAE:
    """The SAE of a SAELens configuration, of any version, and a state dict.

    Args:
        config: `SAE.cfg.to_dict()`, or the contents of cfg.json.
        state: `SAE.state_dict()`.
        where: begins error messages.
        hook_name, model_name: what the SAE reads, where the configuration does not say.

    Raises:
        InputError: an architecture or an option that cannot be expressed here, or tensors that do not fit.
    """
    config = saelens_old.modern(config, where)
    metadata = {key: value for key, value in saelens_old.nested(config).items() if value is not None}
    check_supported(config, metadata, where)
    weights = _weights(config, _tensors(config, state, where), where)
    hook = place_read(metadata)
    _, model = metadata.pop("hook_name", ""), metadata.pop("model_name", "")
    target = metadata.pop("hook_name_out", "") or ""
    for key in ("sae_lens_version", "sae_lens_training_version"):
        metadata.pop(key, None)
    return build(
        weights,
        hook_name=hook if hook_name is None else hook_name,
        model_name=model if model_name is None else model_name,
        metadata={**metadata, "imported_from": f"SAELens {config['architecture']}"},
        target_hook_name=target if weights.is_transcoder else "",
    )


def place_read(metadata: Mapping[str, Any]) -> str:
    """The hook point that SAELens' metadata names, as it is called here; empty where it names none."""
    hook = str(metadata.get("hook_name") or "")
    if str(metadata.get("hf_hook_name")).endswith(".pre_feedforward_layernorm.output"):
        # Gemma Scope 2: what the norm gives to the MLP. `hook_mlp_in` is elsewhere what goes into the norm.
        return hook.replace(".hook_mlp_in", ".mlp.hook_in")
    return hook


def check_supported(
    config: Mapping[str, Any], metadata: Mapping[str, Any], where: str, *, normalisations: Sequence[str] = ("none",)
) -> None:
    """Raises InputError for what no SAE here can be, before any weights are there.

    Args:
        config, metadata: as SAELens 6 writes them (`saelens_old.modern`), and what `metadata` in it says.
        where: begins messages.
        normalisations: of the input that are known how to be taken into the weights.
    """
    architecture = str(config.get("architecture"))
    if architecture not in TENSORS:
        raise InputError(
            f"{where} holds a {architecture!r} SAE, which is not supported: supported are {', '.join(TENSORS)}"
        )
    allowed = {"normalize_activations": normalisations, "reshape_activations": ("none", "hook_z")}
    for key, values in allowed.items():
        if config.get(key, "none") not in values:
            expected = " or ".join(repr(value) for value in values)
            raise InputError(f"{where} has {key} = {config[key]!r}, which is not supported: expected {expected}")
    if metadata.get("hook_head_index") is not None:
        raise InputError(
            f"{where} reads head {metadata['hook_head_index']} of {metadata.get('hook_name', 'its hook point')} alone "
            "(hook_head_index), which is not supported: SAEs here read all heads"
        )
    if architecture.endswith(TRANSCODER):
        if config.get("apply_b_dec_to_input"):
            raise InputError(
                f"{where} is a transcoder with apply_b_dec_to_input, which takes one activation's bias from another: "
                "expected false"
            )
        return
    written = metadata.get("hook_name_out") or metadata.get("hook_name")
    if config.get("is_transcoder") or written != metadata.get("hook_name"):
        raise InputError(
            f"{where} is a transcoder, which predicts another activation than it reads, of the architecture "
            f"{architecture!r}: expected one of SAELens' for transcoders"
        )


def _tensors(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of the architecture and no other, in the configuration's precision.

    Raises InputError where one is missing or unknown, or where the widths are not those of the configuration.
    """
    architecture = config["architecture"]
    wanted, found = TENSORS[architecture], dict(state)
    if (scale := found.get("scaling_factor")) is not None and bool((scale == 1).all()):
        # Written for a while by SAELens 3 whether or not it was finetuned.
        del found["scaling_factor"]
    for name in wanted:
        if name not in found:
            raise InputError(f"{where} lacks {name}: it is not a SAELens {architecture} SAE")
    if unknown := sorted(found.keys() - wanted):
        raise InputError(
            f"{where} holds {', '.join(unknown)}, which no SAELens {architecture} SAE here has: expected "
            f"{', '.join(wanted)}"
        )
    for key, size in zip(("d_in", "d_sae"), found["W_enc"].shape, strict=False):
        if config.get(key, size) != size:
            raise InputError(f"{where} has {key} = {config[key]!r} and an encoder of {list(found['W_enc'].shape)}")
    check_numbers(found, where)
    if architecture.endswith(TRANSCODER) and config.get("d_out", found["W_dec"].shape[-1]) != found["W_dec"].shape[-1]:
        raise InputError(f"{where} has d_out = {config['d_out']!r} and a decoder of {list(found['W_dec'].shape)}")
    if "dtype" not in config:
        return found
    dtype = DTYPES.get(str(config["dtype"]).removeprefix("torch."))
    if dtype is None:
        raise InputError(f"{where} has dtype {config['dtype']!r}: expected one of {', '.join(DTYPES)}")
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def _weights(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> Weights:
    architecture = config["architecture"]
    W_enc, W_dec, b_dec = state["W_enc"], state["W_dec"], state["b_dec"]
    if architecture.endswith(TRANSCODER):
        threshold = state["threshold"].clamp_min(0) if "threshold" in state else None
        rule: rules.Rule = rules.ReLU() if threshold is None else rules.JumpReLU()
        skip = state.get("W_skip")
        weights = Weights(W_enc, state["b_enc"], W_dec, b_dec, rule, threshold, is_transcoder=True, W_skip=skip)
        weights.check(where)
        return weights
    if architecture == "gated":
        weights = gated(W_enc, W_dec, b_dec, gate=state["b_gate"], magnitude=state["b_mag"], scale=state["r_mag"])
    else:
        threshold = state["threshold"].clamp_min(0) if architecture == "jumprelu" else None
        weights = Weights(W_enc, state["b_enc"], W_dec, b_dec, _rule(architecture, config, where), threshold)
    weights.check(where)
    if not config.get("apply_b_dec_to_input", True):
        weights = subtracting(weights)
    return fold(weights) if config.get("rescale_acts_by_decoder_norm", False) else weights


def _rule(architecture: str, config: Mapping[str, Any], where: str) -> rules.Rule:
    if architecture == "standard":
        return rules.ReLU()
    if architecture == "jumprelu":
        return rules.JumpReLU()
    k = config.get("k")
    # The pretrained registry stores k as a float here and there.
    if isinstance(k, bool) or not isinstance(k, int | float) or not float(k).is_integer():
        raise InputError(f"{where} has k = {k!r}: expected the number of active features of a {architecture} SAE")
    return rules.AbsTopK(int(k)) if architecture == "abstopk" else rules.TopK(int(k))
