"""Codebook features where the answer is known (docs/methods/codebook.md): a finite-state machine of 100 states, walked
at random, learned by a transformer with 64 dimensions.

    python benchmarks/codebook_fsm.py [--seeds 0 1 2] [--steps 1500] [--codes 512] [--json]

1. Each state has `SUCCESSORS` successors, drawn once; a walk is written in two digits a state. A transformer of two
   blocks predicts the next digit, once as it is and once with a codebook (k = 1) between its blocks, learned with it:
   what the second block knows of the past is one code a token, and the gradient goes straight through the choice.
2. On fresh walks, at the second digit of every state: F1 of the best unit for each state, mean over the states. Units
   are the codes, the dimensions of the plain model's stream there (above or below the best of 20 thresholds each) and
   the features of TopK SAEs of that stream, with as many features as there are codes.
3. Steering: at one state of each walk its code is replaced by the one that most often stands for another state. Share
   of the next states that follow the other state, and of those that follow the one that was there; by chance a state
   follows another with SUCCESSORS / STATES. The control puts in another code that is in use, drawn at random.

Means and standard deviations over seeds, of machine and training.
"""

import argparse
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae import TopK, TrainConfig, train
from sae.codebook import CodebookLayer, replace_dead

STATES, SUCCESSORS, WALK = 100, 5, 24
WIDTH, HEADS, BATCH = 64, 4, 64
TRAINING, MEASURING = 0, 1
"""Streams of walks."""
SAE_KS = (1, 8)
SAE_TOKENS = 400_000


class Machine:
    """The states and their successors, with one of two streams of walks."""

    def __init__(self, seed: int, stream: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.successors = torch.stack([torch.randperm(STATES, generator=drawn)[:SUCCESSORS] for _ in range(STATES)])
        self.generator = torch.Generator().manual_seed(1000 * (seed + 1) + stream)
        self.follows = torch.zeros(STATES, STATES, dtype=torch.bool).scatter_(1, self.successors, True)

    def walks(self, n: int) -> Tensor:
        """States, [n, WALK]."""
        states = [torch.randint(STATES, (n,), generator=self.generator)]
        for _ in range(WALK - 1):
            which = torch.randint(SUCCESSORS, (n,), generator=self.generator)
            states.append(self.successors[states[-1], which])
        return torch.stack(states, dim=1)


def digits(states: Tensor) -> Tensor:
    """[n, 2 WALK]."""
    return torch.stack([states // 10, states % 10], dim=2).flatten(1)


class Block(nn.Module):
    """Attention, then an MLP, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x))


class Model(nn.Module):
    """Two blocks with a codebook between them, or with none."""

    def __init__(self, n_codes: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(10, WIDTH), nn.Embedding(2 * WALK, WIDTH)
        self.first, self.second, self.norm = Block(), Block(), nn.LayerNorm(WIDTH)
        self.book = CodebookLayer(n_codes, WIDTH, 1) if n_codes else None
        self.head = nn.Linear(WIDTH, 10)

    def stream(self, tokens: Tensor) -> Tensor:
        """What the first block leaves, [n, pos, WIDTH]."""
        return self.first(self.embed(tokens) + self.position(torch.arange(tokens.shape[1])))

    def rest(self, stream: Tensor) -> Tensor:
        """Logits, from what stands between the blocks."""
        return self.head(self.norm(self.second(stream)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stream(tokens)
        return self.rest(x if self.book is None else self.book(x))


def trained(machine: Machine, n_codes: int, steps: int, seed: int) -> Model:
    """A model of the machine's walks; with `n_codes`, around a codebook."""
    torch.manual_seed(seed)
    model, generator = Model(n_codes), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    idle = torch.zeros(n_codes, dtype=torch.int64)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 2e-3 * min(1.0, (steps - step) / (0.3 * steps))
        tokens = digits(machine.walks(BATCH))
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        (loss if model.book is None else loss + model.book.error / WIDTH).backward()
        adam.step()
        if model.book is not None:
            idle += 1
            idle[model.book.chosen.flatten()] = 0
            if step < 0.7 * steps:
                replace_dead(model.book.codes, idle, model.stream(tokens).detach().flatten(0, 1), adam, generator)
    return model


def f1(active: Tensor, states: Tensor) -> Tensor:
    """F1 of every unit for every state, [units, STATES]: active [n, units] is boolean."""
    truth = F.one_hot(states, STATES).float()
    hits = active.float().T @ truth
    return 2 * hits / (active.sum(dim=0)[:, None] + truth.sum(dim=0)).clamp_min(1)


def best_thresholds(values: Tensor, states: Tensor) -> Tensor:
    """F1 for every state of the best dimension above or below one of its 20 quantiles, [STATES]."""
    cuts = values.quantile(torch.linspace(0.02, 0.98, 20), dim=0)
    found = [f1(side * values > side * cut, states).amax(dim=0) for cut in cuts for side in (1, -1)]
    return torch.stack(found).amax(dim=0)


class Rows:
    """A stream of the plain model's rows between its blocks; a `sae.BatchSource`."""

    d_in = WIDTH

    def __init__(self, model: Model, machine: Machine) -> None:
        self.model, self.machine = model, machine

    @torch.no_grad()
    def next_batch(self, n: int) -> Tensor:
        walks = -(-n // (2 * WALK))
        return self.model.stream(digits(self.machine.walks(walks))).flatten(0, 1)[:n]

    def sample(self, n: int) -> Tensor:
        before = self.machine.generator.get_state()
        rows = self.next_batch(n)
        self.machine.generator.set_state(before)
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


@torch.no_grad()
def valid(model: Model, machine: Machine) -> float:
    """Share of the likeliest next states that the machine allows."""
    states = machine.walks(512)
    tokens = digits(states)
    first = model(tokens)[:, 1:-2:2].argmax(dim=-1)
    second = []
    for place in range(WALK - 1):
        continued = torch.cat([tokens[:, : 2 * place + 2], first[:, place : place + 1]], dim=1)
        second.append(model(continued)[:, -1].argmax(dim=-1))
    return machine.follows[states[:, :-1], 10 * first + torch.stack(second, dim=1)].float().mean().item()


@torch.no_grad()
def steered(model: Model, machine: Machine, code_of: Tensor) -> dict[str, float]:
    """Shares of next states that follow the state steered to and the one that was there; with any code, the first."""
    assert model.book is not None
    states = machine.walks(512)
    place = WALK // 2
    there, wanted = states[:, place], torch.randint(STATES, (512,), generator=machine.generator)
    tokens = digits(states)[:, : 2 * place + 2]

    def likeliest(tokens: Tensor, codes: Tensor, book: CodebookLayer) -> Tensor:
        x = book(model.stream(tokens))
        x[:, 2 * place + 1] = book.codes[codes]
        return model.rest(x)[:, -1].argmax(dim=-1)

    def following(codes: Tensor, book: CodebookLayer) -> Tensor:
        first = likeliest(tokens, codes, book)
        return 10 * first + likeliest(torch.cat([tokens, first[:, None]], dim=1), codes, book)

    def share(of: Tensor, after: Tensor) -> float:
        return machine.follows[of, after].float().mean().item()

    after = following(code_of[wanted], model.book)
    any_code = code_of[torch.randint(STATES, (512,), generator=machine.generator)]
    return {
        "steered: follows the new state": share(wanted, after),
        "steered: follows the old one": share(there, after),
        "any code: follows the new state": share(wanted, following(any_code, model.book)),
    }


def measured(seed: int, steps: int, n_codes: int) -> dict[str, float]:
    """Everything, of one seed."""
    plain, book = (trained(Machine(seed, TRAINING), codes, steps, seed) for codes in (0, n_codes))
    machine = Machine(seed, MEASURING)
    assert book.book is not None
    states = machine.walks(1024)
    tokens, known = digits(states), states.flatten()
    with torch.no_grad():
        book(tokens)
        chosen = book.book.chosen[:, 1::2, 0].flatten()
        rows = plain.stream(tokens)[:, 1::2].flatten(0, 1)
    of_codes = f1(F.one_hot(chosen, n_codes).bool(), known)
    counts = torch.zeros(n_codes, STATES).index_put_((chosen, known), torch.ones(len(known)), accumulate=True)
    found = {
        "valid, plain": valid(plain, machine), "valid, codebook": valid(book, machine),
        "codes at states": (counts.sum(dim=1) > 0).sum().item(),
        "precision of a code": (counts.amax(dim=1).sum() / counts.sum()).item(),
        "F1, codes": of_codes.amax(dim=0).mean().item(),
        "F1, dimensions": best_thresholds(rows, known).mean().item(),
    }  # fmt: skip
    configs = [TrainConfig(f"k{k}", SAE_TOKENS, n_codes, TopK(k), lr=2e-3, batch_size=1024, seed=seed) for k in SAE_KS]
    for k, made in zip(SAE_KS, train(configs, Rows(plain, machine)), strict=True):
        assert made.sae is not None, made.error
        found[f"F1, SAE of k = {k}"] = f1(made.sae.encode(rows).to_dense() > 0, known).amax(dim=0).mean().item()
    return found | steered(book, machine, counts.argmax(dim=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="a line a seed")
    options = parser.parse_args()
    found = pd.DataFrame([measured(seed, options.steps, options.codes) for seed in options.seeds])
    if options.json:
        print(found.assign(seed=options.seeds).to_json(orient="records", lines=True))
        return
    print(found.agg(["mean", "std"]).T.round(3).to_string())


if __name__ == "__main__":
    main()
