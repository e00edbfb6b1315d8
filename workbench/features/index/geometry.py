"""What an SAE's decoder directions look like: neighbours and a map.

- Neighbours: for each feature the `NEIGHBOURS` others whose decoder rows have the largest absolute cosine with its
  own; the sign is kept, since an opposed direction is as telling as a parallel one.
- Map: UMAP of the decoder rows by cosine (McInnes et al. 2018, arXiv 1802.03426; fixed seed) where umap-learn is
  installed. Else the two leading principal components of the rows, scaled to unit norm and centred; the sign of a
  component is fixed so that its largest entry is positive, to make the same map every time.
"""

import importlib.util
import warnings
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.directions import cosine_blocks, unit_rows

NEIGHBOURS = 10
FEWEST_FOR_UMAP = 64
"""Below it UMAP's neighbourhoods of 15 are most of the features."""
MapMethod = Literal["UMAP", "PCA"]


@torch.no_grad()
def decoder_neighbours(
    W_dec: Float[Tensor, "d_sae d_in"], n: int = NEIGHBOURS
) -> tuple[Float[Tensor, "d_sae n"], Int[Tensor, "d_sae n"]]:
    """(cosine, feature) of the n nearest, nearest first; n is lowered to d_sae - 1."""
    n = min(n, len(W_dec) - 1)
    cosines, features = [], []
    for first, cosine in cosine_blocks(W_dec, W_dec):
        own = torch.arange(len(cosine), device=cosine.device)
        size = cosine.abs()
        size[own, first + own] = -1
        feature = size.topk(n, dim=1).indices
        features.append(feature)
        cosines.append(cosine.gather(1, feature))
    return torch.cat(cosines), torch.cat(features)


@torch.no_grad()
def decoder_map(W_dec: Float[Tensor, "d_sae d_in"]) -> tuple[MapMethod, Float[Tensor, "d_sae 2"]]:
    """The method there is on this machine, and its coordinates; `principal_map` where features are too few for UMAP."""
    if len(W_dec) < FEWEST_FOR_UMAP or importlib.util.find_spec("umap") is None:
        return "PCA", principal_map(W_dec)
    import umap

    # A fixed seed keeps UMAP to one thread; it says so in a warning every time.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        found = umap.UMAP(metric="cosine", random_state=0).fit_transform(unit_rows(W_dec).cpu().numpy())
    return "UMAP", torch.from_numpy(found).double()


def principal_map(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae 2"]:
    """Coordinates on the two leading principal components; zeros for a component that does not exist."""
    unit = unit_rows(W_dec.double())
    centred = unit - unit.mean(dim=0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    coordinates = centred @ (components * largest.sign())
    if coordinates.shape[1] < 2:
        coordinates = torch.cat([coordinates, torch.zeros_like(coordinates)], dim=1)
    return coordinates
