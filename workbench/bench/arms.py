"""What is timed: whole training steps - forward, backward, optimiser - of a TopK SAE on the same batches.

- this project: the trainer's own step, `sae.fused_step.new_step`, as `workbench train` runs it; without the
  auxiliary loss, which no batch here needs.
- dense: matrix products, torch.topk, a dense code, autograd and fused Adam; eager and compiled by torch.compile.
- topk + embedding_bag: the encoder's product, torch.topk, embedding_bag, autograd, fused Adam.
- sparsify, SAELens, dictionary_learning, llamascopium: where installed, their own training code with stock settings,
  and fused Adam where they leave the choice.
- encoder product alone: what every exact step must do, and no step.

On a GPU products run in bf16 and weights are fp32; on a CPU everything is fp32, without the dense arms.
"""

import importlib.util
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae.config import TrainConfig
from sae.fused_step import new_step
from sae.kernels.products import times
from sae.rules import Rule, TopK
from sae.source import Pair, Part
from sae.state import TrainingState

Step = Callable[[Tensor], object]
Arm = Callable[[], Step]
OURS = "this project"
FLOOR = "encoder product alone"
LR = 1e-4
N_DIRECTIONS = 2048


@dataclass(frozen=True)
class Size:
    """Tokens a batch, activation width, features, active features."""

    batch: int
    d_in: int
    d_sae: int
    k: int


SIZES = {
    "demo": Size(4096, 256, 4096, 32),
    "laptop": Size(1024, 768, 12288, 32),
    "S": Size(4096, 768, 24576, 32),
    "M": Size(8192, 2304, 65536, 64),
    "L": Size(8192, 4096, 131072, 64),
    "odd": Size(5000, 1000, 30001, 50),
}
DEFAULT_SIZES = {"cpu": ("laptop",), "cuda": ("S", "M")}


def batches(
    size: Size, device: torch.device, firing: str = "planted", count: int = 4
) -> list[Float[Tensor, "batch d_in"]]:
    """Gaussian activations, or sparse combinations of directions by a power law of which the first is always on.

    Args:
        firing: "planted" or "random".
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if firing == "random":
        return [draw(size.batch, size.d_in) for _ in range(count)]
    directions = draw(N_DIRECTIONS, size.d_in)
    rates = 0.5 / torch.arange(1, N_DIRECTIONS + 1, device=device).sqrt()
    rates[0] = 1
    made = []
    for _ in range(count):
        strengths, chosen = torch.rand(2, size.batch, N_DIRECTIONS, generator=generator, device=device)
        noise = 0.1 * draw(size.batch, size.d_in)
        made.append((strengths * (chosen < rates)) @ directions / 40**0.5 + noise)
    return made


def ours(
    size: Size,
    example: Float[Tensor, "batch d_in"],
    rule: Rule | None = None,
    *,
    target: Float[Tensor, "batch d_in"] | None = None,
    n_parts: int = 1,
    **settings: Any,
) -> Step:
    """The trainer's step with a selection rule, TopK unless told, and other settings of `TrainConfig`.

    Args:
        target: what a transcoder predicts of every batch; None for an SAE.
        n_parts: activations of one width that lie side by side in a row, of which a crosscoder is trained; 1 for none.
    """
    config = TrainConfig(
        name="bench", d_sae=size.d_sae, rule=rule or TopK(size.k), batch_size=size.batch, total_tokens=10**9,
        aux="none", b_dec_init="mean", lr=LR, **settings,
    )  # fmt: skip
    widths: int | Pair | list[Part] = size.d_in
    if target is not None:
        widths = Pair("read", "predicted", size.d_in, size.d_in)
    elif n_parts > 1:
        widths = [Part(str(number), "read", "", size.d_in // n_parts) for number in range(n_parts)]
    state = TrainingState(config, widths, example.device)
    state.initialise(example, target)
    step, numbers = new_step(state), iter(range(config.n_steps))
    with_gradients = config.rule.needs_gradients
    return lambda batch: step(batch, next(numbers), batch if with_gradients else None, target)


def encoder_product(size: Size, device: torch.device) -> Step:
    """The matrix product every exact encoder must do."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = torch.randn(size.d_sae, size.d_in, device=device, dtype=dtype)
    # The conversion of a batch is no part of the product, and small.
    return lambda batch: times(batch.to(dtype), weights)


class TorchSAE:
    """Parameters of the plain-torch arms, which share them, with torch's fused Adam."""

    def __init__(self, size: Size, device: torch.device) -> None:
        W = F.normalize(torch.randn(size.d_sae, size.d_in, device=device), dim=1)
        self.W_enc, self.W_dec = W.clone().requires_grad_(), W.requires_grad_()
        self.b_enc = torch.zeros(size.d_sae, device=device, requires_grad=True)
        self.b_dec = torch.zeros(size.d_in, device=device, requires_grad=True)
        self.k, self.device = size.k, device.type
        self.adam = torch.optim.Adam([self.W_enc, self.W_dec, self.b_enc, self.b_dec], lr=LR, fused=True)

    def dense(self, x: Tensor) -> Tensor:
        """The loss (a scalar) of a batch [n, d] by matrix products alone."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            z = F.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
            best = z.topk(self.k, dim=1)
            code = torch.zeros_like(z).scatter(1, best.indices, best.values)
            x_hat = code @ self.W_dec + self.b_dec
        return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()

    def sparse(self, x: Tensor) -> Tensor:
        """The loss (a scalar) of a batch [n, d] with a sparse decoder."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            z = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        best = z.float().topk(self.k, dim=1)
        x_hat = F.embedding_bag(best.indices, self.W_dec, per_sample_weights=best.values.relu(), mode="sum")
        return (x - x_hat - self.b_dec).square().sum() / (x - x.mean(0)).square().sum()

    def stepper(self, loss: Callable[[Tensor], Tensor]) -> Step:
        """Backward, projection, Adam and renormalisation around `loss`, which takes a batch [n, d]."""

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


def sparsify(size: Size, device: torch.device) -> Step:
    """sparsify's SparseCoder with torch's fused Adam, in the order of operations of its trainer."""
    if device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read when it is imported: its Triton decoder wants a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(size.d_in, SparseCoderConfig(num_latents=size.d_sae, k=size.k), device=str(device))
    adam = torch.optim.Adam(coder.parameters(), lr=LR, fused=True)

    def step(batch: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            coder(batch).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def sae_lens_step(sae: Any, size: Size, device: torch.device) -> Step:
    """SAELens' trainer with its own optimiser, for one of its SAEs."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=size.batch, lr_end=3e-5,
            autocast=device.type == "cuda", device=str(device),
        ),
        sae,
        data_provider=iter([torch.zeros(1)]),
    )  # fmt: skip
    return trainer.step


def sae_lens(size: Size, device: torch.device) -> Step:
    """SAELens' TopK."""
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k, device=str(device))
    return sae_lens_step(TopKTrainingSAE(config), size, device)


def dictionary_learning_step(trainer: Any, size: Size, device: torch.device, **options: Any) -> Step:
    """A trainer of dictionary_learning, given as its class and the options of its own."""
    made = trainer(
        steps=10**6, activation_dim=size.d_in, dict_size=size.d_sae, layer=0, lm_name="none", lr=LR,
        device=str(device), warmup_steps=1000, decay_start=None, **options,
    )  # fmt: skip
    numbers = iter(range(1, 10**6))

    def step(batch: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made.update(next(numbers), batch)

    return step


def dictionary_learning(size: Size, device: torch.device) -> Step:
    """dictionary_learning's TopK trainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    return dictionary_learning_step(TopKTrainer, size, device, k=size.k)


def llamascopium(size: Size, device: torch.device) -> Step:
    """llamascopium's TopK in the order of operations of its trainer, without its metrics."""
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
    from llamascopium.optim import clip_grad_norm
    from llamascopium.trainer import Trainer, TrainerConfig

    hook = "activations"
    config = SAEConfig(
        hook_point_in=hook, hook_point_out=hook, d_model=size.d_in, expansion_factor=size.d_sae / size.d_in,
        act_fn="topk", top_k=size.k, norm_activation="batch-wise", device=str(device), dtype=torch.float32,
    )  # fmt: skip
    sae = SparseAutoEncoder(config)
    sae.init_parameters(encoder_uniform_bound=size.d_in**-0.5, decoder_uniform_bound=size.d_in**-0.5)
    # It makes a folder for its results.
    settings = TrainerConfig(
        lr=LR, lr_scheduler_name="constant", l1_coefficient=None, exp_result_path=tempfile.mkdtemp()
    )  # fmt: skip
    trainer = Trainer(settings)
    trainer.total_training_steps = 10**6
    trainer._initialize_optimizer(sae)
    tokens = torch.zeros(size.batch, dtype=torch.int64, device=device)

    def step(batch: Tensor) -> None:
        with torch.autocast(device.type, settings.amp_dtype, enabled=device.type == "cuda"):
            made = sae.normalize_activations({hook: batch, "tokens": tokens})
            loss = trainer._training_step(sae, made)["loss"]
        # Its progress bar shows the loss of every step.
        loss.item()
        loss.backward()
        clip_grad_norm(list(sae.parameters()), max_norm=math.inf)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.scheduler.step()

    return step


def libraries(size: Size, device: torch.device) -> dict[str, Arm]:
    """The installed libraries' arms."""
    makers = {
        "sparsify": sparsify, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning,
        "llamascopium": llamascopium,
    }  # fmt: skip

    def arm(make: Callable[[Size, torch.device], Step]) -> Arm:
        return lambda: make(size, device)

    return {name: arm(make) for name, make in makers.items() if importlib.util.find_spec(name) is not None}


def arms(size: Size, example: Float[Tensor, "batch d_in"]) -> dict[str, Arm]:
    """This project's step, the floor and the installed libraries, on the device of `example`."""
    device = example.device
    return {
        OURS: lambda: ours(size, example),
        FLOOR: lambda: encoder_product(size, device),
        **libraries(size, device),
    }


def torch_arms(size: Size, device: torch.device) -> dict[str, Arm]:
    """Plain torch: dense and with a sparse decoder."""
    shared: list[TorchSAE] = []

    def sae() -> TorchSAE:
        if not shared:
            shared.append(TorchSAE(size, device))
        return shared[0]

    return {
        "dense, eager": lambda: sae().stepper(sae().dense),
        "dense, torch.compile": lambda: sae().stepper(torch.compile(sae().dense)),
        "topk + embedding_bag": lambda: sae().stepper(sae().sparse),
    }
