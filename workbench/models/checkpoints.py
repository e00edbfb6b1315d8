"""Where a model's files lie, and reading them: configuration, tokenizer, safetensors weights and their hash.

Python that comes with a checkpoint is never run.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

from sae.errors import InputError
from workbench.disk.hub import require_hub
from workbench.models.bundled import demo_model_dir
from workbench.models.light_imports import light_imports

with light_imports():
    from transformers import AutoTokenizer, PreTrainedTokenizerBase
    from transformers.utils import cached_file
    from transformers.utils import logging as transformers_logging


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of config.json that say how many layers there are, by family."""


def weights_sha256(files: Sequence[Path]) -> str:
    """SHA-256 of a checkpoint: of its one file's bytes, or of its shards' bytes one after the other, by name."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        with file.open("rb") as opened:
            while piece := opened.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def weight_files(location: str, spec: str) -> list[Path]:
    """The safetensors files that transformers loads: one, or the shards that an index names.

    Raises:
        InputError: none, some missing, or no network.
    """
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
    """(what transformers loads, where it comes from: bundled, folder or hub) for `demo`, a folder, a name on the hub or
    one of TransformerLens'.

    Raises:
        InputError: an empty name, no model folder where a path is named, or a name on the hub without a network.
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
    if folder.suffix == ".py":
        raise InputError(f"{spec} is Python: say which function of it makes the model, {spec}:FUNCTION")
    if folder.suffix in (".pt", ".pth") and not folder.exists():
        raise InputError(f"no checkpoint at {spec}")
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise InputError(f"no model folder at {spec}")
    found = hub_name(spec)
    require_hub(
        found, "model",
        f"cannot load {spec!r} from the Hugging Face hub: no network ({{reason}}); give a local folder or `demo`, or "
        "download the model once where there is a network",
    )  # fmt: skip
    return found, "hub"


def layers_told(spec: str) -> int | None:
    """How many layers a model has by its config.json, where that lies on this disk; None where it does not or is not
    plain."""
    try:
        folder = demo_model_dir() if spec == "demo" else Path(spec).expanduser()
        kept = folder / "config.json" if folder.is_dir() else try_to_load_from_cache(hub_name(spec), "config.json")
        config = json.loads(Path(str(kept)).read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        layers = next((config[key] for key in LAYERS if key in config), None)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return layers if isinstance(layers, int) and not config.get("is_encoder_decoder") else None


def hub_name(name: str) -> str:
    """A model's name on the hub, where it may be one of TransformerLens' own: gpt2 for gpt2-small."""
    if "/" in name:
        return name
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((official for official, aliases in MODEL_ALIASES.items() if name in aliases), name)


def reads_as_model(name: str) -> bool:
    """Whether a name is that of a model: demo, a folder of one, a hub name, or one that TransformerLens knows."""
    if name == "demo" or "/" in name or (Path(name).expanduser() / "config.json").is_file():
        return True
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    known = [*OFFICIAL_MODEL_NAMES, *MODEL_ALIASES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)]
    return name.lower() in {part.lower() for spec in known for part in (spec, spec.rpartition("/")[2])}


class _Unfilled(TorchFunctionMode):
    """Starting values of tensors that hold none are not made: that would load torch's reference functions and sympy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


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
        # Code that comes with weights is never run, nor is standard input asked whether it may.
        with _Unfilled():
            return kind.from_pretrained(location, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{spec} comes with Python of its own, which is never run: give a model of one of transformers' classes"
            ) from None
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


def load_tokenizer(location: str, spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub repository. Raises InputError when there is none or it is empty."""
    folder = Path(location)
    if folder.is_dir() and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise InputError(f"{spec} has no tokenizer files: copy tokenizer.json and tokenizer_config.json into it")
    tokenizer = from_pretrained(AutoTokenizer, location, spec)
    # Without its files some tokenizer classes come up empty instead of failing, and encode everything to nothing.
    try:
        empty = len(tokenizer) < 3 or not tokenizer.encode("text", add_special_tokens=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(
            f"the tokenizer of {spec} cannot read every text ({error}): give it a token for words it does not know"
        ) from None
    if empty:
        raise InputError(f"the tokenizer of {spec} is empty: its files are missing or damaged")
    return tokenizer
