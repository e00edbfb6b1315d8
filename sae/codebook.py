"""Fits a codebook (`sae.rules.codebook`; Tamkin et al. 2023, arXiv 2310.17230) to activations, after the fact: the
model stays as it is, where the paper fine-tunes it around its codebooks.

1. The bias is the mean of a sample of rows; rows less the bias are scaled to the mean norm sqrt(d_in).
2. Codes start as rows drawn from the sample.
3. Each step chooses the k codes of each row, and Adam moves them down the squared error of their mean; the choice
   itself has no gradient.
4. Codes that no row has chosen for `DEAD_AFTER` steps become rows of the batch with a little noise, up to the last
   fifth of the steps, in which the learning rate falls to 0.

With several heads, whose outputs lie side by side in a row, each has codes of its own, [n_codes / heads, d_in / heads],
and a scale of its own: as many codebooks as heads, fitted at once.
"""

from collections.abc import Callable

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.errors import InputError
from sae.model import SAE
from sae.rules.codebook import Codebook, best_of_heads
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
    heads: int = 1,
    lr: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int, float], None] | None = None,
) -> SAE:
    """The codebook of a stream of activations, as an SAE of the rule `Codebook`.

    Args:
        source: the stream.
        n_codes: number of codes, those of all heads.
        k: codes that a row has, of every head.
        total_tokens: rows to fit on, in batches of 2,048.
        heads: those whose outputs a row has side by side; 1 for one codebook of whole rows.
        lr: of Adam, for rows of mean norm sqrt(d_in).
        seed: of the rows that codes start as.
        on_step: called with (tokens done, tokens in all, share of the batch's variance unexplained).

    Raises:
        InputError: k or heads out of range, too few tokens for a step, or fewer rows in the sample than codes.
    """
    Codebook(k, heads).check(n_codes)
    if source.d_in % heads:
        raise InputError(
            f"rows of {source.d_in:,} values are not those of {heads:,} heads side by side: give another number"
        )
    if total_tokens < BATCH:
        raise InputError(f"{total_tokens:,} tokens are no step, which takes {BATCH:,}: fit on more tokens")
    sample = source.sample(max(SAMPLE_ROWS, n_codes)).to(device, torch.float32)
    if len(sample) < n_codes:
        raise InputError(
            f"{n_codes:,} codes start as rows, and there are {len(sample):,}: use fewer codes or more rows"
        )
    generator = torch.Generator().manual_seed(seed)
    bias = sample.mean(dim=0)
    scale = scale_of(sample - bias, heads)
    drawn = torch.randperm(len(sample), generator=generator)[:n_codes].to(device)
    codes = of_heads((sample[drawn] - bias) * scale, heads).requires_grad_()
    adam = torch.optim.Adam([codes], lr=lr, betas=(0.9, 0.999))
    idle = torch.zeros(n_codes, dtype=torch.int64, device=device)
    n_steps = total_tokens // BATCH
    for step in range(n_steps):
        adam.param_groups[0]["lr"] = lr * min(1.0, (n_steps - step) / (n_steps * DECAY))
        x = (source.next_batch(BATCH).to(device, torch.float32) - bias) * scale
        chosen = nearest(x, codes.detach(), k)
        error = (means(codes, chosen, k) - x).square().sum(dim=1).mean()
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
    return as_sae(codes.detach(), scale, bias, k)


class CodebookLayer(nn.Module):
    """A codebook in a model that is trained with it: gives the mean of the k nearest codes, and passes the gradient of
    its output to the codes and, as if it gave its input, to what lies before it (straight through).

    Args:
        n_codes, width, k, heads: sizes; with several heads, whose outputs lie side by side, each has its share of codes
            and chooses k.

    Attributes:
        codes: [n_codes, width / heads], the first head's first.
        chosen: [*batch, heads * k], the codes of the last pass.
        error: mean squared error of the last pass, with gradients for the codes alone: what is added to the loss.
    """

    def __init__(self, n_codes: int, width: int, k: int, heads: int = 1) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(n_codes, width // heads))
        self.k = k

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What stands in x's place."""
        self.chosen = nearest(x.detach().flatten(0, -2), self.codes.detach(), self.k).view(*x.shape[:-1], -1)
        found = means(self.codes, self.chosen, self.k)
        self.error = (found - x.detach()).square().sum(dim=-1).mean()
        return found + (x - x.detach())


@torch.no_grad()
def nearest(x: Float[Tensor, "n d"], codes: Float[Tensor, "n_codes d_head"], k: int) -> Int[Tensor, "n chosen"]:
    """The k codes of largest cosine with each row; of every head, where codes are narrower than rows."""
    heads = x.shape[1] // codes.shape[1]
    directions = torch.nn.functional.normalize(codes, dim=1).unflatten(0, (heads, -1))
    return best_of_heads(einsum(x.unflatten(1, (heads, -1)), directions, "n head d, head c d -> n head c"), k)


def means(
    codes: Float[Tensor, "n_codes d_head"], chosen: Int[Tensor, "*batch chosen"], k: int
) -> Float[Tensor, "*batch d"]:
    """What stands for a row: the mean of each head's k codes."""
    return codes[chosen].unflatten(-2, (-1, k)).mean(dim=-2).flatten(-2)


def scale_of(centred: Float[Tensor, "n d"], heads: int = 1) -> Float[Tensor, "d"]:
    """What rows are multiplied by, so that every head's part has the mean norm of the root of its width; 1 for a head
    that always says the same."""
    parts = centred.unflatten(1, (heads, -1))
    norms = torch.linalg.vector_norm(parts, dim=2).mean(dim=0)
    scales = torch.where(norms > 0, parts.shape[2] ** 0.5 / norms, 1.0)
    return scales.repeat_interleave(parts.shape[2])


def of_heads(rows: Float[Tensor, "n_codes d"], heads: int = 1) -> Float[Tensor, "n_codes d_head"]:
    """Codes to start from: of each row the part of the head whose code it becomes."""
    parts = rows.unflatten(1, (heads, -1))
    return parts[torch.arange(len(rows), device=rows.device), _head_of(len(rows), heads, rows.device)]


def _head_of(n_codes: int, heads: int, device: torch.device) -> Int[Tensor, "n_codes"]:
    """Whose each code is."""
    return torch.arange(heads, device=device).repeat_interleave(n_codes // heads)


@torch.no_grad()
def replace_dead(
    codes: Float[Tensor, "n_codes d_head"],
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
    heads = x.shape[1] // codes.shape[1]
    drawn = torch.randint(len(x), (len(dead),), generator=generator).to(x.device)
    rows = x.unflatten(1, (heads, -1))[drawn, _head_of(len(codes), heads, x.device)[dead]]
    codes[dead] = rows + NOISE * rows.std(dim=1, keepdim=True) * torch.randn(rows.shape, generator=generator).to(x)
    idle[dead] = 0
    for moment in ("exp_avg", "exp_avg_sq"):
        adam.state[codes][moment][dead] = 0


@torch.no_grad()
def as_sae(codes: Float[Tensor, "n_codes d_head"], scale: Float[Tensor, "d"], bias: Float[Tensor, "d"], k: int) -> SAE:
    """Codes of rows less a bias, times a scale, as an SAE of the rule `Codebook`."""
    width, heads = len(bias), len(bias) // codes.shape[1]
    whole = torch.zeros(len(codes), heads, codes.shape[1], device=codes.device)
    whole[torch.arange(len(codes), device=codes.device), _head_of(len(codes), heads, codes.device)] = codes
    raw = whole.flatten(1) / scale
    sae = SAE(width, len(codes), Codebook(k, heads), device=codes.device)
    lengths = torch.linalg.vector_norm(raw, dim=1)
    sae.W_dec.copy_(raw / lengths.clamp_min(torch.finfo(codes.dtype).tiny)[:, None])
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(bias)
    sae.get_buffer("lengths").copy_(lengths)
    return sae
