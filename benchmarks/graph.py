"""Seconds from a prompt to its attribution graph, with transcoders of random weights.

    python benchmarks/graph.py                                        # from click to graph: the demo model, 64 tokens
    python benchmarks/graph.py --size gpt2 --device cuda              # GPT-2 small's shape, F 24,576, k 32
    python benchmarks/graph.py --size gpt2 --device cuda --tokens 2000

From click to graph is all that the page Graph waits for: the graph made, its scores, stored, read again, pruned, and
laid out as what the browser draws. Says how many features were active and became nodes, and the largest memory on a
GPU. Each edge row is checked to add up to its node's pre-activation as the graph is made.
"""

import argparse
import inspect
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from circuits.graph import attribute
from sae.rules import TopK
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet

SIZES = {"demo": (4, 256, 8, 4096, 2048, 32), "gpt2": (12, 768, 12, 50257, 24576, 32)}
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
    if arguments.size == "demo":
        from_click(arguments.tokens, arguments.max_features, arguments.device, arguments.runs)
    else:
        whole(arguments.size, arguments.tokens, arguments.max_features, torch.device(arguments.device), arguments.runs)


def from_click(n_tokens: int, max_features: int, device: str, runs: int) -> None:
    """The demo model's graphs as the page makes them."""
    from workbench import Workspace, load_model
    from workbench.circuits.graph_view import view_data
    from workbench.circuits.graphs import open_graph

    model = load_model("demo", device=device)
    prompt = model.text(model.encode(inspect.getsource(argparse.ArgumentParser))[: n_tokens - 1])
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        coders = random_coders(*SIZES["demo"], model.device)
        space.add_transcoders("random", TranscoderSet(coders), [{}] * len(coders))
        for run in range(runs):
            began, busy = time.perf_counter(), time.process_time()
            space.graph(f"run-{run}", model, prompt, max_features=max_features)
            graph = open_graph(space, f"run-{run}")
            drawn = view_data(graph.prune(0.6, 0.98))
            wall, busy = time.perf_counter() - began, time.process_time() - busy
            print(
                f"{wall:.2f} s ({busy:.2f} s of processor time) from click to graph: {len(graph.tokens)} tokens, "
                f"{graph.settings['active_features']:,} active features, {len(graph.nodes):,} nodes stored, "
                f"{len(drawn['nodes']):,} drawn"
            )


def whole(size: str, n_tokens: int, max_features: int, device: torch.device, runs: int) -> None:
    """Graphs of a random model of a shape, in memory."""
    bridge = random_bridge(*SIZES[size][:4], max(1024, n_tokens), device)
    coders = random_coders(*SIZES[size], device)
    tokens = torch.randint(1, SIZES[size][3], (n_tokens,), generator=torch.Generator().manual_seed(0))
    tokens[0] = 0
    for _ in range(runs):
        began = time.perf_counter()
        graph = attribute(bridge, tokens, coders, bos_id=0, max_features=max_features)
        made = time.perf_counter() - began
        pruned = graph.prune()
        print(
            f"{made:.2f} s, pruned in {time.perf_counter() - began - made:.2f} s: "
            f"{graph.settings['active_features']:,} active features, {len(graph.targets):,} rows of "
            f"{graph.n_sources:,} columns, {len(pruned.nodes):,} nodes kept"
        )
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most on {torch.cuda.get_device_name()}")


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
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name="demo", device=device,
        )  # fmt: skip
        for parameter in coder.parameters():
            parameter.data.normal_(0, 0.05)
        coders[layer] = coder.requires_grad_(False)
    return coders


if __name__ == "__main__":
    main()
