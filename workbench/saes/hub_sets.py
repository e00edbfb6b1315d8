"""Sets of transcoders that circuit-tracer names by a repository of the hub, alone: `owner/name`, or a folder in one.

The repository holds circuit-tracer's `config.yaml` and either the layers' files beside it, or the addresses of files in
other repositories (`transcoders: [hf://...]`, Gemma Scope's). The first is fetched as a folder; the second goes through
SAELens' registry, which knows how these files are read.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from safetensors import safe_open

from sae.errors import InputError
from sae.formats import circuit_tracer
from workbench.disk.extras import require
from workbench.disk.hub import require_hub
from workbench.saes.published import Published, Trained, bytes_of_model, describe_published, missing_bytes


def describe_hub_set(reference: str, *, model: str | None = None) -> Published:
    """What a set of transcoders on the hub is; its `config.yaml` is fetched (network, or the hub's cache).

    Args:
        reference: `owner/name`, or `owner/name/folder`.
        model: what it reads, where it does not say or says it as the hub does not know it.

    Raises:
        InputError: no network, no such repository, none of circuit-tracer's sets, or layers in files that nothing here
            reads.
    """
    repo, folder = _parts(reference)
    require_hub(
        repo, "model", f"cannot fetch {reference}: no network ({{reason}}); download it once where there is one"
    )
    config = _config(reference)
    if config.get("model_kind") != "transcoder_set":
        raise InputError(f"{reference} holds a {config.get('model_kind')}: sets of transcoders of one layer are opened")
    if listed := config.get("transcoders"):
        return _listed(reference, [str(one) for one in listed], model or config.get("model_name"))
    files = _layer_files(repo, folder)
    if not files:
        raise InputError(f"{reference} has no layer_0.safetensors beside its config.yaml: it is not complete")
    named = str(model or config.get("model_name") or "")
    if not named:
        raise InputError(f"{reference} does not say which model it reads: give one, as --model EleutherAI/pythia-70m")
    d_sae, d_in = _shape(repo, files[0])
    hooks = tuple(f"blocks.{layer}.{config.get('feature_input_hook')}" for layer in files)
    fetched = {reference: missing_bytes(repo, list(files.values())), **bytes_of_model(named)}
    return Published(reference, files, Trained(named, hooks, d_in, d_sae), fetched, is_folder=True)


def fetch_hub_set(reference: str) -> Path:
    """The folder of a set whose files lie beside its config.yaml (network, or the hub's cache).

    Raises:
        InputError: what cannot be fetched.
    """
    repo, folder = _parts(reference)
    patterns = [str(PurePosixPath(folder, name)) for name in (circuit_tracer.CONFIG, "layer_*.safetensors")]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns)) / folder
    except (OSError, ValueError) as error:
        raise _refused(reference, error) from None


def _parts(reference: str) -> tuple[str, str]:
    owner, name, *folder = reference.split("/")
    return f"{owner}/{name}", "/".join(folder)


def _config(reference: str) -> Mapping[str, Any]:
    import yaml

    repo, folder = _parts(reference)
    try:
        file = hf_hub_download(repo, circuit_tracer.CONFIG, subfolder=folder or None)
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _refused(reference, error) from None
    return found if isinstance(found, Mapping) else {}


def _refused(reference: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(
        f"cannot fetch {reference} ({reason}): give a repository with circuit-tracer's config.yaml, or a release with "
        "an id"
    )


def _listed(reference: str, addresses: list[str], model: str | None) -> Published:
    """A set whose layers lie in other repositories, as SAELens' registry has them."""
    require("sae_lens", f"opening {reference}")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    repos = {"/".join(address.removeprefix("hf://").split("/")[:2]) for address in addresses}
    known = [one for one in get_pretrained_saes_directory().values() if {one.repo_id} == repos]
    for release in known:
        by_path = {path: sae_id for sae_id, path in release.saes_map.items()}
        paths = [address.partition("?")[0].removeprefix(f"hf://{release.repo_id}/") for address in addresses]
        ids = {
            layer: by_path.get(path) or by_path.get(str(PurePosixPath(path).parent)) for layer, path in enumerate(paths)
        }
        if all(ids.values()):
            return describe_published(release.release, {layer: str(one) for layer, one in ids.items()}, model=model)
    raise InputError(f"{reference} names layers in {', '.join(sorted(repos))} that SAELens' registry does not have")


def _layer_files(repo: str, folder: str) -> dict[int, str]:
    """The layers' files, from the hub or, without it, from its cache."""
    try:
        names = HfApi().list_repo_files(repo)
    except Exception:  # of the transport, or offline
        cached = try_to_load_from_cache(repo, str(PurePosixPath(folder, circuit_tracer.CONFIG)))
        place = Path(cached).parent if isinstance(cached, str) else Path()
        names = [str(PurePosixPath(folder, file.name)) for file in place.glob("layer_*.safetensors")]
    at = [(PurePosixPath(name), name) for name in names]
    found = {int(match[1]): name for path, name in at if str(path.parent) in (folder, folder or ".")
             and (match := circuit_tracer.LAYER_FILE.fullmatch(path.name))}  # fmt: skip
    return dict(sorted(found.items()))


def _shape(repo: str, name: str) -> tuple[int, int]:
    """[features, width] of a layer's encoder, from the beginning of its file."""
    cached = try_to_load_from_cache(repo, name)
    if isinstance(cached, str):
        with safe_open(cached, "pt") as opened:
            return tuple(opened.get_slice("W_enc").get_shape())
    try:
        tensors = HfApi().parse_safetensors_file_metadata(repo, name).tensors
    except Exception as error:  # of the transport
        raise _refused(f"{repo}/{name}", error) from None
    d_sae, d_in = tensors["W_enc"].shape
    return d_sae, d_in
