"""How much every method thins at a given cost on several stretches of held-out text, and whom another one leads.

    python benchmarks/sparsity_stretches.py [--model demo --model data/demo_model_gelu] [--stretches 5]

One calibration a model; every stretch is 2,048 tokens of the standard library's held-out files, in contexts of 256.
The level is found by search on each (`workbench.sparsity.at_cost`). Printed are the share of zeros where a method acts,
mean and least - most over the stretches, and differences between two methods on the same stretch.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from workbench.models.contexts import ContextBatch, context_batches
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.at_cost import at_costs
from workbench.sparsity.calibration import calibrate
from workbench.sparsity.enforce import enforce
from workbench.sparsity.methods import method_named
from workbench.text.corpora import open_corpus

TOKENS, CONTEXT = 2048, 256
COSTS = (0.05, 0.5)
PARTS = ("tokens", "ordinary", "doc", "doc_pos")
"""Of a ContextBatch."""
PAIRS = (("CETT", "threshold"), ("CETT", "topk"), ("topk", "threshold"), ("WINA", "TEAL"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="demo and its GELU twin unless given")
    parser.add_argument("--stretches", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file of JSON lines to which every stretch is written as it ends")
    arguments = parser.parse_args()
    for spec in arguments.model or ["demo", "data/demo_model_gelu"]:
        model = load_model(spec, device="cpu")
        rows = []
        for number, table in enumerate(stretches(model, arguments.stretches)):
            rows.append(table.assign(stretch=number))
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({"model": spec, "stretch": number, "rows": table.to_dict("records")}) + "\n")
        print(f"\n{spec}")
        show(pd.concat(rows))


def stretches(model: LoadedModel, n: int) -> Iterator[pd.DataFrame]:
    """Tables of `at_costs`, one a stretch."""
    corpus = open_corpus("python-stdlib")
    calibration = calibrate(model, corpus, context_len=CONTEXT)
    read = list(context_batches(model, corpus, "heldout", max_tokens=n * TOKENS, context_len=CONTEXT))
    whole = [torch.cat([getattr(batch, part) for batch in read]) for part in PARTS]
    graded = [method_named(name) for name in dict.fromkeys(name for pair in PAIRS for name in pair)]
    for parts in zip(*(tensor.split(TOKENS // CONTEXT) for tensor in whole), strict=True):
        held = [ContextBatch(*parts)]
        found = enforce(model, calibration, held, methods=graded)
        yield at_costs(model, calibration, held, graded, found.points, clean_loss=found.clean_loss, costs=COSTS)


def show(rows: pd.DataFrame) -> None:
    """Shares of zeros and differences in points, over the stretches."""
    zeros = 100 * rows.pivot_table(index=["stretch", "cost"], columns="method", values="sparsity")
    for cost in COSTS:
        own = zeros.xs(cost, level="cost")
        print(f"at {cost} nats")
        for method in own:
            print(f"  {method:18} {own[method].mean():5.1f}% ({own[method].min():.1f} - {own[method].max():.1f})")
        for one, other in PAIRS:
            lead = own[one] - own[other]
            print(f"  {one} over {other:10} {lead.mean():+.1f} points ({lead.min():+.1f} to {lead.max():+.1f})")


if __name__ == "__main__":
    main()
