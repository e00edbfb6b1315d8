"""TopK trained here, by SAELens and by dictionary_learning: the same tensor, batches, learning rates and steps.

Activations of the demo model are scaled once to mean norm sqrt(d), all three take batch i from the same rows, and the
learning rate rises over the first 5% of the steps and falls over the last 20%. FVU on rows that nobody trained on:

    own         every library as it is
    equal       the peers start from this project's weights of the same seed, and this project clips as they do
    unclipped   the same, and nobody clips gradients

Both peers clip the gradient to norm 1, `TrainConfig.clip_grad_norm` here. Under Adam that is more than a guard: it
keeps the gradients' scale constant while the error falls, which otherwise lets the second moments, that remember
larger gradients, slow the steps down.
What else differs: this project divides the error by the batch's variance, and SAELens divides pre-activations by
decoder norms instead of keeping these at 1. No auxiliary loss comes into play: so short a run leaves no feature dead
by the peers' definitions, and here it is switched off.

    python benchmarks/parity.py [--steps 400] [--seeds 3]
"""

import argparse
import importlib
import importlib.util
import math
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import TrainConfig
from sae.model import SAE
from sae.rules import TopK
from sae.state import TrainingState
from sae.training import train

WARMUP, DECAY = 0.05, 0.2
PEERS_CLIP = 1.0
"""Norm to which both peers clip gradients."""


@dataclass(frozen=True)
class Task:
    """One tensor and how it is trained on."""

    x: Float[Tensor, "rows d_in"]
    """Rows in the order of training."""
    held_out: Float[Tensor, "held_out d_in"]
    d_sae: int
    k: int
    batch: int
    lr: float

    @property
    def steps(self) -> int:
        return self.x.shape[0] // self.batch

    def config(self, seed: int, clip: float | None = None) -> TrainConfig:
        return TrainConfig(
            f"seed{seed}", self.steps * self.batch, self.d_sae, TopK(self.k), lr=self.lr, batch_size=self.batch,
            warmup=WARMUP, decay=DECAY, aux="none", normalize_input=False, clip_grad_norm=clip, seed=seed,
        )  # fmt: skip

    def fvu(self, reconstruct: Callable[[Tensor], Tensor]) -> float:
        """On the held-out rows."""
        with torch.no_grad():
            error = (self.held_out - reconstruct(self.held_out)).double().square().sum()
        return (error / (self.held_out - self.held_out.mean(dim=0)).double().square().sum()).item()


class Rows:
    """The task's tensor as a stream."""

    def __init__(self, task: Task) -> None:
        self.x, self.position = task.x, 0
        self.d_in = task.x.shape[1]

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        self.position += n
        return self.x[self.position - n : self.position]

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        return self.x[:n]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def start(task: Task, seed: int) -> SAE:
    """This project's SAE before the first step."""
    state = TrainingState(task.config(seed), task.x.shape[1], torch.device("cpu"))
    state.initialise(Rows(task).sample(16_384))
    return state.sae


def ours(task: Task, seed: int, clip: float | None = None) -> float:
    """FVU after this project's training."""
    trained = train([task.config(seed, clip)], Rows(task))[0].sae
    assert trained is not None
    return task.fvu(trained)


def saelens(task: Task, seed: int, weights: SAE | None = None) -> float:
    """FVU after SAELens' training, from `weights` or from its own start."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=task.x.shape[1], d_sae=task.d_sae, k=task.k))
    if weights is not None:
        sae.load_state_dict({name: tensor.clone() for name, tensor in weights.state_dict().items()})
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.batch, train_batch_size_samples=task.batch, lr=task.lr,
        lr_end=task.lr, lr_warm_up_steps=round(WARMUP * task.steps), lr_decay_steps=round(DECAY * task.steps),
    )  # fmt: skip

    def batches() -> Iterator[Tensor]:
        stream = Rows(task)
        while True:
            yield stream.next_batch(task.batch)

    return task.fvu(SAETrainer(config, sae, batches()).fit())


def dictionary_learning(task: Task, seed: int, weights: SAE | None = None) -> float:
    """FVU after dictionary_learning's training, from `weights` or from its own start."""
    trainer = _top_k_module().TopKTrainer(
        task.steps, task.x.shape[1], task.d_sae, task.k, layer=0, lm_name="", lr=task.lr,
        warmup_steps=round(WARMUP * task.steps), decay_start=task.steps - round(DECAY * task.steps), seed=seed,
        device="cpu",
    )  # fmt: skip
    if weights is not None:
        with torch.no_grad():
            trainer.ae.decoder.weight.copy_(weights.W_dec.T)
            trainer.ae.encoder.weight.copy_(weights.W_enc.T)
    stream = Rows(task)
    for step in range(task.steps):
        trainer.update(step, stream.next_batch(task.batch))
    return task.fvu(trainer.ae)


def _top_k_module() -> Any:
    """Its trainer without the package's `__init__`, which wants nnsight."""
    if "dictionary_learning" not in sys.modules:
        spec = importlib.util.find_spec("dictionary_learning")
        if spec is None or spec.submodule_search_locations is None:
            raise SystemExit("needs dictionary-learning: pip install dictionary-learning")
        package = types.ModuleType("dictionary_learning")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["dictionary_learning"] = package
    return importlib.import_module("dictionary_learning.trainers.top_k")


@contextmanager
def unclipped() -> Iterator[None]:
    """Inside, torch clips no gradients."""
    clip = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda parameters, max_norm: torch.zeros(())  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = clip


def compare(task: Task, seeds: int) -> pd.DataFrame:
    """One line for each seed, comparison and library."""
    lines = []
    for seed in range(seeds):
        plain, clipped = ours(task, seed), ours(task, seed, PEERS_CLIP)
        for name, fvu in {"own": plain, "equal": clipped, "unclipped": plain}.items():
            lines.append({"comparison": name, "library": "ours", "seed": seed, "fvu": fvu})
        for peer in (saelens, dictionary_learning):
            found = {"own": peer(task, seed), "equal": peer(task, seed, start(task, seed))}
            with unclipped():
                found["unclipped"] = peer(task, seed, start(task, seed))
            lines += [
                {"comparison": name, "library": peer.__name__, "seed": seed, "fvu": fvu} for name, fvu in found.items()
            ]
    return pd.DataFrame(lines)


def demo_rows(n: int) -> Float[Tensor, "n d_in"]:
    """Shuffled activations of the demo model, scaled to mean norm sqrt(d)."""
    from workbench import Workspace
    from workbench.harvest.plan import HarvestConfig
    from workbench.models.load import load_model

    hook = "blocks.2.hook_resid_post"
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        # A little more, for BOS and padding are left out.
        config = HarvestConfig("demo", "python-stdlib", (hook,), max_tokens=int(1.1 * n) + 4096)
        harvest = space.harvest("h", config, model=load_model("demo", device="cpu"))
        rows = torch.from_numpy(harvest.flags == 0).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]
        x = harvest.vectors(hook).rows(rows[order].numpy()).float()
    return x * (math.sqrt(x.shape[1]) / x.norm(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    batch, held_out = 1024, 16_384
    x = demo_rows(options.steps * batch + held_out)
    found = compare(Task(x[held_out:], x[:held_out], d_sae=1024, k=16, batch=batch, lr=2e-3), options.seeds)
    print(found.groupby(["comparison", "library"])["fvu"].agg(["mean", "std", "min", "max"]).round(4).to_string())


if __name__ == "__main__":
    main()
