"""Pasting: the lower blocks of one model that learns Boolean functions in context under the upper blocks of another
(docs/methods/in-context.md; after Guo et al. 2023, "How Do Transformers Learn In-Context Beyond Simple Functions?").

    python benchmarks/in_context_paste.py --from data/in_context_model --to CONJ1 [--family conjunctions] [--draws 3]

What the first n blocks of one model leave in the residual stream is put in the place of what those of the other leave,
as it is (`identity`) or through the affine map that is nearest to the other's stream in least squares, fitted on
FITTED other prompts, on all tokens (`map`). KL from Bayes in nats a prediction, after 8 examples and more, by n. The
control pastes from a model of the same form with random weights, through its own map; above the table, either model by
itself. Mean (least to greatest) over draws of prompts.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from in_context import Family, bayes, divergence, family_name, mixture, predictions, tokens_of
from train_in_context import build

PROMPTS, FITTED, SEEN = 256, 256, 8


def places(model: GPT2LMHeadModel) -> list[nn.Module]:
    """What reads the stream after 0, 1, ... blocks."""
    return [*model.transformer.h, model.transformer.ln_f]


@torch.no_grad()
def streams(model: GPT2LMHeadModel, tokens: Tensor) -> list[Tensor]:
    """The stream [n, pos, width] after 0, 1, ... blocks."""
    found: list[Tensor] = []
    handles = [place.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for place in places(model)]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


def pasted(model: GPT2LMHeadModel, tokens: Tensor, after: int, stream: Tensor) -> Tensor:
    """P(true) at every input, where the stream after so many blocks is another."""

    def replaced(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (stream, *inputs[1:])

    handle = places(model)[after].register_forward_pre_hook(replaced)
    p = predictions(model, tokens)
    handle.remove()
    return p


def affine(x: Tensor, y: Tensor) -> Tensor:
    """The map [width + 1, width] from rows of x, with a one behind, that is nearest to y.

    In float64 and by singular values: rows of a model with random weights span few dimensions.
    """
    found = torch.linalg.lstsq(_with_one(x).double(), y.flatten(0, -2).double(), driver="gelsd")
    return found.solution.to(x.dtype)


def _with_one(x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def drawn(family: Family, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens to fit the map on, tokens to measure on, and what Bayes says of these."""
    generator = torch.Generator().manual_seed(seed)
    fitted = tokens_of(*family.drawn(FITTED, generator))
    inputs, labels = family.drawn(PROMPTS, generator)
    return fitted, tokens_of(inputs, labels), bayes(family, inputs, labels)


def alone(model: GPT2LMHeadModel, family: Family, seed: int) -> float:
    """KL of one draw without pasting."""
    _, tokens, best = drawn(family, seed)
    return float(divergence(best, predictions(model, tokens))[:, SEEN:].mean())


def measured(
    source: GPT2LMHeadModel, target: GPT2LMHeadModel, family: Family, seed: int
) -> dict[tuple[str, int], float]:
    """KL of one draw, by (way, blocks of the source)."""
    fitted, tokens, best = drawn(family, seed)
    found = {}
    pairs = zip(streams(source, fitted), streams(target, fitted), streams(source, tokens), strict=True)
    for after, (x, y, here) in enumerate(pairs):
        through = (_with_one(here) @ affine(x, y)).view_as(here)
        for way, stream in (("identity", here), ("map", through)):
            kl = divergence(best, pasted(target, tokens, after, stream))
            found[way, after] = float(kl[:, SEEN:].mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, help="folder of the model whose lower blocks are taken")
    parser.add_argument("--to", dest="target", required=True, help="folder of the model whose upper blocks are taken")
    parser.add_argument("--family", default="conjunctions", type=family_name, help="asked about")
    parser.add_argument("--draws", type=int, default=3)
    asked = parser.parse_args()
    source, target = (
        GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval() for folder in (asked.source, asked.target)
    )
    torch.manual_seed(0)
    config, family = target.config, mixture(asked.family)
    untrained = build(config.n_layer, config.n_embd, config.n_head).eval()
    for name, model in (("source", source), ("target", target)):
        print(f"{name} by itself: {cell([alone(model, family, seed) for seed in range(asked.draws)])}")
    blocks = range(config.n_layer + 1)
    print("| pasted | " + " | ".join(map(str, blocks)) + " |\n|" + "---|" * (len(blocks) + 1))
    for name, model in (("source", source), ("untrained", untrained)):
        draws = [measured(model, target, family, seed) for seed in range(asked.draws)]
        for way in ("identity", "map"):
            of = [[draw[way, after] for draw in draws] for after in blocks]
            print(f"| {name}, {way} | " + " | ".join(map(cell, of)) + " |", flush=True)


def cell(draws: list[float]) -> str:
    """Mean (least to greatest)."""
    return f"{statistics.mean(draws):.2g} ({min(draws):.2g} to {max(draws):.2g})"


if __name__ == "__main__":
    main()
