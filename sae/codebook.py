"""Fits a codebook (`sae.rules.codebook`; Tamkin et al. 2023, arXiv 2310.17230) to activations, after the fact: the
model stays as it is, where the paper fine-tunes it around its codebooks.

1. The bias is the mean of a sample of rows; rows less the bias are scaled to the mean norm sqrt(d_in).
2. Codes start as rows drawn from the sample.
3. Each step chooses the k codes of each row, and Adam moves them down the squared error of their mean; the choice
   itself has no gradient.
4. Codes that no row has chosen for `DEAD_AFTER` steps become rows of the batch with a little noise, up to the last
   fifth of the steps, in which the learning rate falls to 0.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.errors import InputError
from sae.model import SAE
from sae.rules.codebook import Codebook
from sae.source import BatchSource

SAMPLE_ROWS = 16_384
BATCH = 2048
DEAD_AFTER = 50
NOISE = 0.01
"""Standard deviation of what is added to a row that becomes a code, in those of the row's coordinates."""
DECAY = 0.2


def fit_codebook(
    source: BatchSource,
    n_codes: int,
    k: int,
    *,
    total_tokens: int,
    lr: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int, float], None] | None = None,
) -> SAE:
    """The codebook of a stream of activations, as an SAE of the rule `Codebook`.

    Args:
        source: the stream.
        n_codes: number of codes.
        k: codes that a row has.
        total_tokens: rows to fit on, in batches of 2,048.
        lr: of Adam, for rows of mean norm sqrt(d_in).
        seed: of the rows that codes start as.
        on_step: called with (tokens done, tokens in all, share of the batch's variance unexplained).

    Raises:
        InputError: k out of range, fewer rows in the sample than codes, or too few tokens for a step.
    """
    Codebook(k).check(n_codes)
    sample = source.sample(max(SAMPLE_ROWS, n_codes)).to(device, torch.float32)
    if len(sample) < n_codes or total_tokens < BATCH:
        raise InputError(
            f"{n_codes:,} codes start as rows of the sample, which has {len(sample):,}, and a step takes {BATCH:,}: "
            f"use fewer codes or more tokens than {total_tokens:,}"
        )
    generator = torch.Generator().manual_seed(seed)
    bias = sample.mean(dim=0)
    centred = sample - bias
    scale = sample.shape[1] ** 0.5 / torch.linalg.vector_norm(centred, dim=1).mean()
    drawn = torch.randperm(len(sample), generator=generator)[:n_codes].to(device)
    codes = (centred[drawn] * scale).requires_grad_()
    adam = torch.optim.Adam([codes], lr=lr, betas=(0.9, 0.999))
    idle = torch.zeros(n_codes, dtype=torch.int64, device=device)
    n_steps = total_tokens // BATCH
    for step in range(n_steps):
        adam.param_groups[0]["lr"] = lr * min(1.0, (n_steps - step) / (n_steps * DECAY))
        x = (source.next_batch(BATCH).to(device, torch.float32) - bias) * scale
        chosen = nearest(x, codes.detach(), k)
        error = (codes[chosen].mean(dim=1) - x).square().sum(dim=1).mean()
        adam.zero_grad()
        error.backward()
        adam.step()
        idle += 1
        idle[chosen.flatten()] = 0
        if step < (1 - DECAY) * n_steps:
            replace_dead(codes, idle, x, adam, generator)
        if on_step is not None:
            variance = (x - x.mean(dim=0)).square().sum(dim=1).mean()
            on_step((step + 1) * BATCH, n_steps * BATCH, float(error.detach() / variance))
    return as_sae(codes.detach() / scale, bias, k)


class CodebookLayer(nn.Module):
    """A codebook in a model that is trained with it: gives the mean of the k nearest codes, and passes the gradient of
    its output to the codes and, as if it gave its input, to what lies before it (straight through).

    Args:
        n_codes, width, k: sizes.

    Attributes:
        codes: [n_codes, width].
        chosen: [*batch, k], the codes of the last pass.
        error: mean squared error of the last pass, with gradients for the codes alone: what is added to the loss.
    """

    def __init__(self, n_codes: int, width: int, k: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(n_codes, width))
        self.k = k

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What stands in x's place."""
        self.chosen = nearest(x.detach().flatten(0, -2), self.codes.detach(), self.k).view(*x.shape[:-1], self.k)
        found = self.codes[self.chosen].mean(dim=-2)
        self.error = (found - x.detach()).square().sum(dim=-1).mean()
        return found + (x - x.detach())


@torch.no_grad()
def nearest(x: Float[Tensor, "n d"], codes: Float[Tensor, "n_codes d"], k: int) -> Int[Tensor, "n k"]:
    """The k codes of largest cosine with each row."""
    return (x @ torch.nn.functional.normalize(codes, dim=1).T).topk(k, dim=1).indices


@torch.no_grad()
def replace_dead(
    codes: Float[Tensor, "n_codes d"],
    idle: Int[Tensor, "n_codes"],
    x: Float[Tensor, "n d"],
    adam: torch.optim.Adam,
    generator: torch.Generator,
) -> None:
    """Codes that were idle for too long become rows of the batch, with a little noise and no momentum; in place.

    Args:
        codes: Adam's one parameter.
        idle: steps since each was last chosen.
        x: the batch.
        adam: whose moments of these codes are set back.
        generator: on the CPU.
    """
    dead = (idle >= DEAD_AFTER).nonzero().squeeze(1)
    if not len(dead):
        return
    rows = x[torch.randint(len(x), (len(dead),), generator=generator).to(x.device)]
    codes[dead] = rows + NOISE * rows.std(dim=1, keepdim=True) * torch.randn(rows.shape, generator=generator).to(x)
    idle[dead] = 0
    for moment in ("exp_avg", "exp_avg_sq"):
        adam.state[codes][moment][dead] = 0


@torch.no_grad()
def as_sae(codes: Float[Tensor, "n_codes d"], bias: Float[Tensor, "d"], k: int) -> SAE:
    """Codes as an SAE of the rule `Codebook`, of rows less a bias."""
    sae = SAE(codes.shape[1], len(codes), Codebook(k), device=codes.device)
    lengths = torch.linalg.vector_norm(codes, dim=1)
    sae.W_dec.copy_(codes / lengths.clamp_min(torch.finfo(codes.dtype).tiny)[:, None])
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(bias)
    sae.get_buffer("lengths").copy_(lengths)
    return sae
