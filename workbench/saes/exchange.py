"""SAEs into a workspace and out of it: from folders of other libraries, from SAELens' registry, and to their formats;
sets of transcoders from and to circuit-tracer's.

An imported SAE is stored in the native format. Its provenance says where it came from, its rule and its
fingerprint, in place of a run and a harvest. A transcoder that reads its layer's normalised activation before the
norm's gain (Gemma Scope's `ln2.hook_normalized`) is stored as one that reads what the MLP reads, which is the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from circuits.blocks import norm_before
from circuits.norms import measured_norm
from sae import rules
from sae.errors import InputError
from sae.formats import circuit_tracer
from sae.formats.conversion import topk_of, weights_of
from sae.formats.foreign import export, load_foreign, recognise
from sae.model import SAE
from sae.transcoder import Transcoder
from sae.transcoder_set import FILE, TranscoderSet, load_transcoders
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Record, versions
from workbench.models.bundled import demo_transcoders_dir
from workbench.models.hooks import resolve_hook
from workbench.models.load import reload_model
from workbench.saes.pretrained import load_pretrained, load_pretrained_set


def import_folder(
    catalog: Catalog,
    name: str,
    folder: Path,
    *,
    hook: str | None = None,
    target_hook: str | None = None,
    model: str | None = None,
    class_name: str | None = None,
    input_mean: str | None = None,
) -> SAE:
    """Imports the SAE in `folder`; see `Workspace.import_sae`."""
    catalog.check_new_sae(name)
    sae = load_foreign(folder, hook_name=hook, model_name=model, class_name=class_name, input_mean=input_mean)
    origin = {"format": recognise(folder), "path": str(folder.resolve())}
    return _store(catalog, name, sae, origin, target_hook)


BUNDLED = Path("bundled")
"""Stands for the folder of the set of transcoders that comes with the demo model."""


def is_set(folder: Path) -> bool:
    """Whether a folder holds a set of transcoders, of circuit-tracer or of this project."""
    return folder == BUNDLED or any((folder / name).is_file() for name in (circuit_tracer.CONFIG, FILE))


def import_set(
    catalog: Catalog, name: str, folder: Path, *, model: str | None = None, repo: str | None = None
) -> TranscoderSet:
    """Brings a set of transcoders into the workspace.

    Args:
        folder: one of circuit-tracer's or of this project's, or `BUNDLED`.
        model: what it reads, where its files do not say.
        repo: where on the hub the folder was fetched from.

    Raises:
        InputError: a taken name, no such set, or one that does not say its model or hook points.
    """
    catalog.check_new_transcoders(name)
    folder = demo_transcoders_dir() if folder == BUNDLED else folder
    coders = load_transcoders(folder)
    for layer, coder in coders.coders.items():
        weights_of(coder).check(f"layer {layer} of {folder}")
        for key, hook in (("feature_input_hook", coder.hook_name), ("feature_output_hook", coder.target_hook_name)):
            if hook in ("", f"blocks.{layer}."):
                raise InputError(f"the set {folder} does not say its {key}: add it to {circuit_tracer.CONFIG}")
    form = "circuit_tracer" if (folder / circuit_tracer.CONFIG).is_file() else "transcoders"
    origin = {"format": form, "path": str(folder.resolve())} if repo is None else {"format": form, "repo": repo}
    return _store_set(catalog, name, coders.coders, [origin] * len(coders), model, coders.metadata)


def import_published_set(
    catalog: Catalog, name: str, release: str, ids: str | Mapping[int, str], *, model: str | None = None
) -> TranscoderSet:
    """Brings the transcoders of a published release, one a layer, into the workspace as a set (network).

    Args:
        ids: pattern of their ids in the release; see `workbench.saes.pretrained.load_pretrained_set`.
        model: what they read, where the release does not say or says it as Hugging Face does not know it.

    Raises:
        InputError: a taken name, or as `load_pretrained_set`.
    """
    catalog.check_new_transcoders(name)
    found = load_pretrained_set(release, ids)
    origins = [{"release": release, "id": sae_id} for sae_id, _ in found.values()]
    return _store_set(catalog, name, {layer: coder for layer, (_, coder) in found.items()}, origins, model, {})


def _store_set(
    catalog: Catalog,
    name: str,
    coders: Mapping[int, Transcoder],
    origins: Sequence[Mapping[str, Any]],
    model: str | None,
    metadata: dict[str, Any],
) -> TranscoderSet:
    """Saves coders, one a layer, as a set that says its model and reads hook points of this project."""
    for coder in coders.values():
        coder.model_name = coder.model_name if model is None else model
        if not coder.model_name:
            raise InputError("the set does not say which model it reads: give one, as --model EleutherAI/pythia-70m")
    made = TranscoderSet(_after_norms(coders), metadata=metadata)
    records = [_provenance(coder, origin) for coder, origin in zip(made.coders.values(), origins, strict=True)]
    catalog.add_transcoders(name, made, records)
    return made


BEFORE_GAIN = ".ln2.hook_normalized"


def _after_norms(coders: Mapping[int, Transcoder]) -> dict[int, Transcoder]:
    """The coders; those that read a norm before its gain and shift moved behind them, with the model's own.

    Raises:
        InputError: a model that is needed for that and cannot be loaded, or has no such norm.
    """
    moved = dict(coders)
    wanted = [number for number, coder in coders.items() if coder.hook_name.endswith(BEFORE_GAIN)]
    if wanted:
        model = reload_model(coders[wanted[0]].model_name, device="cpu")
        for number in wanted:
            coder = coders[number]
            resolve_hook(model, coder.hook_name.replace(BEFORE_GAIN, ".mlp.hook_in"))
            block = model.structure.blocks[int(coder.hook_name.split(".")[1])]
            norm = measured_norm(norm_before(block, "mlp"), torch.zeros(model.info.d_model, dtype=model.dtype))
            moved[number] = circuit_tracer.after_gain(coder, norm.gain, norm.shift)
    return moved


def import_pretrained(
    catalog: Catalog,
    name: str,
    release: str,
    sae_id: str,
    *,
    hook: str | None = None,
    target_hook: str | None = None,
    model: str | None = None,
) -> SAE:
    """Imports a published SAE; see `Workspace.import_pretrained`."""
    catalog.check_new_sae(name)
    sae = load_pretrained(release, sae_id, hook_name=hook, model_name=model)
    return _store(catalog, name, sae, {"release": release, "id": sae_id}, target_hook)


def _store(catalog: Catalog, name: str, sae: SAE, origin: Mapping[str, Any], target_hook: str | None) -> SAE:
    if target_hook is not None:
        if not isinstance(sae, Transcoder):
            raise InputError(f"an SAE writes what it reads, and this is one: leave --target-hook {target_hook} out")
        sae.target_hook_name = target_hook
    if not sae.hook_name:
        what, example = ("transcoder", "mlp.hook_in") if isinstance(sae, Transcoder) else ("SAE", "hook_mlp_out")
        raise InputError(f"the {what} does not say which hook point it reads: give one, as --hook blocks.5.{example}")
    if not sae.model_name:
        raise InputError("the SAE does not say which model it reads: give one, as --model EleutherAI/pythia-70m")
    if isinstance(sae, Transcoder) and not sae.target_hook_name:
        raise InputError(
            "the transcoder does not say which hook point it predicts: give it, as --target-hook blocks.5.hook_mlp_out"
        )
    if isinstance(sae, Transcoder):
        sae = _after_norms({0: sae})[0]
    catalog.add_sae(name, sae, _provenance(sae, origin))
    return sae


def _provenance(sae: SAE, origin: Mapping[str, Any]) -> Record:
    target = {"target_hook": sae.target_hook_name} if isinstance(sae, Transcoder) else {}
    identity = {"rule": rules.to_dict(sae.rule), "fingerprint": sae.fingerprint()}
    return {"imported": {**origin, **identity}, "hook": sae.hook_name, **target, "versions": versions()}


def export_sae(catalog: Catalog, name: str, folder: Path, form: str) -> str | None:
    """Writes an SAE of the workspace to a new folder; returns what `Workspace.export_sae` does.

    Raises:
        InputError: as `Workspace.export_sae`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists: name a new or an empty folder")
    sets = [summary.name for summary in catalog.transcoder_sets()]
    if form == "circuit_tracer" and name not in sets and catalog.sae_folder(name).is_dir():
        _refuse_as_set(catalog, name, sets)
    try:
        if form == "circuit_tracer":
            transcoders = catalog.transcoders(name)
            circuit_tracer.save(transcoders.coders, folder)
            return circuit_tracer.CAUTION if topk_of(transcoders[0].rule) is not None else None
        if name in sets:
            raise InputError(
                f"{name} is a set of transcoders: export it with --format circuit_tracer, or a layer, as {name}.layer_0"
            )
        coder = catalog.coder(name)
        # Whoever opens it harvests as it was trained.
        coder.metadata = {**coder.metadata, **catalog.origin(name).told}
        export(coder, folder, form)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    return None


def _refuse_as_set(catalog: Catalog, name: str, sets: Sequence[str]) -> None:
    """Raises InputError for the name of one coder where that of a set is wanted."""
    coder = catalog.coder(name)
    of_set = name.rpartition(".")[0]
    if of_set in sets:
        raise InputError(
            f"{name} is one layer of the set {of_set}, and circuit-tracer reads whole sets: export {of_set}, or the "
            "layer in another --format"
        )
    kind = "transcoder" if isinstance(coder, Transcoder) else "crosscoder" if coder.parts else "SAE"
    raise InputError(
        f"{name} is a single {kind}, and circuit-tracer reads sets of transcoders: choose another --format, or a set, "
        f"{', '.join(sets) or 'of which there is none'}"
    )
