"""Measures the demo model's transcoders on held-out files of the interpreter's standard library; runs on a CPU.

python data/evaluate_demo_transcoders.py           # prints, and writes data/demo_transcoders/evaluation.json
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from sae import load_transcoders
from workbench.models.load import load_model
from workbench.saes.evaluation import evaluate_sae
from workbench.saes.replacement import evaluate_replacement
from workbench.text.corpora import open_corpus

SET = Path(__file__).resolve().parent / "demo_transcoders"
SHOWN = ("l0", "fvu", "dead_share", "added_nats", "loss_recovered_zero", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transcoders", type=Path, default=SET)
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    model, corpus = load_model("demo"), open_corpus("python-stdlib")
    coders = [
        coder.to(model.device, torch.float32) for coder in load_transcoders(arguments.transcoders).coders.values()
    ]
    alone = evaluate_sae(model, coders, corpus, max_tokens=arguments.tokens)
    together = evaluate_replacement(model, coders, corpus, max_tokens=arguments.tokens)
    result = {
        "python": platform.python_version(),
        "tokens": alone[0].tokens,
        "layers": [{name: round(item.to_dict()[name], 4) for name in SHOWN} for item in alone],
        "together": {name: round(value, 4) for name, value in together.to_dict().items()},
    }
    (arguments.transcoders / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
