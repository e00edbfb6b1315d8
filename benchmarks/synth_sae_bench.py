"""SynthSAEBench-16k (arXiv 2602.14687): what an SAE of 4,096 features finds of 16,384 planted ones.

    python benchmarks/synth_sae_bench.py FOLDER [--arms batchtopk matryoshka ...] [--seeds 0 1 2] [--samples 200000000]
                                         [--l0 25] [--dead-after N] [--anneal-from K] [--clip C] [--betas B1 B2]
                                         [--saelens] [--stream SEED] [--middle | --tiny]

1. SAELens' synthetic model with the benchmark's settings: Zipf frequencies, 128 trees of children that fire only with
   their parent and exclude each other, low-rank correlations, a nearly orthogonal dictionary in 768 dimensions.
2. All arms (`workbench.bench.quality`) train side by side on one stream of batches of 1,024, which is drawn once for
   all. Batch i depends on the stream's seed and on i alone, so that the run goes on where Ctrl-C stopped it: call it
   again with the same FOLDER. Then, with --saelens, SAELens' own BatchTopK trainer on the same stream.
3. By SAELens' own measures, on fresh rows: F1 of every latent for the planted feature nearest to it, the mean
   correlation coefficient (matched cosines), explained variance, L0; dead and split latents, and absorption.
4. JumpReLU a second time with one threshold for all features, at the same L0: whether it is the dictionary or the
   thresholds that cost F1.

`--middle` is a model of 2,048 features in 128 dimensions and a minute an arm on a CPU, `--tiny` one of 400 features and
a minute in all. One JSON line an arm.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch

from sae import SAE, train
from sae.rules import JumpReLU
from workbench.bench.quality import SAELENS, config, measures, recipes, saelens_batchtopk
from workbench.bench.synthetic import FULL, MIDDLE, TINY, ModelSize, Planted, Stream, benchmark_model

EVALUATED_BLOCKS = 4
# A block that is neither trained nor evaluated on, whose activations set the one threshold.
THRESHOLD_BLOCK = -30


@torch.no_grad()
def with_one_threshold(sae: SAE, stream: Stream) -> SAE:
    """A copy with one threshold for all features, which as many entries of fresh rows exceed."""
    x = stream.planted.activations(stream.features(THRESHOLD_BLOCK))
    n_active = int(sae.encode(x).l0().sum())
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    made = copy.deepcopy(sae)
    made.get_buffer("threshold").fill_(z.flatten().topk(n_active).values[-1])
    return made


def add_size(parser: argparse.ArgumentParser) -> None:
    """Options of how large the model is and how long is trained, which `chosen_size` reads."""
    parser.add_argument("--samples", type=int)
    smaller = parser.add_mutually_exclusive_group()
    smaller.add_argument("--middle", action="store_true", help="2,048 features, 1,500,000 samples")
    smaller.add_argument("--tiny", action="store_true", help="400 features, 400,000 samples")


def chosen_size(options: argparse.Namespace, full: int) -> tuple[ModelSize, int]:
    """The size and the number of samples, `full` of the benchmark's own size."""
    size, standard = FULL, full
    if options.middle or options.tiny:
        size, standard = (MIDDLE, 1_500_000) if options.middle else (TINY, 400_000)
    return size, options.samples or standard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="*", choices=recipes(FULL), default=["batchtopk", "matryoshka", "jumprelu"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the SAEs")
    parser.add_argument("--stream", type=int, help="seed of the rows; the first of the SAEs' when not given")
    add_size(parser)
    parser.add_argument("--l0", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--dead-after", type=int)
    parser.add_argument("--anneal-from", type=int)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--betas", nargs=2, type=float, help="of Adam")
    parser.add_argument("--saelens", action="store_true", help="SAELens' BatchTopK too, on the same stream")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    size, samples = chosen_size(options, 200_000_000)
    n_blocks = EVALUATED_BLOCKS if size is FULL else 1
    size = replace(size, l0=options.l0 or size.l0, lr=options.lr or size.lr)
    given = {
        "dead_after_tokens": options.dead_after, "anneal_from_k": options.anneal_from, "clip_grad_norm": options.clip,
        "betas": options.betas and tuple(options.betas),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    planted = Planted.of(benchmark_model(size, options.device))
    rows = options.seeds[0] if options.stream is None else options.stream

    def report(name: str, sae: SAE) -> None:
        found = measures(sae, Stream(planted, rows), n_blocks)
        print(json.dumps({"arm": name} | {key: round(value, 4) for key, value in found.items()}), flush=True)

    configs = [config(arm, size, samples, seed, **given) for seed in options.seeds for arm in options.arms]
    if configs:
        stream = Stream(planted, rows)
        for made in train(configs, stream, device=options.device, checkpoint_dir=options.folder, resume=True):
            if made.sae is None:
                raise SystemExit(f"{made.config.name}: {made.error}")
            report(made.config.name, made.sae)
            if isinstance(made.config.rule, JumpReLU):
                level = with_one_threshold(made.sae, Stream(planted, rows))
                report(f"{made.config.name}, one threshold", level)
    if options.saelens:
        stream = Stream(planted, rows)
        report(SAELENS, saelens_batchtopk(stream, size, samples))


if __name__ == "__main__":
    main()
