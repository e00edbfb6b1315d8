"""Supervised feature dictionaries, and three tests of any dictionary against a task whose attributes are known.

On prompts p with attributes a_i(p) (in IOI: the two names, their order), activations a(p) at one place are
reconstructed as

    a_hat(p) = mean + sum_i u_{i, a_i(p)}
    mean features   u_{i = v} = E[a | a_i = v] - E[a]
    MSE features    least squares of a - mean on the one-hot attributes

1. approximation   sufficiency LD(a -> a_hat) / LD(clean); necessity 1 - |LD_mean - LD_int| / |LD_mean - LD_clean| with
                   a -> E[a] + (a - a_hat), LD_mean that of a -> E[a]: how much of what the activation does is in a_hat
2. control         edit one attribute of a(p) to its counterfactual value by changing at most k features (removed,
                   added, or set to their counterfactual activation), chosen greedily by how close the result comes
                   to the counterfactual activation; success is a
                   prediction equal to that of patching the counterfactual activation. Always read beside the rate
                   without any edit and that of a frozen random decoder.
3. interpretation  F1 of a feature's active set against the prompts with an attribute value or a union of values

(Makelov, Lange & Nanda 2024, arXiv 2405.08366.) The activation is that at `hook_name` at the last position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge
from circuits.passes import activations, answer_logits, last_values
from circuits.prompts import PromptSet
from sae.errors import InputError

Attributes = Mapping[str, Sequence[Any]]
"""Values of every attribute, one a prompt."""


@dataclass(frozen=True)
class SupervisedDictionary:
    """A vector for every attribute value."""

    mean: Float[Tensor, "d"]
    features: Float[Tensor, "values d"]
    names: list[tuple[str, Any]]
    """(attribute, value) of each row."""

    def reconstruct(self, attributes: Attributes) -> Float[Tensor, "n d"]:
        """mean + sum over attributes of their value's vector."""
        return self.mean + _one_hot(attributes, self.names).to(self.features) @ self.features


@dataclass(frozen=True)
class Approximation:
    """How faithful reconstructions are; 1 is perfect for either."""

    sufficiency: float
    necessity: float
    clean: float
    """Mean logit difference of the untouched model."""
    mean_ablated: float


def fit(activation: Float[Tensor, "n d"], attributes: Attributes, method: str = "mse") -> SupervisedDictionary:
    """Mean or MSE features.

    Raises:
        InputError: an unknown method, or attributes of another length than the activations.
    """
    if method not in ("mean", "mse"):
        raise InputError(f"unknown method {method!r}: choose mean or mse")
    if not attributes or any(len(values) != len(activation) for values in attributes.values()):
        raise InputError(f"every attribute needs one value a prompt: there are {len(activation)} prompts")
    names = [(name, value) for name, values in attributes.items() for value in sorted(set(values), key=str)]
    one_hot = _one_hot(attributes, names).to(activation.device)
    mean = activation.double().mean(dim=0)
    centred = activation.double() - mean
    if method == "mean":
        features = (one_hot.T @ centred) / one_hot.sum(dim=0)[:, None]
    else:
        # One-hot blocks are linearly dependent on one another: the pseudo-inverse takes the shortest solution.
        features = torch.linalg.pinv(one_hot) @ centred
    return SupervisedDictionary(mean.to(activation), features.to(activation), names)


def activation_at(
    bridge: Bridge, tokens: Int[Tensor, "n pos"], prompts: PromptSet, hook_name: str
) -> Float[Tensor, "n d"]:
    """Activations at the last positions, heads of hook_z concatenated."""
    found = activations(bridge, tokens, [hook_name])[hook_name]
    return last_values(found.flatten(2), prompts)


@torch.no_grad()
def with_activation(
    bridge: Bridge, prompts: PromptSet, hook_name: str, replacement: Float[Tensor, "n d"]
) -> Float[Tensor, "n vocab"]:
    """Logits with the activation at the last position replaced."""

    def replace(value: Tensor, hook: Any) -> Tensor:
        changed = value.clone()
        rows = torch.arange(len(prompts), device=value.device)
        changed[rows, prompts.last] = replacement.to(value.dtype).view(len(prompts), *value.shape[2:])
        return changed

    return answer_logits(bridge, prompts.clean, prompts.last, [(hook_name, replace)])


@torch.no_grad()
def approximation(
    bridge: Bridge,
    prompts: PromptSet,
    hook_name: str,
    reconstruction: Float[Tensor, "n d"],
    *,
    metric: Metric = logit_difference,
) -> Approximation:
    """Test 1 for reconstructions of the clean activations, from whatever dictionary."""
    a = activation_at(bridge, prompts.clean, prompts, hook_name)
    mean = a.mean(dim=0, keepdim=True).expand_as(a)

    def measured(replacement: Tensor) -> float:
        return metric(with_activation(bridge, prompts, hook_name, replacement), prompts).mean().item()

    clean = metric(answer_logits(bridge, prompts.clean, prompts.last), prompts).mean().item()
    ablated = measured(mean)
    without = measured(mean + a - reconstruction)
    return Approximation(
        measured(reconstruction) / clean, 1 - abs(ablated - without) / abs(ablated - clean), clean, ablated
    )


@dataclass(frozen=True)
class Control:
    """Share of prompts whose prediction after the edit is that after patching the counterfactual activation."""

    edited: float
    unedited: float
    """Without any edit."""
    changed: float
    """Mean number of features changed."""


@torch.no_grad()
def sparse_control(
    bridge: Bridge,
    prompts: PromptSet,
    hook_name: str,
    encode: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n features"]],
    decoder: Float[Tensor, "features d"],
    *,
    k: int = 2,
) -> Control:
    """Test 2: the corrupted prompts are the counterfactuals of the clean ones.

    Args:
        encode: gives the code of activations.
        decoder: directions of the features; what is edited is the activation, so biases play no part.
        k: features changed at most.
    """
    a, target = (activation_at(bridge, t, prompts, hook_name) for t in (prompts.clean, prompts.corrupted))
    present, wanted = encode(a), encode(target)
    edited, changed = greedy_edit(a, target, present, wanted, decoder, k)
    goal = with_activation(bridge, prompts, hook_name, target).argmax(dim=-1)
    reached = with_activation(bridge, prompts, hook_name, edited).argmax(dim=-1)
    unedited = answer_logits(bridge, prompts.clean, prompts.last).argmax(dim=-1)
    return Control(
        (reached == goal).double().mean().item(),
        (unedited == goal).double().mean().item(),
        changed.double().mean().item(),
    )


def greedy_edit(
    a: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    present: Float[Tensor, "n features"],
    wanted: Float[Tensor, "n features"],
    decoder: Float[Tensor, "features d"],
    k: int,
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:
    """Sets features to their wanted value one at a time while that brings a nearer to the target.

    A feature in one code only is removed or added; one in both changes its activation, which counts as one change.

    Returns:
        The edited activations and the number of changes made to each.
    """
    coefficients = wanted - present
    squares = decoder.square().sum(dim=1)
    edited, changed = a.clone(), torch.zeros(len(a), dtype=torch.long, device=a.device)
    available = coefficients != 0
    rows = torch.arange(len(a), device=a.device)
    for _ in range(k):
        gap = target - edited
        # |gap - c d|^2 = |gap|^2 - (2 c gap . d - c^2 |d|^2)
        gain = 2 * coefficients * (gap @ decoder.T) - coefficients.square() * squares
        best, chosen = torch.where(available, gain, -torch.inf).max(dim=1)
        useful = best > 0
        step = coefficients[rows, chosen][:, None] * decoder[chosen]
        edited = torch.where(useful[:, None], edited + step, edited)
        available[rows[useful], chosen[useful]] = False
        changed += useful
    return edited, changed


def interpretations(
    active: Bool[Tensor, "n features"], attributes: Attributes, *, largest_union: int = 10
) -> pd.DataFrame:
    """Test 3: for every feature that fires, the attribute and union of values with the largest F1.

    Values join a union in order of the share of their prompts on which the feature fires: F1 is a ratio of sums over
    the values, so its largest value over all unions is at one of these.

    Returns:
        Columns feature, attribute, values, f1; best first.
    """
    rows = []
    fires = active.any(dim=0).nonzero().squeeze(1).tolist()
    for feature in fires:
        on = active[:, feature].cpu()
        best: tuple[float, str, tuple[Any, ...]] = (-1.0, "", ())
        for name, values in attributes.items():
            groups = {v: torch.tensor([value == v for value in values]) for v in set(values)}
            by_share = sorted(groups, key=lambda v: (-(on & groups[v]).sum().item() / groups[v].sum().item(), str(v)))
            union = torch.zeros_like(on)
            for size, value in enumerate(by_share[:largest_union], start=1):
                union = union | groups[value]
                f1 = 2 * (on & union).sum().item() / (on.sum() + union.sum()).item()
                if f1 > best[0]:
                    best = f1, name, tuple(by_share[:size])
        rows.append((feature, best[1], best[2], best[0]))
    table = pd.DataFrame(rows, columns=["feature", "attribute", "values", "f1"])
    return table.sort_values("f1", ascending=False, ignore_index=True)


def _one_hot(attributes: Attributes, names: Sequence[tuple[str, Any]]) -> Float[Tensor, "n values"]:
    columns = [[float(value == wanted) for value in attributes[name]] for name, wanted in names]
    return torch.tensor(columns, dtype=torch.float64).T
