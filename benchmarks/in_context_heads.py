"""What a model that learns Boolean functions in context does it with, head by head: docs/methods/in-context.md.

    python benchmarks/in_context_heads.py [--model data/in_context_model] [--draws 4]

Of every head, on prompts of the family it was trained on: the attention that an input with 8 examples before it or more
pays to examples whose label is true, over their share of the examples; its attention to examples of other labels
likewise; and the KL from Bayes to the model, in nats a prediction, with the head's output at its mean over prompts at
the same position. Then the KL with all heads but some at their means: the KEPT whose absence costs most. Mean (least to
greatest) over draws of prompts.
"""

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.passes import activations
from workbench.models.load import LoadedModel, load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from in_context import EXAMPLES, FALSE, TRUE, bayes, divergence, family_name, mixture, tokens_of

PROMPTS, SEEN = 256, 8
KEPT = (0, 3, 5, 8)


def predicted(model: LoadedModel, tokens: Tensor, hooks: list[Any]) -> Tensor:
    """P(true) at every input, with hooks in place."""
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
        logits = model.bridge(tokens)[:, 1::2].double()
    found: Tensor = torch.sigmoid(logits[..., TRUE] - logits[..., FALSE])
    return found


def heads(model: LoadedModel, family: str, seed: int) -> dict[tuple[str, str], float]:
    """The numbers of one draw, by (head, column)."""
    functions = mixture(family)
    inputs, labels = functions.drawn(PROMPTS, torch.Generator().manual_seed(seed))
    tokens, best = tokens_of(inputs, labels), bayes(functions, inputs, labels)
    layers, n_heads = model.info.n_layers, model.info.n_heads
    names = [f"blocks.{layer}.attn.hook_{part}" for layer in range(layers) for part in ("pattern", "z")]
    seen = activations(model.bridge, tokens, names)

    def kl(hooks: list[Any]) -> float:
        return float(divergence(best, predicted(model, tokens, hooks))[:, SEEN:].mean())

    before = torch.ones(EXAMPLES, EXAMPLES).tril(-1).bool()
    found = {("none", "kl"): kl([])}
    for layer in range(layers):
        pattern = seen[f"blocks.{layer}.attn.hook_pattern"][:, :, 1::2]
        # An example is its input and its label, which follows it.
        paid = pattern[..., 1::2] + pattern[..., 2::2]
        for head in range(n_heads):
            name = f"a{layer}.h{head}"
            to_examples = (paid[:, head] * before)[:, SEEN:]
            for column, chosen in (("true", labels), ("false", ~labels)):
                share = (chosen[:, None] & before)[:, SEEN:].sum() / before[SEEN:].sum() / PROMPTS
                found[name, column] = float((to_examples * chosen[:, None]).sum() / to_examples.sum() / share)
            found[name, "on examples"] = float(to_examples.sum(dim=-1).mean())

            found[name, "kl"] = kl(_at_means(seen, {(layer, head)}))
    order = sorted(product(range(layers), range(n_heads)), key=lambda at: -found[f"a{at[0]}.h{at[1]}", "kl"])
    for count in KEPT:
        found[f"only {count} heads", "kl"] = kl(_at_means(seen, set(order[count:])))
    return found


def _at_means(seen: dict[str, Tensor], heads: set[tuple[int, int]]) -> list[Any]:
    """Hooks that hold heads, (layer, number), at their means."""
    hooks = []
    for layer in sorted({layer for layer, _ in heads}):
        name = f"blocks.{layer}.attn.hook_z"
        numbers, mean = [head for at, head in heads if at == layer], seen[name].mean(dim=0)

        def at_mean(z: Tensor, hook: Any, numbers: list[int] = numbers, mean: Tensor = mean) -> Tensor:
            z = z.clone()
            z[:, :, numbers] = mean[:, numbers]
            return z

        hooks.append((name, at_mean))
    return hooks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parents[1] / "data" / "in_context_model"))
    parser.add_argument("--family", default="conjunctions", type=family_name)
    parser.add_argument("--draws", type=int, default=4)
    asked = parser.parse_args()
    model = load_model(asked.model, device="cpu")
    draws = [heads(model, asked.family, seed) for seed in range(asked.draws)]
    columns = ("on examples", "true", "false", "kl")
    print("| head | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name in dict.fromkeys(name for name, _ in draws[0]):
        cells = []
        for column in columns:
            values = [draw[name, column] for draw in draws if (name, column) in draw]
            cells.append(f"{statistics.mean(values):.2g} ({min(values):.2g} to {max(values):.2g})" if values else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
