"""SAEs into a workspace and out of it: from folders of other libraries, from SAELens' registry, and to their formats.

An imported SAE is stored in the native format. Its provenance says where it came from, its rule and its
fingerprint, in place of a run and a harvest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae import rules
from sae.errors import InputError
from sae.formats.foreign import export, load_foreign, recognise
from sae.model import SAE
from sae.transcoder import Transcoder
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import versions
from workbench.saes.pretrained import load_pretrained


def import_folder(catalog: Catalog, name: str, folder: Path, *, hook: str | None, model: str | None) -> SAE:
    """Imports the SAE in `folder`; see `Workspace.import_sae`."""
    catalog.check_new_sae(name)
    sae = load_foreign(folder, hook_name=hook, model_name=model)
    origin = {"format": recognise(folder), "path": str(folder.resolve())}
    return _store(catalog, name, sae, origin)


def import_pretrained(
    catalog: Catalog, name: str, release: str, sae_id: str, *, hook: str | None, model: str | None
) -> SAE:
    """Imports a published SAE; see `Workspace.import_pretrained`."""
    catalog.check_new_sae(name)
    sae = load_pretrained(release, sae_id, hook_name=hook, model_name=model)
    return _store(catalog, name, sae, {"release": release, "id": sae_id})


def _store(catalog: Catalog, name: str, sae: SAE, origin: Mapping[str, Any]) -> SAE:
    if not sae.hook_name:
        raise InputError("the SAE does not say which hook point it reads: give one, as --hook blocks.5.hook_mlp_out")
    if not sae.model_name:
        raise InputError("the SAE does not say which model it reads: give one, as --model EleutherAI/pythia-70m")
    target = {}
    if isinstance(sae, Transcoder):
        if not sae.target_hook_name:
            raise InputError(
                "the transcoder does not say which hook point it predicts: name it in its cfg.json, as "
                "metadata.hook_name_out; of sparsify's, folders of MLPs say it, such as layers.5.mlp"
            )
        target = {"target_hook": sae.target_hook_name}
    identity = {"rule": rules.to_dict(sae.rule), "fingerprint": sae.fingerprint()}
    provenance = {"imported": {**origin, **identity}, "hook": sae.hook_name, **target}
    catalog.add_sae(name, sae, {**provenance, "versions": versions()})
    return sae


def export_sae(catalog: Catalog, name: str, folder: Path, form: str) -> None:
    """Writes an SAE of the workspace to a new folder; see `Workspace.export_sae`, also for the InputErrors."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists: name a new or an empty folder")
    sae = catalog.coder(name)
    try:
        export(sae, folder, form)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
