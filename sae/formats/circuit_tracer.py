"""Sets of transcoders of circuit-tracer: one folder, one file a layer.

    config.yaml               model_kind: transcoder_set, model_name, feature_input_hook, feature_output_hook, and for
                              TopK activation: topk, k
    layer_{i}.safetensors     W_enc [F, d], b_enc [F], W_dec [F, d], b_dec [d]; with thresholds
                              activation_function.threshold [F], with a skip W_skip [d, d]

W_skip is added as x W_skip^T. The hook points are names within a block, such as mlp.hook_in and hook_mlp_out. k is read
from config.yaml, or from a scalar tensor `k` beside the weights; on writing there is no such tensor, since
circuit-tracer's own loader refuses it. Its TopK takes the k largest pre-activations whether positive or not, that here
the k largest positive ones: they differ where a token has fewer than k (`CAUTION` says so). Releases of circuit-tracer
up to 0.5 do not know `activation` and take every positive feature of such a set.

`ln2.hook_normalized`, which Gemma Scope's transcoders read, lies before the norm's gain and mlp.hook_in after it:
`after_gain` moves a coder, and importing one into a workspace does it with the model's own gain.
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sae import rules
from sae.errors import InputError
from sae.files import write_atomically
from sae.formats.conversion import Weights, build, topk_of, weights_of
from sae.formats.reading import read_safetensors
from sae.transcoder import Transcoder

CONFIG = "config.yaml"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
CAUTION = (
    "circuit-tracer takes a token's k largest features, negative ones too where fewer than k are positive; its "
    "releases up to 0.5 know no TopK and would take every positive feature"
)
"""Of a set of TopK transcoders: where its readers differ from what it does here."""
THRESHOLD, SKIP = "activation_function.threshold", "W_skip"
LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")
_LINE = re.compile(r"""(["']?)([A-Za-z_][\w.-]*)\1\s*:\s*(.*)""")
_QUOTED = re.compile(r"""(["'])(.*)\1""")
_LEFT_OUT = ("#", "%", "-", "...", " ", "\t", "]", "}")
"""How lines begin that are no `key: value` of the top level."""
_BLOCK = re.compile(r"blocks\.\d+\.(.+)")


def load(path: Path | str) -> dict[int, Transcoder]:
    """Reads the coders of a set, by layer, from its folder; `sae.load_transcoders` makes the set of them.

    Raises:
        InputError: no such set, another kind of model, or a file that is damaged or of another format.
    """
    path = Path(path)
    config = _read_config(path / CONFIG)
    if config.get("model_kind") == "cross_layer_transcoder":
        raise InputError(
            f"{path} holds cross-layer transcoders, whose features write to all later layers: sets of transcoders of "
            "one layer each are read"
        )
    if "model_kind" not in config:
        raise InputError(f"{path / CONFIG} says no model_kind: a set of circuit-tracer has model_kind: transcoder_set")
    if config["model_kind"] != "transcoder_set":
        raise InputError(f"{path / CONFIG} has model_kind = {config['model_kind']!r}: expected 'transcoder_set'")
    files = {int(found[1]): file for file in path.iterdir() if (found := LAYER_FILE.fullmatch(file.name))}
    if not files:
        raise InputError(f"{path} has no layer_0.safetensors: copy the set again, with its weights")
    coders = {layer: _read_layer(file, layer, config) for layer, file in files.items()}
    widths = {coder.d_in: file.name for coder, file in zip(coders.values(), files.values(), strict=True)}
    if len(widths) > 1:
        listed = " and ".join(f"{width} ({name})" for width, name in widths.items())
        raise InputError(f"the layers of {path} read different widths, {listed}: they are of several models")
    return coders


def _read_layer(file: Path, layer: int, config: dict[str, str]) -> Transcoder:
    tensors = read_safetensors(file)
    unknown = sorted(tensors.keys() - {*NAMES, THRESHOLD, SKIP, "k"})
    missing = [name for name in NAMES if name not in tensors]
    if missing or unknown:
        raise InputError(f"{file} holds {', '.join(sorted(tensors))}: expected {', '.join(NAMES)} of a transcoder")
    threshold = tensors.get(THRESHOLD)
    weights = Weights(
        tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], _rule_of(file, tensors, config),
        threshold, is_transcoder=True, W_skip=tensors.get(SKIP),
    )  # fmt: skip
    weights.check(str(file))
    if threshold is not None and bool((threshold < 0).any()):
        raise InputError(
            f"{file} has thresholds below 0, where circuit-tracer keeps negative activations, which no rule here does"
        )
    made = build(
        weights,
        hook_name=f"blocks.{layer}.{config.get('feature_input_hook', '')}",
        target_hook_name=f"blocks.{layer}.{config.get('feature_output_hook', '')}",
        model_name=config.get("model_name", ""),
        metadata={"imported_from": "circuit-tracer"},
    )
    assert isinstance(made, Transcoder)
    return made


def _rule_of(file: Path, tensors: Mapping[str, Tensor], config: Mapping[str, str]) -> rules.Rule:
    """What chooses a layer's features, by its thresholds, the configuration's activation and k, or a tensor k."""
    where, activation = file.with_name(CONFIG), config.get("activation")
    if THRESHOLD in tensors:
        if activation in ("relu", "topk"):
            raise InputError(f"{where} says activation: {activation}, and {file.name} has thresholds: one is wrong")
        return rules.JumpReLU()
    k = config.get("k")
    if k is None and "k" in tensors:
        k, where = ", ".join(f"{number:g}" for number in tensors["k"].flatten().tolist()), file
    if activation == "relu" or (activation is None and k is None):
        return rules.ReLU()
    if activation not in (None, "topk"):
        raise InputError(
            f"{where} says activation: {activation}: expected relu, topk with a k, or files with thresholds"
        )
    if k is None:
        raise InputError(f"{where} says activation: topk, and its k is missing")
    if not k.isdigit():
        raise InputError(f"{where} has k = {k!r}: expected a whole number")
    return rules.TopK(int(k))


def save(coders: Mapping[int, Transcoder], path: Path | str) -> None:
    """Writes a set to the folder `path`, made if needed.

    Args:
        coders: by layer, as `TranscoderSet.coders`.

    Raises:
        InputError: coders of several rules, a rule that the format cannot express, widths or numbers of features that
            differ, a skip in some layers and not in others, or hook points that are not the same place of every block.
    """
    path = Path(path)
    described: dict[str, Any] = {"model_kind": "transcoder_set", "model_name": coders[0].model_name}
    described["feature_input_hook"] = _common([coder.hook_name for coder in coders.values()])
    described["feature_output_hook"] = _common([coder.target_hook_name for coder in coders.values()])
    rules_of = {json.dumps(rules.to_dict(coder.rule), sort_keys=True) for coder in coders.values()}
    if len(rules_of) > 1:
        raise InputError("circuit-tracer's sets have one rule for all layers, and these have several")
    if any(coder.d_in != coder.d_out for coder in coders.values()):
        raise InputError("circuit-tracer's transcoders have one width: one of these reads another than it predicts")
    for what, found in (("width", "d_in"), ("number of features", "d_sae")):
        sizes = sorted({getattr(coder, found) for coder in coders.values()})
        if len(sizes) > 1:
            raise InputError(f"circuit-tracer's sets have one {what} in all layers, and these have {sizes}")
    if len({coder.W_skip is None for coder in coders.values()}) > 1:
        raise InputError("circuit-tracer's sets have a skip in every layer or in none, and these have it in some")
    rule = coders[0].rule
    if (k := topk_of(rule)) is not None:
        described |= {"activation": "topk", "k": k}
    elif rule.saelens not in ("jumprelu", "standard"):
        raise InputError(f"circuit-tracer cannot express the rule {rule.name}: it can express relu, jumprelu and topk")
    path.mkdir(parents=True, exist_ok=True)
    for layer, coder in coders.items():
        weights = weights_of(coder)
        tensors = {"W_enc": weights.W_enc.T, "b_enc": weights.b_enc, "W_dec": weights.W_dec, "b_dec": weights.b_dec}
        tensors |= {} if weights.threshold is None else {THRESHOLD: weights.threshold}
        tensors |= {} if weights.W_skip is None else {SKIP: weights.W_skip}
        owned = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path / f"layer_{layer}.safetensors", partial(save_file, owned))
    # JSON's strings and numbers are YAML's.
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in described.items())
    write_atomically(path / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))


def after_gain(
    coder: Transcoder, gain: Float[Tensor, "d_in"], shift: Float[Tensor, "d_in"] | None = None
) -> Transcoder:
    """A transcoder that reads a normalised activation before the norm's gain and shift, as one that reads it after.

        W_enc' = diag(1 / gain) W_enc,     b_enc' = b_enc - shift W_enc'
        W_skip' = W_skip diag(1 / gain),   b_dec' = b_dec - W_skip' shift

    Args:
        gain: what the norm multiplies with; 1 + weight in Gemma.
        shift: what it then adds; nothing when left out.

    Raises:
        InputError: a gain of another width, or with zeros, behind which the activation is lost.
    """
    if gain.shape != (coder.d_in,) or not bool((gain != 0).all()):
        raise InputError(f"the norm's gain must have {coder.d_in} entries and none that is zero")
    moved = Transcoder(
        coder.d_in, coder.d_out, coder.d_sae, coder.rule, skip=coder.W_skip is not None,
        hook_name=coder.hook_name.replace("ln2.hook_normalized", "mlp.hook_in"),
        target_hook_name=coder.target_hook_name, model_name=coder.model_name, metadata=coder.metadata,
        device=coder.W_enc.device, dtype=torch.promote_types(coder.W_enc.dtype, torch.float32),
    )  # fmt: skip
    moved.load_state_dict(coder.state_dict())
    gain = gain.to(moved.W_enc.device, torch.float64)
    shift = torch.zeros_like(gain) if shift is None else shift.to(gain)
    with torch.no_grad():
        W_enc = coder.W_enc / gain[:, None]
        moved.W_enc.copy_(W_enc)
        moved.b_enc.copy_(coder.b_enc - shift @ W_enc)
        if coder.W_skip is not None and moved.W_skip is not None:
            W_skip = coder.W_skip / gain
            moved.W_skip.copy_(W_skip)
            moved.b_dec.copy_(coder.b_dec - W_skip @ shift)
    return moved


def _common(hooks: list[str]) -> str:
    """The name within the block that all these hook points have."""
    places = {found[1] if (found := _BLOCK.fullmatch(hook)) else hook for hook in hooks}
    if len(places) > 1 or any(not _BLOCK.fullmatch(hook) for hook in hooks):
        raise InputError(
            f"circuit-tracer's sets have one hook point in every block, and these have {', '.join(sorted(places))}"
        )
    return places.pop()


def _read_config(file: Path) -> dict[str, str]:
    """The top-level `key: value` lines of a YAML file; what is nested or a list is left out.

    Raises:
        InputError: no such file, or a line that is none of these.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} ({type(error).__name__}): a set of circuit-tracer has one") from None
    found = {}
    for number, line in enumerate(lines, 1):
        text = line.partition(" #")[0].rstrip()
        if not text or text.startswith(_LEFT_OUT):
            continue
        match = _LINE.fullmatch(text)
        value = match[3] if match else ""
        quoted = _QUOTED.fullmatch(value)
        if match is None or (value.startswith(("'", '"')) and quoted is None):
            raise InputError(
                f"{file} is damaged: line {number} is {text[:60]!r}, where key: value is expected; copy the set again"
            )
        if value:
            found[match[2]] = quoted[2] if quoted else value
    return found
