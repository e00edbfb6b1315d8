"""SynthSAEBench (arXiv 2602.14687): activations made of planted features in trees, drawn fast and again the same.

SAELens builds the model (`benchmark_model`). Its sampler fills and walks matrices [rows, features], of which a row has
some 25 that are not zero; what is drawn here has the same distribution (tests/workbench compares the two):

1. A feature outside the trees, or at the root of one, fires where shared . factor_f + sigma_f noise > threshold_f:
   `shared` are the row's 25 numbers, which make features correlated, the noise is the feature's own.
2. Level by level, only children of features that fire are drawn, in the same way; of siblings that fire one stays, each
   as likely as the others.
3. What fires has the magnitude relu(mean + std noise), times its parent's magnitude over that one's mean; features of
   magnitude 0 do not fire.
4. x = sum of magnitudes times directions, plus a bias.

Rows are drawn in blocks. A block depends on the seed and its number alone, so that a stream can go on anywhere.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import SparseCode
from sae.kernels import decode

if TYPE_CHECKING:
    from sae_lens.synthetic import SyntheticModel

BLOCK = 2**14
"""Rows drawn at once, so that the launches and waits of a block are few a batch."""


@dataclass(frozen=True)
class ModelSize:
    """How large a model of the benchmark's kind is, and what SAEs are measured on it with."""

    n_features: int
    d_in: int
    n_trees: int
    d_sae: int
    l0: int
    lr: float


FULL = ModelSize(n_features=16_384, d_in=768, n_trees=128, d_sae=4096, l0=25, lr=3e-4)
"""SynthSAEBench-16k."""
MIDDLE = ModelSize(n_features=2048, d_in=128, n_trees=32, d_sae=512, l0=12, lr=1e-3)
"""As crowded as SynthSAEBench-16k, minutes on a CPU."""
TINY = ModelSize(n_features=400, d_in=48, n_trees=4, d_sae=96, l0=4, lr=3e-3)
"""A minute on a CPU."""


def benchmark_model(size: ModelSize, device: torch.device | str) -> "SyntheticModel":
    """SAELens' model with the benchmark's settings."""
    from sae_lens.synthetic import (
        FoldedNormalMagnitudeConfig,
        HierarchyConfig,
        LinearMagnitudeConfig,
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
    )

    config = SyntheticModelConfig(
        num_features=size.n_features,
        hidden_dim=size.d_in,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(
            total_root_nodes=size.n_trees, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
            compensate_probabilities=True, scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42,
    )  # fmt: skip
    # It draws a progress bar.
    with contextlib.redirect_stderr(io.StringIO()):
        return SyntheticModel(config, device=str(device))


@dataclass(frozen=True)
class Planted:
    """A model's tensors, as sampling needs them."""

    directions: Float[Tensor, "n_features d_in"]
    bias: Float[Tensor, "d_in"]
    factor: Float[Tensor, "n_features rank"]
    sigma: Float[Tensor, "n_features"]
    threshold: Float[Tensor, "n_features"]
    mean: Float[Tensor, "n_features"]
    std: Float[Tensor, "n_features"]
    children: Int[Tensor, "n_features branches"]
    """-1 where a feature has fewer, or none; children exclude each other and are scaled by their parent."""
    parent: Int[Tensor, "n_features"]
    """-1 for none."""

    @classmethod
    def of(cls, model: "SyntheticModel") -> "Planted":
        """The tensors of a model with low-rank correlations whose siblings all exclude each other."""
        sampler, device = model.activation_generator, model.feature_dict.feature_vectors.device
        assert sampler.low_rank_correlation is not None
        assert sampler.correlation_thresholds is not None
        factor, sigma = sampler.low_rank_correlation
        children, parent = _family(model)
        return cls(
            model.feature_dict.feature_vectors.detach(), model.feature_dict.bias.detach(), factor, sigma,
            sampler.correlation_thresholds, sampler.mean_firing_magnitudes, sampler.std_firing_magnitudes,
            children.to(device), parent.to(device),
        )  # fmt: skip

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> SparseCode:
        """The features behind n rows."""
        device = self.directions.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        shared = normal(n, self.factor.shape[1])
        alone = (self.parent < 0).nonzero().squeeze(1)
        z = normal(n, len(alone)).mul_(self.sigma[alone]).addmm_(shared, self.factor[alone].T)
        row, place = (z > self.threshold[alone]).nonzero(as_tuple=True)
        feature = alone[place]
        value = (self.mean[feature] + self.std[feature] * normal(len(feature))).relu()
        drawn = []
        while len(feature):
            row, feature, value = (each[value > 0] for each in (row, feature, value))
            drawn.append((row, feature, value))
            row, feature, value = (each[self.children[feature, 0] >= 0] for each in (row, feature, value))
            born = self.children[feature]
            # As a product of matrices, each of 4 rows, this takes longer than all else.
            z = (shared[row][:, None] * self.factor[born]).sum(dim=2) + self.sigma[born] * normal(*born.shape)
            size = (self.mean[born] + self.std[born] * normal(*born.shape)).relu()
            size *= (value / self.mean[feature])[:, None]
            lots = torch.rand(born.shape, generator=generator, device=device)
            lot, place = lots.masked_fill_((z <= self.threshold[born]) | (size <= 0) | (born < 0), -1).max(dim=1)
            kept, place = lot >= 0, place[:, None]
            row, feature, value = row[kept], born.gather(1, place)[kept, 0], size.gather(1, place)[kept, 0]
        row, feature, value = (torch.cat(each) for each in zip(*drawn, strict=True))
        n_features = len(self.mean)
        places, order = torch.sort(row * n_features + feature)
        edges = torch.arange(n + 1, device=device) * n_features
        return SparseCode(value[order], feature[order], n_features, torch.searchsorted(places, edges))

    def activations(self, features: SparseCode) -> Float[Tensor, "n d_in"]:
        """The rows made of these features."""
        return decode(features, self.directions, self.bias)


def _family(model: "SyntheticModel") -> tuple[Int[Tensor, "n_features branches"], Int[Tensor, "n_features"]]:
    """Children and parent of every feature."""
    assert model.hierarchy is not None
    below: dict[int, list[int]] = {}
    open_nodes = list(model.hierarchy.roots)
    while open_nodes:
        node = open_nodes.pop()
        nodes = list(node.children)
        if not nodes:
            continue
        if not (node.mutually_exclusive_children and node.scale_children_by_parent):
            raise ValueError("only trees whose siblings exclude each other and are scaled by their parent can be drawn")
        below[node.feature_index] = [child.feature_index for child in nodes]
        open_nodes += nodes
    children = torch.full((model.cfg.num_features, max(map(len, below.values()))), -1)
    parent = torch.full((model.cfg.num_features,), -1)
    for above, features in below.items():
        children[above, : len(features)] = torch.tensor(features)
        parent[features] = above
    return children, parent


class Stream:
    """A model's activations as a `sae.BatchSource`.

    Args:
        planted: the model.
        seed: two streams of one seed have the same rows; below 400.
    """

    def __init__(self, planted: Planted, seed: int) -> None:
        self.planted, self.seed, self.position = planted, seed, 0
        self.d_in = planted.directions.shape[1]
        self._block: tuple[int, Float[Tensor, "block d_in"]] | None = None

    def features(self, number: int) -> SparseCode:
        """The features behind a block; blocks with negative numbers are those of rows not trained on."""
        generator = torch.Generator(self.planted.directions.device)
        # Of a seed torch's generator on a CPU takes 32 bits.
        generator.manual_seed(self.seed * 10**7 + 10**6 + number)
        return self.planted.draw(BLOCK, generator)

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        """The next n rows."""
        parts = []
        while n:
            number, start = divmod(self.position, BLOCK)
            if self._block is None or self._block[0] != number:
                self._block = number, self.planted.activations(self.features(number))
            parts.append(self._block[1][start : start + n])
            self.position += len(parts[-1])
            n -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """At most n rows, the same every time and none of those that `next_batch` gives."""
        return self.planted.activations(self.features(-1))[:n]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where another was."""
        self.position = state["position"]
