"""An SAE, or a set of transcoders, to a repository of the Hugging Face hub: its files and a model card.

An SAE goes in SAELens' format, a set in circuit-tracer's, both into a folder of the repository. What was known of
training here is written into an SAE's configuration, so that whoever opens it harvests as it was trained
(`workbench.features.opening`); a set's has no place for it. Paths of this machine are left out. The card says what it
is, what it was trained on, how it was evaluated and how it is loaded.

Nothing is sent unless it is asked for: without, the files are made, listed and thrown away.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from sae import rules
from sae.errors import InputError
from sae.formats import circuit_tracer, saelens, saelens_import
from sae.formats.conversion import topk_of
from sae.model import SAE
from sae.shown import Shown
from sae.transcoder import Transcoder
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin, versions
from workbench.disk.hub import require_hub
from workbench.models.checkpoints import hub_name
from workbench.models.places import between

CARD = "README.md"
TAGS = ("sparse-autoencoder", "mechanistic-interpretability", "interp-workbench")
HEADLINES = {
    "fvu": "fraction of variance unexplained", "l0": "active features a token (L0)", "added_nats": "added nats",
    "loss_recovered_mean": "loss recovered (against the mean)", "dead_share": "dead features",
}  # fmt: skip
"""What of an evaluation stands in the card."""


@dataclass(frozen=True, repr=False)
class Publication(Shown):
    """What was sent, or would be."""

    repo: str
    folder: str
    """In the repository."""
    files: Mapping[str, int]
    """Bytes by path in the repository."""
    card: str
    url: str | None
    """Where it lies now; None where it was not sent."""


def publish(
    catalog: Catalog,
    name: str,
    repo: str,
    *,
    folder: str | None = None,
    license: str | None = None,
    private: bool = False,
    send: bool = False,
) -> Publication:
    """Makes the files of an SAE or a set of transcoders for the hub, and sends them where that is asked for.

    Args:
        name: of the SAE or set in the workspace.
        repo: `owner/name`; made where it does not exist.
        folder: in the repository; `name` when None.
        license: as the hub knows it, such as `mit`.
        private: whether a repository that is made is private.
        send: without, nothing leaves this machine.

    Raises:
        InputError: an unknown name, a crosscoder, a set that circuit-tracer's format cannot express, no name of a
            repository, or, when sending, no network or no access.
    """
    folder = folder or name
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no repository: give owner/name ({str(error).splitlines()[0]})") from None
    if "/" not in repo:
        raise InputError(f"{repo!r} is no repository: give owner/name")
    with _staged(catalog, name, repo, folder, license) as (place, card):
        files = {f"{folder}/{file.name}": file.stat().st_size for file in sorted(place.iterdir())}
        url = _send(place, repo, folder, name, private) if send else None
    return Publication(repo, folder, {CARD: len(card.encode()), **files}, card, url)


@contextmanager
def _staged(catalog: Catalog, name: str, repo: str, folder: str, license: str | None) -> Iterator[tuple[Path, str]]:
    """The files in a temporary folder, and the card."""
    is_set = name in [one.name for one in catalog.transcoder_sets()]
    coders = catalog.transcoders(name).coders if is_set else {0: catalog.coder(name)}
    if coders[0].parts:
        raise InputError(f"{name!r} is a crosscoder: those are not published yet; `workbench export` writes its files")
    origin = catalog.origin(catalog.with_layers([name])[0])
    for coder in coders.values():
        said = {**coder.metadata, **origin.told}
        coder.metadata = {key: public_name(value) if isinstance(value, str) else value for key, value in said.items()}
        coder.model_name = public_name(coder.model_name)
    with tempfile.TemporaryDirectory(prefix="workbench-publish-") as temporary:
        place = Path(temporary)
        if is_set:
            circuit_tracer.save(
                {layer: coder for layer, coder in coders.items() if isinstance(coder, Transcoder)}, place
            )
            use = f"A set of circuit-tracer's:\n\n```bash\nworkbench open {repo}/{folder} --corpus CORPUS\n```"
            if topk_of(coders[0].rule) is not None:
                use += f"\n\nBeware: {circuit_tracer.CAUTION}."
        else:
            coders[0].save(place)
            use = _use(coders[0], repo, folder)
        library = "saelens" if not is_set and _in_saelens(coders[0]) else None
        about = ModelCardData(library_name=library, license=license, tags=list(TAGS), **_linked(origin, coders[0]))
        card = _card(catalog, name, coders, origin, about, use)
        (place / CARD).write_text(card, encoding="utf-8")
        yield place, card


def public_name(spec: str) -> str:
    """A model's or a corpus' name without what only this machine knows: of a path, its last part."""
    try:
        path = Path(spec).expanduser()
        return path.name if path.is_absolute() or path.exists() else spec
    except (OSError, RuntimeError):
        # Longer than a file's name may be, or in the home of a user that this machine does not have.
        return spec


def _linked(origin: Origin, first: SAE) -> dict[str, Any]:
    """The model and the data set that the hub can link to."""
    model, corpus = origin.model or first.model_name, origin.corpus or ""
    is_dataset = corpus.count("/") == 1 and "://" not in corpus and public_name(corpus) == corpus
    return {
        "base_model": None if _is_local(model) else hub_name(model), "datasets": [corpus] if is_dataset else None,
    }  # fmt: skip


def _card(
    catalog: Catalog, name: str, coders: Mapping[int, SAE], origin: Origin, about: ModelCardData, use: str
) -> str:
    first = coders[0]
    rule = dict(rules.to_dict(first.rule))
    rows = {
        "model": first.model_name, "reads": between(first.hook_name, first.written_hook),
        "features": f"{first.d_sae:,}", "width": f"{first.d_in:,}",
        "rule": " ".join([str(rule.pop("name")), *(f"{key}={value}" for key, value in rule.items())]),
        **_training(origin), "made with": ", ".join(f"{package} {version}" for package, version in versions().items()),
    }  # fmt: skip
    kind = "An SAE" if first.written_hook == first.hook_name else "A transcoder"
    what = kind if len(coders) == 1 else f"{len(coders)} transcoders, one a layer,"
    said = f"{what} of {first.d_sae:,} features at `{rows['reads']}` of {first.model_name}."
    parts = [f"---\n{about.to_yaml()}\n---", f"# {name}", said, _table(rows), *_evaluation(catalog, name)]
    return "\n\n".join([*parts, "## Use", use]) + "\n"


def _training(origin: Origin) -> dict[str, str]:
    if origin.imported:
        source = origin.imported.get("release") or origin.imported.get("format")
        return {"imported from": f"{source} {origin.imported.get('id', '')}".strip()}
    if not origin.training:
        return {}
    begins = f" {'beginning with' if origin.bos else 'without'} BOS" if origin.bos_recorded else ""
    batch = origin.training.get("batch_size")
    return {
        "trained on": f"{origin.tokens:,} tokens of {public_name(origin.corpus or '?')}, contexts of "
        f"{origin.context_len}{begins}",
        **({} if batch is None else {"batch size": f"{batch:,}"}), "seed": str(origin.training["seed"]),
    }  # fmt: skip


def _evaluation(catalog: Catalog, name: str) -> list[str]:
    """The latest evaluation, where there is one."""
    found = next((one.evaluation for one in catalog.coders() if one.name == name), None)
    if not found:
        return []
    rows = {title: f"{found[key]:.4g}" for key, title in HEADLINES.items() if isinstance(found.get(key), float | int)}
    result = catalog.results.open("evaluation", name)
    corpus = result.origin.corpus or result.parameters.get("corpus") or "?"
    return ["## Evaluation", f"On held-out documents of {public_name(str(corpus))}:", _table(rows)]


def _in_saelens(sae: SAE) -> bool:
    """Whether SAELens has a class for it."""
    return saelens.architecture_of(sae) in saelens_import.TENSORS


def _use(sae: SAE, repo: str, folder: str) -> str:
    opened = f"```bash\nworkbench open {repo} {folder}\n```"
    if not _in_saelens(sae):
        return f"SAELens has no class for it; interp-workbench reads its files: `workbench import {folder}`."
    code = f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo}", "{folder}")'
    return f"```python\n{code}\n```\n\nThe pages of its features, harvested as it was trained:\n\n{opened}"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _is_local(spec: str) -> bool:
    return spec == "demo" or public_name(spec) != spec or ":" in spec


def _send(place: Path, repo: str, folder: str, name: str, private: bool) -> str:
    """Uploads; the address of what was sent."""
    require_hub(repo, "model", f"cannot send to {repo}: no network ({{reason}})")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        # A repository of several SAEs keeps the card it has; each folder has its own.
        if not api.file_exists(repo, CARD):
            api.upload_file(path_or_fileobj=place / CARD, path_in_repo=CARD, repo_id=repo)
        sent = api.upload_folder(folder_path=place, repo_id=repo, path_in_repo=folder, commit_message=f"Add {name}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = "log in with `hf auth login`, with a token that may write"
        raise InputError(f"cannot send to {repo} ({reason}): {advice}") from None
    return str(sent)
