"""What attribution graphs of the demo model explain, and whether interventions do what the graphs predict.

    python benchmarks/graph_scores.py [--draws 4] [--prompts 50] [--tokens 24] [--features 2] [--workers 2] [--out FILE]

1. Prompts are windows of held-out files of the interpreter's standard library, BOS before them; a draw has files and
   places of its own.
2. Of each prompt a graph is made with the bundled transcoders, and with random features in their place: as many encoder
   directions drawn at random for each draw, as many of them active, and the decoder that then fits best, by least
   squares on other text. Its scores are the graph's.
3. Some features below the last layer are ablated one by one, the most influential and as many drawn at random from the
   active ones. Reported is Spearman's correlation of predicted and observed effects: over the nodes that the graph says
   are reached, and over all ablations, of the likeliest next token's logit. `swapped` takes the prediction for another
   feature of the same prompt: what any prediction would get.

Medians over prompts or ablations: their mean over the draws, with the least and the greatest, and by how much the
bundled transcoders lead on the same draw. With `--out` every draw is written as it ends, a line of JSON a set, and one
that is there is not measured again (`drawn`).
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from drawn import StoredDraws, Value
from jaxtyping import Int
from torch import Tensor

from circuits.graph import Graph, attribute, intervene
from circuits.graph.graph import FEATURE
from circuits.graph.interventions import Intervention
from sae import Transcoder, TranscoderSet, load_transcoders
from workbench.models.bundled import demo_transcoders_dir
from workbench.models.capture import capture
from workbench.models.contexts import context_batches
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.text.corpora import open_corpus

SETTINGS = {"prompts": 50, "tokens": 24, "features": 2}
WAYS: dict[str, dict[str, Any]] = {
    "patterns held": {},
    "patterns free": {"freeze_attention": False},
}
SCORES = ("replacement", "completeness", "completeness_targets", "bias_share")
FITTED_ON = 16_384
"""Tokens on which the decoders of random features are fitted."""
RIDGE = 1e-3
"""Added to the diagonal of the codes' second moments, as a share of its mean."""


@dataclass
class Found:
    """What graphs and ablations gave."""

    numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    logits: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))


def main() -> None:
    """Measures both sets on every draw and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=SETTINGS["prompts"])
    parser.add_argument("--tokens", type=int, default=SETTINGS["tokens"])
    parser.add_argument(
        "--features", type=int, default=SETTINGS["features"], help="of each choice, ablated in each prompt"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a thread")
    parser.add_argument("--out", type=Path, help="every draw is written there, and taken from there")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in SETTINGS}
    model, bundled = load_model("demo", device="cpu"), load_transcoders(demo_transcoders_dir())
    stored = StoredDraws(options.out, settings)
    with ProcessPoolExecutor(options.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for draw in range(options.draws):
            if all(stored.get(name, draw) for name in ("bundled", "random")):
                continue
            chosen = list(islice(prompts(model, options.tokens, draw), options.prompts))
            for name, transcoders in {"bundled": bundled, "random": random_features(model, bundled, draw)}.items():
                parts = [list(range(len(chosen)))[first :: options.workers] for first in range(options.workers)]
                measure = partial(measured, transcoders, options.features)
                found = summary(pool.map(measure, [{i: chosen[i] for i in part} for part in parts]))
                values = [Value("", what, part, number) for what in found for part, number in found[what].items()]
                stored.add(name, draw, values)
            print(f"draw {draw}: {len(chosen)} prompts", flush=True)
    show(
        [
            (draw, name, *value)
            for draw in range(options.draws)
            for name in ("bundled", "random")
            for value in stored.get(name, draw) or []
        ]
    )


def show(lines: list[tuple[Any, ...]]) -> None:
    """Markdown: mean (least to greatest) over the draws of every median, of both sets and of the lead."""
    values = pd.DataFrame(lines, columns=["draw", "set", *Value._fields])
    wide = values.pivot(index="draw", columns=["row", "column", "set"], values="value")
    print("| | | bundled | random | bundled over random |\n|---|---|---|---|---|")
    for what, part in dict.fromkeys(column[:2] for column in wide.columns):
        both = wide[what][part]
        columns = [both["bundled"], both["random"], both["bundled"] - both["random"]]
        cells = [f"{one.mean():.3f} ({one.min():.3f} to {one.max():.3f})" for one in columns]
        print(f"| {what} | {part} | {' | '.join(cells)} |")


@torch.no_grad()
def random_features(model: LoadedModel, like: TranscoderSet, draw: int) -> TranscoderSet:
    """Transcoders of as many random directions as `like` has, with the same k, and the decoders that fit best."""
    hooks = [hook for coder in like.coders.values() for hook in (coder.hook_name, coder.target_hook_name)]
    rows: dict[str, list[Tensor]] = defaultdict(list)
    corpus = open_corpus("python-stdlib")
    for batch in context_batches(model, corpus, "train", max_tokens=FITTED_ON, context_len=256, separate=False):
        seen = capture(model, batch.tokens, [resolve_hook(model, hook) for hook in hooks]).activations
        for hook in hooks:
            rows[hook].append(seen[hook][batch.ordinary])
    generator, made = torch.Generator().manual_seed(draw), {}
    for layer, coder in like.coders.items():
        x, y = (torch.cat(rows[hook]).float() for hook in (coder.hook_name, coder.target_hook_name))
        control = Transcoder(
            coder.d_in, coder.d_out, coder.d_sae, coder.rule, hook_name=coder.hook_name,
            target_hook_name=coder.target_hook_name, model_name=coder.model_name,
        )  # fmt: skip
        directions = torch.nn.functional.normalize(torch.randn(coder.d_sae, coder.d_in, generator=generator), dim=1)
        control.W_enc.copy_(directions.T)
        control.b_enc.copy_(-(directions @ x.mean(dim=0)))
        codes, mean = control.encode(x).to_dense(), y.mean(dim=0)
        moments = codes.T @ codes
        moments.diagonal().add_(RIDGE * moments.diagonal().mean())
        control.W_dec.copy_(torch.linalg.solve(moments, codes.T @ (y - mean)))
        control.b_dec.copy_(mean)
        made[layer] = control.requires_grad_(False)
    return TranscoderSet(made)


def prompts(model: LoadedModel, n_tokens: int, draw: int) -> Iterator[Int[Tensor, "pos"]]:
    """A window of every held-out file that is long enough, in an order and at a place drawn at random, after BOS."""
    generator = torch.Generator().manual_seed(draw)
    documents = list(open_corpus("python-stdlib").documents("heldout"))
    for number in torch.randperm(len(documents), generator=generator).tolist():
        ids = model.encode(documents[number].text)
        room = len(ids) - (n_tokens - 1)
        if room > 0:
            first = int(torch.randint(room, (), generator=generator))
            yield torch.tensor(model.begun(ids[first : first + n_tokens - 1]))


def measured(transcoders: TranscoderSet, n_features: int, chosen: dict[int, Int[Tensor, "pos"]]) -> Found:
    """Scores and agreements of a set of transcoders on some prompts, by their numbers."""
    model, found = load_model("demo", device="cpu"), Found()
    for number, tokens in chosen.items():
        generator = torch.Generator().manual_seed(number)
        graph = attribute(model.bridge, tokens, transcoders, bos_id=model.bos_id)
        scores = graph.scores()
        for name in SCORES:
            found.numbers[name].append(getattr(scores, name))
        for choice, nodes in choices(graph, n_features, generator).items():
            for way, settings in WAYS.items():
                done = [
                    intervene(model.bridge, graph, transcoders, {graph.nodes.names[node]: 0.0}, **settings)
                    for node in nodes
                ]
                found.numbers[f"{choice}: {way}"] += [one.agreement() for one in done]
                found.numbers[f"{choice}: {way}, swapped"] += swapped(done)
                found.logits[f"{choice}: {way}, logit"] += [of_likeliest(graph, one) for one in done]
    found.numbers, found.logits = dict(found.numbers), dict(found.logits)
    return found


def summary(parts: Iterable[Found]) -> dict[str, Any]:
    """Quartiles and correlations over all prompts."""
    whole = Found()
    for part in parts:
        for name, values in part.numbers.items():
            whole.numbers[name] += values
        for name, pairs in part.logits.items():
            whole.logits[name] += pairs
    quartiles = {name: quartiles_of(values) for name, values in whole.numbers.items()}
    return {**quartiles, **{name: logit_agreement(pairs) for name, pairs in whole.logits.items()}}


def choices(graph: Graph, count: int, generator: torch.Generator) -> dict[str, list[int]]:
    """Features that later ones read: the most influential, and some at random."""
    nodes = graph.nodes
    last = int(nodes.layer[nodes.kind == FEATURE].max())
    candidates = ((nodes.kind == FEATURE) & (nodes.layer < last)).nonzero().squeeze(1)
    best = candidates[graph.influence[candidates].topk(count).indices]
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    return {"most influential": best.tolist(), "at random": drawn.tolist()}


def swapped(done: list[Intervention]) -> list[float]:
    """Agreement of what was observed with what was predicted for the next of the features."""
    found = []
    for one, other in zip(done, [*done[1:], done[0]], strict=True):
        predicted = other.nodes["predicted"]
        found.append(Intervention(one.nodes.assign(predicted=predicted), one.next_tokens, one.changes).agreement())
    return found


def of_likeliest(graph: Graph, done: Intervention) -> tuple[float, float]:
    """Predicted and observed effect on the logit of the likeliest next token."""
    row = done.nodes.set_index("node").loc[graph.nodes.names[graph.n_sources]]
    return float(row["predicted"]), float(row["observed"])


def logit_agreement(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Spearman's correlation over ablations, and the median size of both effects."""
    table = pd.DataFrame(pairs, columns=["predicted", "observed"])
    ranks, sizes = table.rank(), table.abs().median()
    return {
        "spearman": round(float(ranks["predicted"].corr(ranks["observed"])), 3),
        "predicted": round(float(sizes["predicted"]), 4),
        "observed": round(float(sizes["observed"]), 4),
    }


def quartiles_of(values: list[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile of the numbers there are."""
    found = pd.Series([value for value in values if not math.isnan(value)]).quantile([0.25, 0.5, 0.75])
    return dict(zip(("lower quartile", "median", "upper quartile"), found.round(3).tolist(), strict=True))


if __name__ == "__main__":
    main()
