"""SAEs into a workspace and out of it: from folders of other libraries, from SAELens' registry, and to their formats.

An imported SAE is stored in the native format. Its provenance says where it came from, its rule and the SHA-256 of
its weights as they are stored, in place of a run and a harvest.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae import rules
from sae.errors import InputError
from sae.formats.foreign import export, load_foreign, recognise
from sae.model import SAE
from workbench.saes.pretrained import load_pretrained

if TYPE_CHECKING:
    from workbench.workspace import Workspace


def import_folder(
    space: "Workspace", name: str, folder: Path, *, hook: str | None, model: str | None, versions: Mapping[str, str]
) -> SAE:
    """Imports the SAE in `folder`; see `Workspace.import_sae`."""
    space.check_new_sae(name)
    sae = load_foreign(folder, hook_name=hook, model_name=model)
    origin = {"format": recognise(folder), "path": str(folder.resolve())}
    return _store(space, name, sae, origin, versions)


def import_pretrained(
    space: "Workspace",
    name: str,
    release: str,
    sae_id: str,
    *,
    hook: str | None,
    model: str | None,
    versions: Mapping[str, str],
) -> SAE:
    """Imports a published SAE; see `Workspace.import_pretrained`."""
    space.check_new_sae(name)
    sae = load_pretrained(release, sae_id, hook_name=hook, model_name=model)
    return _store(space, name, sae, {"release": release, "id": sae_id}, versions)


def _store(space: "Workspace", name: str, sae: SAE, origin: Mapping[str, Any], versions: Mapping[str, str]) -> SAE:
    if not sae.hook_name:
        raise InputError("the SAE does not say which hook point it reads: give one, as --hook blocks.5.hook_mlp_out")
    if not sae.model_name:
        raise InputError("the SAE does not say which model it reads: give one, as --model EleutherAI/pythia-70m")
    digest = hashlib.sha256()
    for key, tensor in sorted(sae.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    identity = {"rule": rules.to_dict(sae.rule), "weights_sha256": digest.hexdigest()}
    provenance = {"imported": {**origin, **identity}, "hook": sae.hook_name}
    space.add_sae(name, sae, {**provenance, "versions": dict(versions)})
    return sae


def export_sae(space: "Workspace", name: str, folder: Path, form: str) -> None:
    """Writes an SAE of the workspace to a new folder; see `Workspace.export_sae`, also for the InputErrors."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists: name a new or an empty folder")
    sae = space.sae(name)
    try:
        export(sae, folder, form)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
