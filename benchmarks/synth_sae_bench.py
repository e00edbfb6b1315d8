"""SynthSAEBench-16k (arXiv 2602.14687): what an SAE of 4,096 features finds of 16,384 planted ones.

    python benchmarks/synth_sae_bench.py FOLDER [--rules batchtopk topk] [--samples 200000000] [--l0 25]
                                         [--matryoshka] [--dead-after N] [--anneal-from K] [--clip C] [--tiny]

1. SAELens' synthetic model with the benchmark's settings: Zipf frequencies, 128 trees of children that fire only with
   their parent and exclude each other, low-rank correlations, a nearly orthogonal dictionary in 768 dimensions.
2. All rules train side by side on one stream of batches of 1,024. Batch i depends on the seed and on i alone, so that
   the run goes on where it stopped: call it again with the same FOLDER.
3. By SAELens' own measures, on fresh rows: F1 of every latent for the planted feature nearest to it, the mean
   correlation coefficient (matched cosines), explained variance, L0; and the share of dead latents.

`--tiny` is a model of 400 features and a minute on a CPU. One JSON line a rule.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.synthetic import (
    ClassificationMetricsCalculator,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    mean_correlation_coefficient,
)
from torch import Tensor

from sae import SAE, CodeRule, InputError, TrainConfig, train
from sae.rules import rule_class

BATCH, EVALUATED = 1024, 2**16


def synthetic_model(device: str, tiny: bool) -> SyntheticModel:
    """The benchmark's model, or a small one of the same kind."""
    config = SyntheticModelConfig(
        num_features=400 if tiny else 16_384,
        hidden_dim=48 if tiny else 768,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(
            total_root_nodes=4 if tiny else 128, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
            compensate_probabilities=True, scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42,
    )  # fmt: skip
    return SyntheticModel(config, device=device)


class Stream:
    """The model's activations as a `sae.BatchSource`; batch i is drawn from torch's generator, seeded with i."""

    def __init__(self, model: SyntheticModel, seed: int) -> None:
        self.model, self.seed, self.position = model, seed, 0
        self.d_in = model.cfg.hidden_dim

    @torch.no_grad()
    def rows(self, n: int, number: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_features"]]:
        """Activations and the planted features behind them; negative numbers are those of rows not trained on."""
        # Of a seed torch's CPU generator takes 32 bits.
        torch.manual_seed(self.seed * 10**7 + 10**6 + number)
        features = self.model.activation_generator.sample(n)
        return self.model.feature_dict(features), features

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        self.position += 1
        return self.rows(n, self.position)[0]

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        return self.rows(min(n, 16_384), -1)[0]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@torch.no_grad()
def measures(sae: SAE, stream: Stream, n_rows: int) -> dict[str, float]:
    """SAELens' measures of an SAE, on rows of the stream that no training sees."""
    planted = stream.model.feature_dict.feature_vectors.detach()
    classified = ClassificationMetricsCalculator(sae.W_dec.detach(), planted)
    error = squares = n_active = 0.0
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=planted.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=planted.device)
    n_batches = n_rows // BATCH
    for number in range(n_batches):
        x, features = stream.rows(BATCH, -2 - number)
        code = sae.encode(x)
        dense = code.to_dense()
        classified.add_batch(dense, features)
        fired |= (dense != 0).any(dim=0)
        error += (x - sae.decode(code)).double().square().sum().item()
        squares += x.double().square().sum().item()
        total += x.double().sum(dim=0)
        n_active += code.l0().sum().item()
    n = n_batches * BATCH
    found = classified.compute()
    return {
        "f1": found.f1_score, "precision": found.precision, "recall": found.recall,
        "mcc": mean_correlation_coefficient(sae.W_dec.detach(), planted),
        "explained_variance": 1 - error / (squares - total.square().sum().item() / n),
        "l0": n_active / n, "dead": 1 - fired.double().mean().item(),
    }  # fmt: skip


def configs(options: argparse.Namespace) -> list[TrainConfig]:
    """One configuration a rule."""
    width = 96 if options.tiny else 4096
    made = []
    for name in options.rules:
        kind = rule_class(name)
        if not issubclass(kind, CodeRule):
            raise InputError(f"{name} has no k: choose rules that have, so that all are compared at one L0")
        made.append(
            TrainConfig(
                name,
                options.samples,
                width,
                kind(k=options.l0),
                lr=options.lr,
                batch_size=BATCH,
                seed=options.seed,
                matryoshka=tuple(width * i // 32 for i in (1, 4, 16)) if options.matryoshka else (),
                dead_after_tokens=options.dead_after,
                anneal_from_k=options.anneal_from,
                clip_grad_norm=options.clip,
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rules", nargs="+", default=["batchtopk", "topk"])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--l0", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matryoshka", action="store_true")
    parser.add_argument("--dead-after", type=int)
    parser.add_argument("--anneal-from", type=int)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.samples = options.samples or (400_000 if options.tiny else 200_000_000)
    options.l0 = options.l0 or (4 if options.tiny else 25)
    options.lr = options.lr or (3e-3 if options.tiny else 3e-4)
    stream = Stream(synthetic_model(options.device, options.tiny), options.seed)
    for result in train(configs(options), stream, device=options.device, checkpoint_dir=options.folder, resume=True):
        if result.sae is None:
            raise SystemExit(f"{result.config.name}: {result.error}")
        found = measures(result.sae, stream, EVALUATED // (16 if options.tiny else 1))
        print(json.dumps({"rule": result.config.name} | {key: round(value, 4) for key, value in found.items()}))


if __name__ == "__main__":
    main()
