"""How far the features of two SAEs are the same: cosines of their decoder directions.

For feature i of A and j of B, both decoder rows scaled to unit norm, c_ij is their cosine, or its absolute value when
either SAE's activations are signed, since a direction and its opposite are then one feature. For each feature the best
partner in the other SAE and its cosine are kept, in both directions; the mean of these maxima is the mean max cosine
similarity (MMCS) of Sharkey et al. 2022 ("Taking features out of superposition with sparse autoencoders"). The two may
differ in width. Between seeds of one configuration, the share of features with a mutual partner of cosine above 0.9
is how much of a dictionary does not depend on the start (Paulo and Belrose 2025, arXiv 2501.16615, who match one to
one).

Memory: d_sae of B times `sae.directions.ROWS_AT_ONCE` cosines at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from sae.directions import cosine_blocks
from sae.errors import InputError
from sae.model import SAE
from sae.recovery import RECOVERED_ABOVE
from sae.shown import Shown
from workbench.catalog.catalog import Catalog
from workbench.disk.names import lasting_name
from workbench.saes.figures import outline
from workbench.show.colours import series_colour

BINS = 50


@dataclass(frozen=True, repr=False)
class Overlap(Shown):
    """Best partners of the features of two SAEs."""

    a: str
    b: str
    partner_in_b: Int[NDArray, "d_sae_a"]
    cosine_a: Float[NDArray, "d_sae_a"]
    partner_in_a: Int[NDArray, "d_sae_b"]
    cosine_b: Float[NDArray, "d_sae_b"]

    @property
    def mean_max_cosine(self) -> tuple[float, float]:
        """Of A's features in B, and of B's in A."""
        return float(self.cosine_a.mean()), float(self.cosine_b.mean())

    @property
    def mutual(self) -> Bool[NDArray, "d_sae_a"]:
        """Whether the best partner of a feature of A has this feature as its own best."""
        return self.partner_in_a[self.partner_in_b] == np.arange(len(self.partner_in_b))

    @property
    def stable_share(self) -> float:
        """Share of A's features with a mutual partner of cosine above 0.9."""
        return float((self.mutual & (self.cosine_a > RECOVERED_ABOVE)).mean())

    def table(self) -> pd.DataFrame:
        """One line a feature of A: feature, partner, cosine, mutual (whether the partner's best is this feature)."""
        feature = np.arange(len(self.cosine_a))
        return pd.DataFrame(
            {"feature": feature, "partner": self.partner_in_b, "cosine": self.cosine_a, "mutual": self.mutual}
        )

    def figure(self, colours: Mapping[str, str] | None = None) -> go.Figure:
        """Histogram of the best cosines in either direction, as shares of the features.

        Args:
            colours: of the SAEs, where they have them already; the line of A's features has A's.
        """
        figure = go.Figure()
        pairs = ((self.a, self.b, self.cosine_a), (self.b, self.a, self.cosine_b))
        low = min(0.0, float(self.cosine_a.min()), float(self.cosine_b.min()))
        edges = np.linspace(low, 1.0, BINS + 1)
        for number, (own, other, cosine) in enumerate(pairs):
            counts, _ = np.histogram(cosine.clip(low, 1.0), edges)
            figure.add_scatter(
                **outline(edges.tolist(), (counts / len(cosine)).tolist()), name=f"{own} in {other}", mode="lines",
                line={"shape": "hv", "color": colours[own] if colours else series_colour(number), "width": 1.5},
            )  # fmt: skip
        return figure.update_layout(
            xaxis_title="cosine with the nearest decoder direction of the other SAE", yaxis_title="share of features",
            height=320, margin={"l": 50, "r": 10, "t": 20, "b": 40}, legend={"orientation": "h", "y": -0.25},
        )  # fmt: skip


@torch.no_grad()
def overlap(a: SAE, b: SAE, names: tuple[str, str] = ("A", "B")) -> Overlap:
    """Best partners between two SAEs; see the module's description.

    Args:
        a, b: SAEs or transcoders that write vectors of the same width, on one device.
        names: what tables and figures call them.

    Raises:
        InputError: SAEs of different output widths or models, whose directions do not share a basis.
    """
    models = (lasting_name(sae.model_name) for sae in (a, b))
    for what, mine, other in (("writes vectors of", a.d_out, b.d_out), ("is of the model", *models)):
        if mine != other:
            raise InputError(
                f"{names[0]} {what} {mine}, {names[1]} {other}, so their directions have nothing in common: "
                "choose SAEs of one model and width"
            )
    either_signed = a.rule.signed or b.rule.signed
    best_b = torch.full((b.d_sae,), -torch.inf, device=b.W_dec.device)
    in_a = torch.zeros(b.d_sae, dtype=torch.int64, device=b.W_dec.device)
    best_a, in_b = [], []
    for first, cosine in cosine_blocks(a.W_dec, b.W_dec):
        if either_signed:
            cosine = cosine.abs()
        value, index = cosine.max(dim=1)
        best_a.append(value)
        in_b.append(index)
        value, index = cosine.max(dim=0)
        better = value > best_b
        best_b = torch.where(better, value, best_b)
        in_a = torch.where(better, first + index, in_a)
    return Overlap(
        *names, torch.cat(in_b).cpu().numpy(), torch.cat(best_a).cpu().numpy(), in_a.cpu().numpy(), best_b.cpu().numpy()
    )


def overlap_of(catalog: Catalog, a: str, b: str) -> Overlap:
    """The overlap of two SAEs of a workspace. Raises InputError as `overlap`, and for names that do not exist."""
    return overlap(catalog.coder(a), catalog.coder(b), (a, b))
