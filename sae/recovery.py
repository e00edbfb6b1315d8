"""Recovery: how much of a known dictionary an SAE found.

1. cos[i, f] = d_i . W_dec[f] / |W_dec[f]| between true directions and decoder rows; its absolute value where the rule
   gives signed codes, since -W_dec[f] with the opposite sign is the same feature.
2. Matching: one decoder row for each true direction, no row twice, with the largest sum of cosines (the Hungarian
   method, by shortest augmenting paths: Jonker and Volgenant 1987).
3. Mean max cosine similarity (Sharkey et al. 2022): mean over true directions of max_f cos[i, f], rows may repeat.
4. F1 of firing, on held-out rows and matched pairs: a true positive is a row on which both are active, and where
   signs carry meaning with the same sign once -1 cosines are turned round.
5. Dead share: rows of the decoder that fire on none of the held-out rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.directions import cosines
from sae.errors import InputError
from sae.model import SAE
from sae.shown import Shown

RECOVERED_ABOVE = 0.9
"""Cosine above which a true feature counts as found."""
BATCH_ROWS = 4096


@dataclass(frozen=True, repr=False)
class Recovery(Shown):
    """What was found of a planted dictionary."""

    mean_max_cosine: float
    matched_cosine: float
    """Mean cosine of the matched pairs."""
    recovered_share: float
    """Share of true features whose match has a cosine above 0.9."""
    f1: float
    """Mean over true features that fire of the F1 of their match's firing."""
    dead_share: float
    match: Int[Tensor, "n_features"]
    """Decoder row matched to each true feature; -1 for features without one, where the SAE is the smaller."""
    cosine: Float[Tensor, "n_features"]
    """Cosine of each matched pair; 0 without one."""
    feature_f1: Float[Tensor, "n_features"]
    """F1 of each matched pair; NaN for true features that did not fire on these rows."""


@torch.no_grad()
def recovery(
    sae: SAE,
    directions: Float[Tensor, "n_features d_in"],
    x: Float[Tensor, "n d_in"],
    activations: Float[Tensor, "n n_features"],
    gradients: Float[Tensor, "n d_in"] | None = None,
) -> Recovery:
    """Compares an SAE with the dictionary its activations were made from.

    Args:
        directions: true features, of unit norm.
        x: held-out rows.
        activations: their true coefficients, signed.
        gradients: at these rows, to encode a gradient SAE with them; it encodes as TopK without.

    Raises:
        InputError: shapes that do not belong together.
    """
    if directions.shape[1] != sae.d_in or activations.shape != (x.shape[0], directions.shape[0]):
        raise InputError(
            f"directions {list(directions.shape)}, rows {list(x.shape)} and activations {list(activations.shape)} "
            f"do not go with an SAE of width {sae.d_in}: expected [features, d_in], [n, d_in], [n, features]"
        )
    signed = sae.rule.signed
    found = cosines(directions.to(sae.W_dec), sae.W_dec)
    similarity = found.abs() if signed else found
    match = assign(similarity)
    rows = torch.nonzero(match >= 0).squeeze(1)
    matched = torch.zeros_like(similarity[:, 0])
    matched[rows] = similarity[rows, match[rows]]
    turned = torch.ones_like(matched)
    if signed:
        turned[rows] = found[rows, match[rows]].sign()
    counts = torch.zeros(3, directions.shape[0], dtype=torch.int64, device=matched.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=matched.device)
    for start in range(0, x.shape[0], BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        g = None if gradients is None else gradients[part].to(sae.W_dec)
        code = sae.encode(x[part].to(sae.W_dec), g)
        counts += _firings(code, activations[part].to(matched.device), match, turned)
        fired += torch.bincount(code.entries()[1], minlength=sae.d_sae)
    hits, predicted, true = counts.double()
    feature_f1 = torch.where(true > 0, 2 * hits / (predicted + true), torch.nan)
    return Recovery(
        mean_max_cosine=similarity.amax(dim=1).mean().item(),
        matched_cosine=matched.mean().item(),
        recovered_share=(matched > RECOVERED_ABOVE).double().mean().item(),
        f1=feature_f1.nanmean().item(),
        dead_share=(fired == 0).double().mean().item(),
        match=match.cpu(),
        cosine=matched.cpu(),
        feature_f1=feature_f1.cpu(),
    )


def assign(similarity: Float[Tensor, "n m"]) -> Int[Tensor, "n"]:
    """Column of each row in the assignment with the largest sum, no column twice; -1 for rows left over when n > m.

    Exact; float64 on the CPU, time O(min(n, m)^2 max(n, m)).
    """
    if similarity.shape[0] > similarity.shape[1]:
        column_owner = assign(similarity.T)
        rows = torch.full((similarity.shape[0],), -1, device=similarity.device)
        rows[column_owner] = torch.arange(similarity.shape[1], device=similarity.device)
        return rows
    cost = -similarity.detach().cpu().double()
    n, m = cost.shape
    u, v = torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    column_of, row_of = torch.full((n,), -1), torch.full((m,), -1)
    for start in range(n):
        # Dijkstra over columns from an unassigned row: `reach` is the length of the shortest path to each column.
        reach = torch.full((m,), torch.inf, dtype=torch.float64)
        through = torch.full((m,), -1)
        open_columns = torch.ones(m, dtype=torch.bool)
        tree_rows = [start]
        row, length = start, 0.0
        while True:
            step = length + cost[row] - u[row] - v
            shorter = open_columns & (step < reach)
            reach[shorter], through[shorter] = step[shorter], row
            column = int(torch.where(open_columns, reach, torch.inf).argmin())
            length = float(reach[column])
            open_columns[column] = False
            row = int(row_of[column])
            if row < 0:
                break
            tree_rows.append(row)
        closed = ~open_columns
        u[start] += length
        for tree_row in tree_rows[1:]:
            u[tree_row] += length - reach[column_of[tree_row]]
        v[closed] -= length - reach[closed]
        while True:
            row = int(through[column])
            row_of[column] = row
            column_of[row], column = column, int(column_of[row])
            if row == start:
                break
    return column_of.to(similarity.device)


def _firings(
    code: SparseCode,
    activations: Float[Tensor, "n n_features"],
    match: Int[Tensor, "n_features"],
    turned: Float[Tensor, "n_features"],
) -> Int[Tensor, "3 n_features"]:
    """Rows on which both members of a pair fire with one sign, on which the match fires, on which the truth fires."""
    n_features = len(match)
    partner = torch.full((code.d_sae,), -1, device=match.device)
    paired = torch.nonzero(match >= 0).squeeze(1)
    partner[match[paired]] = paired
    row, feature, value = code.entries()
    kept = partner[feature] >= 0
    row, true_feature, value = row[kept], partner[feature[kept]], value[kept]
    agrees = (value * turned[true_feature]).sign() == activations[row, true_feature].sign()
    return torch.stack(
        [
            torch.bincount(true_feature[agrees], minlength=n_features),
            torch.bincount(true_feature, minlength=n_features),
            (activations != 0).sum(dim=0),
        ]
    )
