"""What the experts of a mixture are used for: one streamed pass over a corpus.

Of every ordinary token and every layer that is a mixture, the experts that the router chose and their gates g.

    load              share of tokens that choose the expert; they add up to the number chosen a token
    gate              mean g where it is chosen
    load entropy      H = -sum_e q_e log2 q_e, q_e = load_e / sum of loads; 2^H is how many experts are in use
    gate entropy      mean over tokens of the same, of a token's gates divided by their sum
    together          share of tokens that choose both of two experts; lift = together / (load_a load_b), 1 where the
                      choice of one says nothing of the other
    concept           what is known about tokens (`workbench.features.concepts.truth`) that the expert tells best:
                      "chosen" is taken for "has the concept", chosen by F1 on half of the documents, judged on the
                      other half; beside it the F1 that an expert of that load has by chance, 2 p q / (p + q)

Concepts are left out where the corpus holds token ids, where the tokenizer gives no offsets and where all tokens are of
one document. The expert that every token goes through is not chosen and not counted.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from circuits.turns import turn_of
from sae.errors import InputError
from sae.shown import Shown
from workbench.features.concepts.alignment import held_out_half
from workbench.features.concepts.truth import ConceptTruth, from_contexts
from workbench.models.contexts import ContextBatch, context_batches, context_length
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.models.mixtures import WideOut
from workbench.text.corpora import Corpus
from workbench.text.python_source import Split

AT_MOST_CHOSEN = 16
"""Experts a token that memory is asked for; known models choose 1 to 10."""


@dataclass(frozen=True, repr=False)
class Experts(Shown):
    """What was measured, as tables."""

    tokens: int
    """Ordinary tokens seen."""
    layers: pd.DataFrame
    """One row a mixture: layer, experts, chosen (a token), d_expert, d_shared, load_entropy, in_use (2^H),
    gate_entropy, max_load, unused (experts that no token chose)."""
    experts: pd.DataFrame
    """layer, expert, load, gate, concept, f1, chance, precision, recall: the last five empty without concepts."""
    pairs: pd.DataFrame
    """layer, expert, other (> expert), together, lift."""


def measure_experts(
    model: LoadedModel,
    corpus: Corpus,
    *,
    split: Split = "train",
    max_tokens: int = 100_000,
    context_len: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Experts:
    """Measures `max_tokens` rows of a corpus.

    Args:
        on_progress: called with (rows done, rows asked for).

    Raises:
        InputError: a model without a mixture of experts; see also `models.contexts.context_batches` and
            `models.memory.check_passes_fit`.
    """
    context_len = context_length(model, context_len)
    mixtures = mixtures_of(model)
    routing = [_Routing(out) for out in mixtures.values()]
    check_passes_fit(
        "following experts", model, max_tokens=max_tokens, context_len=context_len,
        per_token=2 * AT_MOST_CHOSEN * len(routing),
    )  # fmt: skip
    seen: list[Int[NDArray, "n 3"]] = []
    done = 0
    for batch in context_batches(model, corpus, split, max_tokens=max_tokens, context_len=context_len):
        _run(model, batch, routing)
        columns = (batch.tokens, batch.doc, batch.doc_pos)
        seen.append(torch.stack([column[batch.ordinary] for column in columns], dim=1).cpu().numpy())
        done += batch.tokens.numel()
        if on_progress is not None:
            on_progress(done, max_tokens)
    tokens = np.concatenate(seen)
    truth = _truth(model, corpus, split, tokens)
    parts = [_tables(layer, found, truth) for layer, found in zip(mixtures, routing, strict=True)]
    layers, experts, pairs = zip(*parts, strict=True)
    return Experts(
        tokens=len(tokens),
        layers=pd.DataFrame(layers),
        experts=pd.concat(experts, ignore_index=True),
        pairs=pd.concat(pairs, ignore_index=True),
    )


def mixtures_of(model: LoadedModel) -> dict[int, WideOut]:
    """The mixtures of a model by layer.

    Raises:
        InputError: none, or of a make that `workbench.models.mixtures` does not know.
    """
    found = {layer: model.component(f"blocks.{layer}.mlp.out") for layer in range(model.info.n_layers)}
    mixtures = {layer: out for layer, out in found.items() if isinstance(out, WideOut)}
    if not mixtures:
        raise InputError(
            f"{model.info.architecture} has no mixture of experts that is read here: this is for models such as "
            "Mixtral, OLMoE and Qwen's"
        )
    return mixtures


class _Routing:
    """What one router said of all tokens."""

    def __init__(self, out: WideOut) -> None:
        self.out = out
        self.chosen: list[Int[Tensor, "n k"]] = []
        self.gate_sums = torch.zeros(out.n_experts, dtype=torch.float64)
        self.entropy = 0.0

    def add(self, experts: Int[Tensor, "n k"], gates: Float[Tensor, "n k"]) -> None:
        """The choice of a batch's ordinary tokens."""
        experts, gates = experts.cpu(), gates.cpu().double()
        self.chosen.append(experts.to(torch.int16))
        self.gate_sums.index_add_(0, experts.flatten(), gates.flatten())
        self.entropy += float(torch.special.entr(gates / gates.sum(dim=1, keepdim=True)).sum() / np.log(2))


@torch.no_grad()
def _run(model: LoadedModel, batch: ContextBatch, routing: list[_Routing]) -> None:
    ordinary = batch.ordinary.flatten()
    with turn_of(model.hf), ExitStack() as stack:
        for found in routing:

            def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: _Routing = found) -> None:
                _, experts, gates = (*args, *kwargs.values())
                found.add(experts[ordinary], gates[ordinary])

            stack.callback(found.out.experts.register_forward_pre_hook(see, with_kwargs=True).remove)
        getattr(model.hf, "base_model", model.hf)(batch.tokens, use_cache=False)


def _truth(model: LoadedModel, corpus: Corpus, split: Split, tokens: Int[NDArray, "n 3"]) -> ConceptTruth | None:
    """None where nothing is known of the tokens, or nothing could be held out."""
    token, document, position = tokens.T
    try:
        truth = from_contexts(token, document, position, corpus, split, model.tokenizer)
        held_out_half(truth)
    except InputError:
        return None
    return truth if truth.names else None


def _tables(
    layer: int, found: _Routing, truth: ConceptTruth | None
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """(the layer's row, its experts, their pairs)."""
    chosen = torch.cat(found.chosen).numpy()
    n, k, experts = *chosen.shape, found.out.n_experts
    counts = np.bincount(chosen.flatten(), minlength=experts)
    load = counts / n
    share = load[load > 0] / load.sum()
    entropy = float(-(share * np.log2(share)).sum())
    row = {
        "layer": layer, "experts": experts, "chosen": k, "d_expert": found.out.d_expert,
        "d_shared": found.out.d_shared, "load_entropy": entropy, "in_use": 2**entropy,
        "gate_entropy": found.entropy / n, "max_load": load.max(), "unused": int((counts == 0).sum()),
    }  # fmt: skip
    gate = np.where(counts > 0, found.gate_sums.numpy() / np.maximum(counts, 1), np.nan)
    table = pd.DataFrame({"layer": layer, "expert": range(experts), "load": load, "gate": gate})
    if truth is not None:
        table = table.join(_concepts(chosen, experts, truth))
    else:
        table = table.assign(concept=None, f1=np.nan, chance=np.nan, precision=np.nan, recall=np.nan)
    return row, table, _pairs(layer, chosen, load)


def _pairs(layer: int, chosen: Int[NDArray, "n k"], load: Float[NDArray, "experts"]) -> pd.DataFrame:
    experts = len(load)
    both = np.zeros(experts * experts, dtype=np.int64)
    wide = chosen.astype(np.int64)
    for one in range(chosen.shape[1]):
        for other in range(chosen.shape[1]):
            if one != other:
                both += np.bincount(wide[:, one] * experts + wide[:, other], minlength=experts * experts)
    first, second = np.triu_indices(experts, 1)
    together = both.reshape(experts, experts)[first, second] / len(chosen)
    by_chance = load[first] * load[second]
    lift = np.divide(together, by_chance, out=np.full(len(first), np.nan), where=by_chance > 0)
    return pd.DataFrame({"layer": layer, "expert": first, "other": second, "together": together, "lift": lift})


def _concepts(chosen: Int[NDArray, "n k"], experts: int, truth: ConceptTruth) -> pd.DataFrame:
    """concept, f1, chance, precision and recall of every expert; see the module's description."""
    held = held_out_half(truth)
    calibration, judged = (_counts(chosen, experts, truth, half) for half in (~held, held))
    loads, positives, joint = calibration
    best = (2 * joint / np.maximum(loads[:, None] + positives, 1)).argmax(axis=1)
    loads, positives, joint = judged
    hits, there = joint[np.arange(experts), best], positives[best]
    n = max(1, int(held.sum()))
    p, q = loads / n, there / n
    known = (loads > 0) & (there > 0)
    return pd.DataFrame(
        {
            "concept": np.where(calibration[0] > 0, np.array(truth.names, dtype=object)[best], None),
            "f1": np.where(known, 2 * hits / np.maximum(loads + there, 1), np.nan),
            "chance": np.where(known, 2 * p * q / np.maximum(p + q, 1e-300), np.nan),
            "precision": np.where(known, hits / np.maximum(loads, 1), np.nan),
            "recall": np.where(known, hits / np.maximum(there, 1), np.nan),
        }
    )


def _counts(
    chosen: Int[NDArray, "n k"], experts: int, truth: ConceptTruth, half: NDArray[np.bool_]
) -> tuple[Int[NDArray, "experts"], Int[NDArray, "concepts"], Int[NDArray, "experts concepts"]]:
    """Tokens of one half: that choose each expert, that have each concept, and both."""
    n_concepts = len(truth.names)
    mine = half[truth.entry_token]
    token, concept = truth.rows[truth.entry_token[mine]], truth.entry_concept[mine]
    both = chosen[token].astype(np.int64) * n_concepts + concept[:, None]
    return (
        np.bincount(chosen[truth.rows[half]].flatten(), minlength=experts),
        np.bincount(concept, minlength=n_concepts),
        np.bincount(both.flatten(), minlength=experts * n_concepts).reshape(experts, n_concepts),
    )
