"""In-context learning with a known best answer: Boolean functions, their exact Bayes predictor, and a transformer.

A prompt is a function of 8 bits, drawn and never shown, and examples of it: BOS, input, label, input, label, ... with a
token for every input.
Inputs are uniform, so that they say nothing of the function, and with a finite family the best prediction is a sum:

    P(y | x, D) = sum over f of P(f) [f(x_i) = y_i for all i in D] [f(x) = y] / sum over f of P(f) [...]

    conjunctions   each bit asked to be 1 or 0 with LITERAL each, or left out: 3^8 functions
    disjunctions   the same with "or"
    parities       of a subset of the bits: 2^8 functions

`train_in_context.py` trains models on one family or a mixture; `measured` holds one against Bayes, the nearest example
and the majority of labels, by number of examples, also on families it has not seen.

(The functions: Bhattamishra et al. 2023, "Understanding In-Context Learning in Transformers and LLMs by Learning to
Learn Discrete Functions". The comparison: Panwar et al. 2023, "In-Context Learning through the Bayesian Prism".)
"""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BITS = 8
LITERAL = 0.15
"""Probability that a bit is asked to be 1, and that it is asked to be 0: 2.4 bits of 8 in the mean."""
EXAMPLES = 24
BOS, FALSE, TRUE, FIRST = range(4)
"""Tokens; inputs begin with FIRST."""
WORDS = ("<s>", "F", "T", *(f"{number:0{BITS}b}" for number in range(2**BITS)))
CONTEXT = 1 + 2 * EXAMPLES


@dataclass(frozen=True)
class Family:
    """Functions with their prior."""

    name: str
    table: Bool[Tensor, "functions inputs"]
    """Each function's value on each of the 2^BITS inputs, whose first bit is the highest."""
    prior: Float[Tensor, "functions"]

    def to(self, device: torch.device | str) -> "Family":
        """The same on another device."""
        return Family(self.name, self.table.to(device), self.prior.to(device))

    def drawn(self, n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n examples"], Bool[Tensor, "n examples"]]:
        """Inputs and labels of `n` prompts."""
        device = self.table.device
        function = torch.multinomial(self.prior, n, replacement=True, generator=generator)
        inputs = torch.randint(2**BITS, (n, EXAMPLES), generator=generator, device=device)
        return inputs, self.table[function[:, None], inputs]


def bits(inputs: Int[Tensor, "*n"]) -> Bool[Tensor, "*n bits"]:
    """The bits of inputs, the highest first."""
    return (inputs[..., None] >> torch.arange(BITS - 1, -1, -1, device=inputs.device)) % 2 == 1


def conjunctions() -> Family:
    """Every conjunction of bits and their negations, the empty one (always true) among them."""
    asked = torch.tensor(list(product((-1, 0, 1), repeat=BITS)), dtype=torch.int8)
    ones = bits(torch.arange(2**BITS))
    broken = ((asked[:, None] == 1) & ~ones) | ((asked[:, None] == -1) & ones)
    prior = torch.where(asked == 0, 1 - 2 * LITERAL, LITERAL).double().prod(dim=1)
    return Family("conjunctions", ~broken.any(dim=2), prior)


def disjunctions() -> Family:
    """Every disjunction of bits and their negations: the conjunctions' negations."""
    of = conjunctions()
    return Family("disjunctions", ~of.table, of.prior)


def parities() -> Family:
    """Whether an odd number of a subset's bits is 1."""
    subsets, inputs = bits(torch.arange(2**BITS)), bits(torch.arange(2**BITS))
    odd = (subsets[:, None] & inputs).sum(dim=2) % 2 == 1
    return Family("parities", odd, torch.full((2**BITS,), 2.0**-BITS, dtype=torch.float64))


FAMILIES: dict[str, Callable[[], Family]] = {
    function.__name__: function for function in (conjunctions, disjunctions, parities)
}


def family_name(names: str) -> str:
    """The names of a mixture, as they are. Raises ArgumentTypeError for one there is not."""
    if unknown := set(names.split("+")) - set(FAMILIES):
        raise ArgumentTypeError(f"no family {', '.join(sorted(unknown))}: there are {', '.join(FAMILIES)}")
    return names


def mixture(names: str) -> Family:
    """The families named, `conjunctions+disjunctions`, with equal weights; see `family_name`."""
    parts = [FAMILIES[name]() for name in names.split("+")]
    return Family(
        names, torch.cat([part.table for part in parts]), torch.cat([part.prior for part in parts]) / len(parts)
    )


def tokens_of(inputs: Int[Tensor, "n examples"], labels: Bool[Tensor, "n examples"]) -> Int[Tensor, "n {CONTEXT}"]:
    """A prompt's tokens."""
    examples = torch.stack([FIRST + inputs, FALSE + labels.long()], dim=2)
    return torch.cat([torch.full_like(inputs[:, :1], BOS), examples.flatten(1)], dim=1)


def bayes(
    family: Family, inputs: Int[Tensor, "n examples"], labels: Bool[Tensor, "n examples"]
) -> Float[Tensor, "n examples"]:
    """P(label is true | examples before, input) for every example; NaN where the family has no such function."""
    weight = family.prior.expand(len(inputs), -1)
    columns = family.table.T
    found = []
    for number in range(inputs.shape[1]):
        value = columns[inputs[:, number]]
        found.append((weight * value).sum(dim=1) / weight.sum(dim=1))
        weight = weight * (value == labels[:, number, None])
    return torch.stack(found, dim=1)


def nearest(inputs: Int[Tensor, "n examples"], labels: Bool[Tensor, "n examples"]) -> Float[Tensor, "n examples"]:
    """Share of true labels among the examples before that differ in the fewest bits; 1/2 without any."""
    told = bits(inputs)
    found = [torch.full_like(inputs[:, 0], 1, dtype=torch.float64) / 2]
    for number in range(1, inputs.shape[1]):
        apart = (told[:, :number] != told[:, number, None]).sum(dim=2)
        closest = apart == apart.amin(dim=1, keepdim=True)
        found.append((closest & labels[:, :number]).sum(dim=1).double() / closest.sum(dim=1))
    return torch.stack(found, dim=1)


def majority(labels: Bool[Tensor, "n examples"]) -> Float[Tensor, "n examples"]:
    """Share of true labels among those before; 1/2 without any."""
    before = labels.double().cumsum(dim=1) - labels.double()
    count = torch.arange(labels.shape[1], device=labels.device).clamp(min=1)
    return torch.where(torch.arange(labels.shape[1], device=labels.device) == 0, 0.5, before / count)


@torch.no_grad()
def predictions(model: torch.nn.Module, tokens: Int[Tensor, "n {CONTEXT}"]) -> Float[Tensor, "n examples"]:
    """A model's P(true), of true and false alone, at every input."""
    logits = model(tokens).logits[:, 1::2].double()
    return torch.sigmoid(logits[..., TRUE] - logits[..., FALSE])


def divergence(p: Float[Tensor, "*n"], q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """KL(p || q) in nats between two predictions of true or false."""
    return torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))


def accuracy(p: Float[Tensor, "n examples"], labels: Bool[Tensor, "n examples"]) -> Float[Tensor, "examples"]:
    """Share of labels that are the likelier one; a tie counts half."""
    right = torch.where(p == 0.5, 0.5, ((p > 0.5) == labels).double())
    return right.mean(dim=0)


def measured(
    model: torch.nn.Module, trained_on: Family, family: Family, *, n: int = 2048, seed: int = 1, batch: int = 256
) -> pd.DataFrame:
    """One row a number of examples seen before: accuracy of the model, of Bayes with the family's prior, of the nearest
    example and of the majority; KL in nats from that Bayes to the model (`kl`), from Bayes with the training's prior
    where that has such a function (`kl_training`), and the share of prompts where it has (`possible`).

    Args:
        trained_on: what the model was trained on.
        family: what it is asked about.
    """
    generator = torch.Generator(family.table.device).manual_seed(seed)
    rows = []
    for _ in range(n // batch):
        inputs, labels = family.drawn(batch, generator)
        p, best = predictions(model, tokens_of(inputs, labels)), bayes(family, inputs, labels)
        prior = bayes(trained_on, inputs, labels)
        known = ~prior.isnan()
        rows.append(
            torch.stack(
                [
                    accuracy(p, labels), accuracy(best, labels), accuracy(nearest(inputs, labels), labels),
                    accuracy(majority(labels), labels), divergence(best, p).mean(dim=0),
                    divergence(prior, p).nan_to_num().mean(dim=0), known.double().mean(dim=0),
                ]
            )
        )  # fmt: skip
    columns = ["model", "bayes", "nearest", "majority", "kl", "kl_training", "possible"]
    table = pd.DataFrame(torch.stack(rows).mean(dim=0).T.cpu().numpy(), columns=columns)
    # So far a mean over all prompts, where those without such a function count 0.
    table["kl_training"] /= table["possible"]
    return table.rename_axis("examples").reset_index()
