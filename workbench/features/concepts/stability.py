"""Stability: which features of one SAE another has as well.

For each feature of a the decoder row of b with the largest cosine (its absolute value where both rules are signed);
`mutual` where that feature's best partner is the first one again. Between seeds of one configuration this is the
share of a dictionary that does not depend on the start (Paulo and Belrose 2025, arXiv 2501.16615, match one to one;
mean max cosine: Sharkey et al. 2022).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.model import SAE
from sae.recovery import RECOVERED_ABOVE, direction_cosines

CHUNK_FEATURES = 1024


@dataclass(frozen=True)
class Stability:
    """The partner in b of each feature of a."""

    partner: Int[NDArray, "d_sae_a"]
    cosine: Float[NDArray, "d_sae_a"]
    mutual: Bool[NDArray, "d_sae_a"]

    @property
    def mean_max_cosine(self) -> float:
        """Mean over features of the largest cosine with a feature of the other SAE."""
        return float(self.cosine.mean())

    @property
    def stable_share(self) -> float:
        """Share of features with a mutual partner of cosine above 0.9."""
        return float((self.mutual & (self.cosine > RECOVERED_ABOVE)).mean())

    def table(self) -> pd.DataFrame:
        """One line a feature."""
        features = np.arange(len(self.partner))
        return pd.DataFrame(
            {"feature": features, "partner": self.partner, "cosine": self.cosine, "mutual": self.mutual}
        )


@torch.no_grad()
def stability(a: SAE, b: SAE) -> Stability:
    """Matches the features of two SAEs of one hook point.

    Raises:
        InputError: widths that differ.
    """
    if a.d_in != b.d_in:
        raise InputError(f"SAEs of widths {a.d_in} and {b.d_in} cannot be matched: take two of one hook point")
    signed = a.rule.signed and b.rule.signed
    cosine, partner = _best(a.W_dec, b.W_dec, signed)
    _, back = _best(b.W_dec, a.W_dec, signed)
    mutual = back[partner] == torch.arange(a.d_sae, device=back.device)
    return Stability(partner.cpu().numpy(), cosine.cpu().numpy(), mutual.cpu().numpy())


def _best(
    rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"], signed: bool
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """For every row the largest cosine with one of the others, and which."""
    found = []
    for chunk in rows.float().split(CHUNK_FEATURES):
        cosines = direction_cosines(chunk, others.float().to(chunk.device))
        found.append((cosines.abs() if signed else cosines).max(dim=1))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
