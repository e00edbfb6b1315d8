"""The workbench: models, corpora, harvests, training, evaluation, features, circuits and sparsity in one workspace.

from workbench import TopK, TrainConfig, Workspace, load_model

What a notebook needs comes from here: of `sae` what is trained and configured, of `circuits` what is measured, the
workspace and its figures. The packages `sae` and `circuits` export the rest.
"""

import os
from typing import TYPE_CHECKING

from sae.errors import InputError
from sae.lazy import lazy_exports

# OpenMP's threads spin while they wait, so two processes on the same cores (the app beside a training run, two
# commands) starve each other and each takes many times as long; threads that sleep share them, and a process alone is
# as fast. It is read when torch is loaded, so it comes first; who has set it keeps it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from circuits import (
        ablate_heads,
        activations,
        attribute_edges,
        circuit_edges,
        composition_scores,
        direct_feature_attribution,
        faithfulness_curve,
        head_scores,
        head_shares,
        logit_attribution,
        make_task,
        patch_activations,
        patch_paths,
        register_task,
        repeated_tokens,
        task_names,
    )
    from circuits.splice import splice
    from sae import (
        SAE,
        AbsTopK,
        BatchAbsTopK,
        BatchTopK,
        Crosscoder,
        DenseSAE,
        FeatureChoice,
        GradientTopK,
        JumpReLU,
        MutualChoice,
        ReLU,
        SparseCode,
        TopK,
        TrainConfig,
        Transcoder,
        TranscoderSet,
        load_transcoders,
        train,
    )
    from workbench.catalog.catalog import Catalog
    from workbench.catalog.origin import Origin
    from workbench.catalog.results import Result
    from workbench.circuits.attention_view import attention_view
    from workbench.circuits.figures import (
        attention_pattern,
        attribution_map,
        circuit_graph,
        faithfulness_figure,
        head_heatmap,
        head_scores_heatmap,
    )
    from workbench.circuits.graphs import attribute, frozen_again, made_with, open_graph
    from workbench.features.index.figures import activation_histogram, logit_bars
    from workbench.features.index.on_text import activations_on_text
    from workbench.features.index.query import FeatureIndex
    from workbench.features.prompt_figures import next_token_bars
    from workbench.harvest.plan import HarvestConfig
    from workbench.models.capture import capture
    from workbench.models.hooks import read_hook, written_hook
    from workbench.models.load import LoadedModel, load_model, reload_model
    from workbench.models.own import OwnModel
    from workbench.saes.crosscoders import feature_table
    from workbench.saes.figures import density_histogram, sae_comparison, training_curves
    from workbench.saes.part_figures import latent_scaling, norm_histogram
    from workbench.saes.sweeps import parse_sweep
    from workbench.sparsity.figures import (
        attention_curves,
        best_patterns,
        cost_curves,
        head_costs,
        layer_overview,
        neuron_densities,
    )
    from workbench.text.corpora import Corpus, open_corpus
    from workbench.workspace import Workspace

_EXPORTS = {
    "sae": (
        "SAE",
        "AbsTopK",
        "BatchAbsTopK",
        "BatchTopK",
        "Crosscoder",
        "DenseSAE",
        "FeatureChoice",
        "GradientTopK",
        "JumpReLU",
        "MutualChoice",
        "ReLU",
        "SparseCode",
        "TopK",
        "TrainConfig",
        "Transcoder",
        "TranscoderSet",
        "load_transcoders",
        "train",
    ),
    "circuits": (
        "ablate_heads",
        "activations",
        "attribute_edges",
        "circuit_edges",
        "composition_scores",
        "direct_feature_attribution",
        "faithfulness_curve",
        "head_scores",
        "head_shares",
        "logit_attribution",
        "make_task",
        "patch_activations",
        "patch_paths",
        "register_task",
        "repeated_tokens",
        "task_names",
    ),
    "circuits.splice": ("splice",),
    "workbench.catalog.catalog": ("Catalog",),
    "workbench.catalog.origin": ("Origin",),
    "workbench.catalog.results": ("Result",),
    "workbench.circuits.attention_view": ("attention_view",),
    "workbench.circuits.figures": (
        "attention_pattern",
        "attribution_map",
        "circuit_graph",
        "faithfulness_figure",
        "head_heatmap",
        "head_scores_heatmap",
    ),
    "workbench.circuits.graphs": ("attribute", "frozen_again", "made_with", "open_graph"),
    "workbench.features.index.figures": ("activation_histogram", "logit_bars"),
    "workbench.features.index.on_text": ("activations_on_text",),
    "workbench.features.index.query": ("FeatureIndex",),
    "workbench.features.prompt_figures": ("next_token_bars",),
    "workbench.harvest.plan": ("HarvestConfig",),
    "workbench.models.capture": ("capture",),
    "workbench.models.hooks": ("read_hook", "written_hook"),
    "workbench.models.load": ("LoadedModel", "load_model", "reload_model"),
    "workbench.models.own": ("OwnModel",),
    "workbench.saes.crosscoders": ("feature_table",),
    "workbench.saes.figures": ("density_histogram", "sae_comparison", "training_curves"),
    "workbench.saes.part_figures": ("latent_scaling", "norm_histogram"),
    "workbench.saes.sweeps": ("parse_sweep",),
    "workbench.sparsity.figures": (
        "attention_curves",
        "best_patterns",
        "cost_curves",
        "head_costs",
        "layer_overview",
        "neuron_densities",
    ),
    "workbench.text.corpora": ("Corpus", "open_corpus"),
    "workbench.workspace": ("Workspace",),
}
_HOMES = {name: home for home, names in _EXPORTS.items() for name in names}
__all__ = [
    "SAE",
    "AbsTopK",
    "BatchAbsTopK",
    "BatchTopK",
    "Catalog",
    "Corpus",
    "Crosscoder",
    "DenseSAE",
    "FeatureChoice",
    "FeatureIndex",
    "GradientTopK",
    "HarvestConfig",
    "InputError",
    "JumpReLU",
    "LoadedModel",
    "MutualChoice",
    "Origin",
    "OwnModel",
    "ReLU",
    "Result",
    "SparseCode",
    "TopK",
    "TrainConfig",
    "Transcoder",
    "TranscoderSet",
    "Workspace",
    "ablate_heads",
    "activation_histogram",
    "activations",
    "activations_on_text",
    "attention_curves",
    "attention_pattern",
    "attention_view",
    "attribute",
    "attribute_edges",
    "attribution_map",
    "best_patterns",
    "capture",
    "circuit_edges",
    "circuit_graph",
    "composition_scores",
    "cost_curves",
    "density_histogram",
    "direct_feature_attribution",
    "faithfulness_curve",
    "faithfulness_figure",
    "feature_table",
    "frozen_again",
    "head_costs",
    "head_heatmap",
    "head_scores",
    "head_scores_heatmap",
    "head_shares",
    "latent_scaling",
    "layer_overview",
    "load_model",
    "load_transcoders",
    "logit_attribution",
    "logit_bars",
    "made_with",
    "make_task",
    "neuron_densities",
    "next_token_bars",
    "norm_histogram",
    "open_corpus",
    "open_graph",
    "parse_sweep",
    "patch_activations",
    "patch_paths",
    "read_hook",
    "register_task",
    "reload_model",
    "repeated_tokens",
    "sae_comparison",
    "splice",
    "task_names",
    "train",
    "training_curves",
    "written_hook",
]
# Loaded when asked for: the command line answers Ctrl-C with one line from its start, and torch takes a second.
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
