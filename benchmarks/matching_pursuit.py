"""Pursuits as training rules on SynthSAEBench's kind of data (docs/methods/inference.md): do they pay?

    python benchmarks/matching_pursuit.py [--seeds 0 1 2] [--arms mp omp ...] [--samples 400000] [--lr 0.003] [--json]
    python benchmarks/matching_pursuit.py --full --arms mp --samples 200000000 --seeds 0  # SynthSAEBench-16k, on a GPU

1. mp: MP-SAE (Costa et al. 2025, arXiv 2506.03093). k times the direction with the largest product with the residual is
   taken off it by that product; gradients go through all k steps.
2. omp: codes by `sae.inference.matching_pursuit`, which are the best values of what was chosen, so that the gradient of
   the squared error goes through the directions alone.

Both learn unit directions and a bias by Adam, with this project's warm-up and decay, on the stream that topk, batchtopk
and matryoshka (`workbench.bench.quality`) train on. Each is measured as SAELens does on rows that no training sees,
with codes as in training and with codes by OMP. Means and standard deviations over seeds.

A step of mp is a few dense products: what the residual's products with the directions become follows from the Gram
matrix of the directions, and the gradient has a closed form. On a GPU it is one CUDA graph, with products in TF32.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import SAE, TopK, train
from sae.code import SparseCode
from sae.inference import InferredSAE, matching_pursuit
from sae.kernels import ragged_code
from workbench.bench.quality import BATCH, config, measures
from workbench.bench.synthetic import FULL, TINY, ModelSize, Planted, Stream, benchmark_model

TRAINED = ("topk", "batchtopk", "matryoshka")
PURSUITS = ("mp", "omp")
SHOWN = ["f1", "mcc", "explained_variance", "l0", "dead", "split", "absorbed"]
EAGER = 3
"""Steps before the graph is captured: kernels are compiled and Adam's state is made in them."""


def pursue(
    scores: Float[Tensor, "n features"], gram: Float[Tensor, "features features"], k: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """What k steps choose and the values; `scores`, products of rows and directions, become those of what is left."""
    if scores.is_cuda:
        from pursuit_kernel import pursue as pursue_on_gpu

        return pursue_on_gpu(scores, gram, k)
    steps = []
    for _ in range(k):
        value, feature = scores.max(dim=1)
        value.relu_()
        scores -= value[:, None] * gram[feature]
        steps.append((feature, value))
    features, values = zip(*steps, strict=True)
    return torch.stack(features, dim=1), torch.stack(values, dim=1)


def spread(features: Int[Tensor, "n k"], values: Float[Tensor, "n k"], width: int) -> Float[Tensor, "n features"]:
    """Dense codes; a feature chosen twice has the sum."""
    return values.new_zeros(len(values), width).scatter_add_(1, features, values)


def mp_codes(x: Tensor, W_dec: Tensor, k: int) -> SparseCode:
    """The codes of matching pursuit."""
    code = spread(*pursue(x @ W_dec.T, W_dec @ W_dec.T, k), len(W_dec))
    token, feature = code.nonzero(as_tuple=True)
    return ragged_code(token, feature, code[token, feature], len(x), len(W_dec))


def mp_gradients(
    x: Float[Tensor, "n d"], directions: Float[Tensor, "features d"], k: int
) -> tuple[Float[Tensor, "features d"], Float[Tensor, "d"]]:
    """Gradients of the mean squared error that k steps leave, for unit directions and for what was subtracted from x.

    With r_{j+1} = r_j - s_j d_j, s_j = relu(d_j . r_j), and l_j the gradient for r_j, going backwards from
    l_k = 2 r_k / n, it is t_j = d_j . l_{j+1} where s_j > 0, else 0, and l_j = l_{j+1} - t_j d_j; the gradient for d_j
    is -(s_j l_{j+1} + t_j r_j). All r_j and l_j are r_0 and l_k less directions that were chosen: the t_j solve a
    triangular system with the Gram matrix of the row's directions, and what pairs of them contribute is summed by pair,
    over rows, before it is multiplied by the directions.
    """
    n, width = len(x), len(directions)
    gram, scores = directions @ directions.T, x @ directions.T
    features, s = pursue(scores, gram, k)
    passed = (s > 0).to(s.dtype)
    among = gram[features[:, :, None], features[:, None, :]] * passed[:, :, None]
    own = scores.gather(1, features) * passed * (2 / n)
    t = torch.linalg.solve_triangular(among, own[:, :, None], upper=True, unitriangular=True)[:, :, 0]
    pairs = (s[:, :, None] * t[:, None, :]).triu(1)
    pairs += pairs.mT.clone()
    places = features[:, :, None] * width + features[:, None, :]
    by_pair = s.new_zeros(width * width).scatter_add_(0, places.flatten(), pairs.flatten()).view(width, width)
    S, T = spread(features, s, width), spread(features, t, width)
    last = (x - S @ directions) * (2 / n)
    return by_pair @ directions - S.T @ last - T.T @ x, T.sum(dim=0) @ directions - last.sum(dim=0)


def omp_gradients(
    x: Float[Tensor, "n d"], directions: Float[Tensor, "features d"], k: int
) -> tuple[Float[Tensor, "features d"], Float[Tensor, "d"]]:
    """The same for codes by OMP, taken as given."""
    code = matching_pursuit(x, directions, [k])[0].to_dense()
    last = (x - code @ directions) * (2 / len(x))
    return -code.T @ last, -last.sum(dim=0)


@torch.no_grad()
def learned(rule: str, size: ModelSize, stream: Stream, samples: int, lr: float, seed: int) -> SAE:
    """An SAE whose decoder was trained by a pursuit; its encoder is its decoder."""
    device, n_steps = stream.planted.directions.device, samples // BATCH
    on_gpu = device.type == "cuda"
    start = torch.randn(size.d_sae, size.d_in, generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(start, dim=1).to(device).requires_grad_()
    rows = stream.next_batch(BATCH).clone()
    bias = rows.mean(dim=0).requires_grad_()
    rate = torch.tensor(lr, device=device)
    adam = torch.optim.Adam([directions, bias], lr=rate, betas=(0.9, 0.999), fused=True, capturable=on_gpu)
    gradients = {"mp": mp_gradients, "omp": omp_gradients}[rule]

    def step() -> None:
        # For these products alone: the stream's rows are to be those that other rules train on.
        torch.set_float32_matmul_precision("high" if on_gpu else "highest")
        directions.grad, bias.grad = gradients(rows - bias, directions, size.l0)
        torch.set_float32_matmul_precision("highest")
        adam.step()
        directions.copy_(torch.nn.functional.normalize(directions, dim=1))

    take: Callable[[], object] = step
    every, began = max(500, n_steps // 40), time.perf_counter()
    for number in range(n_steps):
        rate.fill_(lr * min(1.0, (number + 1) / (n_steps * 0.05), (n_steps - number) / (n_steps * 0.2)))
        rows.copy_(stream.next_batch(BATCH))
        if on_gpu and rule == "mp" and number == EAGER:
            from sae.kernels.triton.step import GraphedStep

            take = GraphedStep(step, warm_up=0)
        take()
        if (number + 1) % every == 0:
            now = time.perf_counter()
            ms, began = (now - began) * 1000 / every, now
            print(f"{rule}: step {number + 1:,} of {n_steps:,}, {ms:.2f} ms a step", file=sys.stderr, flush=True)
    sae = SAE(size.d_in, size.d_sae, TopK(size.l0), device=device)
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(directions.T)
    sae.b_dec.copy_(bias)
    return sae


def arms(
    names: Collection[str], size: ModelSize, planted: Planted, samples: int, lr: float, seed: int
) -> Iterator[tuple[str, SAE]]:
    """What is measured, by name."""
    k, device = size.l0, planted.directions.device

    def searching(sae: SAE) -> SAE:
        return InferredSAE(sae, lambda x, W_dec: matching_pursuit(x, W_dec, [k])[0])

    trained = [name for name in TRAINED if name in names]
    configs = [config(name, size, samples, seed) for name in trained]
    for name, made in zip(
        trained, train(configs, Stream(planted, seed), device=device) if configs else [], strict=True
    ):
        assert made.sae is not None, made.error
        yield name, made.sae
        yield f"{name}, codes by omp", searching(made.sae)
    if "mp" in names:
        by_mp = learned("mp", size, Stream(planted, seed), samples, lr, seed)
        yield "mp", InferredSAE(by_mp, lambda x, W_dec: mp_codes(x, W_dec, k))
        yield "mp, codes by omp", searching(by_mp)
    if "omp" in names:
        yield "omp", searching(learned("omp", size, Stream(planted, seed), samples, lr, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    everything = [*TRAINED, *PURSUITS]
    parser.add_argument(
        "--arms", nargs="+", choices=everything, default=everything, help="omp takes hours at full size"
    )
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--lr", type=float, help="of the pursuits; this project's for the size where left out")
    parser.add_argument("--full", action="store_true", help="the benchmark's own size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="a line a seed and arm")
    options = parser.parse_args()
    size = FULL if options.full else TINY
    planted = Planted.of(benchmark_model(size, options.device))
    n_blocks = 4 if options.full else 1
    rows = []
    for seed in options.seeds:
        for name, sae in arms(options.arms, size, planted, options.samples, options.lr or size.lr, seed):
            rows.append({"seed": seed, "arm": name, **measures(sae, Stream(planted, seed), n_blocks)})
            if options.json:
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        return
    found = pd.DataFrame(rows).groupby("arm", sort=False)[SHOWN]
    print(found.mean().round(3).to_string(), "\n\n", found.std().round(3).to_string())


if __name__ == "__main__":
    main()
