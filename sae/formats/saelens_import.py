"""SAEs that SAELens itself trained or downloaded, from their configuration and state dict.

The native format (`sae.formats.saelens`) is the part of SAELens' that needs no conversion. SAELens has more:

- `apply_b_dec_to_input` false: the shift goes into b_enc (`sae.formats.conversion`);
- decoder rows of any norm, which are folded; with `rescale_acts_by_decoder_norm`, TopK compares z ||W_dec[f]||, and
  folding is exact for it too;
- `gated`: y = (x - b) W fires where y + b_gate > 0, at relu(e^r y + b_mag): thresholds, as in dictionary_learning;
- `normalize_activations` that scales every token by its own norm: no SAE here can do that.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sae import rules
from sae.errors import InputError
from sae.formats.conversion import Weights, build, fold, gated, subtracting
from sae.model import SAE

ARCHITECTURES = ("standard", "topk", "abstopk", "jumprelu", "gated")


def from_parts(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str,
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
) -> SAE:
    """The SAE of a SAELens configuration and state dict.

    Args:
        config: `SAE.cfg.to_dict()`, or the contents of cfg.json.
        state: `SAE.state_dict()`.
        where: begins error messages.
        hook_name, model_name: what the SAE reads, where the configuration does not say.

    Raises:
        InputError: an architecture or an option that cannot be expressed here, or tensors that do not fit.
    """
    try:
        weights = _weights(config, state, where)
    except KeyError as error:
        what = config.get("architecture", "")
        raise InputError(f"{where} lacks {error.args[0]}: it is not a SAELens {what} SAE") from None
    metadata = dict(config.get("metadata") or {})
    hook, model = metadata.get("hook_name") or "", metadata.get("model_name") or ""
    return build(
        weights,
        hook_name=hook if hook_name is None else hook_name,
        model_name=model if model_name is None else model_name,
        metadata={"imported_from": f"SAELens {config['architecture']}"},
    )


def _weights(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> Weights:
    architecture = config["architecture"]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{where} holds a {architecture!r} SAE, which is not supported: supported are {', '.join(ARCHITECTURES)}"
        )
    normalisation = config.get("normalize_activations", "none")
    if normalisation != "none":
        raise InputError(
            f"{where} has normalize_activations = {normalisation!r}, which is not supported: expected 'none'"
        )
    W_enc, W_dec, b_dec = state["W_enc"], state["W_dec"], state["b_dec"]
    if architecture == "gated":
        weights = gated(W_enc, W_dec, b_dec, gate=state["b_gate"], magnitude=state["b_mag"], scale=state["r_mag"])
    else:
        threshold = state["threshold"].clamp_min(0) if architecture == "jumprelu" else None
        weights = Weights(W_enc, state["b_enc"], W_dec, b_dec, _rule(architecture, config), threshold)
    weights.check(where)
    if not config.get("apply_b_dec_to_input", True):
        weights = subtracting(weights)
    return fold(weights) if config.get("rescale_acts_by_decoder_norm", False) else weights


def _rule(architecture: str, config: Mapping[str, Any]) -> rules.Rule:
    if architecture == "standard":
        return rules.ReLU()
    if architecture == "jumprelu":
        return rules.JumpReLU()
    # The pretrained registry stores k as a float here and there.
    k = int(config["k"])
    return rules.AbsTopK(k) if architecture == "abstopk" else rules.TopK(k)
