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
    from sae.crosscoder import Crosscoder
    from sae.dense import DenseSAE
    from sae.description import DenseConfig
    from sae.kernels import Encoder
    from sae.model import SAE
    from sae.rules import (
        RULES,
        AbsTopK,
        Batch,
        BatchAbsTopK,
        BatchTopK,
        Codebook,
        CodeRule,
        FeatureChoice,
        FusedEncoder,
        FusedInputs,
        GradientTopK,
        JumpReLU,
        MutualChoice,
        ReLU,
        Rule,
        ThresholdRule,
        TopK,
        register_rule,
    )
    from sae.rules.base import NO_TENSORS, Tensors
    from sae.source import BatchSource, GradientSource
    from sae.training import StepMetrics, TrainedSAE, train
    from sae.transcoder import Transcoder
    from sae.transcoder_set import TranscoderSet, load_transcoders

__all__ = [
    "NO_TENSORS",
    "RULES",
    "SAE",
    "AbsTopK",
    "Batch",
    "BatchAbsTopK",
    "BatchSource",
    "BatchTopK",
    "CodeRule",
    "Codebook",
    "Crosscoder",
    "DenseConfig",
    "DenseSAE",
    "Encoder",
    "FeatureChoice",
    "FusedEncoder",
    "FusedInputs",
    "GradientSource",
    "GradientTopK",
    "InputError",
    "JumpReLU",
    "MutualChoice",
    "ReLU",
    "Rule",
    "SparseCode",
    "StepMetrics",
    "Tensors",
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
    "BatchSource": "sae.source", "GradientSource": "sae.source",
    "SAE": "sae.model",
    "SparseCode": "sae.code",
    "StepMetrics": "sae.training", "TrainedSAE": "sae.training", "train": "sae.training",
    "TrainConfig": "sae.config",
    "Transcoder": "sae.transcoder",
    "Crosscoder": "sae.crosscoder",
    "DenseConfig": "sae.description", "DenseSAE": "sae.dense",
    "TranscoderSet": "sae.transcoder_set", "load_transcoders": "sae.transcoder_set",
    # What a rule is written with: in rules' own files, which `sae.rules` is still loading then.
    "Encoder": "sae.kernels",
    "NO_TENSORS": "sae.rules.base", "Batch": "sae.rules.base", "CodeRule": "sae.rules.base",
    "FusedEncoder": "sae.rules.base", "FusedInputs": "sae.rules.base", "Rule": "sae.rules.base",
    "Tensors": "sae.rules.base", "ThresholdRule": "sae.rules.base",
}  # fmt: skip
# Loaded when asked for: whoever wants InputError alone, such as the command line, does not wait for torch.
__getattr__, __dir__ = lazy_exports(__name__, {name: _ELSEWHERE.get(name, "sae.rules") for name in __all__})
