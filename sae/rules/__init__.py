"""Selection rules: which features fire. A rule is one small frozen object; a new one is one file and one line here.

A rule has `name`, `encode(x, W_enc, b_enc) -> SparseCode`, `check(d_sae)` (raises InputError when it cannot work
with that many features) and is rebuilt from `to_dict(rule)` by `from_dict`.
"""

from dataclasses import asdict
from typing import Any

from sae.errors import InputError
from sae.rules.topk import TopK

RULES = {"topk": TopK}

Rule = TopK
"""Any of the rules; a union as the family grows."""


def to_dict(rule: Rule) -> dict[str, Any]:
    """`TopK(32) -> {"name": "topk", "k": 32}`."""
    return {"name": rule.name, **asdict(rule)}


def from_dict(fields: dict[str, Any]) -> Rule:
    """The inverse of `to_dict`. Raises InputError naming the rules there are."""
    fields = dict(fields)
    name = fields.pop("name", None)
    if name not in RULES:
        raise InputError(f"unknown selection rule {name!r}: choose one of {', '.join(sorted(RULES))}")
    return RULES[name](**fields)


__all__ = ["RULES", "Rule", "TopK", "from_dict", "to_dict"]
