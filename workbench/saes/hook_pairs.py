"""Where the SAEs, transcoders and crosscoders of a run read harvests, and what transcoders predict.

hook "blocks.2.hook_resid_post"                                   an SAE
hook "blocks.2.mlp.hook_in", target "blocks.2.hook_mlp_out"       a transcoder
hook "blocks.*.mlp.hook_in", target "blocks.*.hook_mlp_out"       a set of transcoders, one for every layer
hooks "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"      a crosscoder of two layers, or an SAE at each
harvests "base", "tuned"                                          a crosscoder of two models over the same tokens
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sae.config import TrainConfig
from sae.errors import InputError
from sae.transcoder_set import folder_of
from workbench.harvest.parts import Place, check_same_tokens
from workbench.harvest.reading import Harvest

EVERY_LAYER = "*"


@dataclass(frozen=True)
class HookPairs:
    """What a run trains on, as it was asked for."""

    hook: str
    target_hook: str | None
    pairs: tuple[tuple[str, str], ...]
    """Hook point read and hook point predicted, by layer for a set; an SAE predicts ""; empty for crosscoders."""
    parts: tuple[tuple[str, Place], ...] = ()
    """Name and place of what a crosscoder reads side by side; empty for others."""

    @property
    def is_set(self) -> bool:
        """Whether it is one transcoder for every layer."""
        return EVERY_LAYER in self.hook

    def pairs_of(self, n_configs: int) -> list[int]:
        """For every configuration of `spread`, which of the pairs it goes between."""
        return [number % max(1, len(self.pairs)) for number in range(n_configs)]

    def spread(self, configs: Sequence[TrainConfig]) -> list[TrainConfig]:
        """The configurations, where there are several pairs one for each of them."""
        if len(self.pairs) < 2 and not self.is_set:
            return list(configs)
        endings = [f".{folder_of(at)}" if self.is_set else f"-{hook}" for at, (hook, _) in enumerate(self.pairs)]
        return [replace(config, name=config.name + ending) for config in configs for ending in endings]


def choose_pairs(
    harvests: Sequence[Harvest], hook: str | Sequence[str] | None, target_hook: str | None, *, each: bool = False
) -> HookPairs:
    """The hook points asked for.

    Args:
        harvests: one, or those whose rows a crosscoder reads side by side.
        hook: one, or several that it reads side by side of each.
        each: several are an SAE's each instead.

    Raises:
        InputError: hook points that a harvest does not have (names those it has), a set with a missing layer, one
            pattern without the other, one activation twice, or harvests of different tokens.
    """
    hooks = as_hooks(hook)
    if len(harvests) > 1 or (len(hooks) > 1 and not each):
        return _side_by_side(harvests, hooks, target_hook)
    return pairs_among(harvests[0].hooks, f"harvest {harvests[0].name!r}", hooks, target_hook)


def as_hooks(hook: str | Sequence[str] | None) -> list[str]:
    """One, several or no hook points as a list."""
    return [hook] if isinstance(hook, str) else list(hook or ())


def _side_by_side(harvests: Sequence[Harvest], hooks: Sequence[str], target_hook: str | None) -> HookPairs:
    if target_hook is not None:
        raise InputError(
            f"a crosscoder of several activations reconstructs what it reads: leave --target-hook {target_hook} out; a "
            "transcoder reads and predicts hook points of one harvest, which holds their rows together"
        )
    wanted: Sequence[str | None] = hooks or [None]
    places = [
        Place(one, choose_hook(one.hooks, f"harvest {one.name!r}", hook)) for one in harvests for hook in wanted
    ]  # fmt: skip
    read = [(place.harvest.directory, place.hook) for place in places]
    if twice := next((place for number, place in enumerate(places) if read[number] in read[:number]), None):
        raise InputError(
            f"{twice.hook} of harvest {twice.harvest.name!r} is read twice: a crosscoder reads different activations, "
            "so name another harvest of the same tokens or another --hook"
        )
    check_same_tokens(harvests)
    if len(harvests) == 1:
        own = [place.hook for place in places]
    elif len(hooks) < 2:
        own = _without_shared_prefix([place.harvest.name for place in places])
    else:
        own = [f"{place.harvest.name}/{place.hook}" for place in places]
    shown = " + ".join(dict.fromkeys(place.hook for place in places))
    return HookPairs(shown, None, (), tuple(zip(own, places, strict=True)))


def _without_shared_prefix(names: list[str]) -> list[str]:
    """Names without what they all have before their last dot: diff.base and diff.tuned are base and tuned."""
    prefix = names[0].rpartition(".")[0] + "."
    return [name.removeprefix(prefix) for name in names] if all(name.startswith(prefix) for name in names) else names


def pairs_among(known: Sequence[str], where: str, hooks: Sequence[str], target: str | None) -> HookPairs:
    """The pairs of hook points asked for, among those that `where`, as error messages name it, has.

    Raises:
        InputError: as `choose_pairs`.
    """
    if target is None:
        pattern = next((one for one in hooks if EVERY_LAYER in one), None)
        if pattern is not None:
            raise InputError(
                f"{pattern} is every layer of a set of transcoders: say what they predict with --target-hook"
            )
        chosen = [choose_hook(known, where, one) for one in hooks] or [choose_hook(known, where, None)]
        return HookPairs(", ".join(chosen), None, tuple((one, "") for one in chosen))
    if not hooks:
        raise InputError(f"a transcoder that predicts {target} reads another hook point: give it with --hook")
    if len(hooks) > 1:
        raise InputError(
            f"a transcoder that predicts {target} reads one hook point: give one --hook, or for a transcoder of every "
            "layer a * in both"
        )
    return _transcoders(known, where, hooks[0], target)


def _transcoders(known: Sequence[str], where: str, hook: str, target: str) -> HookPairs:
    if (EVERY_LAYER in hook) != (EVERY_LAYER in target):
        raise InputError(
            f"{hook} and {target}: for a set of transcoders both hook points need a * for the layer, for one "
            "transcoder none"
        )
    if hook == target:
        raise InputError(f"a transcoder predicts another activation than it reads: leave --target-hook {target} out")
    if EVERY_LAYER not in hook:
        return HookPairs(
            hook, target, ((choose_hook(known, where, hook), choose_hook(known, where, target, "--target-hook")),)
        )
    layers = sorted(set(_layers(known, hook)) | set(_layers(known, target)))
    if not layers:
        raise InputError(f"{where} has no {hook}: it has {', '.join(known)}")
    pairs = [(at_layer(hook, layer), at_layer(target, layer)) for layer in range(max(layers) + 1)]
    missing = next((name for pair in pairs for name in pair if name not in known), None)
    if missing is not None:
        raise InputError(
            f"{where} has no {missing}, and a set of transcoders needs every layer from 0 to "
            f"{max(layers)}: harvest all of them together"
        )
    return HookPairs(hook, target, tuple(pairs))


def choose_hook(known: Sequence[str], where: str, hook: str | None, option: str = "--hook") -> str:
    """The hook point asked for by an option, or the only one. Raises InputError naming those there are."""
    if hook is None and len(known) == 1:
        return known[0]
    if hook is None or hook not in known:
        problem = "has several hook points" if hook is None else f"has no hook point {hook!r}"
        raise InputError(f"{where} {problem}: choose one of {', '.join(known)} with {option}")
    return hook


def at_layer(pattern: str, layer: int) -> str:
    """The hook point that a pattern with a * is at a layer."""
    return pattern.replace(EVERY_LAYER, str(layer))


def _layers(hooks: Sequence[str], pattern: str) -> list[int]:
    matcher = re.compile(re.escape(pattern).replace(re.escape(EVERY_LAYER), r"(\d+)", 1))
    return [int(found[1]) for hook in hooks if (found := matcher.fullmatch(hook))]
