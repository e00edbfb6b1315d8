"""What an SAE's encoder loses: one dictionary, its codes by the encoder and by searches, at equal numbers of features.

For each k, on held-out documents as `workbench.saes.evaluation` measures an SAE (L0, FVU, added nats, KL):

    encoder            the SAE's own codes; below its L0 their k largest values
    encoder, refitted  the same features with their best values (`sae.inference.least_squares`)
    l1                 least squares with an l1 penalty, the one whose codes have a mean L0 of k on a sample of the
                       tokens (`sae.inference.ista`)
    l1, refitted       its features with their best values
    iht                k features by iterative hard thresholding (`sae.inference.iht`)
    omp                k features by orthogonal matching pursuit (`sae.inference.omp`)
    omp, adaptive      as many features of each token as have a product above a threshold, k on average

Values may be negative where the SAE's rule allows it. FVU(encoder) - FVU(omp) at the encoder's own L0 is what the
encoder loses at least, as OMP need not find the best features either (the amortisation gap; O'Neill et al. 2024, arXiv
2411.13117); what refitting wins is the part of it that lies in values, not in the choice.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.inference import (
    InferredSAE,
    ista,
    iterative_hard_thresholding,
    least_for,
    matching_pursuit,
    penalty_for,
    refit,
)
from sae.inference.coder import Infer, check_searched
from sae.inference.omp import SPREAD
from sae.model import SAE
from sae.shown import Shown
from workbench.catalog.catalog import Catalog
from workbench.models.capture import capture
from workbench.models.contexts import CONTEXT_LEN, context_batches, context_length
from workbench.models.hooks import read_hook
from workbench.models.load import LoadedModel
from workbench.saes.evaluate import heldout_text, parameters_of
from workbench.saes.evaluation import evaluate_sae
from workbench.saes.figures import inference_curves
from workbench.text.corpora import Corpus

KIND = "inference"
ENCODER, OMP = "encoder", "omp"
ADAPTIVE = "omp, adaptive"
METHODS = (ENCODER, "encoder, refitted", "l1", "l1, refitted", "iht", OMP, ADAPTIVE)
SAMPLE_ROWS = 256
MEASURED = ("l0", "fvu", "added_nats", "kl", "dead_share")


@dataclass(frozen=True, repr=False)
class Inference(Shown):
    """Codes of one dictionary, method by method."""

    sae: str
    l0: float
    """Mean number of features that its encoder gives the tokens of the sample."""
    rows: pd.DataFrame
    """k, method, l0, fvu, added_nats, kl, dead_share, threshold (l1's penalty, the least product)."""

    def table(self) -> pd.DataFrame:
        """One line a method and k, with the columns of `rows`."""
        return self.rows

    def figure(self) -> go.Figure:
        """FVU and added nats against L0, one line a method."""
        return inference_curves(self.rows)

    @property
    def encoder_loses(self) -> float:
        """FVU of the encoder less that of OMP with as many features, at the largest k that the encoder has codes of;
        NaN where one of the two was not measured."""
        at = self.rows.pivot(index="k", columns="method", values="fvu")
        if not {ENCODER, OMP} <= set(at):
            return float("nan")
        return float((at[ENCODER] - at[OMP]).dropna().iloc[-1])


def infer_codes(
    catalog: Catalog,
    name: str,
    *,
    ks: Sequence[int] = (),
    methods: Sequence[str] = METHODS,
    model: LoadedModel | None = None,
    corpus: str | None = None,
    text_field: str | None = None,
    only: str | None = None,
    max_tokens: int = 4096,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Inference:
    """Measures and stores the codes of an SAE (kind `inference`); what is stored for the same is not measured again.

    Args:
        name: an SAE of the workspace.
        ks: numbers of features; a quarter, a half and the whole of the encoder's mean L0 when left out.
        methods: of METHODS.
        model: the SAE's model, already loaded.
        corpus, text_field, only: whose held-out documents are used, as `workbench.saes.evaluate.evaluate`.
        max_tokens: held-out tokens.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        InputError: no such SAE, a transcoder or crosscoder, k out of range, an unknown method, nothing but codes of the
            encoder asked for at more features than it finds, no corpus known, or as `evaluate_sae`.
    """
    sae, origin = catalog.sae(name), catalog.origin(name)
    if unknown := [method for method in methods if method not in METHODS]:
        raise InputError(f"no method {unknown[0]!r}: choose from {'; '.join(METHODS)}")
    if ks and not 1 <= min(ks) <= max(ks) <= sae.d_sae:
        raise InputError(f"k must lie between 1 and the SAE's {sae.d_sae} features, got {min(ks)} to {max(ks)}")
    opened = heldout_text(f"SAE {name!r}", origin, corpus, text_field, only)
    loaded = origin.load(f"SAE {name!r}", model, device)
    parameters = {
        "sae": name, **parameters_of(origin, corpus, opened), "max_tokens": max_tokens, "ks": [*ks],
        "methods": [*methods],
    }  # fmt: skip

    def make() -> Any:
        found = measure_inference(
            loaded, sae, opened, name=name, ks=ks, methods=methods, max_tokens=max_tokens,
            context_len=min(origin.context_len or CONTEXT_LEN, loaded.info.n_ctx), separate=origin.separate,
            on_progress=on_progress,
        )  # fmt: skip
        return {"codes": found.rows, "summary": pd.DataFrame([{"sae": name, "l0": found.l0}])}, {
            "codes": found.figure()
        }

    text = {"name": opened.name, "fingerprint": opened.fingerprint}
    result = catalog.results.get_or_make(
        KIND, name, parameters=parameters, origin=origin.measured_with(evaluated_on=text), make=make
    )
    return Inference(name, float(result.table("summary")["l0"].item()), result.table("codes"))


def measure_inference(
    model: LoadedModel,
    sae: SAE,
    corpus: Corpus,
    *,
    name: str = "SAE",
    ks: Sequence[int] = (),
    methods: Sequence[str] = METHODS,
    max_tokens: int = 4096,
    context_len: int | None = None,
    separate: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inference:
    """Measures an SAE's codes on the held-out documents of a corpus; see `infer_codes`, also for the InputErrors."""
    context_len = context_length(model, context_len)
    check_searched(sae)
    sae = sae if sae.W_dec.device == model.device else copy.deepcopy(sae).to(model.device)
    sample = _sample(model, sae, corpus, context_len, separate, max_tokens)
    l0 = float(sae.encode(sample).l0().double().mean())
    own = max(1, round(l0))
    ks = sorted(set(ks)) or sorted({max(1, own // 4), max(1, own // 2), own})
    ways, tuned = ways_to_codes(sae, sample, ks, own, methods)
    if not ways:
        raise InputError(f"the encoder finds {own} features a token, not {ks[0]}: ask for fewer, or for a search too")
    arms = {at: InferredSAE(sae, infer) for at, infer in ways.items()}
    found = evaluate_sae(
        model, list(arms.values()), corpus, max_tokens=max_tokens, context_len=context_len, separate=separate,
        on_progress=on_progress,
    )  # fmt: skip
    rows = [
        {"k": k, "method": method, **{key: getattr(one, key) for key in MEASURED},
         "threshold": tuned.get((method, k))}
        for (method, k), one in zip(arms, found, strict=True)
    ]  # fmt: skip
    return Inference(name, l0, pd.DataFrame(rows).astype({"threshold": float}))


def ways_to_codes(
    sae: SAE, sample: Float[Tensor, "n d_in"], ks: Sequence[int], own: int, methods: Sequence[str]
) -> tuple[dict[tuple[str, int], Infer], dict[tuple[str, int], float]]:
    """How each of the methods finds codes of about k features, for every k; and the thresholds that give some their L0.

    Args:
        sample: activations that these thresholds are found on.
        own: the encoder's mean L0.
    """
    signed = sae.rule.signed
    x = (sample - sae.b_dec).to(torch.promote_types(sae.W_dec.dtype, torch.float32))
    W_dec = sae.W_dec.detach().to(x.dtype)
    ways, tuned = dict[tuple[str, int], Infer](), dict[tuple[str, int], float]()
    # An SAE's batch is asked for all k, and a penalty's codes for their refitting: both are found once a batch.
    pursuits = _Remembered(partial(matching_pursuit, ks=ks, signed=signed))
    for number, k in enumerate(ks):
        if k <= own:
            encoder = _Remembered(partial(_encoded, sae, k if k != own else sae.d_sae))
            ways[ENCODER, k], ways["encoder, refitted", k] = encoder, partial(_refitted, encoder, signed)
        if {"l1", "l1, refitted"} & set(methods):
            tuned["l1", k] = tuned["l1, refitted", k] = penalty_for(x, W_dec, k, signed=signed)
            l1 = _Remembered(partial(ista, penalty=tuned["l1", k], signed=signed))
            ways["l1", k], ways["l1, refitted", k] = l1, partial(_refitted, l1, signed)
        ways["iht", k] = partial(iterative_hard_thresholding, k=k, signed=signed)
        ways[OMP, k] = partial(_one_of, pursuits, number)
        if ADAPTIVE in methods:
            tuned[ADAPTIVE, k] = least_for(x, W_dec, k, signed=signed)
            free = partial(matching_pursuit, ks=[SPREAD * k], signed=signed, least=tuned[ADAPTIVE, k])
            ways[ADAPTIVE, k] = partial(_one_of, free, 0)
    return {at: way for at, way in ways.items() if at[0] in methods}, tuned


def _encoded(sae: SAE, most: int, x: Float[Tensor, "n d_in"], _: Tensor) -> SparseCode:
    return sae.encode(x + sae.b_dec).largest(most)


def _refitted(infer: Infer, signed: bool, x: Float[Tensor, "n d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> SparseCode:
    return refit(x, infer(x, W_dec), W_dec, signed=signed)


def _one_of(
    codes: Callable[[Tensor, Tensor], Sequence[SparseCode]], number: int, x: Tensor, W_dec: Tensor
) -> SparseCode:
    return codes(x, W_dec)[number]


class _Remembered:
    """A function of rows that keeps what it found for the last ones."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.rows: Tensor | None = None
        self.found: Any = None

    def __call__(self, x: Float[Tensor, "n d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> Any:
        if self.rows is None or not torch.equal(x, self.rows):
            self.found, self.rows = self.function(x, W_dec), x
        return self.found


def _sample(
    model: LoadedModel, sae: SAE, corpus: Corpus, context_len: int, separate: bool, max_tokens: int
) -> Float[Tensor, "n d_in"]:
    """Activations of held-out tokens, evenly spaced over the first batch of those that are measured."""
    hook = read_hook(model, sae)
    sizes = {"max_tokens": max_tokens, "context_len": context_len}
    batch = next(context_batches(model, corpus, "heldout", separate=separate, **sizes))
    found = capture(model, batch.tokens, [hook]).activations[hook.name][batch.ordinary].flatten(1)
    return found[:: max(1, len(found) // SAMPLE_ROWS)]
