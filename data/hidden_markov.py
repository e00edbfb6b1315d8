"""A recurrent network that emulates a hidden Markov model, and what it does it with: the numbers of notebook 10.

1. `Chain`: a hidden Markov model of few states, with what its outputs obey in closed form.
2. `Emulator`: h_t = tanh(h_{t-1} W + e[token_t] U + b), logits h_t V + c. Its tokens mean nothing: each stands for one
   vector of noise, so that random tokens drive it, and a model of tokens is what every tool here takes.
3. `train_emulator`: softened samples of its outputs are brought to the chain's by the Sinkhorn divergence

       S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2,   OT(x, y) = min_P <P, C> + eps KL(P | uniform)

   of whole sequences, C their squared distances a step. The gradient is that of <P, C> at the best P.
4. `fixed_points` without noise (the tokens' mean is zero), `switching`, `kick_units`: units whose mean in place of
   their state makes switches of the hidden state rarer.

    python data/hidden_markov.py            # the table of docs/methods/hidden-markov.md

(Torre et al. 2025, "Mechanistic Interpretability of RNNs emulating Hidden Markov Models"; sizes are ours.)
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

NOISE, WIDTH, UNITS = 256, 10, 150
"""Tokens, each a vector of noise; its width; units."""
WARM_UP = 20
"""Steps from the state 0 on that are not looked at."""


@dataclass(frozen=True)
class Chain:
    """A hidden Markov model in its stationary distribution."""

    transition: Float[Tensor, "states states"]
    emission: Float[Tensor, "states outputs"]

    @classmethod
    def two_states(cls, stay: float = 0.95) -> "Chain":
        """Two states, kept for 1 / (1 - stay) steps in the mean: each has an output of its own, and one is shared."""
        transition = torch.tensor([[stay, 1 - stay], [1 - stay, stay]], dtype=torch.float64)
        return cls(transition, torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]], dtype=torch.float64))

    @property
    def stationary(self) -> Float[Tensor, "states"]:
        """Share of the time that is spent in each state."""
        values, vectors = torch.linalg.eig(self.transition.T)
        found = vectors[:, values.real.argmax()].real
        return found / found.sum()

    def pairs(self) -> Float[Tensor, "outputs outputs"]:
        """P(next output | output), exactly."""
        joint = self.emission.T @ torch.diag(self.stationary) @ self.transition @ self.emission
        return joint / joint.sum(dim=1, keepdim=True)

    def sample(self, n: int, steps: int, generator: torch.Generator) -> Int[Tensor, "n steps"]:
        """Outputs of `n` sequences."""
        state = torch.multinomial(self.stationary, n, replacement=True, generator=generator)
        found = []
        for _ in range(steps):
            found.append(torch.multinomial(self.emission[state], 1, generator=generator)[:, 0])
            state = torch.multinomial(self.transition[state], 1, generator=generator)[:, 0]
        return torch.stack(found, dim=1)

    def surprise(self, outputs: Int[Tensor, "n steps"]) -> Float[Tensor, "n"]:
        """-log P(outputs) in nats a step, by the forward algorithm."""
        belief = self.stationary.expand(len(outputs), -1)
        total = torch.zeros(len(outputs), dtype=torch.float64)
        for step in range(outputs.shape[1]):
            joint = belief * self.emission[:, outputs[:, step]].T
            seen = joint.sum(dim=1, keepdim=True)
            total -= seen[:, 0].log()
            belief = joint / seen @ self.transition
        return total / outputs.shape[1]


class Emulator(nn.Module):
    """The network. Its states are what `states` hands on: a hook point of the workbench."""

    def __init__(self, outputs: int = 3, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(NOISE, WIDTH, generator=generator)
        # Without noise means the tokens' mean: it is zero, and no token is on average a push.
        self.register_buffer("noise", noise - noise.mean(dim=0))

        def drawn(rows: int, columns: int, size: float) -> nn.Parameter:
            return nn.Parameter(size / math.sqrt(rows) * torch.randn(rows, columns, generator=generator))

        self.W, self.U, self.V = drawn(UNITS, UNITS, 0.9), drawn(WIDTH, UNITS, 0.5), drawn(UNITS, outputs, 1.0)
        self.b, self.c = nn.Parameter(torch.zeros(UNITS)), nn.Parameter(torch.zeros(outputs))
        self.states = nn.Identity()

    def step(self, h: Float[Tensor, "*n units"]) -> Float[Tensor, "*n units"]:
        """The next state without noise."""
        return torch.tanh(h @ self.W + self.b)

    def forward(
        self,
        tokens: Int[Tensor, "n steps"],
        *,
        louder: float = 1.0,
        replaced: Bool[Tensor, "units"] | None = None,
        by: Float[Tensor, "units"] | None = None,
    ) -> Float[Tensor, "n steps outputs"]:
        """Logits of the outputs.

        Args:
            louder: the noise is multiplied by it.
            replaced, by: units whose state is this one at every step.
        """
        pushes = louder * self.get_buffer("noise")[tokens] @ self.U
        h = torch.zeros(len(tokens), UNITS, dtype=pushes.dtype)
        found = []
        for push in pushes.unbind(dim=1):
            h = torch.tanh(h @ self.W + push + self.b)
            if replaced is not None and by is not None:
                h = torch.where(replaced, by, h)
            found.append(h)
        logits: Tensor = self.states(torch.stack(found, dim=1)) @ self.V + self.c
        return logits


def random_tokens(n: int, steps: int, generator: torch.Generator) -> Int[Tensor, "n steps"]:
    """Noise."""
    return torch.randint(NOISE, (n, steps), generator=generator)


def soft_outputs(
    logits: Float[Tensor, "n steps outputs"], generator: torch.Generator, temperature: float
) -> Float[Tensor, "n steps outputs"]:
    """Samples that a gradient passes: softmax of logits with Gumbel noise, the categorical's own at temperature 0."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    found: Tensor = torch.softmax((logits - torch.log(-torch.log(uniform))) / temperature, dim=-1)
    return found


def sinkhorn_divergence(
    x: Float[Tensor, "n steps outputs"], y: Float[Tensor, "m steps outputs"], *, eps: float = 0.1, iterations: int = 30
) -> Float[Tensor, ""]:
    """S(x, y) of two sets of sequences by <P, C> alone, without the KL; its gradient, of the costs, is that of S."""

    def transport(a: Tensor, b: Tensor) -> Tensor:
        costs = torch.cdist(a.flatten(1), b.flatten(1)) ** 2 / a.shape[1]
        return (plan(costs.detach(), eps, iterations) * costs).sum()

    return transport(x, y) - transport(x, x) / 2 - transport(y, y) / 2


def plan(costs: Float[Tensor, "n m"], eps: float, iterations: int) -> Float[Tensor, "n m"]:
    """The entropic plan between uniform weights, by Sinkhorn's iterations on logarithms."""
    n, m = costs.shape
    f, g = costs.new_zeros(n), costs.new_zeros(m)
    for _ in range(iterations):
        f = -eps * (torch.logsumexp((g - costs) / eps, dim=1) - math.log(m))
        g = -eps * (torch.logsumexp((f[:, None] - costs) / eps, dim=0) - math.log(n))
    return torch.exp((f[:, None] + g - costs) / eps - math.log(n * m))


def train_emulator(
    chain: Chain, *, steps: int = 200, seed: int = 0, n: int = 256, length: int = 40, temperature: float = 0.5
) -> Emulator:
    """An emulator of the chain's outputs, trained for `steps` steps on `n` sequences each."""
    generator = torch.Generator().manual_seed(seed)
    emulator = Emulator(chain.emission.shape[1], seed=seed)
    optimizer = torch.optim.Adam(emulator.parameters(), lr=2e-3)
    for _ in range(steps):
        wanted = nn.functional.one_hot(chain.sample(n, length, generator), chain.emission.shape[1]).float()
        logits = emulator(random_tokens(n, WARM_UP + length, generator))[:, WARM_UP:]
        loss = sinkhorn_divergence(soft_outputs(logits, generator, temperature), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(emulator.parameters(), 1.0)
        optimizer.step()
    return emulator.requires_grad_(False)


def outputs_of(logits: Float[Tensor, "n steps outputs"], generator: torch.Generator) -> Int[Tensor, "n steps"]:
    """Outputs drawn from the network's probabilities, after the warm-up."""
    shares = torch.softmax(logits[:, WARM_UP:].double(), dim=-1)
    return torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(shares.shape[:2])


def counted_pairs(outputs: Int[Tensor, "n steps"], n_outputs: int) -> Float[Tensor, "outputs outputs"]:
    """P(next output | output) as counted."""
    pairs = outputs[:, :-1] * n_outputs + outputs[:, 1:]
    counts = torch.bincount(pairs.flatten(), minlength=n_outputs**2).view(n_outputs, n_outputs).double()
    return counts / counts.sum(dim=1, keepdim=True)


def sides(logits: Float[Tensor, "n steps outputs"]) -> Bool[Tensor, "n steps"]:
    """Which of two states the network is in: whether the first output is likelier than the last."""
    return logits[:, WARM_UP:, 0] > logits[:, WARM_UP:, -1]


def switching(logits: Float[Tensor, "n steps outputs"]) -> float:
    """Switches of the state a step."""
    side = sides(logits)
    return float((side[:, 1:] != side[:, :-1]).float().mean())


@dataclass(frozen=True)
class FixedPoint:
    """h = F(h) without noise."""

    h: Float[Tensor, "units"]
    largest: float
    """Modulus of the largest eigenvalue of F's Jacobian there; below 1 it attracts."""
    unstable: int
    """Directions in which it repels."""


def fixed_points(emulator: Emulator, starts: Float[Tensor, "n units"], *, steps: int = 200) -> list[FixedPoint]:
    """Those that Newton's method on F(h) - h finds from `starts`, in float64: each once, the most stable first."""
    W, b = emulator.W.double(), emulator.b.double()
    eye = torch.eye(len(b), dtype=torch.float64)
    found: list[FixedPoint] = []
    for start in starts.double():
        h = start
        for _ in range(steps):
            nextly = torch.tanh(h @ W + b)
            jacobian = W.T * (1 - nextly**2)[:, None]
            change = torch.linalg.solve(jacobian - eye, nextly - h)
            # A damped step: far from a fixed point Newton's own may go anywhere.
            h = h - change * min(1.0, 2.0 / float(change.norm().clamp(min=1e-300)))
            if float(change.norm()) < 1e-12:
                break
        nextly = torch.tanh(h @ W + b)
        if float((nextly - h).norm()) < 1e-10 and all(float((h - other.h).norm()) > 1e-6 for other in found):
            sizes = torch.linalg.eigvals(W.T * (1 - nextly**2)[:, None]).abs()
            found.append(FixedPoint(h, float(sizes.max()), int((sizes > 1).sum())))
    return sorted(found, key=lambda point: (point.unstable, point.largest))


def states_of(emulator: Emulator, tokens: Int[Tensor, "n steps"]) -> Float[Tensor, "n steps units"]:
    """The network's states, after the warm-up."""
    seen: list[Tensor] = []
    handle = emulator.states.register_forward_hook(lambda _, __, value: seen.append(value[:, WARM_UP:]))
    emulator(tokens)
    handle.remove()
    return seen[0]


def kick_units(emulator: Emulator, tokens: Int[Tensor, "n steps"]) -> Float[Tensor, "units"]:
    """Switches a step with each unit in turn at its mean: the fewer, the more the unit kicks."""
    mean = states_of(emulator, tokens).mean(dim=(0, 1))
    return torch.tensor([switching(emulator(tokens, replaced=unit.bool(), by=mean)) for unit in torch.eye(UNITS)])


def without(emulator: Emulator, tokens: Int[Tensor, "n steps"], units: Sequence[int]) -> float:
    """Switches a step with all of these units at their means."""
    mean = states_of(emulator, tokens).mean(dim=(0, 1))
    replaced = torch.zeros(UNITS, dtype=torch.bool)
    replaced[list(units)] = True
    return switching(emulator(tokens, replaced=replaced, by=mean))


def measured(seed: int, steps: int) -> Iterator[tuple[str, float]]:
    """The numbers of one training; the sequences that units are chosen by are not those they are measured on."""
    chain = Chain.two_states()
    emulator = train_emulator(chain, steps=steps, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens, fresh = random_tokens(128, 220, generator), random_tokens(128, 220, generator)
    logits = emulator(fresh)
    outputs = outputs_of(logits, generator)
    yield "largest error of P(next output | output)", float((counted_pairs(outputs, 3) - chain.pairs()).abs().max())
    yield "nats a step under the chain", float(chain.surprise(outputs).mean())
    yield "... of the chain's own outputs", float(chain.surprise(chain.sample(128, 200, generator)).mean())
    states = states_of(emulator, tokens)
    points = fixed_points(emulator, states[:24, ::20].flatten(0, 1))
    yield "fixed points that attract", sum(not point.unstable for point in points)
    yield "fixed points that repel", sum(point.unstable > 0 for point in points)
    for louder in (0.0, 0.5, 1.0, 2.0):
        yield f"switches a step, noise x {louder:g}", switching(emulator(fresh, louder=louder))
    order = kick_units(emulator, tokens).argsort().tolist()
    for count in (5, 10, 20):
        yield f"... without {count} kick units", without(emulator, fresh, order[:count])
        draws = [torch.randperm(UNITS, generator=generator)[:count].tolist() for _ in range(20)]
        drawn = [without(emulator, fresh, units) for units in draws]
        yield f"... without {count} random units, mean of 20", statistics.mean(drawn)
        yield f"... without {count} random units, least of 20", min(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    found: dict[str, list[float]] = {}
    for seed in range(asked.seeds):
        for name, value in measured(seed, asked.steps):
            found.setdefault(name, []).append(value)
            print(f"seed {seed}: {name}: {value:.4g}", flush=True)
    print("\n| | mean (least to greatest) |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g}) |")


if __name__ == "__main__":
    main()
