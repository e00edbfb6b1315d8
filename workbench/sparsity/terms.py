"""How few terms reconstruct an activation: the best m terms in an orthonormal basis, and in an SAE's dictionary.

For a token's x and the mean mu of the sampled activations, the error with m terms, relative to ||x - mu||^2:

1. Orthonormal basis Q (rows q_j): coefficients c_j = q_j . (x - mu). The best m terms are the m largest |c_j|, and
   error(m) = 1 - (sum of the m largest c_j^2) / ||x - mu||^2.
   Bases: the neurons of the hook point (its own axes), PCA of a sample of other tokens, and a random rotation.
2. SAE: the token's m largest terms by size |a_i| ||W_dec[i]||, with the SAE's own bias in mu's place and its
   activations as they are; error(m) = ||x - b_dec - sum of m terms||^2 / ||x - mu||^2. An SAE's terms are not
   orthogonal, so this is a fixed order, not the best subset; its error ends at what the SAE leaves unexplained.

The number of terms of a token for an error e is the smallest m with error(m) <= e.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.model import SAE

ERRORS = (0.5, 0.2, 0.1, 0.05)
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis with the mean it is used around."""

    name: str
    mean: Float[Tensor, "d"]
    rows: Float[Tensor, "d d"] | None
    """None for the axes themselves."""


def bases(x: Float[Tensor, "n d"], *, seed: int = 0) -> list[Basis]:
    """The neurons' axes, PCA of `x` and a random rotation, all around the mean of `x`."""
    wide = x.double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.T
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64)).Q
    return [
        Basis("neurons", mean, None),
        Basis("PCA", mean, directions),
        Basis("random rotation", mean, rotation.to(x.device)),
    ]


def errors_in_basis(x: Float[Tensor, "n d"], basis: Basis) -> Float[Tensor, "n d+1"]:
    """error(m) for m = 0 ... d of every token, in float64; a token at the mean has error 0 throughout."""
    centred = x.double() - basis.mean
    coefficients = centred if basis.rows is None else centred @ basis.rows.T
    energy = coefficients.square().sort(dim=1, descending=True).values
    total = energy.sum(dim=1, keepdim=True)
    left = torch.cat([total, (total - energy.cumsum(dim=1)).clamp(min=0)], dim=1)
    return torch.where(total > 0, left / total, 0.0)


def errors_in_sae(x: Float[Tensor, "n d"], sae: SAE, mean: Float[Tensor, "d"]) -> Float[Tensor, "n terms+1"]:
    """error(m) for m = 0 ... the largest number of active features of a token; constant after a token's last term."""
    code = sae.encode(x)
    values, indices = _by_size(code, sae)
    wide = x.double()
    total = (wide - mean).square().sum(dim=1)
    left = wide - sae.b_dec.double()
    found = [left.square().sum(dim=1)]
    for term in range(values.shape[1]):
        left = left - values[:, term, None] * sae.W_dec[indices[:, term]].double()
        found.append(left.square().sum(dim=1))
    return torch.stack(found, dim=1) / total.clamp(min=torch.finfo(torch.float64).tiny)[:, None]


def _by_size(code: SparseCode, sae: SAE) -> tuple[Float[Tensor, "n terms"], Int[Tensor, "n terms"]]:
    """Values and features of each token, the largest contributions first, zeros where it has fewer."""
    token, feature, value = code.entries()
    size = value.double().abs() * sae.W_dec[feature].double().norm(dim=1)
    order = size.argsort(descending=True, stable=True)
    order = order[token[order].argsort(stable=True)]
    token, feature, value = token[order], feature[order], value[order].double()
    counts = torch.bincount(token, minlength=code.n_tokens)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(token), device=token.device) - starts[token]
    values = value.new_zeros(code.n_tokens, int(counts.max()) if len(token) else 0)
    indices = torch.zeros_like(values, dtype=torch.int64)
    values[token, rank] = value
    indices[token, rank] = feature
    return values, indices


def terms_needed(errors: Float[Tensor, "n terms"], allowed: float) -> Int[Tensor, "n"]:
    """Smallest m with error(m) <= allowed for every token; -1 where no m reaches it."""
    reached = errors <= allowed
    return torch.where(reached.any(dim=1), reached.int().argmax(dim=1), -1)


def terms_table(x: Float[Tensor, "n d"], around: Sequence[Basis], saes: dict[str, SAE]) -> pd.DataFrame:
    """Columns dictionary, error, terms_mean, terms_median (over the tokens that reach it), reached (their share).

    Args:
        around: bases made from other tokens; the first one's mean is what errors are relative to.
    """
    needed: dict[str, list[Tensor]] = {name: [] for name in [basis.name for basis in around] + list(saes)}
    for part in x.split(ROWS_AT_ONCE):
        curves = {basis.name: errors_in_basis(part, basis) for basis in around}
        curves |= {name: errors_in_sae(part, sae, around[0].mean) for name, sae in saes.items()}
        for name, errors in curves.items():
            needed[name].append(torch.stack([terms_needed(errors, allowed) for allowed in ERRORS], dim=1))
    rows = []
    for name, parts in needed.items():
        counts = torch.cat(parts)
        for number, allowed in enumerate(ERRORS):
            reached = counts[:, number][counts[:, number] >= 0].double()
            rows.append(
                {
                    "dictionary": name,
                    "error": allowed,
                    "terms_mean": reached.mean().item() if len(reached) else float("nan"),
                    "terms_median": reached.median().item() if len(reached) else float("nan"),
                    "reached": len(reached) / len(counts),
                }
            )
    return pd.DataFrame(rows)
