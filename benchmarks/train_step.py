"""A TopK SAE's training step on one GPU: forward, backward and Adam, with the decoder kept at unit norm.

    python benchmarks/train_step.py [--sizes S M L] [--firing planted|random] [--rounds 20] [--arms NAME ...] [--json]

Arms run in turn, round after round, on the same batches, so that a change in the machine's speed meets all alike;
each is timed with CUDA events. Reported: median, p10 and p90 in ms, tokens a second, the roofline's share, and the
peak memory of a step with its state. Products in bf16, weights and moments in fp32.

- this project: the step captured as a CUDA graph; `eager` without the graph; `materialised` with gradients in memory;
  and the other selection rules.
- dense: matrix products, torch.topk, a dense code, autograd and fused Adam; eager and compiled by torch.compile.
- topk + embedding_bag: the encoder's product, torch.topk, embedding_bag, autograd, fused Adam.
- sparsify, SAELens, dictionary_learning: where installed, their own training code with stock settings under bf16
  autocast, and fused Adam where they leave the choice.
"""

import argparse
import importlib.util
import json
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.code import SparseCode

Step = Callable[[Tensor], object]
BETAS, LR = (0.9, 0.999), 1e-4
# One H200, measured: dense bf16 FLOP/s and bytes/s of a copy.
FLOPS, BYTES = 790e12, 4.3e12


@dataclass(frozen=True)
class Size:
    """Tokens a batch, activation width, features, active features."""

    batch: int
    d_in: int
    d_sae: int
    k: int

    def roofline(self) -> float:
        """Seconds that the step's least FLOPs and bytes take: product, decode, two passes of gradients, Adam."""
        product = 2 * self.batch * self.d_in * self.d_sae / FLOPS
        gathered = 3 * 2 * self.batch * self.k * self.d_in
        return product + (gathered + 26 * 2 * self.d_in * self.d_sae) / BYTES


SIZES = {
    "S": Size(4096, 768, 24576, 32),
    "M": Size(8192, 2304, 65536, 64),
    "L": Size(8192, 4096, 131072, 64),
    "odd": Size(5000, 1000, 30001, 50),
}


@dataclass(frozen=True)
class Measured:
    """Milliseconds and bytes of one arm."""

    median: float
    p10: float
    p90: float
    tokens_per_second: float
    roofline_share: float
    peak_bytes: int


def ours(size: Size, rule: str = "topk", *, graph: bool = True, materialise: bool = False) -> Step:
    """This project's step with one of its selection rules."""
    from sae.kernels import triton as fast

    def gradient(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
        values, indices = fast.gradient_topk_encode(x, W_enc, b_enc, parameters.shadow_dec, x, size.k, 1.0)
        return SparseCode(values, indices, size.d_sae)

    def feature(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
        return fast.feature_topk_encode(x, W_enc, b_enc, budgets, n_entries=n_entries)

    def batchwise(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
        return fast.batch_topk_encode(x, W_enc, b_enc, size.batch * size.k)

    W = F.normalize(torch.randn(size.d_sae, size.d_in, device="cuda"), dim=1)
    parameters = fast.Parameters.starting(
        W.clone(), W, torch.zeros(size.d_sae, device="cuda"), torch.zeros(size.d_in, device="cuda"), torch.bfloat16
    )
    since = torch.zeros(size.d_sae, dtype=torch.int64, device="cuda")
    scalars = torch.tensor(fast.step_scalars(LR, 1, BETAS), device="cuda")
    adam, one = fast.AdamStep(scalars, *BETAS, 1e-8), torch.ones((), device="cuda")
    n_entries = size.d_sae * max(1, size.batch * size.k // size.d_sae)
    budgets = torch.full((size.d_sae,), n_entries // size.d_sae, device="cuda")
    rules = {
        "topk": fast.topk_rule(size.k),
        "abs": fast.topk_rule(size.k, absolute=True),
        "batch": batchwise,
        "feature": feature,
        "gradient": gradient,
    }
    encoder = rules[rule]
    static = torch.randn(size.batch, size.d_in, device="cuda")

    def run() -> object:
        return fast.training_step(static, one, encoder, parameters, since, adam, materialise=materialise)

    replay = fast.GraphedStep(run) if graph else run  # type: ignore[arg-type]

    def step(batch: Tensor) -> object:
        static.copy_(batch)
        return replay()

    return step


class TorchSAE:
    """Parameters of the plain-torch arms, which share them, with torch's fused Adam."""

    def __init__(self, size: Size) -> None:
        W = F.normalize(torch.randn(size.d_sae, size.d_in, device="cuda"), dim=1)
        self.W_enc, self.W_dec = W.clone().requires_grad_(), W.requires_grad_()
        self.b_enc = torch.zeros(size.d_sae, device="cuda", requires_grad=True)
        self.b_dec = torch.zeros(size.d_in, device="cuda", requires_grad=True)
        self.k = size.k
        self.adam = torch.optim.Adam([self.W_enc, self.W_dec, self.b_enc, self.b_dec], lr=LR, fused=True)

    def dense(self, x: Tensor) -> Tensor:
        """The loss by matrix products alone."""
        with torch.autocast("cuda", torch.bfloat16):
            z = F.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
            best = z.topk(self.k, dim=1)
            code = torch.zeros_like(z).scatter(1, best.indices, best.values)
            x_hat = code @ self.W_dec + self.b_dec
        return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()

    def sparse(self, x: Tensor) -> Tensor:
        """The loss with a sparse decoder."""
        with torch.autocast("cuda", torch.bfloat16):
            z = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        best = z.float().topk(self.k, dim=1)
        x_hat = F.embedding_bag(best.indices, self.W_dec, per_sample_weights=best.values.relu(), mode="sum")
        return (x - x_hat - self.b_dec).square().sum() / (x - x.mean(0)).square().sum()

    def stepper(self, loss: Callable[[Tensor], Tensor]) -> Step:
        """Backward, projection, Adam and renormalisation around `loss`."""

        def step(batch: Tensor) -> None:
            self.adam.zero_grad()
            loss(batch).backward()
            with torch.no_grad():
                assert self.W_dec.grad is not None
                along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
                self.W_dec.grad.addcmul_(self.W_dec, along[:, None], value=-1)
                self.adam.step()
                self.W_dec /= torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)

        return step


def sparsify(size: Size) -> Step:
    """sparsify's SparseCoder in the order of operations of its trainer."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(size.d_in, SparseCoderConfig(num_latents=size.d_sae, k=size.k), device="cuda")
    adam = torch.optim.Adam(coder.parameters(), lr=LR, fused=True)

    def step(batch: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", torch.bfloat16):
            coder(batch).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def sae_lens(size: Size) -> Step:
    """SAELens' trainer with its own optimiser."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=size.batch, lr_end=3e-5, autocast=True, device="cuda"
        ),
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k, device="cuda")),
        data_provider=iter([torch.zeros(1)]),
    )
    return trainer.step


def dictionary_learning(size: Size) -> Step:
    """dictionary_learning's TopK trainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=size.d_in, dict_size=size.d_sae, k=size.k, layer=0, lm_name="none", lr=LR,
        device="cuda", warmup_steps=1000, decay_start=None,
    )  # fmt: skip
    numbers = iter(range(1, 10**6))

    def step(batch: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            trainer.update(next(numbers), batch)

    return step


def arms(size: Size) -> dict[str, Callable[[], Step]]:
    """Every arm's maker; those that are not installed are left out."""
    shared: list[TorchSAE] = []

    def torch_sae() -> TorchSAE:
        if not shared:
            shared.append(TorchSAE(size))
        return shared[0]

    made: dict[str, Callable[[], Step]] = {
        "this project": lambda: ours(size),
        "this project, eager": lambda: ours(size, graph=False),
        "this project, materialised": lambda: ours(size, materialise=True),
        "this project, AbsTopK": lambda: ours(size, "abs"),
        "this project, batch top-k": lambda: ours(size, "batch", graph=False),
        "this project, feature choice": lambda: ours(size, "feature"),
        "this project, gradient rule": lambda: ours(size, "gradient"),
        "dense, eager": lambda: torch_sae().stepper(torch_sae().dense),
        "dense, torch.compile": lambda: torch_sae().stepper(torch.compile(torch_sae().dense)),
        "topk + embedding_bag": lambda: torch_sae().stepper(torch_sae().sparse),
    }
    for name, maker in (("sparsify", sparsify), ("sae_lens", sae_lens), ("dictionary_learning", dictionary_learning)):
        if importlib.util.find_spec(name) is not None:
            made[name] = lambda maker=maker: maker(size)  # type: ignore[misc]
    return made


def batches(size: Size, firing: str, count: int = 4) -> list[Tensor]:
    """Gaussian activations, or sparse combinations of directions of which the first is always on."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    if firing == "random":
        return [draw(size.batch, size.d_in) for _ in range(count)]
    directions = draw(2048, size.d_in)
    rates = 0.5 / torch.arange(1, 2049, device="cuda").sqrt()
    rates[0] = 1
    made = []
    for _ in range(count):
        strengths = torch.rand(size.batch, 2048, generator=generator, device="cuda")
        chosen = torch.rand(size.batch, 2048, generator=generator, device="cuda") < rates
        made.append((strengths * chosen) @ directions / math.sqrt(40) + 0.1 * draw(size.batch, size.d_in))
    return made


def measure(size: Size, names: list[str], firing: str, rounds: int) -> dict[str, Measured]:
    """Times the arms in turn."""
    data = batches(size, firing)
    makers = arms(size)
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    for name in names or list(makers):
        if name not in makers:
            continue
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            steps[name] = makers[name]()
            for batch in data[:2]:
                steps[name](batch)
            torch.cuda.synchronize()
        except Exception as error:  # a peer that does not run here is left out and named
            steps.pop(name, None)
            print(f"  {name}: left out, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        peaks[name] = torch.cuda.max_memory_allocated() - before
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step(data[number % len(data)])
            stop.record()
            events[name].append((start, stop))
        torch.cuda.synchronize()
    results = {}
    for name, pairs in events.items():
        times = sorted(start.elapsed_time(stop) for start, stop in pairs)
        tenths = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        results[name] = Measured(
            median, tenths[0], tenths[-1], size.batch / median * 1e3, size.roofline() * 1e3 / median, peaks[name]
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S", "M", "L"])
    parser.add_argument("--firing", choices=["planted", "random"], default="planted")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--arms", nargs="*", default=[])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU; on a CPU run benchmarks/train_step_cpu.py")
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "triton")}
    report = {"device": torch.cuda.get_device_name(), "python": platform.python_version(), **versions}
    for name in arguments.sizes:
        size = SIZES[name]
        results = measure(size, arguments.arms, arguments.firing, arguments.rounds)
        report[name] = {"size": asdict(size), "arms": {arm: asdict(result) for arm, result in results.items()}}
        if not arguments.json:
            print(f"{name}: batch {size.batch}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, {arguments.firing}")
            for arm, r in sorted(results.items(), key=lambda item: item[1].median):
                print(
                    f"  {arm:30} {r.median:8.2f} ms ({r.p10:.2f}-{r.p90:.2f}) "
                    f"{r.tokens_per_second / 1e6:6.2f}M tokens/s {r.roofline_share:5.0%} of roofline "
                    f"{r.peak_bytes / 2**30:6.1f} GiB"
                )
        torch.cuda.empty_cache()
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
