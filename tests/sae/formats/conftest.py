"""The peers whose files are read and written, from their own packages; tests skip where they are not installed.

dictionary_learning's package imports its activation buffer, and with it nnsight, as soon as it is imported. Its SAE
classes need neither: they are imported from the package's folder without running its `__init__`.
"""

import importlib
import importlib.util
import os
import sys
import types
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def sparsify() -> Any:
    # Its decoder is a Triton kernel wherever Triton is installed, and Triton needs a GPU.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    return pytest.importorskip("sparsify", reason="needs eai-sparsify")


@pytest.fixture(scope="session")
def dictionary_learning() -> types.SimpleNamespace:
    """The SAE classes of dictionary_learning by name."""
    spec = importlib.util.find_spec("dictionary_learning")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs dictionary-learning")
    if "dictionary_learning" not in sys.modules:
        package = types.ModuleType("dictionary_learning")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec  # what find_spec answers with for a module that is imported
        sys.modules["dictionary_learning"] = package
    classes = {}
    for module, names in {
        "dictionary": ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"),
        "trainers.top_k": ("AutoEncoderTopK",),
        "trainers.batch_top_k": ("BatchTopKSAE",),
        "trainers.matryoshka_batch_top_k": ("MatryoshkaBatchTopKSAE",),
    }.items():
        imported = importlib.import_module(f"dictionary_learning.{module}")
        classes.update({name: getattr(imported, name) for name in names})
    return types.SimpleNamespace(**classes)


@pytest.fixture(scope="session")
def tracer() -> Any:
    """circuit-tracer's module of transcoders one a layer. PyPI's package is a fork of its repository, with the same
    loader, which knows no TopK yet."""
    name = "circuit_tracer.transcoder.single_layer_transcoder"
    return pytest.importorskip(name, reason="needs circuit-tracer")


@pytest.fixture
def x() -> torch.Tensor:
    """Activations with a mean of their own."""
    return torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


@pytest.fixture
def randomise():
    """Fills every parameter of a peer's module; decoder rows (of 16) get the norms given, or 1."""

    def fill(module: torch.nn.Module, *, norms: torch.Tensor | None = None) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                if "threshold" in name:
                    parameter.copy_(parameter.abs())
                if name in ("W_dec", "decoder.weight"):
                    rows = parameter if name == "W_dec" else parameter.T
                    rows /= rows.norm(dim=1, keepdim=True)
                    if norms is not None:
                        rows *= norms[:, None]
        return module

    return fill
