"""Sparse autoencoders: codes, selection rules, training, metrics and file formats.

from sae import SAE
sae = SAE.load("saes/my-sae")
code = sae.encode(activations)      # the active features of every token
"""

from typing import TYPE_CHECKING

from sae.errors import InputError
from sae.lazy import lazy_exports

if TYPE_CHECKING:
    from sae.code import SparseCode
    from sae.config import TrainConfig
    from sae.model import SAE
    from sae.rules import (
        RULES,
        AbsTopK,
        Batch,
        BatchAbsTopK,
        BatchTopK,
        CodeRule,
        FeatureChoice,
        GradientTopK,
        JumpReLU,
        MutualChoice,
        ReLU,
        Rule,
        ThresholdRule,
        TopK,
        register_rule,
    )
    from sae.source import BatchSource, GradientSource
    from sae.training import StepMetrics, TrainedSAE, train
    from sae.transcoder import Transcoder
    from sae.transcoder_set import TranscoderSet, load_transcoders

__all__ = [
    "RULES",
    "SAE",
    "AbsTopK",
    "Batch",
    "BatchAbsTopK",
    "BatchSource",
    "BatchTopK",
    "CodeRule",
    "FeatureChoice",
    "GradientSource",
    "GradientTopK",
    "InputError",
    "JumpReLU",
    "MutualChoice",
    "ReLU",
    "Rule",
    "SparseCode",
    "StepMetrics",
    "ThresholdRule",
    "TopK",
    "TrainConfig",
    "TrainedSAE",
    "Transcoder",
    "TranscoderSet",
    "load_transcoders",
    "register_rule",
    "train",
]
_ELSEWHERE = {
    "BatchSource": "sae.source",
    "GradientSource": "sae.source",
    "SAE": "sae.model",
    "SparseCode": "sae.code",
    "StepMetrics": "sae.training",
    "TrainConfig": "sae.config",
    "TrainedSAE": "sae.training",
    "Transcoder": "sae.transcoder",
    "TranscoderSet": "sae.transcoder_set",
    "load_transcoders": "sae.transcoder_set",
    "train": "sae.training",
}
# Loaded when asked for: whoever wants InputError alone, such as the command line, does not wait for torch.
__getattr__, __dir__ = lazy_exports(__name__, {name: _ELSEWHERE.get(name, "sae.rules") for name in __all__})
