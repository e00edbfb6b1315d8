"""Trains the demo model from scratch on a corpus made by prepare_corpus.py, and saves it as a Hugging Face folder.

    python data/train_demo_model.py --corpus .corpus --out data/demo_model --minutes 8

The model is `GPT2LMHeadModel` with ReLU MLPs and tied embeddings; `--activation` and `--architecture` make its twins
(`demo_architectures`). A training window is `<|bos|>` and the 512 tokens that follow some place in the stream (512
inputs, 512 targets); windows of one epoch do not overlap and their grid moves from epoch to epoch. AdamW, warm-up, then
linear decay to zero over a number of steps that the first hundred steps' speed and `--minutes` decide (`--steps` sets
it instead). Weights are stored in fp16. `--checkpoints N` saves the model at N earlier steps too, each half the next,
as folders `OUT/step_00300`.

Matrix products run in bf16, attention in fp32. With attention in bf16 as well the model broke: the residual stream
after layer 0 took on a large constant vector, attention logits in layer 1 exploded, that layer's gradients came out
with the wrong sign, and its MLP died (compare arXiv:2510.04212). Training stops when a layer has died.
"""

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from demo_architectures import ARCHITECTURES, build_model
from demo_metrics import bits_per_byte, induction_scores, mlp_sparsity, nats_per_document
from demo_tokenizer import BOS_ID, CONTEXT
from jaxtyping import Int
from packed_corpus import HeldoutFiles, corpus_heldout, read_stream
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel, PreTrainedModel

MEASURED_STEPS = 100
"""Steps whose speed sets the number of all steps; the first ones, which compile, are not timed."""
UNTIMED_STEPS = 20
REPORTS = 12
MONITOR_WINDOWS = 64
MAX_DEAD = 0.5
"""Share of dead units in one layer at which training stops; early on, up to half are off for a while."""


@dataclass(frozen=True)
class TrainingConfig:
    architecture: str
    activation: str
    layers: int
    d_model: int
    heads: int
    windows: int
    """Windows in a batch."""
    learning_rate: float
    warmup: int
    weight_decay: float
    seed: int


def main() -> None:
    arguments = parse_arguments()
    config = TrainingConfig(**{name: getattr(arguments, name) for name in TrainingConfig.__annotations__})
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = read_stream(arguments.corpus / "train.xz").to(device)
    monitor = corpus_heldout(arguments.corpus)["standard library"]
    early = {arguments.steps >> n for n in range(1, arguments.checkpoints + 1)} if arguments.checkpoints else set()

    def keep(model: PreTrainedModel, step: int) -> None:
        if step in early:
            save(copy.deepcopy(model), {"step": step}, arguments.corpus, arguments.out / f"step_{step:05}")

    model, record = train(config, stream, monitor, arguments.minutes, arguments.steps, keep)
    save(model, record, arguments.corpus, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for the training steps")
    parser.add_argument("--steps", type=int, help="number of steps, whatever time they take")
    parser.add_argument("--checkpoints", type=int, default=0, help="earlier steps to save; needs --steps")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="gpt2")
    parser.add_argument("--activation", default="relu", help="relu, gelu_new, ...")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--windows", type=int, default=128, help="windows of 512 tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.checkpoints and arguments.steps is None:
        parser.error("--checkpoints needs --steps")
    return arguments


def batches(
    stream: Int[Tensor, " token"], windows: int, generator: torch.Generator
) -> Iterator[Int[Tensor, "window position"]]:
    """Windows of 513 tokens that begin with `<|bos|>`, epoch after epoch."""
    positions = torch.arange(CONTEXT + 1, device=stream.device)
    while True:
        offset = int(torch.randint(1, CONTEXT + 1, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - CONTEXT - 1, CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)].to(stream.device)
        for chosen in starts.split(windows)[:-1]:
            # The token before the cut makes room for `<|bos|>`; where the cut is a document's own, it moves by one.
            first = torch.where(stream[chosen] == BOS_ID, chosen, chosen - 1)
            batch = stream[first[:, None] + positions].long()
            batch[:, 0] = BOS_ID
            yield batch


def train(
    config: TrainingConfig,
    stream: Int[Tensor, " token"],
    monitor: HeldoutFiles,
    minutes: float,
    steps: int | None,
    keep: Callable[[PreTrainedModel, int], None],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The training loop: the model, its weights rounded to fp16, and a record of what was done.

    Args:
        keep: called with the model and the steps done after every step.
    """
    cuda = stream.is_cuda
    model = build_model(
        config.architecture, activation=config.activation, layers=config.layers, d_model=config.d_model,
        heads=config.heads, seed=config.seed,
    ).to(stream.device)  # fmt: skip
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=cuda,
    )

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast(stream.device.type, torch.bfloat16, enabled=cuda):
            logits = model(batch[:, :-1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    # Compiling pays on the GPU only; a CPU run is for trying the script out.
    compiled_loss = torch.compile(loss_of) if cuda else loss_of
    source = batches(stream, config.windows, torch.Generator().manual_seed(config.seed))
    total, history, running = steps, [], torch.zeros((), device=stream.device)
    since_report = step = 0
    started = timed_from = time.monotonic()
    while total is None or step < total:
        decay = 1.0 if total is None else (total - step) / total
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min((step + 1) / config.warmup, decay)
        loss = compiled_loss(next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.detach()
        step, since_report = step + 1, since_report + 1
        keep(model, step)

        if step == UNTIMED_STEPS:
            synchronize(cuda)
            timed_from = time.monotonic()
        if step == UNTIMED_STEPS + MEASURED_STEPS:
            synchronize(cuda)
            seconds = (time.monotonic() - timed_from) / MEASURED_STEPS
            total = steps or step + int(minutes * 60 / seconds)
            print(f"{seconds * 1e3:.1f} ms a step, {total} steps", flush=True)
        if total and (step % -(-total // REPORTS) == 0 or step == total):
            measured = monitor_metrics(model, monitor)
            entry = {"step": step, "seconds": round(time.monotonic() - started, 1)}
            entry |= {"train_loss": round((running / since_report).item(), 4)} | measured
            history.append(entry)
            print(json.dumps(entry), flush=True)
            if step > 4 * config.warmup and max(measured["dead_units"]) > MAX_DEAD:
                raise SystemExit("most units of a layer have died: lower --learning-rate")
            running.zero_()
            since_report = 0

    tokens = step * config.windows * CONTEXT
    record = {
        "config": asdict(config),
        "steps": step,
        "tokens": tokens,
        "epochs": round(tokens / len(stream), 2),
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "precision": "bf16 matrix products, attention and everything else in fp32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": history,
    }
    model.half().float()
    record["rounded_to_fp16"] = monitor_metrics(model, monitor)
    return model, record


def monitor_metrics(model: PreTrainedModel, monitor: HeldoutFiles) -> dict[str, Any]:
    model.eval()
    nats = nats_per_document(model, monitor.documents, batch=64).sum()
    # Attention is worked out anew from GPT-2's own weights: `workbench circuits heads` scores the others.
    induction = induction_scores(model, sequences=16).max().item() if isinstance(model, GPT2LMHeadModel) else None
    # A learning rate that is too high shows here first: units of a ReLU layer die and do not come back.
    dead = mlp_sparsity(model, monitor.windows(MONITOR_WINDOWS)).dead
    model.train()
    return {
        "heldout_bits_per_byte": round(bits_per_byte(nats, monitor.bytes), 4),
        **({} if induction is None else {"best_induction": round(induction, 3)}),
        "dead_units": [round(share, 3) for share in dead.tolist()],
    }


def synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def save(model: PreTrainedModel, record: dict[str, Any], corpus: Path, out: Path) -> None:
    """Weights in fp16, tokenizer, the corpus's manifest, and the training record."""
    model.half().save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(corpus / "tokenizer" / name, out / name)
    shutil.copyfile(corpus / "manifest.json", out / "manifest.json")
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
