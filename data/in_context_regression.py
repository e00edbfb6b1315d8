"""Linear regression in context with a known best answer, and the transformer that learns it.

A prompt is a vector w, drawn and never shown, and examples: x_1, y_1, x_2, y_2, ..., x ~ N(0, I), y = w.x + NOISE e.

    dense    w ~ N(0, I)
    sparse   one coordinate of w, any of them, is N(0, DIM); the others are 0

Each, and any mixture, is one of Gaussians with diagonal covariances S_c, so that the best prediction is exact:

    K_c = X S_c X^T + NOISE^2 I
    E[y | x, D] = sum over c of P(c | D) x^T S_c X^T K_c^-1 y,        P(c | D) ~ P(c) N(y; 0, K_c)

`bayes` for dense is ridge regression with NOISE^2. Beside it stand least squares (of least norm) and one step of
gradient descent from 0, w = r X^T y / n with the rate r that is best after n examples.

    python data/in_context_regression.py FOLDER --family dense+sparse --steps 9000

trains a GPT-2 whose tokens are linear maps of x and of y, and writes `model.safetensors`, `measured.csv` (risks and
distances by number of examples, before and after training, on every family) and `probes.csv`: how well X^T y / n and
the posterior mean of w can be read linearly from the last example's y, layer by layer. Minutes on a GPU.

(Regression in context: Garg et al. 2022. The predictors beside it, and the probes: Akyürek et al. 2023, "What learning
algorithm is in-context learning?". Mixtures with exact Bayes: Panwar et al. 2023.)
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save_model
from small_training import fit
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

DIM, EXAMPLES, NOISE = 5, 16, 0.5
COLUMNS = ("model", "bayes", "ridge", "least_squares", "gradient_step")
RATE_PROMPTS = 4096
"""On which the rate of the gradient step is chosen."""


@dataclass(frozen=True)
class Prior:
    """A mixture of Gaussians over w, each with a diagonal covariance."""

    name: str
    weights: Float[Tensor, "components"]
    variances: Float[Tensor, "components dim"]

    def drawn(
        self, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n examples dim"], Float[Tensor, "n examples"], Float[Tensor, "n dim"]]:
        """Inputs, outputs and w of `n` prompts, on the generator's device."""
        device = generator.device
        which = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        w = self.variances.to(device)[which].sqrt() * torch.randn(n, DIM, generator=generator, device=device)
        x = torch.randn(n, EXAMPLES, DIM, generator=generator, device=device)
        noise = NOISE * torch.randn(n, EXAMPLES, generator=generator, device=device)
        return x, (x @ w[:, :, None]).squeeze(2) + noise, w


def dense() -> Prior:
    """Every coordinate is there."""
    return Prior("dense", torch.ones(1), torch.ones(1, DIM))


def sparse() -> Prior:
    """One coordinate is there, and as long as all of a dense one's in the mean."""
    return Prior("sparse", torch.full((DIM,), 1 / DIM), DIM * torch.eye(DIM))


PRIORS = {function.__name__: function for function in (dense, sparse)}


def mixture(names: str) -> Prior:
    """The priors named, `dense+sparse`, with equal weights. Raises ArgumentTypeError for one there is not."""
    if unknown := set(names.split("+")) - set(PRIORS):
        raise argparse.ArgumentTypeError(
            f"no family {', '.join(sorted(unknown))}: there are {', '.join(PRIORS)}, + between those of a mixture"
        )
    parts = [PRIORS[name]() for name in names.split("+")]
    weights = torch.cat([part.weights for part in parts]) / len(parts)
    return Prior(names, weights, torch.cat([part.variances for part in parts]))


def posterior_mean(prior: Prior, x: Float[Tensor, "n seen dim"], y: Float[Tensor, "n seen"]) -> Float[Tensor, "n dim"]:
    """E[w | the examples], in float64."""
    x, y = x.double(), y.double()[:, None, :, None]
    variances, seen = prior.variances.to(x), x.shape[1]
    scaled = x[:, None] * variances[:, None]
    covariance = scaled @ x[:, None].mT + NOISE**2 * torch.eye(seen, dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky(covariance)
    solved = torch.cholesky_solve(y, factor)
    fit = -0.5 * (y * solved).sum(dim=(2, 3)) - factor.diagonal(dim1=2, dim2=3).log().sum(dim=2)
    chance = (prior.weights.to(x).log() + fit).softmax(dim=1)
    return (chance[:, :, None] * (scaled.mT @ solved).squeeze(3)).sum(dim=1)


def least_squares(x: Float[Tensor, "n seen dim"], y: Float[Tensor, "n seen"]) -> Float[Tensor, "n dim"]:
    """The w of least norm among those of least squared error, in float64."""
    return (torch.linalg.pinv(x.double()) @ y.double()[:, :, None]).squeeze(2)


def gradient(x: Float[Tensor, "n seen dim"], y: Float[Tensor, "n seen"]) -> Float[Tensor, "n dim"]:
    """X^T y / n: minus half the gradient of the mean squared error at w = 0; 0 without examples."""
    return torch.einsum("nsd,ns->nd", x.double(), y.double()) / max(1, x.shape[1])


def best_rates(prior: Prior, seed: int = 2) -> Float[Tensor, "examples"]:
    """By number of examples the rate r with which r X^T y / n is nearest to w in the mean."""
    x, y, w = prior.drawn(RATE_PROMPTS, torch.Generator().manual_seed(seed))
    steps = torch.stack([gradient(x[:, :seen], y[:, :seen]) for seen in range(EXAMPLES)])
    return (steps * w).sum(dim=(1, 2)) / steps.square().sum(dim=(1, 2)).clamp_min(1e-12)


class Regressor(nn.Module):
    """A transformer over x_1, y_1, x_2, ..., which says y at every x."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.body = GPT2Model(
            GPT2Config(
                vocab_size=1, n_positions=2 * EXAMPLES, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        self.read_x, self.read_y, self.say = nn.Linear(DIM, width), nn.Linear(1, width), nn.Linear(width, 1)

    def layers(
        self, x: Float[Tensor, "n examples dim"], y: Float[Tensor, "n examples"]
    ) -> tuple[Float[Tensor, "n pos width"], ...]:
        """What the embedding and every block leave, the last one after the final norm."""
        tokens = torch.stack([self.read_x(x), self.read_y(y[:, :, None])], dim=2).flatten(1, 2)
        found: tuple[Tensor, ...] = self.body(inputs_embeds=tokens, output_hidden_states=True).hidden_states
        return found

    def forward(
        self, x: Float[Tensor, "n examples dim"], y: Float[Tensor, "n examples"]
    ) -> Float[Tensor, "n examples"]:
        """Predictions, each from the examples before and its own x."""
        said: Tensor = self.say(self.layers(x, y)[-1][:, ::2]).squeeze(2)
        return said


@torch.no_grad()
def measured(model: Regressor, trained_on: Prior, asked: Prior, *, n: int = 2048, seed: int = 1) -> pd.DataFrame:
    """One row a number of examples seen: risks, that is mean squared differences from w.x, of the model and of every
    predictor, and the model's distances from each (`to ...`), all over DIM, which is the mean square of w.x.

    Bayes has the prior of what is asked about; the distance from Bayes with the training's is `to training`.
    """
    device = next(model.parameters()).device
    x, y, w = asked.drawn(n, torch.Generator().manual_seed(seed))
    said = model(x.to(device), y.to(device)).double().cpu()
    rows, rates = [], best_rates(asked)
    for seen in range(EXAMPLES):
        before, now = (x[:, :seen], y[:, :seen]), x[:, seen].double()
        vectors = {
            "bayes": posterior_mean(asked, *before), "ridge": posterior_mean(dense(), *before),
            "least_squares": least_squares(*before), "gradient_step": rates[seen] * gradient(*before),
            "training": posterior_mean(trained_on, *before),
        }  # fmt: skip
        predictions = {name: (vector * now).sum(dim=1) for name, vector in vectors.items()}
        truth = (now * w).sum(dim=1)
        risks = {name: (one - truth).square().mean() for name, one in {"model": said[:, seen], **predictions}.items()}
        apart = {f"to {name}": (said[:, seen] - one).square().mean() for name, one in predictions.items()}
        kept = {name: risks[name] for name in COLUMNS} | apart
        rows.append({"examples": seen, **{name: float(value) / DIM for name, value in kept.items()}})
    return pd.DataFrame(rows)


@torch.no_grad()
def probes(model: Regressor, prior: Prior, *, n: int = 4096, seed: int = 3) -> pd.DataFrame:
    """R^2 on half of the prompts of linear maps fitted on the other half, from the stream at the last example's y to
    X^T y / n and to the posterior mean of w; a row a layer, 0 for the embedding."""
    device = next(model.parameters()).device
    x, y, _ = prior.drawn(n, torch.Generator().manual_seed(seed))
    wanted = {"gradient": gradient(x, y), "posterior": posterior_mean(prior, x, y)}
    rows = []
    for layer, stream in enumerate(model.layers(x.to(device), y.to(device))):
        seen = torch.cat([stream[:, -1].double().cpu(), torch.ones(n, 1, dtype=torch.float64)], dim=1)
        row = {"layer": float(layer)}
        for name, values in wanted.items():
            fitted = torch.linalg.lstsq(seen[: n // 2], values[: n // 2], driver="gelsd").solution
            left = (values - seen @ fitted)[n // 2 :].square().sum()
            row[name] = float(1 - left / (values - values.mean(dim=0))[n // 2 :].square().sum())
        rows.append(row)
    return pd.DataFrame(rows)


def train(model: Regressor, prior: Prior, *, steps: int, batch: int, lr: float, seed: int, device: str) -> list[float]:
    """Trains the model where it is; the mean squared error of every step, noise included."""
    generator = torch.Generator(device).manual_seed(seed)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return (model(x, y) - y).square().mean()

    return fit(model, lambda: prior.drawn(batch, generator)[:2], loss_of, steps=steps, lr=lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", type=mixture, default="dense", help="+ between those of a mixture")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(asked.seed)
    model = Regressor(asked.layers, asked.width, asked.heads).to(device)
    tables, read = [], []

    def measure(when: str) -> None:
        for name, make in PRIORS.items():
            tables.append(measured(model.eval(), asked.family, make()).assign(asked=name, when=when))
        read.append(probes(model, asked.family).assign(when=when))

    measure("untrained")
    settings = {name: getattr(asked, name) for name in ("steps", "batch", "lr", "seed")}
    train(model.train(), asked.family, **settings, device=device)
    measure("trained")
    asked.folder.mkdir(parents=True, exist_ok=True)
    save_model(model.cpu(), str(asked.folder / "model.safetensors"))
    table, seen = pd.concat(tables, ignore_index=True).round(4), pd.concat(read, ignore_index=True).round(4)
    table.to_csv(asked.folder / "measured.csv", index=False)
    seen.to_csv(asked.folder / "probes.csv", index=False)
    print(table[(table["when"] == "trained") & table["examples"].isin([0, 2, 5, 10, 15])].to_string(index=False))
    print(seen.to_string(index=False))


if __name__ == "__main__":
    main()
