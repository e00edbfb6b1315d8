"""SAELens' registry: the releases it knows, the SAEs in each, and whether the hub can be asked for them.

It is read from the file in the package (the extra `saelens`), which is not imported for it: that takes seconds, and
what is not in the registry, or cannot be fetched without a network, is said at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from sae.errors import InputError
from workbench.disk.extras import check_installed
from workbench.disk.hub import require_hub

FILE = "pretrained_saes.yaml"


@dataclass(frozen=True)
class Release:
    """A release of the registry."""

    repo: str
    """On the hub."""
    paths: Mapping[str, str]
    """Where an SAE lies in the repository, by its id."""
    conversion: str
    """SAELens' reader of its files; empty for its own form."""


def registered(release: str) -> Release | None:
    """A release in SAELens' registry; None for a repository of the hub. Raises InputError naming the nearest."""
    check_installed("sae_lens", "fetching a published SAE")
    known = _registry()
    if release not in known and "/" not in release:
        raise InputError(f"SAELens knows no release {release!r}: {_near(release, list(known))}")
    if release not in known:
        return None
    about = known[release]
    paths = {str(one["id"]): str(one["path"]) for one in about["saes"]}
    return Release(about["repo_id"], paths, about.get("conversion_func") or "")


def listed(release: str) -> Release:
    """A release in SAELens' registry, which says what there is of every layer. Raises InputError for another."""
    known = registered(release)
    if known is None:
        raise InputError(f"{release} is not in SAELens' registry, so its ids are not known: name one with --id")
    return known


def ids_of_set(release: str, ids: str) -> dict[int, str]:
    """The ids of a release that a pattern stands for, by layer.

    Args:
        release: SAELens' name of the release.
        ids: pattern of their ids, such as `layer_*/width_16k/average_l0_*`: the first * stands for the layer's number,
            further ones for anything.

    Raises:
        InputError: an unknown release, a pattern that no id or two of one layer have, a missing layer, or layers of a
            cross-layer transcoder.
    """
    known = listed(release)
    _refuse_cross_layer(release, known)
    head, _, rest = ids.partition("*")
    matcher = re.compile(re.escape(head) + r"(\d+)" + re.escape(rest).replace(re.escape("*"), ".*"))
    found: dict[int, str] = {}
    for sae_id in known.paths:
        if (match := matcher.fullmatch(sae_id)) is None:
            continue
        if int(match[1]) in found:
            raise InputError(
                f"{ids} is both {found[int(match[1])]} and {sae_id} in release {release!r}: a set has one a layer"
            )
        found[int(match[1])] = sae_id
    if not found:
        raise InputError(f"release {release!r} has no {ids}: {_near(ids, list(known.paths))}")
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
    if sae_id not in known.paths:
        raise InputError(f"release {release!r} has no SAE {sae_id!r}: {_near(sae_id, list(known.paths))}")


def check_reachable(release: str, sae_id: str) -> dict[int, str]:
    """The ids that are meant, by layer: one under 0, or with a * those of a set.

    Raises:
        InputError: an unknown release or id, or one that is not in the cache while the hub does not answer.
    """
    if "*" in sae_id:
        ids = ids_of_set(release, sae_id)
    else:
        check_id(release, sae_id)
        ids = {0: sae_id}
    check_hub(release, sae_id, "open")
    return ids


def check_hub(release: str, sae_id: str | None, instead: str) -> None:
    """Raises InputError for a release that is not in the cache while the hub does not answer.

    Args:
        instead: what can be done with a copy of the folder.
    """
    known = registered(release)
    require_hub(
        known.repo if known else release, "model",
        f"cannot fetch {release if sae_id is None else f'{release}/{sae_id}'}: no network ({{reason}}); download it "
        f"once where there is one, or copy the folder and {instead} that",
    )  # fmt: skip


@cache
def _registry() -> dict[str, Any]:
    spec = find_spec("sae_lens")
    assert spec is not None, "it is installed"
    assert spec.submodule_search_locations is not None, "it is a package"
    with (Path(spec.submodule_search_locations[0]) / FILE).open("rb") as file:
        # Of libyaml where PyYAML has it: ten times as fast.
        found: dict[str, Any] = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


def _refuse_cross_layer(release: str, known: Release) -> None:
    if "clt" in known.conversion:
        raise InputError(
            f"release {release!r} holds a cross-layer transcoder: its layers predict nothing by themselves"
        )


def _near(wanted: str, known: list[str]) -> str:
    near = get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(known[:5])}, ..."
