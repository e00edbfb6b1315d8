"""Whether the two signs of a feature tell two concepts, which is what signed codes are for (AbsTopK, arXiv 2510.00404).

1. Positive and negative activations of a signed rule's feature are two units of an `Alignment`. Each has the concept
   that it tells best by F1 on calibration documents, and holds it where the held-out F1 is `HOLDS` or more.
2. Of the F features that fire on held-out tokens,

       both    share of which both signs hold a concept
       two     share of which both do and the concepts differ

3. chance = (n+ n- - sum over concepts c of n+(c) n-(c)) / F^2, with n+(c) the positive signs that hold c and n+ all of
   them, is `two` were a feature's negative sign that of any feature, the mean over all F^2 pairs. Signs that have
   nothing to do with each other reach it.

The paper asks a large language model of each feature whether its poles are opposites; known concepts in its place are
`reconstructed`, and do not ask whether the two are opposites of each other.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.features.concepts.alignment import Alignment

HOLDS = 0.5
SIGNS = {"positive": 1, "negative": -1}


@dataclass(frozen=True)
class Poles:
    """What both signs of an SAE's features tell."""

    table: pd.DataFrame
    """One row a feature that fires: feature; positive and negative (concepts, None where that sign does not fire), with
    their held-out positive_f1 and negative_f1 and firings positive_firings and negative_firings (0 there)."""

    def holds(self, sign: str, at: float = HOLDS) -> "pd.Series[bool]":
        """Which features hold a concept by a sign of `SIGNS`, with a held-out F1 of `at` or more."""
        return self.table[f"{sign}_f1"] >= at

    def both(self, at: float = HOLDS) -> float:
        """Share of the features of which both signs hold a concept; 0 where none fires."""
        return _share(self.holds("positive", at) & self.holds("negative", at))

    def two(self, at: float = HOLDS) -> float:
        """Share of the features whose signs hold two concepts; 0 where none fires."""
        differ = self.table["positive"] != self.table["negative"]
        return _share(self.holds("positive", at) & self.holds("negative", at) & differ)

    def chance(self, at: float = HOLDS) -> float:
        """`two`, were the signs of different features put together at random; see step 3."""
        held = [self.table.loc[self.holds(sign, at), sign].value_counts() for sign in SIGNS]
        same = held[0].mul(held[1], fill_value=0).sum()
        return float(held[0].sum() * held[1].sum() - same) / max(1, len(self.table)) ** 2

    def summary(self) -> dict[str, float]:
        """The three shares at `HOLDS`, by name."""
        return {"both": self.both(), "two": self.two(), "chance": self.chance()}

    @property
    def rarer(self) -> float:
        """Median over the features of the share of a feature's firings that have its rarer sign."""
        firings = self.table[[f"{sign}_firings" for sign in SIGNS]]
        return float((firings.min(axis=1) / firings.sum(axis=1)).median())


def _share(chosen: "pd.Series[bool]") -> float:
    return float(chosen.mean()) if len(chosen) else 0.0


def poles(alignment: Alignment) -> Poles:
    """The poles of the features of an alignment; under a rule without signs the negative ones are None."""
    best = alignment.best_concepts().set_index("feature")
    features = np.unique(best.index)
    table = pd.DataFrame({"feature": features})
    for name, sign in SIGNS.items():
        of_sign = best[best["sign"] == sign].reindex(features)
        table[name] = of_sign["concept"].astype(object).where(of_sign["concept"].notna(), None).to_numpy()
        # A concept that no held-out token has is not held either.
        table[f"{name}_f1"] = of_sign["f1"].fillna(0.0).to_numpy()
        table[f"{name}_firings"] = of_sign["firings"].fillna(0).astype(int).to_numpy()
    return Poles(table)
