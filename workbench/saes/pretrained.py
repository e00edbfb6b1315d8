"""Published SAEs by release and id, through SAELens' registry (network; Hugging Face's cache holds what was fetched).

SAELens knows a few hundred releases and how to read each of them; what it gives is converted as one of its own
folders would be (`sae.formats.saelens_import`).
"""

from difflib import get_close_matches

from sae.errors import InputError
from sae.formats.saelens_import import from_parts
from sae.model import SAE
from workbench.disk.hub import require_hub


def load_pretrained(release: str, sae_id: str, *, hook_name: str | None = None, model_name: str | None = None) -> SAE:
    """Downloads a published SAE.

    Args:
        release: SAELens' name of the release, or a Hugging Face repository of SAELens folders.
        sae_id: the SAE in it.
        hook_name, model_name: what the SAE reads, where the release does not say.

    Raises:
        InputError: an unknown release or id (names the nearest), no network, or an SAE that cannot be expressed here.
    """
    from sae_lens import SAE as SAELensSAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory and "/" not in release:
        raise InputError(f"SAELens knows no release {release!r}: {_near(release, list(directory))}")
    if release in directory and sae_id not in directory[release].saes_map:
        raise InputError(
            f"release {release!r} has no SAE {sae_id!r}: {_near(sae_id, list(directory[release].saes_map))}"
        )
    repo = directory[release].repo_id if release in directory else release
    require_hub(
        repo, "model",
        f"cannot fetch {release}/{sae_id}: no network ({{reason}}); download it once where there is one, or copy the "
        "folder and import that",
    )  # fmt: skip
    try:
        found = SAELensSAE.from_pretrained(release, sae_id)
    except OSError as error:
        # Of Hugging Face's errors too: no connection, no such file or repository, no access.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot fetch {release}/{sae_id} ({reason}): check the names and the network") from None
    return from_parts(
        found.cfg.to_dict(),
        found.state_dict(),
        f"{release}/{sae_id}",
        hook_name=hook_name,
        model_name=model_name,
    )


def _near(wanted: str, known: list[str]) -> str:
    near = get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(known[:5])}, ..."
