"""Ablating every head of a GPT-2-small-sized model: prefix reused and heads batched, beside one whole pass a head.

Random weights, eight prompts of 16 tokens. Two threads unless OMP_NUM_THREADS says otherwise.

    python benchmarks/ablation.py [--layers 12]
"""

import argparse
import os
import time
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from circuits.ablation import ablate_heads, head_means
from circuits.metrics import logit_difference
from circuits.nodes import Bridge
from circuits.passes import answer_logits
from circuits.prompts import PromptSet
from workbench.models.bundled import demo_model_dir

LIMIT = 60.0
"""Seconds that the ablation may take."""


def random_gpt2(n_layers: int) -> Any:
    """A bridge over GPT-2 small's shape with random weights; the tokenizer is any, since prompts are token ids."""
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=n_layers)).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=model, tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )
    return bridge.eval().requires_grad_(False)


def random_prompts(n: int = 8, length: int = 16) -> PromptSet:
    """Random tokens, clean and corrupted, with one answer and one wrong answer each."""
    tokens = torch.randint(50257, (2, n, length), generator=torch.Generator().manual_seed(0))
    ends = torch.full((n,), length - 1)
    return PromptSet("random", tokens[0], tokens[1], ends, tokens[0, :, :1], tokens[1, :, :1])


@torch.no_grad()
def naive(bridge: Bridge, prompts: PromptSet) -> torch.Tensor:
    """One whole forward pass for each head, all positions unembedded."""
    means = head_means(bridge, prompts)
    clean = logit_difference(answer_logits(bridge, prompts.clean, prompts.last), prompts).mean()
    rows, scores = torch.arange(len(prompts)), []
    for name, mean in means.items():
        for head in range(bridge.cfg.n_heads):

            def ablate(value: torch.Tensor, hook: Any, head: int = head, mean: torch.Tensor = mean) -> torch.Tensor:
                value = value.clone()
                value[:, :, head] = mean[head]
                return value

            with bridge.hooks(fwd_hooks=[(name, ablate)]):
                logits = bridge(prompts.clean)[rows, prompts.last]
            scores.append(clean - logit_difference(logits, prompts).mean())
    return torch.stack(scores)


def main() -> None:
    """Prints seconds of both and their largest difference; fails above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    layers = parser.parse_args().layers
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    bridge, prompts = random_gpt2(layers), random_prompts()
    answer_logits(bridge, prompts.clean, prompts.last)
    started, cpu = time.perf_counter(), time.process_time()
    batched = ablate_heads(bridge, prompts, kind="mean-over-positions")
    seconds, used = time.perf_counter() - started, time.process_time() - cpu
    started, cpu = time.perf_counter(), time.process_time()
    one_by_one = naive(bridge, prompts)
    naive_seconds, naive_used = time.perf_counter() - started, time.process_time() - cpu
    apart = float((batched.scores - one_by_one).abs().max())
    print(f"{len(batched.nodes)} heads, {len(prompts)} prompts of 16 tokens, {torch.get_num_threads()} threads")
    print(f"prefix reused, heads batched   {seconds:6.1f} s   ({used:.1f} s of CPU)")
    print(f"one whole pass a head          {naive_seconds:6.1f} s   ({naive_used:.1f} s of CPU)")
    print(f"largest difference of a score  {apart:.1e}, largest score {float(one_by_one.abs().max()):.2g}")
    if apart > 1e-3 * float(one_by_one.abs().max()):
        raise SystemExit("the two disagree")
    if seconds > LIMIT:
        raise SystemExit(f"slower than {LIMIT:.0f} s")


if __name__ == "__main__":
    main()
