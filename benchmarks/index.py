"""Building the feature index, against encoding alone, and reading from it.

    python benchmarks/index.py [--rows 1000000] [--width 256] [--features 16384] [--k 32] [--device cpu] [--json]

Encoding alone is the SAE over the same rows in the same batches with nothing kept, in a sample of the harvest spread
over its length, before and after the build; the mean of both counts. Activations are random and decoder rows are
the encoder's, so every feature fires about equally often. Logit effects come from the bundled model where the width
is its own. Reading: 200 features drawn at random, each opened once, then the table and a search.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from synthetic_harvest import HOOK, synthetic_harvest

from sae import SAE, TopK
from workbench import Workspace
from workbench.features.index.build import build_index
from workbench.features.index.query import FeatureIndex
from workbench.features.index.segments import BATCH_ROWS
from workbench.harvest.reading import Harvest
from workbench.models.load import load_model

SAMPLE_BATCHES = 16


def encoding_seconds(harvest: Harvest, sae: SAE) -> float:
    """Time of encoding every row, from a sample of batches."""
    vectors = harvest.vectors(HOOK)
    starts = np.linspace(0, harvest.n_rows - BATCH_ROWS, SAMPLE_BATCHES).astype(int)
    batches = [torch.cat(list(vectors.pieces(start, start + BATCH_ROWS))) for start in starts.tolist()]
    took = []
    sae.encode(batches[0].to(sae.W_dec.device, torch.float32))  # the first call finds no memory to reuse
    for batch in batches:
        begin = time.perf_counter()
        sae.encode(batch.to(sae.W_dec.device, torch.float32)).entries()
        took.append(time.perf_counter() - begin)
    return sum(took) / SAMPLE_BATCHES * harvest.n_trainable_rows / BATCH_ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="Disk to measure on.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        space = Workspace(Path(folder) / "w")
        (space.path / "harvests").mkdir()
        harvest = synthetic_harvest(space.path / "harvests" / "h", arguments.rows, arguments.width)
        sae = SAE(arguments.width, arguments.features, TopK(arguments.k), hook_name=HOOK, model_name="random")
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(sae.W_dec.shape), dim=1))
            sae.W_enc.copy_(sae.W_dec.T)
        sae.save(space.path / "saes" / "s")
        sae = space.sae("s", device=arguments.device)
        demo = load_model("demo", device=arguments.device)
        model = demo if demo.info.d_model == arguments.width else None
        encoding = [encoding_seconds(harvest, sae)]
        begin = time.perf_counter()
        made = build_index(space, "s", harvest="h", model=model, device=arguments.device)
        total = time.perf_counter() - begin
        encoding.append(encoding_seconds(harvest, sae))
        index = FeatureIndex.open(space, "s")
        opened = []
        for feature in np.random.default_rng(0).integers(0, arguments.features, 200).tolist():
            begin = time.perf_counter()
            index.feature(feature)
            opened.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        index.table()
        table = time.perf_counter() - begin
        begin = time.perf_counter()
        index.search("token 7")
        search = time.perf_counter() - begin
    report = {
        "tokens": made.tokens,
        "features": arguments.features,
        "activations": made.activations,
        "threads": torch.get_num_threads(),
        "encoding_alone_seconds": [round(seconds, 1) for seconds in encoding],
        "index_seconds": round(total, 1),
        "ratio": round(total / statistics.mean(encoding), 2),
        "steps": made.seconds,
        "bytes_per_activation": round(made.bytes / made.activations, 2),
        "open_feature_median_ms": round(1000 * statistics.median(opened), 1),
        "open_feature_slowest_ms": round(1000 * max(opened), 1),
        "table_ms": round(1000 * table, 1),
        "search_ms": round(1000 * search, 1),
    }
    print(json.dumps(report, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
