"""What a dictionary shows and controls of a weak attribute beside a strong one, where both are known: a table of
docs/methods/circuits.md.

    python benchmarks/occlusion.py [--seeds 3] [--ratios 1 2 4 8] [--ks 5 3 2] [--steps 600]

Rows are r u_a + u_b and planted features (`sae.planted`, a third as strong): a and b one of eight values each, drawn
independently, u random unit directions, r the strength of the first attribute in those of the second. Judged of the
weak attribute b, on rows that no dictionary was fitted on, with `circuits.supervised`:

    F1        of the feature that shows a value best
    control   share of rows that a change of b by at most 1 or 2 features gives the wanted value: of the planted rows
              that differ in b alone theirs is the nearest

by supervised dictionaries (MSE features), a TopK SAE of as many features as there are directions planted, one with a
frozen random decoder, and random directions with least-squares codes of the same number of features a row. `recovered`
is the least cosine of a supervised feature with its planted direction. Means and standard deviations over seeds.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from planted import config
from torch import Tensor

from circuits.supervised import fit, greedy_edit, joined, least_squares_code
from sae import SAE, TopK, train
from sae.planted import PlantedDictionary, Planting

D, VALUES, BACKGROUND = 64, 8, Planting(d_in=64, n_features=48, l0=3.0)
FAINT = 1 / 3
FITTED, JUDGED = 2048, 4096
CHANGES = (1, 2)
PLANTED_SEEDS, RANDOM_SEEDS, SAMPLE_SEEDS = 1000, 2000, 3000


@dataclass(frozen=True)
class Rows:
    """Rows with the values of both attributes."""

    x: Float[Tensor, "n d"]
    strong: Int[Tensor, "n"]
    weak: Int[Tensor, "n"]


class Planted:
    """Rows of two attributes; an endless stream of them to train on."""

    def __init__(self, ratio: float, seed: int) -> None:
        # SAEs begin with directions of their own seed: with the same one theirs would be the planted ones.
        random = torch.Generator().manual_seed(PLANTED_SEEDS + seed)
        self.directions = torch.nn.functional.normalize(torch.randn(2, VALUES, D, generator=random), dim=2)
        self.ratio, self.d_in, self._seed, self._random = ratio, D, seed, random
        self._background = PlantedDictionary(Planting(**{**vars(BACKGROUND), "seed": seed}))
        self._rows = self._background.rows(1 << 16).x * FAINT

    def rows(self, n: int) -> Rows:
        """The next n."""
        return self._drawn(n, self._random)

    def _drawn(self, n: int, random: torch.Generator) -> Rows:
        strong, weak = torch.randint(VALUES, (2, n), generator=random)
        behind = self._rows[torch.randint(len(self._rows), (n,), generator=random)]
        return Rows(self.ratio * self.directions[0, strong] + self.directions[1, weak] + behind, strong, weak)

    def next_batch(self, n: int) -> Float[Tensor, "n d"]:
        return self.rows(n).x

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        return self._drawn(n, torch.Generator().manual_seed(SAMPLE_SEEDS + self._seed)).x

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def judged(ratio: float, k: int, seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """One row a dictionary."""
    planted = Planted(ratio, seed)
    n_features = 2 * VALUES + BACKGROUND.n_features
    configs = [
        config(name, TopK(k), n_features, steps, seed, frozen_decoder=frozen)
        for name, frozen in (("SAE", False), ("frozen random decoder", True))
    ]
    saes = [one.sae for one in train(configs, planted)]
    known, rows = planted.rows(FITTED), planted.rows(JUDGED)
    supervised = fit(known.x, {"strong": known.strong.tolist(), "weak": known.weak.tolist()})
    own = supervised.features[VALUES:]
    truth = planted.directions[1] - planted.directions[1].mean(dim=0)
    recovered = float(torch.cosine_similarity(own, truth).min())
    wanted = (rows.weak + torch.randint(1, VALUES, (JUDGED,), generator=torch.Generator().manual_seed(seed))) % VALUES
    behind = rows.x - planted.directions[1, rows.weak]
    goal = behind + planted.directions[1, wanted]
    random = torch.nn.functional.normalize(
        torch.randn(n_features, D, generator=torch.Generator().manual_seed(RANDOM_SEEDS + seed)), dim=1
    )
    sides = [{"strong": rows.strong.tolist(), "weak": side.tolist()} for side in (rows.weak, wanted)]
    dictionaries = {"supervised": (tuple(supervised.code(side) for side in sides), supervised.features)}
    for name, sae in zip(("SAE", "frozen random decoder"), saes, strict=True):
        assert isinstance(sae, SAE)
        dictionaries[name] = tuple(sae.encode(x).to_dense() for x in (rows.x, goal)), sae.W_dec.detach()
    mean = known.x.mean(dim=0)
    dictionaries["random"] = tuple(least_squares_code(x - mean, random, k) for x in (rows.x, goal)), random
    for name, ((present, after), decoder) in dictionaries.items():
        paths = [joined(present != 0, rows.weak == value) or [0.0] for value in range(VALUES)]
        found = {"F1": sum(path[0] for path in paths) / VALUES, "joined": sum(map(len, paths)) / VALUES}
        for changes in CHANGES:
            edited, _ = greedy_edit(rows.x, goal, present, after, decoder, changes)
            # All but b as it is in the row: what is left is nearest to the direction of one value.
            read = torch.cdist(edited - behind, planted.directions[1]).argmin(dim=1)
            found[f"control, {changes}"] = float((read == wanted).double().mean())
        yield {"k": k, "ratio": ratio, "dictionary": name, "seed": seed, **found, "recovered": recovered}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 2, 4, 8])
    parser.add_argument("--ks", nargs="+", type=int, default=[5, 3, 2], help="features a row; five are planted")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    cases = product(options.ks, options.ratios, range(options.seeds))
    rows = pd.DataFrame([row for k, ratio, seed in cases for row in judged(ratio, k, seed, options.steps)])
    columns = rows.columns.drop(["k", "ratio", "dictionary", "seed"])
    print(f"| k | ratio | | {' | '.join(columns)} |\n{'|---' * (len(columns) + 3)}|")
    for (k, ratio, name), own in rows.groupby(["k", "ratio", "dictionary"], sort=False):
        cells = [f"{own[key].mean():.2f} ± {own[key].std():.2f}" for key in columns]
        print(f"| {k} | {ratio:g} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
