"""A set of transcoders: one for each layer of a model, kept, loaded and shown as one thing.

transcoders.json     schema, number of layers, model, metadata; written last
layer_0/             the first layer's transcoder, a directory as `sae.formats.saelens` writes it
layer_1/             ...
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sae.errors import InputError
from sae.files import write_atomically
from sae.formats import circuit_tracer
from sae.formats.reading import read_json
from sae.transcoder import Transcoder

FILE, SCHEMA = "transcoders.json", 1
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class TranscoderSet:
    """Transcoders of the layers 0 ... n - 1 of one model, by layer.

        transcoders = load_transcoders("transcoders/mlps")
        code = transcoders[3].encode(mlp_in)

    Args:
        coders: one a layer.
        metadata: anything to keep with the set (JSON).

    Attributes:
        coders: layer -> `Transcoder`, in order.
        model_name: the model they belong to.

    Raises:
        InputError: no coder, a missing layer, coders of several models, or one of another layer than where it stands.
    """

    def __init__(self, coders: Mapping[int, Transcoder], *, metadata: dict[str, Any] | None = None) -> None:
        if not coders:
            raise InputError("a set of transcoders needs one for every layer, and there is none")
        missing = [layer for layer in range(max(coders) + 1) if layer not in coders]
        if missing:
            raise InputError(
                f"the set of transcoders lacks layer {missing[0]}: it needs every one from 0 to {max(coders)}"
            )
        for layer, coder in coders.items():
            for hook in (coder.hook_name, coder.target_hook_name):
                if (found := _BLOCK.match(hook)) and int(found[1]) != layer:
                    raise InputError(f"the transcoder of layer {layer} of the set is one of {hook}: copy the set again")
        models = sorted({coder.model_name for coder in coders.values()})
        if len(models) > 1:
            raise InputError(f"transcoders of several models are no set: these are of {' and '.join(models)}")
        self.coders = {layer: coders[layer] for layer in sorted(coders)}
        self.model_name, self.metadata = models[0], dict(metadata or {})

    def __getitem__(self, layer: int) -> Transcoder:
        if layer not in self.coders:
            raise InputError(f"the set has no layer {layer}: its layers are 0 to {len(self) - 1}")
        return self.coders[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.coders)

    def __len__(self) -> int:
        return len(self.coders)

    def __repr__(self) -> str:
        return f"TranscoderSet({len(self)} layers of {self.model_name!r}, layer 0: {self[0].extra_repr()})"

    def to(self, device: torch.device | str) -> "TranscoderSet":
        """Moves every coder to a device, and returns the set."""
        for coder in self.coders.values():
            coder.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of its coders' fingerprints in order."""
        return hashlib.sha256("".join(coder.fingerprint() for coder in self.coders.values()).encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Writes the set to the folder `path`; see the module's description."""
        path = Path(path)
        for layer, coder in self.coders.items():
            coder.save(path / folder_of(layer))
        description = {
            "schema": SCHEMA, "layers": len(self), "model_name": self.model_name, "metadata": self.metadata,
        }  # fmt: skip
        write_atomically(path / FILE, lambda file: file.write_text(json.dumps(description, indent=2), encoding="utf-8"))

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> "TranscoderSet":
        """Reads a set from its folder.

        Raises:
            InputError: no set, another schema, a missing layer, or one that is damaged or no transcoder.
        """
        path = Path(path)
        if not (path / FILE).is_file():
            raise InputError(f"{path} is no set of transcoders: a folder with {FILE} and {folder_of(0)} is expected")
        description = read_json(path / FILE)
        if description.get("schema") != SCHEMA:
            raise InputError(
                f"the set of transcoders {path} has schema {description.get('schema')}, this version reads {SCHEMA}: "
                "use the version that wrote it"
            )
        layers = description.get("layers")
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise InputError(f"{path / FILE} has layers = {layers!r}: expected how many there are")
        missing = [folder_of(layer) for layer in range(layers) if not (path / folder_of(layer)).is_dir()]
        if missing:
            raise InputError(f"the set of transcoders {path} of {layers} layers lacks {missing[0]}: copy it again")
        coders = {layer: Transcoder.load(path / folder_of(layer), device) for layer in range(layers)}
        return cls(coders, metadata=description.get("metadata") or {})


def load_transcoders(path: Path | str, device: torch.device | str = "cpu") -> TranscoderSet:
    """Reads a set of transcoders, one a layer, from its folder: one of this project or of circuit-tracer.

    Raises:
        InputError: as `TranscoderSet.load`, or `sae.formats.circuit_tracer.load`.
    """
    if (Path(path) / circuit_tracer.CONFIG).is_file():
        return TranscoderSet(circuit_tracer.load(Path(path))).to(device)
    return TranscoderSet.load(path, device)


def folder_of(layer: int) -> str:
    """Name of a layer's folder in a set's."""
    return f"layer_{layer}"
