"""SAELens' own synthetic models: this project's trainer beside SAELens' `train_toy_sae`, TopK at equal settings.

A model of SAELens (orthogonalised dictionary with a bias, Zipf frequencies, random low-rank correlations) makes the
activations. Both trainers take TopK with the same k, width, batch size, number of rows and constant learning rate,
each on rows drawn with the run's seed; SAELens' other settings are its own. Held-out rows decide, by SAELens' own
`mean_correlation_coefficient` (matched cosine) and by `sae.recovery`.

    python benchmarks/planted_saelens.py [--seeds 3] [--steps 1500]
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    generate_random_low_rank_correlation_matrix,
    mean_correlation_coefficient,
    zipfian_firing_probabilities,
)
from sae_lens.synthetic.training import train_toy_sae
from torch import Tensor

from sae.config import TrainConfig
from sae.model import SAE
from sae.recovery import recovery
from sae.rules import TopK
from sae.training import train

D_IN, N_FEATURES, WIDTH, K, BATCH, LR = 48, 96, 96, 4, 512, 3e-3
HELD_OUT_ROWS = 16_384


class Synthetic:
    """A synthetic model of SAELens as a `sae.BatchSource`; it draws from torch's global generator."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.features = FeatureDictionary(N_FEATURES, D_IN, bias=True, seed=seed)
        self.generator = ActivationGenerator(
            N_FEATURES,
            zipfian_firing_probabilities(N_FEATURES, exponent=0.5, max_prob=0.12, min_prob=0.01),
            std_firing_magnitudes=0.2,
            correlation_matrix=generate_random_low_rank_correlation_matrix(N_FEATURES, rank=8, seed=seed),
        )
        self.d_in = D_IN

    @torch.no_grad()
    def rows(self, n: int) -> tuple[Tensor, Tensor]:
        """Activations of the model and of its features."""
        activations = self.generator.sample(n)
        return self.features(activations), activations

    def next_batch(self, n: int) -> Tensor:
        return self.rows(n)[0]

    def sample(self, n: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.rows(n)[0]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": torch.get_rng_state().tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(torch.tensor(state["generator"], dtype=torch.uint8))


def ours(source: Synthetic, steps: int, seed: int) -> SAE:
    """This project's trainer."""
    config = TrainConfig(
        "ours", steps * BATCH, WIDTH, TopK(K), lr=LR, batch_size=BATCH, warmup=0.0, decay=0.0, seed=seed
    )
    sae = train([config], source)[0].sae
    assert sae is not None
    return sae


def saelens(source: Synthetic, steps: int, seed: int) -> SAE:
    """SAELens' trainer; the result as one of our SAEs, which has the same formula."""
    torch.manual_seed(seed)
    # Acts count with the decoder's norm, which is folded away afterwards: decoder rows of unit norm, as ours.
    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=WIDTH, k=K, rescale_acts_by_decoder_norm=True))
    train_toy_sae(theirs, source.features, source.generator, training_samples=steps * BATCH, batch_size=BATCH, lr=LR)
    theirs.fold_W_dec_norm()
    sae = SAE(D_IN, WIDTH, TopK(K))
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(sae, name).copy_(getattr(theirs, name))
    return sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    arms: dict[str, Callable[[Synthetic, int, int], SAE]] = {"ours": ours, "sae-lens": saelens}
    print(f"{'':10}{'fvu':>16}{'MCC':>16}{'mean max cos':>16}{'F1':>16}{'dead':>16}")
    for name, arm in arms.items():
        numbers: list[tuple[float, ...]] = []
        for seed in range(options.seeds):
            source = Synthetic(seed)
            sae = arm(source, options.steps, seed)
            torch.manual_seed(10_000 + seed)
            x, activations = source.rows(HELD_OUT_ROWS)
            found = recovery(sae, source.features.feature_vectors.detach(), x, activations)
            with torch.no_grad():
                fvu = ((x - sae(x)).square().sum() / (x - x.mean(dim=0)).square().sum()).item()
                mcc = mean_correlation_coefficient(source.features.feature_vectors.detach(), sae.W_dec.detach())
            numbers.append((fvu, mcc, found.mean_max_cosine, found.f1, found.dead_share))
        columns = list(zip(*numbers, strict=True))
        spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        cells = [f"{statistics.fmean(column):.3f} ± {std:.3f}" for column, std in zip(columns, spread, strict=True)]
        print(f"{name:10}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
