"""Measures the demo model's transcoders on held-out files of the interpreter's standard library; runs on a CPU.

    python data/evaluate_demo_transcoders.py [--random-decoder FOLDER]

Prints, and writes data/demo_transcoders/evaluation.json: each layer alone and all at once, beside zeros and the mean in
the MLPs' places, and beside a set with frozen random decoders (`train_demo_transcoders.py --random-decoder` makes one).
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from sae import load_transcoders
from workbench.models.load import LoadedModel, load_model
from workbench.saes.evaluation import Evaluation, evaluate_sae
from workbench.saes.replacement import evaluate_replacement
from workbench.text.corpora import Corpus, open_corpus

SET = Path(__file__).resolve().parent / "demo_transcoders"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transcoders", type=Path, default=SET)
    parser.add_argument("--random-decoder", type=Path, help="a set to compare with")
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    model, corpus = load_model("demo"), open_corpus("python-stdlib")
    result = {
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "python": platform.python_version(),
        "tokens": arguments.tokens,
        **measure(model, corpus, arguments.transcoders, arguments.tokens),
    }
    if arguments.random_decoder is not None:
        result["random_decoder"] = measure(model, corpus, arguments.random_decoder, arguments.tokens)
    (arguments.transcoders / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def measure(model: LoadedModel, corpus: Corpus, folder: Path, tokens: int) -> dict[str, Any]:
    """Every layer of a set alone, and all at once."""
    coders = [coder.to(model.device, torch.float32) for coder in load_transcoders(folder).coders.values()]
    alone = evaluate_sae(model, coders, corpus, max_tokens=tokens)
    together = evaluate_replacement(model, coders, corpus, max_tokens=tokens)
    return {
        "layers": [_rounded(of_layer(item)) for item in alone],
        "together": _rounded(together.to_dict()),
    }


def of_layer(item: Evaluation) -> dict[str, float]:
    """What is kept of a layer's evaluation."""
    return {
        "l0": item.l0,
        "fvu": item.fvu,
        "dead_share": item.dead_share,
        "skip_share": item.skip_share,
        "added_nats": item.added_nats,
        "added_nats_zero": item.added_nats_zero,
        "added_nats_mean": item.added_nats_mean,
        "kl": item.kl,
    }


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}


if __name__ == "__main__":
    main()
