"""SAEs of other libraries, recognised by their files.

| files                                | format              |
|--------------------------------------|---------------------|
| cfg.json, sae_weights.safetensors    | SAELens, the native |
| cfg.json, sae.safetensors            | sparsify            |
| config.json, ae.pt                   | dictionary_learning |
| cfg.json, cc_weights.pt              | crosscoder          |
| one file, .pt, .pth or .bin          | `single_file`       |
"""

from pathlib import Path

from sae.crosscoder import Crosscoder
from sae.errors import InputError
from sae.formats import crosscoders, dictionary_learning, saelens, saelens_import, single_file, sparsify
from sae.formats.conversion import topk_of, weights_of
from sae.formats.reading import read_json, read_safetensors
from sae.model import SAE

FILES = {
    "saelens": (saelens.CONFIG, saelens.WEIGHTS),
    "sparsify": (sparsify.CONFIG, sparsify.WEIGHTS),
    "dictionary_learning": (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
    "crosscoder": (crosscoders.CC_CONFIG, crosscoders.CC_WEIGHTS),
}
WRITERS = {"saelens": saelens.save, "sparsify": sparsify.save, "dictionary_learning": dictionary_learning.save}
"""Crosscoders of the field's two classes are dictionary_learning's."""


def recognise(path: Path) -> str:
    """Name of the format of the folder `path`, as in FILES, or `file`.

    Raises:
        InputError: no folder, or none of the formats; names the folders below that are.
    """
    if single_file.is_file(path):
        return "file"
    if not path.is_dir():
        raise InputError(f"no SAE at {path}: a folder is expected, holding {_expected()}")
    for name, (_, weights) in FILES.items():
        if (path / weights).is_file():
            return name
    if (path / "layer_0.safetensors").is_file():
        raise InputError(f"{path} has layers' files and no config.yaml, which a set of circuit-tracer has: copy it too")
    weight_files = {weights for _, weights in FILES.values()}
    below = sorted({file.parent.name for name in weight_files for file in path.glob(f"*/{name}")})
    if below:
        shown = ", ".join(below[:8]) + (", ..." if len(below) > 8 else "")
        raise InputError(f"{path} holds several SAEs: choose one of its folders, {shown}")
    raise InputError(f"{path} is no SAE of a known format: expected {_expected()}")


def load_foreign(
    path: Path | str,
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
    class_name: str | None = None,
    input_mean: str | None = None,
) -> SAE:
    """Reads an SAE of any known format.

    Args:
        path: its folder or file.
        hook_name: TransformerLens name of the hook point it reads, where its files do not say, or say wrongly.
        model_name: the model it reads, likewise.
        class_name, input_mean: of a single file, which does not say them; see `sae.formats.single_file`.

    Raises:
        InputError: not an SAE, damaged, or one that cannot be expressed here; a class or a mean given for a folder.
    """
    path = Path(path)
    form = recognise(path)
    if form == "file":
        return single_file.load(
            path, class_name=class_name, input_mean=input_mean, hook_name=hook_name, model_name=model_name
        )
    if class_name is not None or input_mean is not None:
        raise InputError(f"{path} says itself which SAE it is: --class and --input-mean are for a single .pt file")
    if form == "sparsify":
        return sparsify.load(path, hook_name=hook_name, model_name=model_name)
    if form == "dictionary_learning":
        return dictionary_learning.load(path, hook_name=hook_name, model_name=model_name)
    if form == "crosscoder":
        return crosscoders.load(path, hook_name=hook_name, model_name=model_name)
    return _load_saelens(path, hook_name, model_name)


def _load_saelens(path: Path, hook_name: str | None, model_name: str | None) -> SAE:
    config = read_json(path / saelens.CONFIG)
    if "rule" not in config and "parts" not in config:
        state = read_safetensors(path / saelens.WEIGHTS)
        return saelens_import.from_parts(config, state, str(path), hook_name=hook_name, model_name=model_name)
    # Written by this project.
    sae = saelens.load(path)
    weights_of(sae).check(str(path))
    if isinstance(sae, Crosscoder):
        sae.read_at(hook_name, model_name)
        return sae
    sae.hook_name = sae.hook_name if hook_name is None else hook_name
    sae.model_name = sae.model_name if model_name is None else model_name
    return sae


def export(sae: SAE, path: Path | str, form: str) -> None:
    """Writes an SAE in a format of WRITERS.

    Raises:
        InputError: an unknown format, a rule that the format cannot express, or an SAE that SAELens, which lies in its
            layout, has no class for.
    """
    if form not in WRITERS:
        raise InputError(f"unknown format {form!r}: choose one of {', '.join(WRITERS)}")
    architecture = saelens.architecture_of(sae)
    if form == "saelens" and architecture not in saelens_import.TENSORS:
        others = (
            "export it to dictionary_learning" if isinstance(sae, Crosscoder)
            else "export it to sparsify, or its set to circuit_tracer" if topk_of(sae.rule) is not None
            else "no library here has one"
        )  # fmt: skip
        raise InputError(
            f"SAELens has no class {architecture!r} and could not load it: {others}; another workspace imports this "
            "one's own folder of it"
        )
    WRITERS[form](sae, Path(path))


def _expected() -> str:
    return " or ".join(f"{config} and {weights} ({name})" for name, (config, weights) in FILES.items())
