"""Loading a transformer: `demo`, a local Hugging Face folder, or a name on the Hugging Face hub.

A model is loaded once and held twice without using memory twice: the bare Hugging Face module, which runs at full
speed (harvests use it with native hooks), and a TransformerBridge around a copy that shares every weight tensor
(every TransformerLens hook point, eager attention; splicing and circuits use it; where it splits a fused
query-key-value matrix, as in GPT-NeoX, it holds the parts once more). Weights are raw: no LayerNorm is folded and
nothing is centred, so activations are those of the model as published. No weight requires a gradient.
"""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from circuits.prompts import ids
from sae.errors import InputError
from workbench.models.bundled import demo_model_dir
from workbench.models.devices import choose_device
from workbench.models.guards import Checks, check

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded; recorded with everything made from it."""

    name: str
    """As the user gave it."""
    source: str
    """`bundled`, `folder` or `hub`."""
    revision: str | None
    """Commit on the hub, where there is one."""
    weights_sha256: str
    """Over the safetensors files, see `weights_sha256`; does not depend on the precision the model runs in."""
    processing: str
    """`raw`: no folding, no centring."""
    architecture: str
    checkpoint_dtype: str
    """Precision of the weights as stored."""
    dtype: str
    """Precision the model runs in."""
    device: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_attention: int
    """Width of all heads' outputs side by side."""
    d_mlp: int
    n_ctx: int
    d_vocab: int
    parallel_attention: bool
    transformer_lens: str

    @classmethod
    def of(cls, hf: Any, bridge: Any, **recorded: Any) -> "ModelInfo":
        """The shape of a module and its bridge, with what is `recorded` of where the weights came from."""
        shape = bridge.cfg
        return cls(
            processing="raw",
            architecture=type(hf).__name__,
            dtype=str(next(hf.parameters()).dtype).removeprefix("torch."),
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            d_head=shape.d_head,
            d_attention=shape.n_heads * shape.d_head,
            d_mlp=shape.d_mlp,
            n_ctx=shape.n_ctx,
            d_vocab=hf.get_input_embeddings().weight.shape[0],
            parallel_attention=bool(shape.parallel_attn_mlp),
            transformer_lens=version("transformer-lens"),
            **recorded,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    info: ModelInfo
    hf: nn.Module
    """The bare Hugging Face model."""
    structure: Any
    """TransformerBridge over the same weights, for its names and shapes; `bridge` is the one to run."""
    tokenizer: PreTrainedTokenizerBase
    bos_id: int
    """Token put before every document and context; the end-of-text token where the tokenizer has no BOS."""

    @cached_property
    def checks(self) -> Checks:
        """What a few random tokens show of it."""
        return check(self)

    @property
    def bridge(self) -> Any:
        """The TransformerBridge. Raises InputError where it computes another model than the module."""
        if self.checks.wrong_bridge is not None:
            raise InputError(self.checks.wrong_bridge)
        return self.structure

    def component(self, path: str) -> nn.Module | None:
        """The bare module at a TransformerLens path such as `blocks.0.attn.o`, None where this model has none."""
        try:
            found: nn.Module | None = self.structure.adapter.get_component(self.hf, path)
        except (ValueError, AttributeError, KeyError, IndexError):
            return None
        return found if isinstance(found, nn.Module) else None

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision it runs in."""
        return next(self.hf.parameters()).dtype

    @cached_property
    def token_texts(self) -> list[str]:
        """Text of every token id, as it reads inside a text."""
        return [self.text([token]) for token in range(self.info.d_vocab)]

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token that texts are decoded after, and its own text."""
        token = self.encode("a")[-1]
        return token, self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, without BOS; the text of a special token, such as a chat marker, is that one token."""
        return ids(self.tokenizer, text)

    def text(self, tokens: Sequence[int]) -> str:
        """Text of some tokens in the middle of a text: SentencePiece tokenizers drop a space at its start."""
        token, before = self._anchor
        return self.tokenizer.decode([token, *tokens], clean_up_tokenization_spaces=False).removeprefix(before)


def load_model(spec: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a model.

    Args:
        spec: `demo`, a local Hugging Face folder (offline), or a name on the hub (network, or its local cache).
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `float32`, `float16`, `bfloat16`, or `auto`: the checkpoint's own on CUDA, float32 on a CPU.

    Raises:
        InputError: nothing at the folder or name, no network, no usable tokenizer, weights that are not
            safetensors, an architecture TransformerLens does not know, or an unknown device or dtype.
    """
    place = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    location, source = locate(spec)
    config = from_pretrained(AutoConfig, location, spec)
    stored = getattr(config, "dtype", None) or torch.float32
    run_dtype = DTYPES[dtype] if dtype != "auto" else (stored if place.type == "cuda" else torch.float32)
    tokenizer = _tokenizer(location, spec)
    weights = _weight_files(location, spec)
    hf = _module(location, spec, run_dtype).to(place).eval().requires_grad_(False)
    bos_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    _refuse_unusable(hf, tokenizer, bos_id, spec)
    bridge = _bridge(spec, location, hf, tokenizer, run_dtype)
    info = ModelInfo.of(
        hf, bridge, name=spec, source=source, revision=getattr(config, "_commit_hash", None),
        weights_sha256=weights_sha256(weights), checkpoint_dtype=str(stored).removeprefix("torch."), device=str(place),
    )  # fmt: skip
    loaded = LoadedModel(info, hf, bridge, tokenizer, bos_id)
    # Measured now, so that a model that does not fit is one line and no surprise later.
    _ = loaded.checks
    return loaded


def _module(location: str, spec: str, dtype: torch.dtype) -> Any:
    """The Hugging Face model; a checkpoint that does not fit its configuration is refused."""
    hf, loading = from_pretrained(
        AutoModelForCausalLM,
        location,
        spec,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    # transformers fills weights that a file lacks with random numbers and goes on.
    if loading["mismatched_keys"]:
        name, found, wanted = sorted(loading["mismatched_keys"])[0]
        raise InputError(
            f"the weights of {spec} do not fit its config.json: {name} has shape {list(found)}, "
            f"the configuration says {list(wanted)}"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(
            f"the weights of {spec} do not fit its config.json: {len(missing)} tensors are missing, first {missing[0]}"
        )
    return hf


def _refuse_unusable(hf: Any, tokenizer: PreTrainedTokenizerBase, bos_id: int | None, spec: str) -> None:
    """Raises InputError for a model or tokenizer that nothing here could work with."""
    if not _is_causal(hf):
        raise InputError(
            f"{spec} ({type(hf).__name__}) lets tokens see later ones: it is an encoder, no causal language model"
        )
    n_embedded = hf.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > n_embedded:
        raise InputError(
            f"the tokenizer of {spec} has {tokenizer.vocab_size} tokens, the embedding of the model "
            f"{n_embedded} rows: it belongs to another model"
        )
    if bos_id is None:
        raise InputError(
            f"the tokenizer of {spec} has neither a BOS nor an end-of-text token: contexts need one; "
            "set bos_token in its tokenizer_config.json"
        )


@torch.inference_mode()
def _is_causal(hf: Any) -> bool:
    """Whether the first token's logits do not depend on the second: encoders load as language models too."""
    last = hf.get_input_embeddings().weight.shape[0] - 1
    logits = hf(torch.tensor([[0, 0], [0, last]], device=next(hf.parameters()).device), use_cache=False).logits[:, 0]
    scale = logits.abs().max()
    # Rounding alone, since both are computed in one batch.
    rounding = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    return not bool(torch.isfinite(scale)) or bool((logits[0] - logits[1]).abs().max() <= rounding * scale)


def weights_sha256(files: Sequence[Path]) -> str:
    """SHA-256 of a checkpoint: of its one file's bytes, or of its shards' bytes one after the other, by name."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        with file.open("rb") as opened:
            while piece := opened.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _weight_files(location: str, spec: str) -> list[Path]:
    """The safetensors files that transformers loads: one, or the shards that an index names."""
    single = _repository_file(location, "model.safetensors")
    if single is not None:
        return [single]
    index = _repository_file(location, "model.safetensors.index.json")
    if index is None:
        raise InputError(
            f"{spec} has no model.safetensors or index of shards: only safetensors weights are loaded; convert others "
            "with save_pretrained"
        )
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [_repository_file(location, shard) for shard in shards]
    missing = [shard for shard, file in zip(shards, files, strict=True) if file is None]
    if missing:
        raise InputError(f"{spec} lacks {len(missing)} of its {len(shards)} weight files, first {missing[0]}")
    return [file for file in files if file is not None]


def _repository_file(location: str, name: str) -> Path | None:
    """A file of a local folder or of a hub repository (downloaded or from the cache), None where there is none."""
    try:
        found = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot fetch {name} of {location}: check the network ({reason})") from None
    return None if found is None else Path(found)


def locate(spec: str) -> tuple[str, str]:
    """(what transformers loads, where it comes from: bundled, folder or hub) for `demo`, a folder or a hub name.

    Raises:
        InputError: an empty name, or no model folder where a path is named.
    """
    if not spec.strip():
        raise InputError("the model has no name: give demo, a local Hugging Face folder, or a hub name")
    if spec == "demo":
        return str(demo_model_dir()), "bundled"
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{spec} is not a Hugging Face model folder: it has no config.json")
        return str(folder), "folder"
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise InputError(f"no model folder at {spec}")
    return spec, "hub"


def from_pretrained(kind: Any, location: str, spec: str, **options: Any) -> Any:
    """`kind.from_pretrained(location, **options)` of transformers, without its progress bars.

    Args:
        kind: such as `AutoTokenizer`.
        location: as `locate` gives it.
        spec: what the user named, for error messages.

    Raises:
        InputError: any of its many failures, in one line.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return kind.from_pretrained(location, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(location).is_dir():
            raise InputError(f"cannot load {spec}: {reason}") from None
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise InputError(
            f"cannot load {spec!r} from the Hugging Face hub{offline}: check the name and the network, or give a "
            f"local folder or `demo` ({reason})"
        ) from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _tokenizer(location: str, spec: str) -> PreTrainedTokenizerBase:
    folder = Path(location)
    if folder.is_dir() and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise InputError(f"{spec} has no tokenizer files: copy tokenizer.json and tokenizer_config.json into it")
    tokenizer = from_pretrained(AutoTokenizer, location, spec)
    # Without its files some tokenizer classes come up empty instead of failing, and encode everything to nothing.
    if len(tokenizer) < 3 or not tokenizer.encode("text", add_special_tokens=False):
        raise InputError(f"the tokenizer of {spec} is empty: its files are missing or damaged")
    return tokenizer


def _bridge(spec: str, location: str, hf: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Any:
    """A TransformerBridge over a copy of `hf` that shares its weight tensors; `hf` itself is left as it is."""
    from transformer_lens.model_bridge import TransformerBridge

    shared = {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    try:
        twin = copy.deepcopy(hf, shared)
        bridge = TransformerBridge.boot_transformers(
            location, hf_model=twin, tokenizer=tokenizer, device=next(hf.parameters()).device, dtype=dtype
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(
            f"TransformerLens cannot wrap {spec} ({type(hf).__name__}): {str(error).splitlines()[0]}"
        ) from None
    return bridge.eval().requires_grad_(False)
