"""Trains a transcoder for every MLP of the demo model and writes the set, in half precision, to data/demo_transcoders.

    python data/train_demo_transcoders.py                                  # the interpreter's standard library, a GPU
    python data/train_demo_transcoders.py --rows 200000 --tokens 800000    # what a CPU does in minutes
    python data/train_demo_transcoders.py --site-packages DIR --rows 14000000 --tokens 60000000
    python data/train_demo_transcoders.py --trained workspace/transcoders/mlps      # a set that lies in a workspace

1. What every MLP reads and what it adds to the residual stream is harvested in one pass: over the standard library, or
   over the training side of what `prepare_corpus.py` makes of it and of packages, read where they are installed.
2. One transcoder a layer trains on one stream of it, TopK. With --random-decoder another set does, whose decoders stay
   as they were drawn; it is written beside the first for `evaluate_demo_transcoders.py` to compare with.
3. The set is rounded to half precision and written with training.json, which says what made it.

`evaluate_demo_transcoders.py` measures it.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from corpus_sources import Document
from prepare_corpus import read_corpus, text_digest

from sae import TopK, TranscoderSet, load_transcoders
from sae.config import TrainConfig
from sae.training import StepMetrics
from workbench.disk.descriptions import read_description
from workbench.harvest.plan import HarvestConfig
from workbench.text.corpora import LIVE, Corpus, Entry
from workbench.workspace import Workspace

OUT = Path(__file__).resolve().parent / "demo_transcoders"
LAYERS = 4
READS, PREDICTS = "blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"
NAME, RANDOM = "mlps", "random"
TEXT = "python"


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        trained = arguments.trained or train(Workspace(Path(folder) / "workspace"), arguments)
        bundle(trained, arguments.out)
        if arguments.random_decoder is not None:
            bundle(trained.parent / RANDOM, arguments.random_decoder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site-packages", type=Path, action="append", default=[], help="packages to read; repeatable")
    parser.add_argument("--max-package-mb", type=float, default=2.0, help="most text taken from one package")
    parser.add_argument("--rows", type=int, default=2_000_000, help="activations to harvest")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens to train on, in several epochs")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, help="peak learning rate; the default by width when left out")
    parser.add_argument("--dead-after", type=int, help="tokens without firing after which a feature is revived")
    parser.add_argument("--skip", action="store_true", help="with a linear path beside the features")
    parser.add_argument("--random-decoder", type=Path, help="where the set with frozen decoders goes, if wanted")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trained", type=Path, help="a set that is trained already")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def train(workspace: Workspace, arguments: argparse.Namespace) -> Path:
    """Harvests and trains; the folder of the set."""
    hooks = [pattern.replace("*", str(layer)) for layer in range(LAYERS) for pattern in (READS, PREDICTS)]
    harvest = HarvestConfig(
        model="demo", corpus="python-stdlib", hooks=tuple(hooks), max_tokens=arguments.rows, dtype="float16"
    )
    text = installed_text(arguments.site_packages, arguments.max_package_mb) if arguments.site_packages else None
    workspace.harvest(NAME, harvest, corpus=text, device=arguments.device)
    config = TrainConfig(
        name=NAME, total_tokens=arguments.tokens, d_sae=arguments.features, rule=TopK(arguments.k), lr=arguments.lr,
        skip=arguments.skip, dead_after_tokens=arguments.dead_after,
    )  # fmt: skip
    configs = [config]
    if arguments.random_decoder is not None:
        configs.append(replace(config, name=RANDOM, frozen_decoder=True))
    workspace.train(NAME, NAME, configs, hook=READS, target_hook=PREDICTS, device=arguments.device, on_metrics=_report)
    return workspace.transcoder_folder(NAME)


def installed_text(site_packages: list[Path], max_package_mb: float) -> Corpus:
    """The demo model's kind of text, the training side alone, in memory."""
    _, made = read_corpus(site_packages, max_package_mb)

    def entry(document: Document) -> Entry:
        return Entry(f"{document.distribution}/{document.module_path}", lambda: document.text)

    entries = [entry(document) for document in made.train]
    print(f"{len(entries)} files, {sum(document.bytes for document in made.train) / 1e6:.0f} MB")
    return Corpus(LIVE + TEXT, lambda: iter(entries), lambda _: "train", text_digest(made.train))


def _report(metrics: StepMetrics) -> None:
    if metrics.tokens == metrics.total_tokens:
        print(f"{metrics.name}: FVU {metrics.fvu:.4f}, dead {metrics.dead_share:.1%}, {metrics.seconds:.0f} s")


def bundle(trained: Path, out: Path) -> None:
    """Writes the set in half precision, with what its first layer's record says about how it was made."""
    coders = load_transcoders(trained)
    record = read_description(trained / "layer_0" / "provenance.json")
    training = {key: value for key, value in record["training"].items() if key != "name"}
    halves = {layer: coder.to(torch.float16) for layer, coder in coders.coders.items()}
    for coder in halves.values():
        coder.model_name = "demo"
    TranscoderSet(halves).save(out)
    harvest = record["harvest"]
    made: dict[str, Any] = {
        "training": training,
        "corpus": harvest["config"]["corpus"].removeprefix(LIVE),
        "rows": harvest["config"]["max_tokens"],
        "model_weights_sha256": harvest["model"]["weights_sha256"],
        "versions": record["versions"],
    }
    (out / "training.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
