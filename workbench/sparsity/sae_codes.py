"""How sparse SAE codes are, on held-out tokens.

1. L0 of every token: mean, deciles, and mean by position in the context.
2. Density spectrum: features by falling density p(1) >= p(2) >= ..., the share of tokens on which each fires; dead
   features (never) and dense ones (on more than a tenth of the tokens).
3. Zipf exponent s of p(r) ~ r^-s: least squares of log p(r) on log r over the features that fired, every rank
   weighted by 1/r so that each factor of two in rank counts alike (reconstructed), with the fit's R^2.
4. How few terms reconstruct a token, in each SAE and in the hook point's own axes, PCA and a random rotation
   (`terms`); PCA and the mean come from training tokens.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from sae.metrics import DENSE_ABOVE
from sae.model import SAE
from sae.shown import Shown
from workbench.models.capture import capture
from workbench.models.contexts import context_batches, context_length
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.models.places import HookSpec
from workbench.sparsity.terms import bases, terms_table
from workbench.text.corpora import Corpus
from workbench.text.python_source import Split

DECILES = tuple(range(10, 100, 10))
TERM_TOKENS = 4096
"""Tokens whose terms are counted: the sort of every token's coefficients is what takes long."""


@dataclass(frozen=True)
class ZipfFit:
    """p(r) ~ r^-exponent."""

    exponent: float
    r_squared: float


def fit_zipf(density: Float[Tensor, "features"]) -> ZipfFit:
    """Step 3 of the module's description; NaN with fewer than three features that fired."""
    ordered = density.double().sort(descending=True).values
    ordered = ordered[ordered > 0]
    if len(ordered) < 3:
        return ZipfFit(float("nan"), float("nan"))
    rank = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    weight = 1 / rank / (1 / rank).sum()
    x, y = rank.log(), ordered.log()
    x, y = x - weight @ x, y - weight @ y
    slope = (weight @ (x * y)) / (weight @ x.square())
    residual, total = weight @ (y - slope * x).square(), weight @ y.square()
    return ZipfFit(-slope.item(), (1 - residual / total).item() if total > 0 else float("nan"))


@dataclass(frozen=True, repr=False)
class SAESparsity(Shown):
    """What was measured, as tables; the first column of each is `sae`, but for `terms`."""

    tokens: int
    summary: pd.DataFrame
    """l0, l0_p10 ... l0_p90, dead_share, dense_share, zipf_exponent, zipf_r2."""
    positions: pd.DataFrame
    """pos (in the context), tokens, l0."""
    spectrum: pd.DataFrame
    """rank, feature, density: the features that fired, by falling density."""
    terms: pd.DataFrame
    """See `terms.terms_table`."""


def measure_saes(
    model: LoadedModel,
    saes: Mapping[str, SAE],
    corpus: Corpus,
    *,
    max_tokens: int = 32_768,
    context_len: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SAESparsity:
    """Measures SAEs that read one hook point.

    Args:
        saes: by name.
        on_progress: called with (rows done, rows asked for).

    Raises:
        InputError: SAEs of different hook points or of another width, too few held-out tokens, or more than memory
            holds.
    """
    context_len = context_length(model, context_len)
    hook = _shared_hook(model, saes)
    # Of every token its place, with the row it came from, and every SAE's count, are gathered and then joined.
    check_passes_fit(
        "measuring SAE codes", model, max_tokens=max_tokens, context_len=context_len, width=hook.width,
        per_token=24 + 16 * len(saes),
    )  # fmt: skip
    basis = bases(_activations(model, corpus, "train", hook, context_len))
    # A copy where it has to move: the caller's stays where it is.
    saes = {
        name: sae if sae.W_dec.device == model.device else copy.deepcopy(sae).to(model.device)
        for name, sae in saes.items()
    }
    l0: dict[str, list[Tensor]] = {name: [] for name in saes}
    fired = {name: torch.zeros(sae.d_sae, dtype=torch.int64, device=model.device) for name, sae in saes.items()}
    position: list[Tensor] = []
    done = 0
    for batch in context_batches(model, corpus, "heldout", max_tokens=max_tokens, context_len=context_len):
        x = capture(model, batch.tokens, [hook]).activations[hook.name][batch.ordinary].flatten(1)
        position.append(batch.ordinary.nonzero()[:, 1])
        for name, sae in saes.items():
            code = sae.encode(x)
            l0[name].append(code.l0())
            fired[name] += torch.bincount(code.entries()[1], minlength=sae.d_sae)
        done += batch.tokens.numel()
        if on_progress is not None:
            on_progress(done, max_tokens)
    where = torch.cat(position)
    counts = {name: torch.cat(parts).double() for name, parts in l0.items()}
    density = {name: total.double() / len(where) for name, total in fired.items()}
    sample = _activations(model, corpus, "heldout", hook, context_len)
    return SAESparsity(
        tokens=len(where),
        summary=pd.DataFrame([_summary(name, counts[name], density[name]) for name in saes]),
        positions=pd.concat([_positions(name, counts[name], where) for name in saes], ignore_index=True),
        spectrum=pd.concat([_spectrum(name, density[name]) for name in saes], ignore_index=True),
        terms=terms_table(sample, basis, dict(saes)),
    )


def _shared_hook(model: LoadedModel, saes: Mapping[str, SAE]) -> HookSpec:
    names = sorted({sae.hook_name for sae in saes.values()})
    if len(names) != 1:
        raise InputError(f"these SAEs read different hook points ({', '.join(names)}): compare those of one at a time")
    hook = resolve_hook(model, names[0])
    for name, sae in saes.items():
        if sae.d_in != hook.width:
            raise InputError(
                f"SAE {name} reads {sae.d_in} values and {hook.name} of {model.info.name} has {hook.width}: "
                "it belongs to another model"
            )
    return hook


def _activations(
    model: LoadedModel, corpus: Corpus, split: Split, hook: HookSpec, context_len: int
) -> Float[Tensor, "n width"]:
    """Activations of ordinary tokens, from up to TERM_TOKENS rows of one side of the corpus."""
    rows = [
        capture(model, batch.tokens, [hook]).activations[hook.name][batch.ordinary].flatten(1)
        for batch in context_batches(
            model, corpus, split, max_tokens=max(TERM_TOKENS, context_len), context_len=context_len
        )
    ]
    return torch.cat(rows)


def _summary(name: str, l0: Float[Tensor, "tokens"], density: Float[Tensor, "features"]) -> dict[str, object]:
    fit = fit_zipf(density)
    at = torch.tensor([share / 100 for share in DECILES], dtype=torch.float64, device=l0.device)
    ordered = l0.sort().values
    deciles = ordered[(at * (len(ordered) - 1)).round().long()].tolist()
    return {
        "sae": name,
        "l0": l0.mean().item(),
        **{f"l0_p{share}": value for share, value in zip(DECILES, deciles, strict=True)},
        "dead_share": (density == 0).double().mean().item(),
        "dense_share": (density > DENSE_ABOVE).double().mean().item(),
        "zipf_exponent": fit.exponent,
        "zipf_r2": fit.r_squared,
    }


def _positions(name: str, l0: Float[Tensor, "tokens"], where: Tensor) -> pd.DataFrame:
    tokens = torch.bincount(where)
    total = torch.bincount(where, weights=l0)
    table = pd.DataFrame({"sae": name, "pos": range(len(tokens)), "tokens": tokens.cpu(), "l0": (total / tokens).cpu()})
    return table[table["tokens"] > 0]


def _spectrum(name: str, density: Float[Tensor, "features"]) -> pd.DataFrame:
    ordered, feature = density.sort(descending=True)
    count = int((ordered > 0).sum())
    return pd.DataFrame(
        {
            "sae": name,
            "rank": range(1, count + 1),
            "feature": feature[:count].cpu(),
            "density": ordered[:count].cpu(),
        }
    )
