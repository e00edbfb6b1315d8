"""Pursuits as training rules on SynthSAEBench's kind of data (docs/methods/inference.md): do they pay?

    python benchmarks/matching_pursuit.py [--seeds 0 1 2] [--samples 400000] [--lr 0.003] [--json]
    python benchmarks/matching_pursuit.py --full --samples 5000000       # SynthSAEBench-16k, on a GPU, without omp

1. mp: MP-SAE (Costa et al. 2025, arXiv 2506.03093). k times the direction with the largest product with the residual is
   taken off it by that product; gradients go through all k steps.
2. omp: codes by `sae.inference.matching_pursuit`, which are the best values of what was chosen, so that the gradient of
   the squared error goes through the directions alone.

Both learn unit directions and a bias by Adam, with this project's warm-up and decay, on the stream that topk, batchtopk
and matryoshka (`workbench.bench.quality`) train on. Each is measured as SAELens does on rows that no training sees,
with codes as in training and with codes by OMP. Means and standard deviations over seeds.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice

import pandas as pd
import torch
from torch import Tensor

from sae import SAE, TopK, train
from sae.code import SparseCode
from sae.inference import InferredSAE, matching_pursuit
from sae.kernels import ragged_code
from workbench.bench.quality import BATCH, config, measures
from workbench.bench.synthetic import FULL, TINY, ModelSize, Planted, Stream, benchmark_model

FULL_ARMS = 8
TRAINED = ("topk", "batchtopk", "matryoshka")
SHOWN = ["f1", "mcc", "explained_variance", "l0", "dead", "split", "absorbed"]


def pursued(x: Tensor, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(what k steps leave of x [n, d], codes [n, features]); differentiable."""
    residual, code = x, x.new_zeros(len(x), len(directions))
    for _ in range(k):
        size, feature = (residual @ directions.T).max(dim=1)
        size = size.relu()
        residual = residual - size[:, None] * directions[feature]
        code = code.scatter_add(1, feature[:, None], size[:, None])
    return residual, code


def mp_codes(x: Tensor, W_dec: Tensor, k: int) -> SparseCode:
    """The codes of matching pursuit."""
    code = pursued(x, W_dec, k)[1]
    token, feature = code.nonzero(as_tuple=True)
    return ragged_code(token, feature, code[token, feature], len(x), len(W_dec))


def learned(rule: str, size: ModelSize, stream: Stream, samples: int, lr: float, seed: int) -> SAE:
    """An SAE whose decoder was trained by a pursuit; its encoder is its decoder."""
    device, n_steps = stream.planted.directions.device, samples // BATCH
    start = torch.randn(size.d_sae, size.d_in, generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(start, dim=1).to(device).requires_grad_()
    bias = stream.next_batch(BATCH).mean(dim=0).requires_grad_()
    adam = torch.optim.Adam([directions, bias], lr=lr, betas=(0.9, 0.999))
    for step in range(n_steps):
        adam.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / (n_steps * 0.05), (n_steps - step) / (n_steps * 0.2))
        x = stream.next_batch(BATCH) - bias
        if rule == "mp":
            left = pursued(x, directions, size.l0)[0]
        else:
            code = matching_pursuit(x.detach(), directions.detach(), [size.l0])[0]
            left = x - (code.values[:, None, :] @ directions[code.indices])[:, 0]
        adam.zero_grad()
        left.square().sum(dim=1).mean().backward()
        adam.step()
        with torch.no_grad():
            directions.copy_(torch.nn.functional.normalize(directions, dim=1))
    sae = SAE(size.d_in, size.d_sae, TopK(size.l0), device=device)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
        sae.b_dec.copy_(bias)
    return sae


def arms(size: ModelSize, planted: Planted, samples: int, lr: float, seed: int) -> Iterator[tuple[str, SAE]]:
    """What is measured, by name."""
    k = size.l0

    def searching(sae: SAE) -> SAE:
        return InferredSAE(sae, lambda x, W_dec: matching_pursuit(x, W_dec, [k])[0])

    configs = [config(name, size, samples, seed) for name in TRAINED]
    for name, made in zip(
        TRAINED, train(configs, Stream(planted, seed), device=planted.directions.device), strict=True
    ):
        assert made.sae is not None, made.error
        yield name, made.sae
        yield f"{name}, codes by omp", searching(made.sae)
    by_mp = learned("mp", size, Stream(planted, seed), samples, lr, seed)
    yield "mp", InferredSAE(by_mp, lambda x, W_dec: mp_codes(x, W_dec, k))
    yield "mp, codes by omp", searching(by_mp)
    yield "omp", searching(learned("omp", size, Stream(planted, seed), samples, lr, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--lr", type=float, help="of the pursuits; this project's for the size where left out")
    parser.add_argument("--full", action="store_true", help="the benchmark's own size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="a line a seed and arm")
    options = parser.parse_args()
    size = FULL if options.full else TINY
    planted = Planted.of(benchmark_model(size, options.device))
    rows = []
    for seed in options.seeds:
        trained = arms(size, planted, options.samples, options.lr or size.lr, seed)
        # Training by OMP comes last and would take hours at full size.
        for name, sae in islice(trained, FULL_ARMS if options.full else None):
            rows.append({"seed": seed, "arm": name, **measures(sae, Stream(planted, seed), 1)})
            if options.json:
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        return
    found = pd.DataFrame(rows).groupby("arm", sort=False)[SHOWN]
    print(found.mean().round(3).to_string(), "\n\n", found.std().round(3).to_string())


if __name__ == "__main__":
    main()
