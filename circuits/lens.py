"""Lenses: what the residual stream after each block would say if the blocks that follow were left out, or were linear.

    logit lens            U(h_l)
    Jacobian lens         U(J_l h_l),   J_l = mean over p of sum over p' of d h_L(p') / d h_l(p)
    centred               U(m_L + J_l (h_l - m_l)),   m_l = E[h_l(p)]
    of a position's own   J_l = mean over p of d h_L(p) / d h_l(p)

h_0 is the residual stream that enters the first block, h_l the one that block l - 1 hands on, h_L the last. U is
whatever the model does after its last block (final norm, unembedding, a scale or cap of the logits): it is run and not
read from weights, so at l = L all lenses are the model itself. p and p' run over the counted positions of a text, of
which a causal model gives p' >= p; J_l is averaged over texts.

The logit lens is nostalgebraist's (2020). The Jacobian lens is that of Gurnee et al. (2026, "Verbalizable
Representations Form a Global Workspace in Language Models", arXiv 2607.15495), whose code leaves out the first 16
positions and the last of every text, and mentions the Jacobian of a position's own stream as another estimator. The
centred form is reconstructed: the bias that makes the reading right on average (as Hernandez et al. 2023, arXiv
2308.09124, section 3, have it for one relation). Nothing is trained, unlike in the tuned lens (Belrose et al. 2023,
arXiv 2303.08112).

The sum over p' of one entry of h_L is one pass back for all p, layers and texts of a batch together. For a position's
own, signs s(p) = +-1 at random stand before each term and again on each gradient: what positions do to each other has
the mean zero then (Hutchinson's estimator of a diagonal).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.nodes import Bridge
from circuits.passes import OnProgress, activations, answer_logits, probed, taking
from circuits.resume import recorded_block, resumed_after
from sae.errors import InputError
from sae.shown import Shown


@dataclass(frozen=True, repr=False)
class Jacobians(Shown):
    """The mean Jacobians of the last residual stream, float32."""

    matrices: Float[Tensor, "layers d_model d_model"]
    """J_0 ... J_{L-1}; a row is an entry of h_L."""
    means: Float[Tensor, "layers+1 d_model"]
    """m_0 ... m_L."""
    n_positions: int
    """Averaged over."""
    noise: Float[Tensor, "layers"]
    """Norm of half the difference between the averages over every second batch and the others, over J_l's own: about
    the relative error that is left. NaN with one batch."""

    def last(
        self, layer: int, h: Float[Tensor, "*rows d_model"], *, centred: bool = False
    ) -> Float[Tensor, "*rows d_model"]:
        """The last residual stream that the lens expects of h_l, with h_L itself at l = L."""
        if layer == len(self.matrices):
            return h
        matrix = self.matrices[layer].to(h)
        if not centred:
            return h @ matrix.T
        return self.means[-1].to(h) + (h - self.means[layer].to(h)) @ matrix.T


def stream_names(bridge: Bridge) -> list[str]:
    """Hook points of h_0 ... h_L."""
    n_layers = bridge.cfg.n_layers
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]


@torch.no_grad()
def lens_logits(
    bridge: Bridge, tokens: Int[Tensor, "n pos"], jacobians: Jacobians | None = None, *, centred: bool = False
) -> Iterator[Float[Tensor, "n pos vocab"]]:
    """The logits that a lens reads at h_0 ... h_L, one layer at a time: the last are the model's own.

    Args:
        jacobians: for the Jacobian lens; the logit lens without.
        centred: whether the Jacobian lens is the centred one.

    Raises:
        InputError: Jacobians of a model of another shape.
    """
    n_layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    if jacobians is not None and jacobians.means.shape != (n_layers + 1, d_model):
        layers, width = jacobians.means.shape
        raise InputError(
            f"the Jacobians are of {layers - 1} layers of width {width}, the model has {n_layers} of width {d_model}"
        )
    names = stream_names(bridge)
    with recorded_block(bridge, n_layers - 1) as output:
        streams = activations(bridge, tokens, names)
    for layer, name in enumerate(names):
        h = streams[name] if jacobians is None else jacobians.last(layer, streams[name], centred=centred)

        def instead(value: Tensor, hook: object, h: Tensor = h) -> Tensor:
            return h

        with resumed_after(bridge, n_layers - 1, output[0]), bridge.hooks(fwd_hooks=[(names[-1], instead)]):
            logits: Tensor = bridge(tokens)
        yield logits


def mean_jacobians(
    bridge: Bridge,
    batches: Iterable[tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"]]],
    *,
    n_batches: int,
    own: bool = False,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Jacobians:
    """J_l and m_l of every layer, from some batches of tokens; a pass back through the model for each of the d_model
    entries of h_L.

    Args:
        batches: tokens, and the positions p and p' that are counted.
        n_batches: how many there are at most, for the progress.
        own: only what a position does to itself, by signs drawn with `seed`.

    Raises:
        InputError: no position to average over.
    """
    names, d_model = stream_names(bridge), bridge.cfg.d_model
    generator = torch.Generator().manual_seed(seed) if own else None
    halves = [_Sums.zeros(len(names), d_model) for _ in range(2)]
    for number, (tokens, counted) in enumerate(batches):
        done = number * d_model
        for row in _add_batch(bridge, tokens, counted, halves[number % 2], generator):
            if on_progress is not None:
                on_progress(done + row + 1, n_batches * d_model)
    n = halves[0].n + halves[1].n
    if n == 0:
        raise InputError("there is no position to average Jacobians over: give more text")
    total = (halves[0].matrices + halves[1].matrices) / n
    noise = torch.full((len(total),), torch.nan)
    if all(half.n for half in halves):
        first, second = (half.matrices / half.n for half in halves)
        noise = ((first - second).flatten(1).norm(dim=1) / 2 / total.flatten(1).norm(dim=1)).float()
    means = (halves[0].means + halves[1].means) / n
    return Jacobians(total.float(), means.float(), n, noise)


@dataclass
class _Sums:
    """Over the positions of some batches, float64 on the CPU."""

    matrices: Float[Tensor, "layers d_model d_model"]
    means: Float[Tensor, "layers+1 d_model"]
    n: int = 0

    @classmethod
    def zeros(cls, n_streams: int, d_model: int) -> "_Sums":
        return cls(
            torch.zeros(n_streams - 1, d_model, d_model, dtype=torch.float64),
            torch.zeros(n_streams, d_model, dtype=torch.float64),
        )


def _add_batch(
    bridge: Bridge,
    tokens: Int[Tensor, "n pos"],
    counted: Bool[Tensor, "n pos"],
    sums: _Sums,
    generator: torch.Generator | None,
) -> Iterator[int]:
    """Adds a batch's Jacobians row by row and yields the row's number; those of a position's own with a generator."""
    names = stream_names(bridge)
    streams: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    first = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    with torch.enable_grad(), taking(bridge, names, streams):
        answer_logits(bridge, tokens, first, hooks=probed(names[:-1], probes))
    sums.means += torch.stack([streams[name].detach()[counted].double().sum(dim=0).cpu() for name in names])
    sums.n += int(counted.sum())
    below, last = [probes[name] for name in names[:-1]], streams[names[-1]]
    for row in range(last.shape[-1]):
        weights = counted.to(last)
        if generator is not None:
            weights = weights * torch.randint(2, counted.shape, generator=generator).mul_(2).sub_(1).to(last)
        gradients = torch.autograd.grad((last[..., row] * weights).sum(), below, retain_graph=row + 1 < last.shape[-1])
        # Each gradient with its own sign again; 1 where all of them are.
        for layer, gradient in enumerate(gradients):
            sums.matrices[layer, row] += torch.einsum("npd,np->d", gradient, weights).double().cpu()
        yield row
