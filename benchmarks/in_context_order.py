"""In which order a model that learned conjunctions in context looks at what it needs (docs/methods/in-context.md):
the cuts of notebooks/11_in_context.ipynb on any such model, on several draws of prompts.

    python benchmarks/in_context_order.py --model data/in_context_model CONJ1 CONJ2 [--draws 3]

On pairs of the task `conjunction`, whose answers are certain: share of answers that are right, and the log odds of what
is right, where the answer is T and where it is F,

1. with nothing changed;
2. with the last word kept, in one block, from the examples whose label is T, or from those whose label is F, and the
   rest of its attention scaled up to 1;
3. with the head of block 0 that looks most from a label at the word before it sent to BOS: from labels, and from words
   as the control.

Mean (least to greatest) over draws of prompts.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from in_context_heads import predicted
from in_context_paste import cell
from torch import Tensor

from circuits.passes import activations
from circuits.tasks import make_task
from workbench.models.load import LoadedModel, load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from in_context import TRUE

PROMPTS = 128
LABELS, WORDS = 2, 3
"""The first token of each kind that has one of the other before it; every second one from there on."""


def cut(layer: int, hidden: Tensor) -> tuple[str, Any]:
    """Keeps the last word from tokens, [n, pos], in one block."""

    def hook(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        kept = pattern[:, :, -1].masked_fill(hidden[:, None], 0)
        pattern[:, :, -1] = kept / kept.sum(dim=-1, keepdim=True).clamp_min(1e-6)
        return pattern

    return f"blocks.{layer}.attn.hook_pattern", hook


def to_bos(head: int, first: int) -> tuple[str, Any]:
    """Sends a head of block 0 to BOS from every second token."""

    def hook(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[:, head, first::2] = 0
        pattern[:, head, first::2, 0] = 1
        return pattern

    return "blocks.0.attn.hook_pattern", hook


def changes(model: LoadedModel, tokens: Tensor) -> Iterator[tuple[str, list[Any]]]:
    """What is changed, in words, and the hooks that do it."""
    yield "nothing", []
    true = (tokens[:, 2::2] == TRUE).repeat_interleave(2, dim=1)
    for layer in range(model.info.n_layers):
        for kind, examples in (("T", true), ("F", ~true)):
            # BOS comes before the examples, and the last word behind them.
            hidden = torch.nn.functional.pad(examples, (1, 1))
            yield f"no {kind} in block {layer}", [cut(layer, hidden)]
    name = "blocks.0.attn.hook_pattern"
    before = activations(model.bridge, tokens, [name])[name].diagonal(-1, dim1=2, dim2=3)[:, :, 1::2]
    head = int(before.mean(dim=(0, 2)).argmax())
    yield f"a0.h{head} at BOS from labels", [to_bos(head, LABELS)]
    yield f"a0.h{head} at BOS from words", [to_bos(head, WORDS)]


def measured(model: LoadedModel, seed: int) -> Iterator[dict[str, float | str]]:
    """One draw: a line a change."""
    task = make_task("conjunction", model.tokenizer, model.bos_id, PROMPTS, seed)
    wanted = task.answers[:, 0] == TRUE
    for what, hooks in changes(model, task.clean):
        p = predicted(model, task.clean, hooks)[:, -1]
        odds = torch.logit(p) * torch.where(wanted, 1, -1)
        line: dict[str, float | str] = {"changed": what}
        for answer, which in (("T", wanted), ("F", ~wanted)):
            line[f"right, {answer}"] = float((odds[which] > 0).double().mean())
            line[f"log odds, {answer}"] = float(odds[which].mean())
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=["data/in_context_model"], help="folders, trained on conjunctions"
    )
    parser.add_argument("--draws", type=int, default=3)
    asked = parser.parse_args()
    for folder in asked.model:
        model = load_model(folder, device="cpu")
        table = pd.DataFrame([line for seed in range(asked.draws) for line in measured(model, seed)])
        columns = [column for column in table if column != "changed"]
        print(f"\n{folder}\n\n| changed | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
        for what, lines in table.groupby("changed", sort=False):
            print(f"| {what} | " + " | ".join(cell(lines[column].tolist()) for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
