"""What a published SAE, transcoder or set of transcoders is and what it was trained on, before its weights are fetched.

Its configuration alone is read, through SAELens as the weights would be, or from a local folder. Sizes are those that
the hub tells of what is not in its cache yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile

from sae.errors import InputError
from sae.formats import saelens_old
from sae.formats.saelens_import import check_supported, place_read
from sae.model import SAE
from workbench.catalog.origin import Origin, contexts_told
from workbench.disk.extras import require
from workbench.disk.hub import SECONDS_TO_ANSWER
from workbench.models.checkpoints import hub_name
from workbench.saes.releases import check_hub, check_reachable, registered

PROCESSED = ("center_writing_weights", "fold_ln", "center_unembed", "fold_value_biases")
"""What TransformerLens may have done to a model's weights; here they are raw."""


FOLDED = ("none", "expected_average_only_in")
"""Normalisations of the input that SAELens takes into the weights of what it fetches."""


@dataclass(frozen=True)
class Trained:
    """What a dictionary was trained on, as far as it says; None for what it does not."""

    model: str
    """As `load_model` takes it."""
    hooks: tuple[str, ...]
    """The hook points that are read: one, or one of every layer of a set."""
    d_in: int
    d_sae: int
    context_len: int | None = None
    bos: bool = True
    corpus: str | None = None
    text_field: str = "text"
    """Of the corpus."""
    separate: bool = False
    """Whether no context held parts of two documents."""
    processed: tuple[str, ...] = ()
    """What was done to the model's weights before, of PROCESSED."""

    @classmethod
    def of(cls, coders: Mapping[int, SAE], record: Mapping[str, Any] | None = None) -> "Trained":
        """Of dictionaries that are there, by layer.

        Args:
            record: of the first, where a workspace keeps one.
        """
        first, origin = next(iter(coders.values())), Origin.of_sae(record or {})
        hooks = tuple(coder.hook_name for coder in coders.values())
        about = _from_metadata({**first.metadata, **origin.told})
        return cls(
            first.model_name, hooks, first.d_in, first.d_sae, text_field=origin.text_field, separate=origin.separate,
            **about,
        )  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published dictionary before it is fetched."""

    release: str
    ids: Mapping[int, str]
    """Its ids in the release by layer; one under 0 for a single one."""
    trained: Trained
    fetched: Mapping[str, int | None] = field(default_factory=dict)
    """Bytes to download, by what it is; None where the hub did not say."""
    is_folder: bool = False
    """Whether it is a set of circuit-tracer's, whose files are fetched as a folder (`workbench.saes.hub_sets`)."""


def describe_published(
    release: str, sae_id: str | Mapping[int, str], *, hook: str | None = None, model: str | None = None
) -> Published:
    """What a published dictionary is; its configuration is fetched (network, or the hub's cache).

    Args:
        release: as `load_pretrained`.
        sae_id: likewise; with a * a set's, as `load_pretrained_set`, which may also name its ids by layer.
        hook, model: what it reads, where the release does not say.

    Raises:
        InputError: as `load_pretrained` and `load_pretrained_set`, or one that does not say what it reads.
    """
    if isinstance(sae_id, str):
        ids, called = check_reachable(release, sae_id), f"{release}/{sae_id}"
    else:
        check_hub(release, None, "open")
        ids, called = dict(sae_id), release
    known = registered(release)
    repo = known.repo if known else release
    trained = _trained(release, ids, hook, model)
    paths = [known.paths[one] if known else one for one in ids.values()]
    return Published(release, ids, trained, {called: missing_bytes(repo, paths), **bytes_of_model(trained.model)})


def _trained(release: str, ids: Mapping[int, str], hook: str | None, model: str | None) -> Trained:
    configs = [saelens_old.modern(_config(release, one), f"{release}/{one}") for one in ids.values()]
    abouts = [saelens_old.nested(config) for config in configs]
    for one, config, about in zip(ids.values(), configs, abouts, strict=True):
        check_supported(config, about, f"{release}/{one}", normalisations=FOLDED)
    hooks = tuple(hook or place_read(about) for about in abouts)
    named = model or str(abouts[0].get("model_name") or "")
    if not named or not all(hooks):
        lacking = "hook point it reads: give one, as --hook blocks.5.hook_mlp_out"
        if not named:
            lacking = "model it reads: give one, as --model EleutherAI/pythia-70m"
        raise InputError(f"{release}/{next(iter(ids.values()))} does not say which {lacking}")
    first = configs[0]
    return Trained(named, hooks, int(first["d_in"]), int(first["d_sae"]), **_from_metadata(abouts[0]))


def _from_metadata(about: Mapping[str, Any]) -> dict[str, Any]:
    """What SAELens' metadata says of how an SAE was trained."""
    loaded = about.get("model_from_pretrained_kwargs")
    done = tuple(name for name in PROCESSED if isinstance(loaded, Mapping) and loaded.get(name))
    context_len, bos = contexts_told(about)
    return {
        "context_len": context_len, "bos": bos, "corpus": about.get("dataset_path") or None, "processed": done
    }  # fmt: skip


def _config(release: str, sae_id: str) -> dict[str, Any]:
    require("sae_lens", "opening a published SAE")
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    try:
        return dict(load_sae_config_from_huggingface(release, sae_id))
    except (OSError, ValueError, KeyError) as error:
        # Of Hugging Face's errors too: no connection, no such file or repository, no access; or a file of another kind.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot fetch {release}/{sae_id} ({reason}): check the names and the network") from None


def bytes_of_model(model: str) -> dict[str, int | None]:
    """Bytes of a model to download, by what it is; empty for one that is here."""
    is_here = model == "demo" or Path(model).exists()
    return {} if is_here else {f"the model {model}": missing_bytes(hub_name(model), None)}


def missing_bytes(repo: str, paths: list[str] | None) -> int | None:
    """Bytes of what a repository holds at some paths, or of a model's weights and tokenizer, and the cache does not;
    None where the hub does not say."""
    if constants.HF_HUB_OFFLINE:
        return None
    found: dict[str, int] = {}
    try:
        api = HfApi()
        if paths is None:
            siblings = api.model_info(repo, files_metadata=True, timeout=SECONDS_TO_ANSWER).siblings or []
            wanted = (one for one in siblings if one.rfilename.endswith((".safetensors", ".json")))
            found = {one.rfilename: one.size or 0 for one in wanted}
        for one in api.get_paths_info(repo, paths) if paths else ():
            files = [one] if isinstance(one, RepoFile) else api.list_repo_tree(repo, one.path, recursive=True)
            found |= {file.path: file.size for file in files if isinstance(file, RepoFile)}
    except Exception:
        # What cannot be asked here is said again, and better, where it is fetched.
        return None
    return sum(size for name, size in found.items() if not isinstance(try_to_load_from_cache(repo, name), str))
