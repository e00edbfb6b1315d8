"""Steering with single SAE features against difference in means at equal side effect: AbsTopK's claim and g-SAE's.

arXiv 2510.00404 reports that a single AbsTopK feature steers as well as the supervised difference in means or better.
Here, for each concept of the demo model's held-out files (`reconstructed`: the paper's judge is a large model):

1. Half of the documents choose. Difference in means: mean activation with the concept minus mean without. An SAE's
   feature: the one with the best F1 there, its decoder row, turned round where the negative activations won. Target
   tokens T: those at least RATIO times as frequent after tokens with the concept as after others.
2. On the other half x + s d at every token without the concept (`toward`), x - s d at every one with it (`away`), d of
   unit length.
        effect       mean change of the log odds of T as next token, in the direction wanted
        side effect  mean KL(clean || steered) of the next token given that it is not in T
3. The effect where the side effect is SIDE_EFFECT nats, interpolated over strengths.

arXiv 2411.10397 reports that latents of a gradient SAE steer more than others in arbitrary contexts. Its features are
among the arms; and for N_LATENTS features that fire, drawn at random, of every SAE

    reach        root mean square change of the logits, their mean removed, mean over all tokens, with the feature's
                 decoder row added there at REACH mean norms of an activation (reconstructed)

It reads the SAEs and concept scores that benchmarks/rules.py left in its workspace.

    python benchmarks/steering_effect.py WORKSPACE [--seeds 3] [--arms topk abstopk ...]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.resume import recorded_block, resumed_after
from circuits.splice import splice
from workbench import Workspace
from workbench.features.concepts.alignment import held_out_half
from workbench.features.concepts.report import truth_of
from workbench.features.concepts.truth import ConceptTruth
from workbench.harvest.reading import Harvest
from workbench.models.load import LoadedModel, load_model

HOOK, LAYER = "blocks.2.hook_resid_post", 2
RATIO, MIN_COUNT = 4.0, 5
MIN_POSITIVES, MIN_JUDGED = 200, 20
"""Tokens of a concept in all, and among those steered."""
MIN_MASS = 0.2
"""Of T among the tokens that follow the concept: below, the concept says little about what comes next."""
SIDE_EFFECT = 0.1
STRENGTHS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
"""In mean norms of an activation."""
N_CONTEXTS = 4
N_LATENTS, REACH = 32, 0.1
ARMS = ("topk", "abstopk", "gradient_topk", "random_decoder")


@dataclass(frozen=True)
class Tokens:
    """Tokens of a harvest, context by context, with what is known about them."""

    token: Int[Tensor, "contexts pos"]
    concept: Bool[Tensor, "contexts pos concepts"]
    known: Bool[Tensor, "contexts pos"]
    """Ordinary tokens whose concepts and next token are known."""
    judging: Bool[Tensor, "contexts pos"]
    """In the half of the documents that judges."""


def read_tokens(space: Workspace, harvest: Harvest, truth: ConceptTruth) -> Tokens:
    length = harvest.context_len
    token = torch.tensor([row[0] for row in _all_tokens(space, harvest)])
    n = len(token) // length * length
    concept = torch.zeros(len(token), len(truth.names), dtype=torch.bool)
    rows = torch.from_numpy(truth.rows)
    concept[rows] = torch.from_numpy(truth.dense(0, len(truth.rows)))
    known, judging = torch.zeros(2, len(token), dtype=torch.bool)
    known[rows] = True
    judging[rows] = torch.from_numpy(held_out_half(truth))
    next_known = torch.cat([known[1:], known.new_zeros(1)])
    next_known[length - 1 :: length] = False
    document = torch.full((len(token),), -1)
    document[rows] = torch.from_numpy(truth.document)
    known &= next_known & (document == torch.cat([document[1:], document.new_full((1,), -2)]))

    def contexts(value: Tensor) -> Tensor:
        return value[:n].reshape(-1, length, *value.shape[1:])

    return Tokens(contexts(token), contexts(concept), contexts(known), contexts(judging))


def _all_tokens(space: Workspace, harvest: Harvest) -> list[tuple[Any, ...]]:
    from workbench.disk.database import read_duckdb

    with read_duckdb(harvest.database) as connection:
        return connection.execute("SELECT token FROM tokens ORDER BY row").fetchall()


def target_tokens(tokens: Tokens, concept: int, vocabulary: int) -> tuple[Bool[Tensor, "vocab"], float]:
    """T, and its share of the tokens that follow the concept, on the half that chooses."""
    after = tokens.token[:, 1:]
    chosen = (tokens.known & ~tokens.judging)[:, :-1]
    has = tokens.concept[:, :-1, concept]
    with_it = torch.bincount(after[chosen & has], minlength=vocabulary).double()
    without = torch.bincount(after[chosen & ~has], minlength=vocabulary).double()
    ratio = ((with_it + 1) / (with_it.sum() + vocabulary)) / ((without + 1) / (without.sum() + vocabulary))
    target = (ratio >= RATIO) & (with_it >= MIN_COUNT)
    return target, (with_it[target].sum() / with_it.sum().clamp_min(1)).item()


@dataclass(frozen=True)
class Stage:
    """The judging contexts with their clean pass."""

    model: LoadedModel
    token: Int[Tensor, "contexts pos"]
    concept: Bool[Tensor, "contexts pos concepts"]
    counted: Bool[Tensor, "contexts pos"]
    block: Any
    logits: Float[Tensor, "contexts pos vocab"]
    norm: float

    @classmethod
    def make(cls, model: LoadedModel, tokens: Tokens) -> "Stage":
        counted = tokens.known & tokens.judging
        full = torch.nonzero(counted.float().mean(dim=1) > 0.9).squeeze(1)
        chosen = full[torch.linspace(0, len(full) - 1, N_CONTEXTS).long()]
        token = tokens.token[chosen]
        seen: list[Tensor] = []

        def look(value: Tensor) -> Tensor:
            seen.append(value)
            return value

        with recorded_block(model.bridge, LAYER) as blocks, splice(model.bridge, HOOK, look):
            logits = model.bridge(token, return_type="logits")
        norm = seen[0].norm(dim=1)[counted[chosen].flatten()].mean().item()
        return cls(model, token, tokens.concept[chosen], counted[chosen], blocks[0], logits, norm)

    def steered(self, shift: Float[Tensor, "d"], where: Bool[Tensor, "contexts pos"]) -> Float[Tensor, "n vocab"]:
        """Logits at the steered tokens."""
        bridge = self.model.bridge
        with resumed_after(bridge, LAYER, self.block), splice(bridge, HOOK, lambda x: x + shift, keep=~where):
            logits: Tensor = bridge(self.token, return_type="logits")
        return logits[where]


def log_odds(logits: Float[Tensor, "n vocab"], target: Bool[Tensor, "vocab"]) -> Float[Tensor, "n"]:
    """Of the target tokens as next token."""
    return logits[:, target].logsumexp(dim=1) - logits[:, ~target].logsumexp(dim=1)


def effect_at(stage: Stage, direction: Float[Tensor, "d"], concept: int, target: Tensor, *, away: bool) -> float:
    """Effect at SIDE_EFFECT nats; NaN where no strength reaches that."""
    has = stage.concept[:, :, concept]
    where = stage.counted & (has if away else ~has)
    clean = stage.logits[where]
    before, rest = log_odds(clean, target), clean[:, ~target].log_softmax(dim=1)
    sign = -1.0 if away else 1.0
    effects, sides = [], []
    for strength in STRENGTHS:
        logits = stage.steered(sign * strength * stage.norm * direction / direction.norm(), where)
        effects.append(sign * (log_odds(logits, target) - before).mean().item())
        other = logits[:, ~target].log_softmax(dim=1)
        sides.append(F.kl_div(other, rest, reduction="batchmean", log_target=True).item())
        if sides[-1] > SIDE_EFFECT:
            break
    if sides[-1] < SIDE_EFFECT:
        return float("nan")
    return float(np.interp(np.log(SIDE_EFFECT), np.log(sides), effects))


def reach(stage: Stage, rows: Float[Tensor, "n d"]) -> float:
    """Mean over directions; see the module's description."""
    clean, found = stage.logits[stage.counted], []
    for row in rows:
        change = stage.steered(REACH * stage.norm * row / row.norm(), stage.counted) - clean
        found.append(change.std(dim=1, correction=0).mean().item())
    return float(np.mean(found))


def difference_in_means(harvest: Harvest, truth: ConceptTruth) -> Float[Tensor, "concepts d"]:
    """On the half that chooses."""
    choosing = np.flatnonzero(~held_out_half(truth))
    x = harvest.vectors(HOOK).rows(truth.rows[choosing]).double()
    has = torch.from_numpy(truth.dense(0, len(truth.rows))[choosing]).double()
    n = has.sum(dim=0)[:, None]
    with_it = has.T @ x
    return (with_it / n.clamp_min(1) - (x.sum(dim=0) - with_it) / (len(x) - n).clamp_min(1)).float()


def feature_directions(space: Workspace, sae: str, names: tuple[str, ...]) -> Float[Tensor, "concepts d"]:
    """Decoder row of each concept's best feature, with its sign."""
    best = space.results.open("concepts", sae).table("concepts").set_index("concept").loc[list(names)]
    rows = space.sae(sae).W_dec.detach()[torch.tensor(best["feature"].to_numpy())]
    return rows * torch.tensor(best["sign"].to_numpy(), dtype=rows.dtype)[:, None]


def latents(space: Workspace, sae: str, seed: int) -> Float[Tensor, "n d"]:
    """Decoder rows of features that fire, drawn at random."""
    firing = space.results.open("concepts", sae).table("features")["feature"].unique()
    chosen = np.random.default_rng(seed).choice(np.sort(firing), N_LATENTS, replace=False)
    return space.sae(sae).W_dec.detach()[torch.from_numpy(chosen)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    options = parser.parse_args()
    space = Workspace(options.workspace, create=False)
    model = load_model("demo", device="cpu")
    harvest = space.open_harvest("demo-heldout")
    truth = truth_of(space, "demo-heldout", model=model)
    tokens = read_tokens(space, harvest, truth)
    stage = Stage.make(model, tokens)
    directions = {("difference_in_means", 0): difference_in_means(harvest, truth)}
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        directions["random_direction", seed] = torch.randn(len(truth.names), model.info.d_model, generator=generator)
        for arm in options.arms:
            directions[arm, seed] = feature_directions(space, f"seed{seed}-{arm}", truth.names)
    reached = pd.DataFrame(
        [{"arm": arm, "seed": seed, "reach": reach(stage, latents(space, f"seed{seed}-{arm}", seed))}
         for arm in options.arms for seed in range(options.seeds)]
        + [{"arm": "random_direction", "seed": seed, "reach": reach(stage, directions["random_direction", seed])}
           for seed in range(options.seeds)]
    )  # fmt: skip
    print(reached.groupby("arm")["reach"].agg(["mean", "std"]).round(4).to_string())
    lines = []
    for number, name in enumerate(truth.names):
        target, mass = target_tokens(tokens, number, model.info.d_vocab)
        enough = (stage.counted & stage.concept[:, :, number]).sum() >= MIN_JUDGED
        if truth.counts[number] < MIN_POSITIVES or mass < MIN_MASS or not enough:
            continue
        for (arm, seed), rows in directions.items():
            toward, away = (effect_at(stage, rows[number], number, target, away=back) for back in (False, True))
            lines.append({"concept": name, "arm": arm, "seed": seed, "toward": toward, "away": away})
        print(f"{name}: {int(target.sum())} target tokens, {mass:.2f} of what follows", flush=True)
    found = pd.DataFrame(lines)
    found.to_csv(options.workspace.with_name(options.workspace.name + "-steering.csv"), index=False)
    report(found)


def report(found: pd.DataFrame) -> None:
    """Means over concepts with their spread over seeds and over concepts, beside difference in means too."""
    print(f"directions whose side effect stays below the limit: {found[['toward', 'away']].isna().sum().to_dict()}")
    reference = found[found["arm"] == "difference_in_means"].set_index("concept")
    for way in ("toward", "away"):
        wide = found.pivot_table(index="concept", columns=["arm", "seed"], values=way)
        beats = wide.gt(reference[way], axis=0).mean()
        summary = pd.DataFrame({"effect": wide.mean(), "beats": beats}).groupby("arm").agg(["mean", "std"])
        print(f"\n{way}: change of log odds at a side effect of {SIDE_EFFECT} nats; share of concepts where it beats")
        print(summary.round(3).to_string())
        concepts = wide.T.groupby("arm").mean().T
        print(concepts.round(2).to_string())
        for one in ("difference_in_means", *(arm for arm in concepts if arm.startswith("topk"))):
            lead = concepts.sub(concepts[one], axis=0)
            ends = pd.DataFrame({"mean": lead.mean(), "std error over concepts": lead.sem(), "n": lead.count()})
            print(f"over {one}, concept by concept\n{ends.round(3).to_string()}")


if __name__ == "__main__":
    main()
