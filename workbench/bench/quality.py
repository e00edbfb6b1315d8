"""How well SAEs find planted features (`workbench.bench.synthetic`): what is trained, and how it is measured.

By SAELens' own measures, on rows that no training sees: F1 of every latent for the planted feature nearest to it, the
mean correlation coefficient (cosines after the best matching), explained variance, L0. Besides, on the known trees:

- dead: share of latents that never fire.
- splitting: share of latents whose nearest feature is also another latent's.
- absorption: of a child feature whose parent has a latent of its own, that latent misses the parent on a share of the
  rows where the child fires; it is absorbed where that share is at least `ABSORBED` above the share of the rows where
  the parent fires without any child. Reported: the mean of both shares, and how many of the children are absorbed.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import SAE, InputError, TrainConfig, train
from sae.formats import saelens
from sae.rules import AbsTopK, BatchTopK, FeatureChoice, JumpReLU, Rule, TopK
from workbench.bench.synthetic import BLOCK, ModelSize, Planted, Stream, benchmark_model

BATCH = 1024
DEFAULT = ("topk", "batchtopk", "matryoshka", "jumprelu")
SAELENS = "SAELens batchtopk"
ABSORBED = 0.5
MIN_ROWS = 20
"""Rows a child must fire on, and its parent without a child, for its absorption to be judged."""


@dataclass(frozen=True)
class Recipe:
    """How an SAE is trained: a rule and other settings of `TrainConfig`."""

    rule: Rule
    settings: Mapping[str, Any]


def recipes(size: ModelSize) -> dict[str, Recipe]:
    """What can be trained, by name; each is what this project knows to be best for it on these streams."""
    k, width = size.l0, size.d_sae
    revived = {"dead_after_tokens": 1000 * width // k}
    annealed = revived | {"anneal_from_k": min(4 * k, width)}
    # What annealing is to a k, a slow rise of its penalty's weight is to a rule without one.
    tightened = revived | {"aux": "aux_k", "clip_grad_norm": 1.0, "sparsity_warmup": 0.7}
    return {
        "topk": Recipe(TopK(k), {}),
        "abstopk": Recipe(AbsTopK(k), {}),
        "batchtopk": Recipe(BatchTopK(k), {}),
        "batchtopk_annealed": Recipe(BatchTopK(k), annealed),
        "matryoshka": Recipe(BatchTopK(k), annealed | {"matryoshka": tuple(width * i // 32 for i in (1, 4, 16))}),
        "feature_choice": Recipe(FeatureChoice(k), {}),
        "jumprelu": Recipe(JumpReLU(target_l0=k), tightened),
    }


def config(name: str, size: ModelSize, samples: int, seed: int, **settings: Any) -> TrainConfig:
    """The configuration of a recipe; `settings` go before the recipe's own."""
    recipe = recipes(size)[name]
    return TrainConfig(
        f"{name}-{seed}", samples, size.d_sae, recipe.rule,
        **{"lr": size.lr, "batch_size": BATCH, "seed": seed, **recipe.settings, **settings},
    )  # fmt: skip


def compared(
    size: ModelSize, samples: int, device: torch.device | str, names: Sequence[str] = DEFAULT, seed: int = 0
) -> Iterator[tuple[str, dict[str, float]]]:
    """Trains recipes side by side, then SAELens' BatchTopK on the same rows; names and measures as they come.

    Raises:
        InputError: an SAE whose loss stopped being finite.
    """
    planted = Planted.of(benchmark_model(size, device))
    configs = [config(name, size, samples, seed) for name in names]
    for name, made in zip(names, train(configs, Stream(planted, seed), device=device), strict=True):
        if made.sae is None:
            raise InputError(f"{name}: {made.error}")
        yield name, measures(made.sae, Stream(planted, seed), 1)
    peer = saelens_batchtopk(Stream(planted, seed), size, samples)
    yield SAELENS, measures(peer, Stream(planted, seed), 1)


def saelens_batchtopk(stream: Stream, size: ModelSize, samples: int) -> SAE:
    """SAELens' BatchTopK, trained by its own trainer and read from the file it writes; warm-up and decay as here."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    device = stream.planted.directions.device
    n_steps = max(1, samples // BATCH)

    def batches() -> Iterator[Tensor]:
        while True:
            yield stream.next_batch(BATCH)

    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=samples, train_batch_size_samples=BATCH, lr=size.lr, lr_end=size.lr / 10,
            lr_warm_up_steps=n_steps // 20, lr_decay_steps=n_steps // 5, autocast=device.type == "cuda",
            device=str(device), logger=LoggingConfig(log_to_wandb=False),
        ),
        BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=float(size.l0), device=str(device))
        ),
        data_provider=batches(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer.fit().save_inference_model(folder)
        return saelens.load(Path(folder)).to(device)


@torch.no_grad()
def measures(sae: SAE, stream: Stream, n_blocks: int) -> dict[str, float]:
    """The measures above, on `n_blocks` blocks of rows of the stream that no training sees."""
    from sae_lens.synthetic import ClassificationMetricsCalculator, mean_correlation_coefficient

    planted = stream.planted
    W_dec, directions = sae.W_dec.detach(), planted.directions
    classified = ClassificationMetricsCalculator(W_dec, directions)
    family = Family(planted, nearest_latents(W_dec, directions))
    error = squares = n_active = 0.0
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=W_dec.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=W_dec.device)
    for number in range(n_blocks):
        features = stream.features(-2 - number)
        for first in range(0, BLOCK, BATCH):
            part = features.tokens(first, first + BATCH)
            x, present = planted.activations(part), part.to_dense()
            code = sae.encode(x)
            dense = code.to_dense()
            classified.add_batch(dense, present)
            family.add(dense != 0, present > 0)
            fired |= (dense != 0).any(dim=0)
            error += (x - sae.decode(code)).double().square().sum().item()
            squares += x.double().square().sum().item()
            total += x.double().sum(dim=0)
            n_active += code.l0().sum().item()
    n = n_blocks * BLOCK
    found = classified.compute()
    return {
        "f1": found.f1_score, "precision": found.precision, "recall": found.recall,
        "mcc": mean_correlation_coefficient(W_dec, directions),
        "explained_variance": 1 - error / (squares - total.square().sum().item() / n),
        "l0": n_active / n, "dead": 1 - fired.double().mean().item(),
        "split": split_share(W_dec, directions), **family.shares(),
    }  # fmt: skip


def nearest_latents(
    W_dec: Float[Tensor, "d_sae d"], directions: Float[Tensor, "n_features d"]
) -> Int[Tensor, "n_features"]:
    """The latent of every feature: the nearest of those whose own nearest feature it is; -1 for none."""
    cosine, feature = _nearest(W_dec, directions)
    # By cosine ascending, so that of the latents of one feature the nearest is written last.
    order = cosine.argsort().cpu()
    latents = torch.full((len(directions),), -1)
    for latent, its in zip(order.tolist(), feature.cpu()[order].tolist(), strict=True):
        latents[its] = latent
    return latents.to(directions.device)


def split_share(W_dec: Float[Tensor, "d_sae d"], directions: Float[Tensor, "n_features d"]) -> float:
    """Share of latents whose nearest feature is also another latent's."""
    _, feature = _nearest(W_dec, directions)
    together = torch.bincount(feature, minlength=len(directions))[feature]
    return (together > 1).double().mean().item()


def _nearest(
    W_dec: Float[Tensor, "d_sae d"], directions: Float[Tensor, "n_features d"]
) -> tuple[Float[Tensor, "d_sae"], Int[Tensor, "d_sae"]]:
    """|cosine| to the nearest feature and its number, for every latent."""
    unit = torch.nn.functional.normalize
    cosines = (unit(W_dec, dim=1) @ unit(directions, dim=1).T).abs()
    best = cosines.max(dim=1)
    return best.values, best.indices


class Family:
    """Counts where the latents of parent features miss them.

    Args:
        planted: the model.
        latents: the latent of every feature, -1 for none.
    """

    def __init__(self, planted: Planted, latents: Int[Tensor, "n_features"]) -> None:
        has_latent = (planted.parent >= 0) & (latents[planted.parent.clamp_min(0)] >= 0)
        self.child = has_latent.nonzero().squeeze(1)
        self.parent = planted.parent[self.child]
        self.latent = latents[self.parent]
        self.siblings = planted.children[self.parent]
        counts = (len(self.child), 2, 2)
        # [child, whether it fires (or no sibling does), rows and missed ones]
        self.counts = torch.zeros(counts, dtype=torch.float64, device=self.child.device)

    def add(self, active: Bool[Tensor, "n d_sae"], present: Bool[Tensor, "n n_features"]) -> None:
        """Counts a batch: the latents that are active, and the features that are present."""
        missed = ~active[:, self.latent]
        fires = present[:, self.child]
        childless = present[:, self.parent]
        for branch in range(self.siblings.shape[1]):
            sibling = self.siblings[:, branch]
            childless &= ~(present[:, sibling.clamp_min(0)] & (sibling >= 0))
        for which, rows in enumerate((fires, childless)):
            self.counts[:, which, 0] += rows.sum(dim=0)
            self.counts[:, which, 1] += (rows & missed).sum(dim=0)

    def shares(self) -> dict[str, float]:
        """Mean shares of rows on which parents are missed, and the share of children that are absorbed."""
        judged = self.counts[(self.counts[:, :, 0] >= MIN_ROWS).all(dim=1)]
        missed = judged[:, :, 1] / judged[:, :, 0]
        with_child, alone = missed.mean(dim=0).tolist() if len(judged) else (0.0, 0.0)
        absorbed = (missed[:, 0] >= missed[:, 1] + ABSORBED).double().sum().item()
        return {
            "children_judged": float(len(judged)), "missed_with_child": with_child, "missed_alone": alone,
            "absorbed": absorbed / max(1, len(judged)),
        }  # fmt: skip
