"""Where the SAEs, transcoders and crosscoders of a run read harvests, and what transcoders predict.

hook "blocks.2.hook_resid_post"                                   an SAE
hook "blocks.2.mlp.hook_in", target "blocks.2.hook_mlp_out"       a transcoder
hook "blocks.*.mlp.hook_in", target "blocks.*.hook_mlp_out"       a set of transcoders, one for every layer
hooks "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"      a crosscoder of two layers
harvests "base", "tuned"                                          a crosscoder of two models over the same tokens
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sae.errors import InputError
from workbench.harvest.loader import ActivationLoader
from workbench.harvest.pairs import PairLoader
from workbench.harvest.parts import PartLoader, Place, check_same_tokens
from workbench.harvest.reading import Harvest

EVERY_LAYER = "*"


@dataclass(frozen=True)
class HookPairs:
    """What a run trains on, as it was asked for."""

    hook: str
    target_hook: str | None
    pairs: tuple[tuple[str, str], ...]
    """Hook point read and hook point predicted, by layer for a set; empty for SAEs."""
    parts: tuple[tuple[str, Place], ...] = ()
    """Name and place of what a crosscoder reads side by side; empty for others."""

    @property
    def is_set(self) -> bool:
        """Whether it is one transcoder for every layer."""
        return EVERY_LAYER in self.hook

    def pairs_of(self, n_configs: int) -> list[int] | None:
        """For every configuration, those of a set in a row, which of the pairs it goes between; None for one pair."""
        return [number % len(self.pairs) for number in range(n_configs)] if self.is_set else None

    def loader(
        self, harvest: Harvest, seed: int, device: str, *, gradients: bool
    ) -> ActivationLoader | PairLoader | PartLoader:
        """The stream of the harvest, or harvests, that a run draws from."""
        if self.parts:
            names, places = zip(*self.parts, strict=True)
            return PartLoader(places, names, seed=seed, device=device)
        if self.pairs:
            return PairLoader(harvest, self.pairs, seed=seed, device=device, with_gradients=gradients)
        return ActivationLoader(harvest, self.hook, seed=seed, device=device, with_gradients=gradients)

    def widths(self, harvest: Harvest) -> tuple[int, int]:
        """(width of what is read, width of what is predicted), of the first pair."""
        if self.parts:
            together = sum(place.harvest.vectors(place.hook).width for _, place in self.parts)
            return together, together
        hook, target = self.pairs[0] if self.pairs else (self.hook, self.hook)
        return harvest.vectors(hook).width, harvest.vectors(target).width


def choose_pairs(harvests: Sequence[Harvest], hook: str | Sequence[str] | None, target_hook: str | None) -> HookPairs:
    """The hook points asked for.

    Args:
        harvests: one, or those whose rows a crosscoder reads side by side.
        hook: one, or several that it reads side by side of each.

    Raises:
        InputError: hook points that a harvest does not have (names those it has), a set with a missing layer, one
            pattern without the other, or harvests of different tokens.
    """
    hooks = [hook] if isinstance(hook, str) else list(hook or ())
    if len(harvests) > 1 or len(hooks) > 1:
        return _side_by_side(harvests, hooks, target_hook)
    return _of_one(harvests[0], hooks[0] if hooks else None, target_hook)


def _side_by_side(harvests: Sequence[Harvest], hooks: Sequence[str], target_hook: str | None) -> HookPairs:
    if target_hook is not None:
        raise InputError(f"a crosscoder reconstructs what it reads: leave --target-hook {target_hook} out")
    wanted: Sequence[str | None] = hooks or [None]
    places = [Place(one, choose_hook(one, hook)) for one in harvests for hook in wanted]
    check_same_tokens(harvests)
    several = len(harvests) > 1
    names: list[str] = []
    for place in places:
        name = (
            place.hook
            if not several
            else place.harvest.name
            if len(hooks) < 2
            else f"{place.harvest.name}/{place.hook}"
        )
        # An activation beside itself is a control.
        again = sum(other.split("#")[0] == name for other in names)
        names.append(f"{name}#{again + 1}" if again else name)
    shown = " + ".join(dict.fromkeys(place.hook for place in places))
    return HookPairs(shown, None, (), tuple(zip(names, places, strict=True)))


def _of_one(harvest: Harvest, hook: str | None, target_hook: str | None) -> HookPairs:
    if target_hook is None:
        if hook is not None and EVERY_LAYER in hook:
            raise InputError(f"{hook} is every layer of a set of transcoders: say what they predict with --target-hook")
        return HookPairs(choose_hook(harvest, hook), None, ())
    if hook is None:
        raise InputError(f"a transcoder that predicts {target_hook} reads another hook point: give it with --hook")
    if (EVERY_LAYER in hook) != (EVERY_LAYER in target_hook):
        raise InputError(
            f"{hook} and {target_hook}: for a set of transcoders both hook points need a * for the layer, for one "
            "transcoder none"
        )
    if EVERY_LAYER not in hook:
        return HookPairs(hook, target_hook, ((choose_hook(harvest, hook), choose_hook(harvest, target_hook)),))
    layers = sorted(set(_layers(harvest.hooks, hook)) | set(_layers(harvest.hooks, target_hook)))
    if not layers:
        raise InputError(f"harvest {harvest.name!r} has no {hook}: it has {', '.join(harvest.hooks)}")
    pairs = [(_at(hook, layer), _at(target_hook, layer)) for layer in range(max(layers) + 1)]
    missing = next((name for pair in pairs for name in pair if name not in harvest.hooks), None)
    if missing is not None:
        raise InputError(
            f"harvest {harvest.name!r} has no {missing}, and a set of transcoders needs every layer from 0 to "
            f"{max(layers)}: harvest all of them together"
        )
    return HookPairs(hook, target_hook, tuple(pairs))


def choose_hook(harvest: Harvest, hook: str | None) -> str:
    """The hook point asked for, or the only one. Raises InputError naming those there are."""
    if hook is None and len(harvest.hooks) == 1:
        return harvest.hooks[0]
    if hook is None or hook not in harvest.hooks:
        problem = "has several hook points" if hook is None else f"has no hook point {hook!r}"
        known = ", ".join(harvest.hooks)
        raise InputError(f"harvest {harvest.name!r} {problem}: choose one of {known} with --hook")
    return hook


def _at(pattern: str, layer: int) -> str:
    return pattern.replace(EVERY_LAYER, str(layer))


def _layers(hooks: Sequence[str], pattern: str) -> list[int]:
    matcher = re.compile(re.escape(pattern).replace(re.escape(EVERY_LAYER), r"(\d+)", 1))
    return [int(found[1]) for hook in hooks if (found := matcher.fullmatch(hook))]
