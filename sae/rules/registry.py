"""Rules by name: those of this package, and a door for rules of one's own.

A rule's class is found under the name that it has itself (`Rule.name`):

1. the rules of this package, `RULES`;
2. what was registered in this process by `register_rule`;
3. entry points of the group `interp_workbench.rules` of every installed package, named as the rule, in its
   pyproject.toml

       [project.entry-points."interp_workbench.rules"]
       groupmax = "my_package.rules:GroupMax"

The last are there in every process: for the command line and the app too. A rule of another package is imported when
it is first asked for.
"""

import dataclasses
import inspect
import re
from typing import Any, TypeVar

from sae import plugins
from sae.errors import InputError
from sae.rules.abstopk import AbsTopK
from sae.rules.base import SAELENS_ARCHITECTURES, CodeRule, Rule, ThresholdRule
from sae.rules.batchtopk import BatchAbsTopK, BatchTopK, MutualChoice
from sae.rules.codebook import Codebook
from sae.rules.feature_choice import FeatureChoice
from sae.rules.gradient_topk import GradientTopK
from sae.rules.jumprelu import JumpReLU
from sae.rules.relu import ReLU
from sae.rules.topk import TopK

RULES: dict[str, type[Rule]] = {
    "topk": TopK,
    "abstopk": AbsTopK,
    "batchtopk": BatchTopK,
    "mutual_choice": MutualChoice,
    "batch_abstopk": BatchAbsTopK,
    "feature_choice": FeatureChoice,
    "gradient_topk": GradientTopK,
    "jumprelu": JumpReLU,
    "relu": ReLU,
}
"""The rules of this package that an SAE can be trained with."""
FITTED: dict[str, type[Rule]] = {"codebook": Codebook}
"""Those that are fitted otherwise, and read back as the others are."""
GROUP = "interp_workbench.rules"
"""Entry points of other packages' rules."""
_registered: dict[str, type[Rule]] = {}
AnyRule = TypeVar("AnyRule", bound=type[Rule])


def register_rule(rule: AnyRule) -> AnyRule:
    """Makes a rule's class known by its name in this process, and returns it: also to be used as a decorator.

    Trainer, checkpoints, sweeps, the command line and files then take it as one of this package's. A class of the same
    module and name may come again, as when a notebook's cell is run twice.

    Raises:
        InputError: a name that is taken or cannot be one, or a class that is no rule, is not frozen, or lacks methods.
    """
    _check(rule, f"{rule.__name__!r}" if isinstance(rule, type) else f"a {type(rule).__name__}")
    known = _registered.get(rule.name)
    again = known is not None and (known.__module__, known.__qualname__) == (rule.__module__, rule.__qualname__)
    if not again and (known is not None or rule.name in RULES | FITTED or plugins.is_elsewhere(GROUP, rule.name, rule)):
        raise InputError(f"there is a rule {rule.name!r} already: give {rule.__name__} another name")
    _registered[rule.name] = rule
    return rule


def rule_names() -> list[str]:
    """Names that `rule_class` takes: this package's rules, then other packages' and those registered here."""
    return list(dict.fromkeys([*RULES, *sorted(plugins.found(GROUP)), *_registered]))


def rule_class(name: str) -> type[Rule]:
    """The class of a rule.

    Raises:
        InputError: an unknown name; or a rule of another package that has a name taken, cannot be imported, or is none.
    """
    loaded = None
    if name not in _registered or plugins.is_elsewhere(GROUP, name, _registered[name]):
        loaded = plugins.load(GROUP, name, "rule", taken={*RULES, *FITTED, *_registered})
    if loaded is not None:
        rule, package = loaded
        _check(rule, f"{name!r} of {package}")
        if rule.name != name:
            raise InputError(
                f"the rule {name!r} of {package} calls itself {rule.name!r}: give its entry point that name"
            )
        checked: type[Rule] = rule
        return checked
    known = (RULES | FITTED).get(name) or _registered.get(name)
    if known is None:
        raise InputError(
            f"unknown selection rule {name!r}: choose one of {', '.join(sorted(rule_names()))}, or import what "
            "registers it"
        )
    return known


def _check(rule: Any, what: str) -> None:
    """Raises InputError unless `rule` is a class that can be trained with and written to files."""
    if not (isinstance(rule, type) and issubclass(rule, CodeRule | ThresholdRule)):
        raise InputError(f"the rule {what} is no selection rule: derive a class from sae.CodeRule or sae.ThresholdRule")
    missing = ", ".join(sorted(rule.__abstractmethods__)) if inspect.isabstract(rule) else ""
    if missing:
        raise InputError(f"the rule {what} lacks {missing}: sae.rules.base says what these do")
    name = getattr(rule, "name", None)
    if not isinstance(name, str) or re.fullmatch(r"[a-z][a-z0-9_]*", name) is None:
        raise InputError(f"the rule {what} has the name {name!r}: give it one of lower-case letters, digits and _")
    parameters = vars(rule).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise InputError(f"the rule {what} is no frozen dataclass: put @dataclass(frozen=True) above it")
    taken = name not in RULES and name in SAELENS_ARCHITECTURES
    if taken or rule.saelens not in (None, *SAELENS_ARCHITECTURES):
        known = ", ".join(SAELENS_ARCHITECTURES)
        raise InputError(
            f"the rule {what} has the name {name!r} and the SAELens architecture {rule.saelens!r}: "
            f"`saelens` is one of {known}, or None, and no other rule's name is"
        )


def to_dict(rule: Rule) -> dict[str, Any]:
    """`TopK(32) -> {"name": "topk", "k": 32}`."""
    return {"name": rule.name, **dataclasses.asdict(rule)}


def from_dict(settings: dict[str, Any]) -> Rule:
    """The inverse of `to_dict`. Raises InputError naming the rules there are, or the settings of a rule."""
    settings = dict(settings)
    name = settings.pop("name", None)
    found = rule_class(name if isinstance(name, str) else str(name))
    try:
        return found(**settings)
    except TypeError:
        known = ", ".join(field.name for field in dataclasses.fields(found)) or "none"
        raise InputError(f"rule {name} got the settings {', '.join(settings) or 'none'}: it has {known}") from None
