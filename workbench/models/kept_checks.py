"""What was measured of a model when it was loaded, kept by its weights' hash.

A file a model in the user's cache folder (`$XDG_CACHE_HOME/interp-workbench/checks`, `~/.cache` unless set). Its name
is a hash of all that the result depends on: weights, configuration, precision, kind of device, versions of packages,
and the source of what measures. A file that is missing, damaged or cannot be written costs the time of measuring.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from circuits import norms, unembedding
from sae.files import write_atomically
from sae.kernels import products
from workbench.models import capture, fast_products, fused_attention, guards, mixtures, places, wrapping
from workbench.models.guards import check, prepare
from workbench.models.model import Checks, LoadedModel
from workbench.models.places import HookSpec

MEASURING = (guards, products, fast_products, fused_attention, places, wrapping, mixtures, capture, unembedding, norms)


def kept_or_measured(model: LoadedModel) -> Checks:
    """As `guards.check`, which runs where nothing is kept."""
    file = _file(model)
    try:
        found = _read(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        found = check(model)
        _write(file, found)
    else:
        prepare(model.structure, delegated=found.delegated)
    return found


def _file(model: LoadedModel) -> Path:
    config: Any = model.hf.config
    described = {
        "weights": model.info.weights_sha256, "config": config.to_dict(), "class": model.info.architecture,
        "dtype": model.info.dtype, "device": model.device.type, "bos": model.bos_id,
        # No entry of `to_dict`.
        "attention": getattr(config, "_attn_implementation", None),
        "versions": [version(name) for name in ("torch", "transformers", "transformer-lens")],
        "measuring": [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in MEASURING],
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "interp-workbench" / "checks" / f"{name}.json"


def _read(kept: Mapping[str, Any]) -> Checks:
    hooks = {name: HookSpec(**described) for name, described in kept["hooks"].items()}
    return Checks(**{**kept, "hooks": hooks})


def _write(file: Path, found: Checks) -> None:
    text = json.dumps(asdict(found))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError:
        # A home that cannot be written to: measured again next time.
        pass
