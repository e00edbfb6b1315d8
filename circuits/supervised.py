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

and two faults that the paper describes without a formula (these numbers are reconstructed):

over-splitting     a value's F1 by the best single feature against that of the best features joined one by one: many
                   features and a much larger F1 where what is one value is split into small features
occlusion          of every attribute the strength E|u_{i, a_i}|^2 / E|a - mean|^2 and the effect, the part of
                   LD(clean) - LD_mean that goes with a -> a - u_{i, a_i}; occluded is an attribute that the features
                   show worse than one of greater strength and smaller effect

(Makelov, Lange & Nanda 2024, arXiv 2405.08366.) The activation is that at `hook_name` at the last position.
"""

import math
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
from sae.shown import Shown

Attributes = Mapping[str, Sequence[Any]]
"""Values of every attribute, one a prompt; None where a prompt has none."""
BATCH = 32
"""Prompts a forward pass."""


@dataclass(frozen=True, repr=False)
class SupervisedDictionary(Shown):
    """A vector for every attribute value."""

    mean: Float[Tensor, "d"]
    features: Float[Tensor, "values d"]
    names: list[tuple[str, Any]]
    """(attribute, value) of each row."""

    def code(self, attributes: Attributes) -> Float[Tensor, "n values"]:
        """1 at the value of every attribute; nothing for None and for values that it was not fitted on."""
        return _one_hot(attributes, self.names).to(self.features)

    def reconstruct(self, attributes: Attributes) -> Float[Tensor, "n d"]:
        """mean + sum over attributes of their value's vector."""
        return self.mean + self.code(attributes) @ self.features

    def part(self, attribute: str, attributes: Attributes) -> Float[Tensor, "n d"]:
        """The vector of one attribute's value in every prompt."""
        own = torch.tensor([name == attribute for name, _ in self.names], device=self.features.device)
        return self.code(attributes)[:, own] @ self.features[own]


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
    names = [(name, value) for name, values in attributes.items() for value in _values(values)]
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
    bridge: Bridge, tokens: Int[Tensor, "n pos"], prompts: PromptSet, hook_name: str, batch_size: int = BATCH
) -> Float[Tensor, "n d"]:
    """Activations at the last positions, heads of hook_z concatenated; of a model in half precision in float32."""
    parts = zip(tokens.split(batch_size), prompts.batches(batch_size), strict=True)
    found = torch.cat(
        [last_values(activations(bridge, part, [hook_name])[hook_name].flatten(2), own) for part, own in parts]
    )
    return found.to(torch.promote_types(found.dtype, torch.float32))


@torch.no_grad()
def with_activation(
    bridge: Bridge,
    prompts: PromptSet,
    hook_name: str,
    replacement: Float[Tensor, "n d"] | None = None,
    batch_size: int = BATCH,
) -> Float[Tensor, "n vocab"]:
    """Logits with the activation at the last position replaced; of the untouched model without a replacement."""

    def logits(batch: PromptSet, new: Tensor | None) -> Tensor:
        def replace(value: Tensor, hook: Any) -> Tensor:
            changed = value.clone()
            rows = torch.arange(len(batch), device=value.device)
            changed[rows, batch.last] = new.to(value.dtype).view(len(batch), *value.shape[2:])  # type: ignore[union-attr]
            return changed

        return answer_logits(bridge, batch.clean, batch.last, [] if new is None else [(hook_name, replace)])

    parts = [None] * len(prompts) if replacement is None else replacement.split(batch_size)
    # strict would refuse the many Nones.
    return torch.cat([logits(*pair) for pair in zip(prompts.batches(batch_size), parts, strict=False)])


@torch.no_grad()
def approximation(
    bridge: Bridge,
    prompts: PromptSet,
    hook_name: str,
    reconstruction: Float[Tensor, "n d"],
    *,
    metric: Metric = logit_difference,
    batch_size: int = BATCH,
) -> Approximation:
    """Test 1 for reconstructions of the clean activations, from whatever dictionary; NaN where nothing is shared."""
    a = activation_at(bridge, prompts.clean, prompts, hook_name, batch_size)
    mean = a.mean(dim=0, keepdim=True).expand_as(a)

    measured = _meter(bridge, prompts, hook_name, metric, batch_size)
    clean, ablated = measured(None), measured(mean)
    without = measured(mean + a - reconstruction)
    lost = abs(ablated - clean) or math.nan
    return Approximation(
        measured(reconstruction) / (clean or math.nan), 1 - abs(ablated - without) / lost, clean, ablated
    )


def _meter(
    bridge: Bridge, prompts: PromptSet, hook_name: str, metric: Metric, batch_size: int
) -> Callable[[Tensor | None], float]:
    """The mean metric as a function of the replacement."""

    def measured(replacement: Tensor | None) -> float:
        return metric(with_activation(bridge, prompts, hook_name, replacement, batch_size), prompts).mean().item()

    return measured


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
    present: Float[Tensor, "n features"],
    wanted: Float[Tensor, "n features"],
    decoder: Float[Tensor, "features d"],
    *,
    k: int = 2,
    batch_size: int = BATCH,
) -> Control:
    """Test 2: the corrupted prompts are the counterfactuals of the clean ones.

    Args:
        present: code of the clean activations.
        wanted: code of the corrupted ones.
        decoder: directions of the features; what is edited is the activation, so biases play no part.
        k: features changed at most.
    """
    sides = (prompts.clean, prompts.corrupted)
    a, target = (activation_at(bridge, tokens, prompts, hook_name, batch_size) for tokens in sides)
    edited, changed = greedy_edit(a, target, present, wanted, decoder, k)
    goal, reached, unedited = (
        with_activation(bridge, prompts, hook_name, replacement, batch_size).argmax(dim=-1)
        for replacement in (target, edited, None)
    )
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


def least_squares_code(
    x: Float[Tensor, "n d"], decoder: Float[Tensor, "features d"], k: int
) -> Float[Tensor, "n features"]:
    """The code that fits x best on the k unit directions that are most parallel to it, least squares on these."""
    chosen = (x @ decoder.T).abs().topk(min(k, *decoder.shape), dim=1).indices
    values = torch.linalg.lstsq(decoder[chosen].mT, x[..., None]).solution[..., 0]
    return x.new_zeros(len(x), len(decoder)).scatter(1, chosen, values)


def best_unions(
    hits: Float[Tensor, "features values"],
    sizes: Float[Tensor, "values"],
    fires: Float[Tensor, "features"],
    *,
    largest: int = 10,
) -> tuple[Float[Tensor, "features"], Bool[Tensor, "features values"]]:
    """Of every feature the union of at most `largest` values with the largest F1 = 2 hits(U) / (fires + size(U)).

    A union with a larger F1 than f is one with sum over its values of 2 hits - f size > f fires. So, from f = 0, take
    the values where that term is largest and above zero and let their F1 be f, until it stays (Dinkelbach 1967): exact.

    Args:
        hits: prompts with a value on which a feature fires.
        sizes: prompts with a value.
        fires: prompts on which a feature fires, at least one.

    Returns:
        The F1 and which values are in the union; 0 and none where a feature fires on prompts without a value only.
    """
    f1 = torch.zeros_like(fires)
    while True:
        gain = 2 * hits - f1[:, None] * sizes
        best = gain.topk(min(largest, len(sizes)), dim=1).indices
        union = torch.zeros_like(hits, dtype=torch.bool).scatter(1, best, gain.gather(1, best) > 1e-9)
        found = 2 * (hits * union).sum(dim=1) / (fires + (sizes * union).sum(dim=1))
        if bool((found <= f1 + 1e-12).all()):
            return found, union
        f1 = found


def interpretations(
    active: Bool[Tensor, "n features"], attributes: Attributes, *, largest_union: int = 10
) -> pd.DataFrame:
    """Test 3: for every feature that fires, the attribute and union of values with the largest F1.

    Unions hold at most `largest_union` values and never all: a feature that always fires would show each attribute.

    Returns:
        Columns feature, attribute, values, f1; best first. No attribute and 0 where a feature fires on no value.
    """
    fires = active.any(dim=0).nonzero().squeeze(1).tolist()
    on = active[:, fires].cpu().double()
    best: list[tuple[float, str, tuple[Any, ...]]] = [(0.0, "", ())] * len(fires)
    for name, given in attributes.items():
        values = _values(given)
        if len(values) < 2:
            continue
        groups = _one_hot({name: given}, [(name, value) for value in values])
        f1, unions = best_unions(
            on.T @ groups, groups.sum(dim=0), on.sum(dim=0), largest=min(largest_union, len(values) - 1)
        )
        for place, (score, union) in enumerate(zip(f1.tolist(), unions.tolist(), strict=True)):
            if score > best[place][0]:
                best[place] = score, name, tuple(value for value, inside in zip(values, union, strict=True) if inside)
    rows = [(feature, name, values, f1) for feature, (f1, name, values) in zip(fires, best, strict=True)]
    table = pd.DataFrame(rows, columns=["feature", "attribute", "values", "f1"])
    return table.sort_values("f1", ascending=False, ignore_index=True)


def joined(active: Bool[Tensor, "n features"], truth: Bool[Tensor, "n"], *, most: int = 10) -> list[float]:
    """F1 of the features for the prompts of one value: of the best alone, then of the union with the next, and so on.

    The next is the one that raises F1 most; there is none where none does, or after `most`. The list's length over one
    and its rise measure over-splitting (reconstructed).
    """
    union, found = torch.zeros_like(truth), [0.0]
    while len(found) <= most and active.shape[1]:
        unions = active | union[:, None]
        f1 = 2 * (unions & truth[:, None]).sum(dim=0).double() / (unions.sum(dim=0) + truth.sum()).clamp(min=1)
        best, feature = f1.max(dim=0)
        if best <= found[-1]:
            break
        union = unions[:, feature]
        found.append(float(best))
    return found[1:]


@torch.no_grad()
def strengths(
    bridge: Bridge,
    prompts: PromptSet,
    hook_name: str,
    dictionary: SupervisedDictionary,
    attributes: Attributes,
    *,
    metric: Metric = logit_difference,
    batch_size: int = BATCH,
) -> pd.DataFrame:
    """How long an attribute's vectors are and how much of the behaviour goes with them: what occlusion is read from.

    Returns:
        Columns attribute, strength (share of the activations' variance) and effect (share of what mean ablation takes).
    """
    a = activation_at(bridge, prompts.clean, prompts, hook_name, batch_size)
    mean = a.mean(dim=0, keepdim=True).expand_as(a)

    measured = _meter(bridge, prompts, hook_name, metric, batch_size)
    clean = measured(None)
    lost = clean - measured(mean) or math.nan
    variance = float((a - mean).square().sum()) or math.nan
    rows = []
    for name in attributes:
        part = dictionary.part(name, attributes)
        rows.append((name, float(part.square().sum()) / variance, (clean - measured(a - part)) / lost))
    return pd.DataFrame(rows, columns=["attribute", "strength", "effect"])


def _values(given: Sequence[Any]) -> list[Any]:
    """The values there are, in order."""
    return sorted(set(given) - {None}, key=str)


def _one_hot(attributes: Attributes, names: Sequence[tuple[str, Any]]) -> Float[Tensor, "n values"]:
    columns = [[float(value == wanted) for value in attributes[name]] for name, wanted in names]
    return torch.tensor(columns, dtype=torch.float64).T
