"""Selection rules: which features fire. A rule is one small frozen object; a new one is one file and one line.

`sae.rules.base` says what a rule does; `sae.rules.registry` finds rules by name and takes in those of others. A rule is
rebuilt from `to_dict(rule)` by `from_dict`.
"""

from sae.rules.abstopk import AbsTopK
from sae.rules.base import (
    ActiveSums,
    AuxKind,
    Batch,
    CodeRule,
    FusedEncoder,
    FusedInputs,
    Rule,
    ThresholdRule,
)
from sae.rules.batchtopk import BatchAbsTopK, BatchTopK, MutualChoice
from sae.rules.codebook import Codebook
from sae.rules.feature_choice import FeatureChoice
from sae.rules.gradient_topk import GradientTopK
from sae.rules.jumprelu import JumpReLU
from sae.rules.registry import RULES, from_dict, register_rule, rule_class, rule_names, to_dict
from sae.rules.relu import ReLU
from sae.rules.topk import TopK

__all__ = [
    "RULES",
    "AbsTopK",
    "ActiveSums",
    "AuxKind",
    "Batch",
    "BatchAbsTopK",
    "BatchTopK",
    "CodeRule",
    "Codebook",
    "FeatureChoice",
    "FusedEncoder",
    "FusedInputs",
    "GradientTopK",
    "JumpReLU",
    "MutualChoice",
    "ReLU",
    "Rule",
    "ThresholdRule",
    "TopK",
    "from_dict",
    "register_rule",
    "rule_class",
    "rule_names",
    "to_dict",
]
