"""Lenses on prompts, and mean Jacobians fitted on a corpus; see `circuits.lens`.

`fit_lens` stores a `lens` result:

    layers     lens (logit, Jacobian, centred), layer (0: what enters the first block, L: the model itself), kl (nats,
               of the model's distribution to the lens'), cross_entropy (nats; NaN of classes), agrees (share of
               positions whose likeliest output is the model's), noise (of the Jacobian, see
               `circuits.lens.Jacobians`); all on held-out text
    jacobians  layer, mean (float32 bytes), matrix (likewise, a row an entry of the last residual stream; none at L)
    summary    positions averaged over, positions measured on

`read_lens` is a prompt through a lens: the likeliest tokens by layer and position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from circuits.lens import Jacobians, lens_logits, mean_jacobians
from circuits.passes import OnProgress
from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits import figures
from workbench.models.contexts import ContextBatch, context_batches, context_length, losses, whole_contexts
from workbench.models.load import LoadedModel
from workbench.models.memory import check_fits_memory
from workbench.models.prompt_text import next_log_probabilities, row_texts, whole_prompt
from workbench.show.grid import GRID_CSS, Cell, Row, grid_html
from workbench.show.html import quoted
from workbench.text.corpora import Corpus

LENS = "lens"
"""The kind of result."""
CONTEXTS = 16
"""Of a batch whose Jacobians are taken together."""
LENS_CONTEXT = 128
"""Positions of a context, where the model takes as many and no other number is asked for."""
PREDICTIONS = 5
SINKS = 16
"""Positions at a context's start that are not counted: attention sinks have streams of their own kind."""


@dataclass(frozen=True)
class LensReading:
    """A prompt through a lens. Positions are those of the model's row of tokens: BOS, where it has one, is 0."""

    lens: str
    """`logit`, or the name of the Jacobians, with `, centred` where it is."""
    texts: tuple[str, ...]
    top: Int[NDArray, "layers+1 pos PREDICTIONS"]
    """Likeliest next tokens, or classes, the likeliest first."""
    top_texts: tuple[tuple[tuple[str, ...], ...], ...]
    probabilities: Float[NDArray, "layers+1 pos PREDICTIONS"]
    final: Float[NDArray, "layers+1 pos"]
    """Probability of the token that the model itself finds likeliest."""
    kl: Float[NDArray, "layers+1 pos"]
    """Nats, of the model's distribution to the lens'."""
    outcome: str = "next token"
    """What is likeliest; `class` of a model of classes."""

    def __repr__(self) -> str:
        layers, positions = self.kl.shape
        return f"LensReading({self.lens}): {positions} tokens, {layers - 1} layers"

    def table(self) -> pd.DataFrame:
        """Columns layer, position, token (that stands there), next (likeliest after it), p, final (the probability of
        the model's own likeliest), kl."""
        layers, positions = self.kl.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), positions),
                "position": np.tile(np.arange(positions), layers),
                "token": list(self.texts) * layers,
                "next": [texts[0] for row in self.top_texts for texts in row],
                "p": self.probabilities[..., 0].ravel(),
                "final": self.final.ravel(),
                "kl": self.kl.ravel(),
            }
        )

    def rows(self) -> list[Row]:
        """For `workbench.show.grid`: the last layer first, in every cell the likeliest next token."""
        layers, positions = self.kl.shape
        return [
            Row(
                str(layer), f"after block {layer - 1}" if layer else "before the blocks", 1.0,
                {at: Cell(float(self.probabilities[layer, at, 0]), self._said(layer, at), self.top_texts[layer][at][0])
                 for at in range(positions)},
            )
            for layer in reversed(range(layers))
        ]  # fmt: skip

    def _said(self, layer: int, position: int) -> str:
        likeliest = zip(self.top_texts[layer][position], self.probabilities[layer, position], strict=True)
        said = "\n".join(f"{quoted(text)} {p:.1%}" for text, p in likeliest)
        return f"{said}\nKL to the model {self.kl[layer, position]:.3g} nats"

    def _repr_html_(self) -> str:
        return f"<style>{GRID_CSS}</style>{grid_html(self.texts, self.rows())}"


@torch.no_grad()
def read_lens(
    model: LoadedModel, prompt: str, jacobians: tuple[str, Jacobians] | None = None, *, centred: bool = False
) -> LensReading:
    """Reads a prompt's residual streams by the logit lens, or by a Jacobian lens.

    Args:
        jacobians: their name and what `open_lens` gave.
        centred: see `circuits.lens`.

    Raises:
        InputError: a prompt without tokens or longer than is read at once, a bridge that computes another model, or
            Jacobians of another model's shape.
    """
    row = model.begun(whole_prompt(model, prompt))
    tokens = torch.tensor([row], device=model.device)
    name, fitted = jacobians or ("logit", None)
    clean = next_log_probabilities(model.bridge(tokens)[0])
    likeliest, n_out = clean.argmax(dim=-1, keepdim=True), clean.shape[-1]
    top, texts, probabilities, final, kl = [], [], [], [], []
    # One layer's logits at a time: those of all layers together are what a prompt would need most memory for.
    for logits in lens_logits(model.bridge, tokens, fitted, centred=centred):
        log_p = next_log_probabilities(logits[0])
        best = log_p.topk(min(PREDICTIONS, n_out), dim=-1)
        top.append(best.indices.cpu().numpy())
        texts.append(tuple(tuple(model.label_of(token, n_out) for token in row) for row in top[-1].tolist()))
        probabilities.append(best.values.exp().cpu().numpy())
        final.append(log_p.gather(1, likeliest)[:, 0].exp().cpu().numpy())
        kl.append(F.kl_div(log_p, clean, reduction="none", log_target=True).sum(dim=-1).clamp(min=0).cpu().numpy())
    return LensReading(
        f"{name}, centred" if centred else name, tuple(row_texts(model, row)), np.stack(top),
        tuple(texts), np.stack(probabilities), np.stack(final), np.stack(kl),
        model.outcome,
    )  # fmt: skip


def fit_lens(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    max_tokens: int = 4096,
    heldout_tokens: int = 8192,
    context_len: int | None = None,
    own: bool = False,
    on_progress: OnProgress | None = None,
) -> Result:
    """Averages Jacobians over a corpus' training side, measures the lenses on the other, and stores them.

    Args:
        max_tokens: to average over; a pass back through the model for each of its `d_model` directions.
        context_len: positions of a context, 128 or as many as a shorter model takes when None; the first `SINKS` and
            the last are left out, as Gurnee et al. leave them.
        own: Jacobians of a position's own stream; see `circuits.lens`.

    Raises:
        InputError: contexts that the model does not take or that leave no position, too few tokens for one, too little
            memory, or a bridge that computes another model.
    """
    context_len = context_length(model, context_len, LENS_CONTEXT)
    if context_len < SINKS + 2:
        raise InputError(f"contexts of {context_len} leave no position: the first {SINKS} and the last are left out")
    whole_contexts(model, min(max_tokens, heldout_tokens), context_len)
    parameters = {"max_tokens": max_tokens, "heldout_tokens": heldout_tokens, "context_len": context_len, "own": own}
    d_model, n_layers = model.info.d_model, model.info.n_layers

    def make() -> Made:
        # The sums of two halves in float64, of which the averages are made beside them.
        check_fits_memory(
            f"Jacobians of {n_layers} layers of width {d_model}", 4 * 8 * n_layers * d_model**2,
            torch.device("cpu"), "use a smaller model",
        )  # fmt: skip
        found = mean_jacobians(
            model.bridge, _batches(model, corpus, max_tokens, context_len),
            n_batches=-(-max_tokens // (CONTEXTS * context_len)), own=own, on_progress=on_progress,
        )  # fmt: skip
        held = list(context_batches(model, corpus, "heldout", max_tokens=heldout_tokens, context_len=context_len))
        layers = pd.concat(
            [
                _measured(model, held, "logit", None), _measured(model, held, "Jacobian", found),
                _measured(model, held, "centred", found),
            ],
            ignore_index=True,
        )  # fmt: skip
        n_measured = sum(int(batch.counted.sum()) for batch in held)
        stored = pd.DataFrame(
            {
                "layer": range(n_layers + 1),
                "mean": [mean.numpy().tobytes() for mean in found.means],
                "matrix": [*[matrix.numpy().tobytes() for matrix in found.matrices], b""],
            }
        )
        summary = pd.DataFrame([{"averaged": found.n_positions, "measured": n_measured}])
        return {"layers": layers, "jacobians": stored, "summary": summary}, {"layers": figures.lens_curves(layers)}

    origin = Origin.of_measurement(model, corpus=corpus)
    return catalog.results.get_or_make(LENS, name, parameters=parameters, origin=origin, make=make)


def open_lens(catalog: Catalog, name: str, model: LoadedModel) -> Jacobians:
    """The Jacobians of a stored result. Raises InputError where there is none, or it is of another model."""
    result = catalog.results.open(LENS, name)
    result.origin.check_model(model, f"lens {name!r}")
    table = result.table("jacobians").sort_values("layer")
    noise = result.table("layers").query("lens == 'Jacobian'").sort_values("layer")["noise"].to_numpy(np.float32)
    width = model.info.d_model
    matrices = np.stack([np.frombuffer(bytes(raw), np.float32).reshape(width, width) for raw in table["matrix"][:-1]])
    means = np.stack([np.frombuffer(bytes(raw), np.float32) for raw in table["mean"]])
    averaged = int(result.table("summary")["averaged"].iloc[0])
    return Jacobians(torch.from_numpy(matrices), torch.from_numpy(means), averaged, torch.tensor(noise[:-1]))


def _batches(model: LoadedModel, corpus: Corpus, max_tokens: int, context_len: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and the positions to average over, a few contexts at a time."""
    return [
        (part.tokens, part.ordinary & _inside(context_len, model.device))
        for batch in context_batches(model, corpus, "train", max_tokens=max_tokens, context_len=context_len)
        for start in range(0, len(batch.tokens), CONTEXTS)
        for part in [batch.part(slice(start, start + CONTEXTS))]
    ]


def _inside(context_len: int, device: torch.device) -> Tensor:
    """The positions of a context that are counted."""
    position = torch.arange(context_len, device=device)
    return (position >= SINKS) & (position < context_len - 1)


@torch.no_grad()
def _measured(model: LoadedModel, held: Sequence[ContextBatch], lens: str, jacobians: Jacobians | None) -> pd.DataFrame:
    """A lens beside the model, by layer, on held-out text."""
    sums = np.zeros((model.info.n_layers + 1, 3))
    for batch in held:
        clean = model.bridge(batch.tokens)
        for layer, logits in enumerate(lens_logits(model.bridge, batch.tokens, jacobians, centred=lens == "centred")):
            cross_entropy, kl = losses(batch, logits, clean)
            counted = batch.counted
            n = counted.shape[1]
            same = (logits[:, :n].argmax(dim=-1) == clean[:, :n].argmax(dim=-1))[counted].sum()
            sums[layer] += [float(kl), float(cross_entropy), float(same)]
    sums /= sum(int(batch.counted.sum()) for batch in held)
    noise = [np.nan] * len(sums) if jacobians is None else [*jacobians.noise.tolist(), 0.0]
    return pd.DataFrame(
        {
            "lens": lens, "layer": range(len(sums)), "kl": sums[:, 0],
            "cross_entropy": sums[:, 1], "agrees": sums[:, 2], "noise": noise,
        }
    )  # fmt: skip
