"""Seconds from a prompt to its attribution graph, with transcoders of random weights.

    python benchmarks/graph.py                                        # the demo model, 64 tokens, F 4096, k 16
    python benchmarks/graph.py --size gpt2 --device cuda              # GPT-2 small's shape, F 24,576, k 32
    python benchmarks/graph.py --size gpt2 --device cuda --tokens 1000

Says how many features were active and became nodes, and the largest memory on a GPU. Each edge row is checked to add up
to its node's pre-activation as the graph is made.
"""

import argparse
import time
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from circuits.graph import attribute
from sae.rules import TopK
from sae.transcoder import Transcoder

SIZES = {"demo": (4, 256, 8, 4096, 4096, 16), "gpt2": (12, 768, 12, 50257, 24576, 32)}
"""Layers, width, heads, vocabulary, features, k."""


def main() -> None:
    """Times the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-features", type=int, default=5000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    bridge = random_bridge(*SIZES[arguments.size][:4], max(1024, arguments.tokens), device)
    coders = random_coders(*SIZES[arguments.size], device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, SIZES[arguments.size][3], (arguments.tokens,), generator=generator)
    tokens[0] = 0
    for _ in range(arguments.runs):
        began, busy = time.perf_counter(), time.process_time()
        graph = attribute(bridge, tokens, coders, bos_id=0, max_features=arguments.max_features)
        made, busy = time.perf_counter() - began, time.process_time() - busy
        pruned = graph.prune()
        print(
            f"{made:.2f} s ({busy:.2f} s of processor time), pruned in {time.perf_counter() - began - made:.2f} s: "
            f"{graph.settings['active_features']:,} active features, {len(graph.targets):,} rows of "
            f"{graph.n_sources:,} columns, {len(pruned.nodes):,} nodes kept"
        )
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")


def random_bridge(layers: int, width: int, heads: int, vocabulary: int, context: int, device: torch.device) -> Any:
    """A random GPT-2 of a shape."""
    from transformer_lens.model_bridge import TransformerBridge

    from workbench.models.bundled import demo_model_dir
    from workbench.models.checkpoints import load_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=heads)
    config.architectures = ["GPT2LMHeadModel"]
    model = GPT2LMHeadModel(config).eval().requires_grad_(False).to(device)
    model.set_attn_implementation("eager")
    folder = str(demo_model_dir())
    tokenizer = load_tokenizer(folder, folder)
    return TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer, device=device).eval()


def random_coders(
    layers: int, width: int, heads: int, vocabulary: int, features: int, k: int, device: torch.device
) -> dict[int, Transcoder]:
    """A TopK transcoder of random weights for every layer."""
    coders = {}
    for layer in range(layers):
        coder = Transcoder(
            width, width, features, TopK(k), hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", device=device,
        )  # fmt: skip
        for parameter in coder.parameters():
            parameter.data.normal_(0, 0.05)
        coders[layer] = coder.requires_grad_(False)
    return coders


if __name__ == "__main__":
    main()
