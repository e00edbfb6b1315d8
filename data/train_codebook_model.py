"""Fine-tunes the demo model around a codebook (Tamkin et al. 2023, arXiv 2310.17230; docs/methods/codebook.md).

    python data/train_codebook_model.py twin                    # minutes on a GPU, an hour on a CPU
    python data/train_codebook_model.py twin --steps 100 --k 32
    python data/train_codebook_model.py twin --heads          # a codebook for every head of the layer

What layer `--layer` leaves in the residual stream, or the outputs of its attention's heads, is replaced, but at BOS, by
the mean of the k nearest codes, of every head; all weights and the codes learn from the next token's loss, straight
through the choice, the codes from the squared error too. Rows are taken about their mean and in one scale, of every
head. What is written:

    OUT/             the model, a Hugging Face folder with the demo model's tokenizer
    OUT/codebook/    its codebook, an SAE: `workbench import OUT/codebook`; the twin is the model read through it

At the end, on held-out text: nats of the demo model, of the twin through its codebook and without it, and of the demo
model through a codebook that was fitted to it after the fact (`sae.codebook.fit_codebook`) on as many tokens.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo_tokenizer import BOS_ID
from torch import Tensor, nn
from tune_demo_model import CONTEXT, CONTEXTS, repeated

from sae import SAE
from sae.codebook import CodebookLayer, as_sae, fit_codebook, of_heads, replace_dead, scale_of
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.saes.evaluation import evaluate_sae
from workbench.text.corpora import Corpus, open_corpus

SAMPLE_CONTEXTS = 64
HELD_OUT = 16_384
DOCUMENTS = 400
"""Of the corpus' training side, evenly spaced enough for what is a short run."""


class Some(Corpus):
    """The first documents of a corpus' training side."""

    def __init__(self, whole: Corpus) -> None:
        self.name, self.text_field, self.fingerprint = whole.name, whole.text_field, whole.fingerprint
        self._whole = whole

    def documents(self, split: Any, start: int = 0) -> Iterator[Any]:
        return itertools.islice(self._whole.documents(split, start), DOCUMENTS)


class Stream:
    """Rows of the demo model at a hook point; a `sae.BatchSource`."""

    def __init__(self, model: LoadedModel, hook: str, batches: Iterator[Tensor]) -> None:
        self.model, self.hook, self.batches = model, resolve_hook(model, hook), batches
        self.d_in = self.hook.width
        self.left = torch.zeros(0, self.d_in, device=model.device)

    def next_batch(self, n: int) -> Tensor:
        while len(self.left) < n:
            tokens = next(self.batches).to(self.model.device)
            found = capture(self.model, tokens, [self.hook]).activations[self.hook.name]
            self.left = torch.cat([self.left, found[tokens != BOS_ID]])
        taken, self.left = self.left[:n], self.left[n:]
        return taken

    def sample(self, n: int) -> Tensor:
        return self.next_batch(n)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class Between(nn.Module):
    """The codebook of rows about a mean and in a scale, but where BOS stands."""

    def __init__(self, rows: Tensor, n_codes: int, k: int, heads: int, seed: int) -> None:
        super().__init__()
        self.mean = rows.mean(dim=0)
        self.scale = scale_of(rows - self.mean, heads)
        self.book = CodebookLayer(n_codes, rows.shape[1], k, heads).to(rows.device)
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n_codes]
        self.book.codes.data.copy_(of_heads((rows[drawn.to(rows.device)] - self.mean) * self.scale, heads))
        self.bos = torch.zeros(0, dtype=torch.bool)
        self.seen = rows[:1]

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[~self.bos] - self.mean) * self.scale
        self.seen = rows.detach()
        found = x.clone()
        found[~self.bos] = self.book(rows) / self.scale + self.mean
        return found

    def as_sae(self, hook: str, model: str) -> SAE:
        """As what evaluates and steers takes it."""
        sae = as_sae(self.book.codes.detach(), self.scale, self.mean, self.book.k)
        sae.hook_name, sae.model_name = hook, model
        return sae


def train(model: LoadedModel, between: Between, batches: Iterator[Tensor], arguments: argparse.Namespace) -> None:
    """Model and codebook together, in place."""
    hf: Any = model.hf.train()
    hf.requires_grad_(True)
    book, generator = between.book, torch.Generator().manual_seed(arguments.seed)
    model_adam = torch.optim.AdamW(hf.parameters(), lr=arguments.lr, weight_decay=0.0)
    book_adam = torch.optim.Adam([book.codes], lr=arguments.book_lr)
    idle = torch.zeros(len(book.codes), dtype=torch.int64, device=model.device)

    def hooked(_: nn.Module, __: Any, output: Any) -> Any:
        return (between(output[0]), *output[1:]) if isinstance(output, tuple) else between(output)

    block = hf.transformer.h[arguments.layer]
    if arguments.heads:
        # Heads' outputs, side by side, are what the attention's last product reads.
        handle = block.attn.c_proj.register_forward_pre_hook(lambda _, inputs: (between(inputs[0]),))
    else:
        handle = block.register_forward_hook(hooked)
    for step, tokens in enumerate(itertools.islice(batches, arguments.steps)):
        for adam, rate in ((model_adam, arguments.lr), (book_adam, arguments.book_lr)):
            adam.param_groups[0]["lr"] = rate * min(
                1.0, (step + 1) / 20, (arguments.steps - step) / arguments.steps * 2
            )
        tokens = tokens.to(model.device)
        between.bos = tokens == BOS_ID
        loss = hf(input_ids=tokens, labels=tokens).loss
        (loss + book.error / len(between.mean)).backward()
        for adam in (model_adam, book_adam):
            adam.step()
            adam.zero_grad()
        idle += 1
        idle[book.chosen.flatten()] = 0
        if step < arguments.steps / 2:
            replace_dead(book.codes, idle, between.seen, book_adam, generator)
    handle.remove()
    hf.requires_grad_(False).eval()


def main() -> None:
    arguments = parse_arguments()
    corpus, model = open_corpus("python-stdlib"), load_model("demo", device=arguments.device, dtype="float32")
    hook = f"blocks.{arguments.layer}." + ("attn.hook_z" if arguments.heads else "hook_resid_post")
    heads = model.info.n_heads if arguments.heads else 1

    def batches() -> Iterator[Tensor]:
        return repeated(Some(corpus), model.tokenizer, model.bos_id)

    started = time.monotonic()
    after = fit_codebook(
        Stream(model, hook, batches()), arguments.codes, arguments.k,
        total_tokens=arguments.steps * CONTEXTS * CONTEXT, heads=heads, seed=arguments.seed, device=model.device,
    )  # fmt: skip
    after.hook_name, after.model_name = hook, "demo"
    before = evaluate_sae(model, [after], corpus, max_tokens=HELD_OUT, context_len=CONTEXT)[0]
    print(f"after the fact: {time.monotonic() - started:.0f} s", flush=True)
    sample = Stream(model, hook, batches()).sample(SAMPLE_CONTEXTS * CONTEXT)
    between = Between(sample, arguments.codes, arguments.k, heads, arguments.seed)
    train(model, between, batches(), arguments)
    hf: Any = model.hf
    hf.save_pretrained(arguments.out)
    model.tokenizer.save_pretrained(arguments.out)
    twin = load_model(str(arguments.out), device=arguments.device, dtype="float32")
    sae = between.as_sae(hook, str(arguments.out.resolve()))
    sae.save(arguments.out / "codebook")
    tuned = evaluate_sae(twin, [sae], corpus, max_tokens=HELD_OUT, context_len=CONTEXT)[0]
    print(f"{time.monotonic() - started:.0f} s; nats on {HELD_OUT:,} held-out tokens, FVU and dead share of codebooks")
    print(f"demo model                          {before.ce_clean:.3f}")
    for name, one in (("  through a codebook after the fact", before), ("twin through its codebook", tuned)):
        print(f"{name:36}{one.ce_spliced:.3f}   {one.fvu:.3f}   {one.dead_share:.3f}")
    print(f"  without it                        {tuned.ce_clean:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--heads", action="store_true", help="a codebook for every head instead of one for the stream")
    parser.add_argument("--codes", type=int, default=4096, help="of all heads")
    parser.add_argument("--k", type=int, default=8, help="of every head")
    parser.add_argument("--steps", type=int, default=1000, help="of 2,048 tokens")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the model")
    parser.add_argument("--book-lr", type=float, default=3e-3, help="of the codes, for rows of mean norm sqrt(width)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that codes start as")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
