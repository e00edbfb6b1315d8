"""Published SAEs by release and id, and sets of transcoders by a pattern of ids, through SAELens' registry (network and
the extra `saelens`; Hugging Face's cache holds what was fetched).

SAELens knows a few hundred releases and how to read each of them; what it gives is converted as one of its own
folders would be (`sae.formats.saelens_import`).
"""

from collections.abc import Mapping

from sae.errors import InputError
from sae.formats.saelens_import import from_parts
from sae.model import SAE
from sae.transcoder import Transcoder
from workbench.disk.extras import require
from workbench.saes.releases import check_hub, check_id, ids_of_set, listed


def load_pretrained(release: str, sae_id: str, *, hook_name: str | None = None, model_name: str | None = None) -> SAE:
    """Downloads a published SAE.

    Args:
        release: SAELens' name of the release, or a Hugging Face repository of SAELens folders.
        sae_id: the SAE in it.
        hook_name, model_name: what the SAE reads, where the release does not say.

    Raises:
        InputError: an unknown release or id (names the nearest), no network, no SAELens, or an SAE that cannot be
            expressed here.
    """
    check_id(release, sae_id)
    return _fetch(release, sae_id, hook_name, model_name)


def load_pretrained_set(release: str, ids: str | Mapping[int, str]) -> dict[int, tuple[str, Transcoder]]:
    """Downloads the transcoders of a release, one a layer.

    Args:
        release: SAELens' name of the release.
        ids: pattern of their ids, such as `layer_*/width_16k/average_l0_*`: the first * stands for the layer's number,
            further ones for anything. Or the ids themselves, by layer.

    Returns:
        Layer -> (id, transcoder).

    Raises:
        InputError: as `load_pretrained`, a pattern that no id or two of one layer have, a missing layer, SAEs that are
            no transcoders, or layers of a cross-layer transcoder.
    """
    listed(release)
    found = ids_of_set(release, ids) if isinstance(ids, str) else ids
    made = {}
    for layer, sae_id in found.items():
        coder = _fetch(release, sae_id, None, None)
        if not isinstance(coder, Transcoder):
            raise InputError(f"{release}/{sae_id} is no transcoder: import SAEs one by one")
        made[layer] = (sae_id, coder)
    return made


def _fetch(release: str, sae_id: str, hook_name: str | None, model_name: str | None) -> SAE:
    check_hub(release, sae_id, "import")
    require("sae_lens", "fetching a published SAE")
    from sae_lens import SAE as SAELensSAE

    try:
        found = SAELensSAE.from_pretrained(release, sae_id)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        # Of Hugging Face's errors too: no connection, no such file or repository, no access; or files of another kind.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot fetch {release}/{sae_id} ({reason}): check the names and the network") from None
    return from_parts(
        found.cfg.to_dict(),
        found.state_dict(),
        f"{release}/{sae_id}",
        hook_name=hook_name,
        model_name=model_name,
    )
