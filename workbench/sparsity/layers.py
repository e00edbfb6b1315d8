"""The weight matrices of a model's blocks, and its MLPs, found on the bare Hugging Face module.

An MLP computes y = W_out h (+ b), with h = act(W_in x) or, gated, h = act(W_gate x) * (W_in x). Neuron i hands
n_i = W_out[:, i] h_i to the output. `MLP.drive` is the matrix whose output goes into the activation function.

A mixture of experts is one wide MLP (`workbench.models.mixtures`): h holds the activations of all experts, times their
gates and zero where an expert was not chosen.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from sae.errors import InputError
from workbench.models.load import LoadedModel
from workbench.models.mixtures import WideOut


@dataclass(frozen=True)
class Projection:
    """One weight matrix of a block."""

    name: str
    """`blocks.LAYER.` and the module's path in the Hugging Face block."""
    layer: int
    module: nn.Module

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """As applied to a column vector, whichever way round the module stores it."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def d_in(self) -> int:
        """Width of its input."""
        # A mixture's matrix is put together whenever it is asked for.
        return self.module.in_features if isinstance(self.module, WideOut) else self.weight.shape[1]

    @property
    def flops(self) -> int:
        """Of its product with one token's vector: two per weight."""
        return 2 * self.weight.numel()


@dataclass(frozen=True)
class MLP:
    """The matrices of one MLP."""

    layer: int
    drive: Projection | None
    """W_gate of a gated MLP, W_in of another; None in a mixture of experts, whose matrices in are not told apart."""
    up: Projection | None
    """W_in of a gated MLP."""
    out: Projection
    activation: str
    """Name of the activation function, as transformers knows it."""

    @property
    def d_mlp(self) -> int:
        """Number of neurons."""
        return self.out.d_in

    @property
    def gated(self) -> bool:
        """Whether a second projection of the input multiplies the activations, as it may in a mixture of experts."""
        return self.up is not None or self.drive is None

    def act(self, z: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_mlp"]:
        """The activation function of pre-activations."""
        value: Tensor = ACT2FN[self.activation](z)
        return value

    def output_norms(self) -> Float[Tensor, "d_mlp"]:
        """||W_out[:, i]|| of every neuron, in float32."""
        return self.out.weight.float().norm(dim=0)


def projections(model: LoadedModel) -> list[Projection]:
    """Every weight matrix inside the blocks, in the order the modules are registered."""
    found = []
    for layer in range(model.info.n_layers):
        block = model.component(f"blocks.{layer}")
        if block is None:
            continue
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                found.append(Projection(f"blocks.{layer}.{path}", layer, module))
    return found


def mlps(model: LoadedModel) -> list[MLP]:
    """The MLP of every block.

    Raises:
        InputError: a block whose MLP is not made of single matrices in and out (fused gates), or whose experts are no
            such MLP.
    """
    by_module = {id(projection.module): projection for projection in projections(model)}
    if not model.info.n_layers:
        raise InputError(f"{model.info.name} is known by its hook points alone, which do not say what an MLP is")
    activation = _activation(model)
    found = []
    for layer in range(model.info.n_layers):
        wide = model.component(f"blocks.{layer}.mlp.out")
        if isinstance(wide, WideOut):
            found.append(MLP(layer, None, None, Projection(f"blocks.{layer}.mlp.out", layer, wide), activation))
            continue
        if model.component(f"blocks.{layer}.mlp") is None:
            raise InputError(
                f"{model.info.name} has no MLP in block {layer}: of attention there are sparsity attention and heads"
            )
        entry, gate, out = (_matrix(model, by_module, layer, name) for name in ("in", "gate", "out"))
        drive = gate or entry
        if drive is None or entry is None or out is None or drive.weight.shape[0] != out.d_in:
            raise InputError(
                f"{model.info.architecture} has no plain MLP in block {layer} (fused gate, or experts that are none): "
                "activation sparsity is measured on MLPs with one matrix in, at most one gate, and one matrix out"
            )
        found.append(MLP(layer, drive, entry if gate is not None else None, out, activation))
    return found


def _matrix(model: LoadedModel, by_module: dict[int, Projection], layer: int, name: str) -> Projection | None:
    """A matrix of a block's MLP; `dense_` stands before its name where other blocks are mixtures."""
    parts = (model.component(f"blocks.{layer}.mlp.{prefix}{name}") for prefix in ("", "dense_"))
    return next((by_module[id(part)] for part in parts if id(part) in by_module), None)


def flat_like(mask: Bool[Tensor, "batch pos"], value: Float[Tensor, "*rows width"]) -> Bool[Tensor, "*rows"]:
    """A mask of tokens for a matrix' input: some modules see all contexts' tokens as one list.

    Raises:
        InputError: an input that is not one vector a token.
    """
    if value.ndim == 2 and value.shape[0] == mask.numel():
        return mask.flatten()
    if value.shape[:-1] != mask.shape:
        raise InputError("a matrix of this model reads other than one vector a token: its sparsity is not measured")
    return mask


def has_exact_zeros(mlp: MLP) -> bool:
    """Whether the activation function gives exact zeros (ReLU and its powers) and not only small values."""
    return bool(mlp.act(torch.tensor([-1.0])).item() == 0.0)


def _activation(model: LoadedModel) -> str:
    config: Any = getattr(model.hf, "config", None)
    if config is None and (name := getattr(getattr(model.structure, "cfg", None), "act_fn", None)):
        # A HookedTransformer has TransformerLens' configuration alone.
        return str(name)
    for key in ("hidden_act", "activation_function", "hidden_activation"):
        if name := getattr(config, key, None):
            return str(name)
    raise InputError(f"{model.info.architecture} does not say which activation function its MLPs use (hidden_act)")
