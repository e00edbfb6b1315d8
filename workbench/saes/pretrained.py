"""Published SAEs by release and id, and sets of transcoders by a pattern of ids, through SAELens' registry (network and
the extra `saelens`; Hugging Face's cache holds what was fetched).

SAELens knows a few hundred releases and how to read each of them; what it gives is converted as one of its own
folders would be (`sae.formats.saelens_import`).
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

from sae.errors import InputError
from sae.formats.saelens_import import from_parts
from sae.model import SAE
from sae.transcoder import Transcoder
from workbench.disk.extras import require
from workbench.disk.hub import require_hub

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup


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
    known = registered(release)
    check_id(release, sae_id)
    return _fetch(release, known.repo_id if known else release, sae_id, hook_name, model_name)


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
    known = _listed(release)
    found = ids_of_set(release, ids) if isinstance(ids, str) else ids
    made = {}
    for layer, sae_id in found.items():
        coder = _fetch(release, known.repo_id, sae_id, None, None)
        if not isinstance(coder, Transcoder):
            raise InputError(f"{release}/{sae_id} is no transcoder: import SAEs one by one")
        made[layer] = (sae_id, coder)
    return made


def ids_of_set(release: str, ids: str) -> dict[int, str]:
    """The ids of a release that a pattern stands for, by layer.

    Raises:
        InputError: as `load_pretrained_set`.
    """
    known = _listed(release)
    _refuse_cross_layer(release, known)
    head, _, rest = ids.partition("*")
    matcher = re.compile(re.escape(head) + r"(\d+)" + re.escape(rest).replace(re.escape("*"), ".*"))
    found: dict[int, str] = {}
    for sae_id in known.saes_map:
        if (match := matcher.fullmatch(sae_id)) is None:
            continue
        if int(match[1]) in found:
            raise InputError(
                f"{ids} is both {found[int(match[1])]} and {sae_id} in release {release!r}: a set has one a layer"
            )
        found[int(match[1])] = sae_id
    if not found:
        raise InputError(f"release {release!r} has no {ids}: {_near(ids, list(known.saes_map))}")
    missing = next((layer for layer in range(max(found)) if layer not in found), None)
    if missing is not None:
        raise InputError(f"release {release!r} has no {ids} of layer {missing}: a set has one for every layer")
    return {layer: found[layer] for layer in sorted(found)}


def check_id(release: str, sae_id: str) -> None:
    """Raises InputError, naming the nearest, for an id that a release of the registry does not have, and for a layer of
    a cross-layer transcoder."""
    known = registered(release)
    if known is None:
        return
    _refuse_cross_layer(release, known)
    if sae_id not in known.saes_map:
        raise InputError(f"release {release!r} has no SAE {sae_id!r}: {_near(sae_id, list(known.saes_map))}")


def registered(release: str) -> "PretrainedSAELookup | None":
    """A release in SAELens' registry; None for a repository of the hub. Raises InputError naming the nearest."""
    require("sae_lens", "fetching a published SAE")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory and "/" not in release:
        raise InputError(f"SAELens knows no release {release!r}: {_near(release, list(directory))}")
    return directory.get(release)


def _listed(release: str) -> "PretrainedSAELookup":
    """A release in SAELens' registry, which says what there is of every layer. Raises InputError for another."""
    known = registered(release)
    if known is None:
        raise InputError(f"{release} is not in SAELens' registry, so its ids are not known: name one with --id")
    return known


def _fetch(release: str, repo: str, sae_id: str, hook_name: str | None, model_name: str | None) -> SAE:
    from sae_lens import SAE as SAELensSAE

    require_hub(
        repo, "model",
        f"cannot fetch {release}/{sae_id}: no network ({{reason}}); download it once where there is one, or copy the "
        "folder and import that",
    )  # fmt: skip
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


def _refuse_cross_layer(release: str, known: "PretrainedSAELookup") -> None:
    if "clt" in (known.conversion_func or ""):
        raise InputError(
            f"release {release!r} holds a cross-layer transcoder: its layers predict nothing by themselves"
        )


def _near(wanted: str, known: list[str]) -> str:
    near = get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(known[:5])}, ..."
