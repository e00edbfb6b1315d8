"""Measures the demo model on the CPU; with the training corpus at hand also the n-gram baseline.

    python data/evaluate_demo_model.py                     # the running interpreter's held-out library files; prints
    python data/evaluate_demo_model.py --corpus .corpus    # everything; writes evaluation.json and README.md

Bits per byte: each held-out file by itself, in windows of `<|bos|>` and the next 511 tokens without overlap; every
token is scored once, `<|bos|>` never; summed loss in bits over the file's bytes in UTF-8. The baseline scores the same
tokens with the whole file as context. See `demo_metrics` for the head scores and `ngram_baseline` for the baseline.
"""

import argparse
import json
import platform
from hashlib import sha256
from pathlib import Path
from typing import Any

import ngram_baseline
import numpy as np
import torch
from demo_metrics import (
    bits_per_byte,
    induction_scores,
    mlp_sparsity,
    nats_per_document,
    previous_token_scores,
)
from model_card import write_card
from packed_corpus import HeldoutFiles, corpus_heldout, read_stream
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from workbench.text.python_source import split_of, stdlib_files

MODEL = Path(__file__).resolve().parent / "demo_model"
HEAD_WINDOWS = 64
SAMPLE = ("asyncio/queues.py", "code.py", "netrc.py", "operator.py", "py_compile.py", "runpy.py", "stat.py")
"""Held-out modules that change little between Python versions; their losses let a test check the shipped files."""


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load(arguments.model)
    if arguments.corpus is None:
        sets = {"standard library of this interpreter": interpreter_heldout(tokenizer)}
    else:
        sets = corpus_heldout(arguments.corpus)
    result = evaluate(model, tokenizer, sets)
    if arguments.corpus is not None:
        add_baseline(result, arguments.corpus, sets)
        (arguments.model / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_card(arguments.model)
    print(json.dumps(result, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--corpus", type=Path, help="folder that prepare_corpus.py wrote")
    return parser.parse_args()


def load(folder: Path) -> tuple[GPT2LMHeadModel, Any]:
    """The model in fp32, whatever it is stored in, and its tokenizer; from the folder alone."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def evaluate(model: GPT2LMHeadModel, tokenizer: Any, sets: dict[str, HeldoutFiles]) -> dict[str, Any]:
    windows = next(iter(sets.values())).windows(HEAD_WINDOWS)
    induction = induction_scores(model)
    previous = previous_token_scores(model, windows)
    sparsity = mlp_sparsity(model, windows)
    return {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "heldout": {name: evaluate_files(model, files) for name, files in sets.items()},
        "sample": evaluate_sample(model, tokenizer),
        "induction": head_table(induction),
        "previous_token": head_table(previous),
        "zero_activations_by_layer": [round(share, 4) for share in sparsity.zero.tolist()],
        "dead_units_by_layer": [round(share, 4) for share in sparsity.dead.tolist()],
    }


def evaluate_files(model: GPT2LMHeadModel, files: HeldoutFiles) -> dict[str, float]:
    nats = nats_per_document(model, files.documents).sum()
    tokens = sum(map(len, files.documents))
    return {
        "files": len(files.documents),
        "bytes": files.bytes,
        "tokens": tokens,
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(bits_per_byte(nats, files.bytes), 4),
    }


def evaluate_sample(model: GPT2LMHeadModel, tokenizer: Any) -> dict[str, Any]:
    """Bits per byte of a few held-out modules of the running interpreter, and which text it was."""
    texts = {file.module_path: file.read() for file in stdlib_files() if file.module_path in SAMPLE}
    nats = nats_per_document(model, [encode(tokenizer, text) for text in texts.values()])
    return {
        "python": platform.python_version(),
        "files": {
            name: {
                "sha256": sha256(text.encode()).hexdigest(),
                "bits_per_byte": round(bits_per_byte(loss, len(text.encode())), 4),
            }
            for (name, text), loss in zip(texts.items(), nats, strict=True)
        },
    }


def encode(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.uint16)


def interpreter_heldout(tokenizer: Any) -> HeldoutFiles:
    texts = [file.read() for file in stdlib_files() if split_of(file.module_path) == "heldout"]
    return HeldoutFiles([encode(tokenizer, text) for text in texts if text], sum(len(text.encode()) for text in texts))


def add_baseline(result: dict[str, Any], corpus: Path, sets: dict[str, HeldoutFiles]) -> None:
    levels = ngram_baseline.fit(read_stream(corpus / "train.xz").numpy())
    for name, files in sets.items():
        nats = -sum(ngram_baseline.log_probabilities(levels, document).sum() for document in files.documents)
        result["heldout"][name]["five_gram_bits_per_byte"] = round(bits_per_byte(nats, files.bytes), 4)


def head_table(scores: Tensor) -> dict[str, Any]:
    """The best head and all scores, [layer][head]."""
    best = int(scores.argmax())
    layer, head = divmod(best, scores.shape[1])
    return {
        "best_head": f"L{layer}H{head}",
        "best": round(scores.max().item(), 4),
        "scores": [[round(score, 4) for score in row] for row in scores.tolist()],
    }


if __name__ == "__main__":
    main()
