"""Selection rules: which features fire. A rule is one small frozen object; a new one is one file and one line here.

`sae.rules.base` says what a rule does; it is rebuilt from `to_dict(rule)` by `from_dict`.
"""

from dataclasses import asdict, fields
from typing import Any

from sae.errors import InputError
from sae.rules.abstopk import AbsTopK
from sae.rules.base import AuxKind, Batch, CodeRule, Rule, Support, ThresholdRule
from sae.rules.batchtopk import BatchAbsTopK, BatchTopK, MutualChoice
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


def to_dict(rule: Rule) -> dict[str, Any]:
    """`TopK(32) -> {"name": "topk", "k": 32}`."""
    return {"name": rule.name, **asdict(rule)}


def from_dict(settings: dict[str, Any]) -> Rule:
    """The inverse of `to_dict`. Raises InputError naming the rules there are, or the settings of a rule."""
    settings = dict(settings)
    name = settings.pop("name", None)
    if name not in RULES:
        raise InputError(f"unknown selection rule {name!r}: choose one of {', '.join(sorted(RULES))}")
    try:
        return RULES[name](**settings)
    except TypeError:
        known = ", ".join(field.name for field in fields(RULES[name])) or "none"
        raise InputError(f"rule {name} got the settings {', '.join(settings) or 'none'}: it has {known}") from None


__all__ = [
    "RULES",
    "AbsTopK",
    "AuxKind",
    "Batch",
    "BatchAbsTopK",
    "BatchTopK",
    "CodeRule",
    "FeatureChoice",
    "GradientTopK",
    "JumpReLU",
    "MutualChoice",
    "ReLU",
    "Rule",
    "Support",
    "ThresholdRule",
    "TopK",
    "from_dict",
    "to_dict",
]
