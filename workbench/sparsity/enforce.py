"""Running a model with part of its activations set to zero, and what that costs.

1. Thresholds come from a sample of the training documents (`calibration`).
2. `enforced` thins the inputs of weight matrices while the bare model runs. BOS is spared: its vector is unlike any
   other (massive activations, attention sinks) and the same in every context, so it can be computed once and kept.
3. On held-out contexts, for every method and level, against the clean pass on the same contexts:
       loss, perplexity = exp(loss), KL(clean || thinned)          per counted position, in nats
       sparsity = share of zeros among the entries of the thinned inputs after masking (mean over matrices' entries)
4. FLOPs saved, as a share of all weight products in the blocks (two per weight and token; attention scores and the
   unembedding are not counted, they are the same for every method):
       as it is         the columns of a thinned matrix that meet zeros, and for methods that know their mask from the
                        gate, the rows of W_in of the same neurons
       with a predictor  MLP methods only: the rows of every matrix into h too, were the mask known beforehand, which
                        takes a predictor that is never wrong; an upper bound
   NaN where an MLP is a mixture of experts: its zeros come by whole experts, whose products were never made.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from circuits.turns import turn_of
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.contexts import ContextBatch, logits_of, losses
from workbench.models.load import LoadedModel
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.layers import flat_like
from workbench.sparsity.methods import METHODS, Keep, Method, check_methods


class Tally:
    """Counts zeros among the thinned entries, by matrix, over every pass inside `enforced`."""

    def __init__(self) -> None:
        self._zeros: dict[str, Tensor] = {}
        self._entries: dict[str, int] = defaultdict(int)

    def add(self, name: str, thinned: Tensor) -> None:
        """Counts the zeros of a matrix' thinned input, of any shape."""
        zeros = thinned.numel() - torch.count_nonzero(thinned)
        # Left on the device: reading it here would stop the GPU at every matrix.
        self._zeros[name] = self._zeros[name] + zeros if name in self._zeros else zeros
        self._entries[name] += thinned.numel()

    def share(self, name: str) -> float:
        """Share of zeros in one matrix' input."""
        return self._zeros[name].item() / max(1, self._entries[name])

    def shares(self) -> dict[str, float]:
        """By matrix."""
        return {name: self.share(name) for name in self._zeros}

    def sparsity(self) -> float:
        """Share of zeros over all thinned entries."""
        return sum(zeros.item() for zeros in self._zeros.values()) / max(1, sum(self._entries.values()))


@contextmanager
def enforced(
    model: LoadedModel, calibration: Calibration, keeps: Mapping[str, Keep], tally: Tally | None = None
) -> Iterator[None]:
    """Thins the inputs of matrices in every pass of `model.hf` inside the context, also while it generates.

    Args:
        keeps: what is kept, by name of the matrix; see `methods.base.Keep`.
        tally: counts what is zero afterwards.

    Hooks go when the context ends, also by an exception.
    """
    ordinary: list[Tensor] = []
    driven: dict[str, Tensor] = {}

    def see_tokens(_: nn.Module, args: tuple[Any, ...]) -> None:
        ordinary[:] = [args[0] != (-1 if model.bos_id is None else model.bos_id)]

    def see_drive(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            driven[name] = output

        return hook

    def thin(name: str, keep: Keep) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            rows = flat_like(ordinary[0], x)
            drive = driven.pop(name, None)
            chosen = x[rows]
            mask = keep(chosen, None if drive is None else drive[rows])
            thinned = torch.where(mask, chosen, 0.0)
            if tally is not None:
                tally.add(name, thinned)
            replaced = x.clone()
            replaced[rows] = thinned
            return replaced, *args[1:]

        return hook

    with turn_of(model.hf), ExitStack() as stack:
        embeddings: Any = model.hf
        stack.callback(embeddings.get_input_embeddings().register_forward_pre_hook(see_tokens).remove)
        for mlp in calibration.mlps:
            if mlp.out.name in keeps and mlp.drive is not None:
                stack.callback(mlp.drive.module.register_forward_hook(see_drive(mlp.out.name)).remove)
        for matrix in calibration.projections:
            if matrix.name in keeps:
                handle = matrix.module.register_forward_pre_hook(thin(matrix.name, keeps[matrix.name]))
                stack.callback(handle.remove)
        yield


@dataclass(frozen=True)
class Point:
    """One level of one method on the held-out tokens."""

    method: str
    level: float
    """What it means depends on the method, see `Method.level_means`."""
    sparsity: float
    loss: float
    added_nats: float
    perplexity: float
    kl: float
    flops_saved: float
    flops_saved_predictor: float | None
    """None for methods that thin every matrix."""


@dataclass(frozen=True, repr=False)
class Curves(Shown):
    """Every method's points, and the shares of zeros behind them."""

    clean_loss: float
    tokens: int
    """Positions counted."""
    points: tuple[Point, ...]
    shares: pd.DataFrame
    """method, level, matrix, sparsity."""

    def table(self) -> pd.DataFrame:
        """One row per point."""
        return pd.DataFrame([vars(point) for point in self.points])


def enforce(
    model: LoadedModel,
    calibration: Calibration,
    batches: Sequence[ContextBatch],
    *,
    methods: Sequence[Method] = tuple(METHODS.values()),
    on_progress: Callable[[int, int], None] | None = None,
) -> Curves:
    """Measures the curves of `methods`; see the module's description.

    Args:
        batches: held-out contexts; every one is run once clean and once per point.
        on_progress: called with (passes done, passes in all), in tokens.

    Raises:
        InputError: no held-out position to measure on, or a method that the MLPs cannot be thinned with.
    """
    check_methods(methods, calibration.mlps)
    plan = [(method, level, method.keeps(level, calibration)) for method in methods for level in method.levels]
    tallies = [Tally() for _ in plan]
    sums = torch.zeros(len(plan), 2, dtype=torch.float64)
    clean_sum, count, done = 0.0, 0, 0
    total = sum(batch.tokens.numel() for batch in batches) * (len(plan) + 1)
    for batch in batches:
        clean = logits_of(model, batch)
        clean_sum += losses(batch, clean)[0].item()
        count += int(batch.counted.sum())
        done += batch.tokens.numel()
        for number, (_, _, keeps) in enumerate(plan):
            with enforced(model, calibration, keeps, tallies[number]):
                logits = logits_of(model, batch)
            sums[number] += torch.stack(losses(batch, logits, clean)).cpu()
            done += batch.tokens.numel()
            if on_progress is not None:
                on_progress(done, total)
    if not count:
        raise InputError("no held-out position to measure on: every context is BOS and padding")
    clean_loss = clean_sum / count
    means = (sums / count).tolist()
    points = tuple(
        point_of(calibration, method, level, tally, mean, clean_loss)
        for (method, level, _), tally, mean in zip(plan, tallies, means, strict=True)
    )
    rows = [
        {"method": method.name, "level": level, "matrix": name, "sparsity": share}
        for (method, level, _), tally in zip(plan, tallies, strict=True)
        for name, share in tally.shares().items()
    ]
    return Curves(clean_loss, count, points, pd.DataFrame(rows))


def mean_loss(model: LoadedModel, batches: Sequence[ContextBatch]) -> float:
    """The bare model's loss per counted position."""
    total = count = 0.0
    for batch in batches:
        total += losses(batch, logits_of(model, batch))[0].item()
        count += int(batch.counted.sum())
    return total / count


def point_of(
    calibration: Calibration, method: Method, level: float, tally: Tally, mean: Sequence[float], clean_loss: float
) -> Point:
    """A point of a curve. Args: mean: loss and KL per counted position; tally: of the passes behind it."""
    loss, kl = mean
    shares = tally.shares()
    return Point(
        method=method.name,
        level=level,
        sparsity=tally.sparsity(),
        loss=loss,
        added_nats=loss - clean_loss,
        perplexity=math.exp(min(loss, 700.0)),
        kl=kl,
        flops_saved=flops_saved(calibration, shares, skips_up=method.skips_up),
        flops_saved_predictor=flops_saved(calibration, shares, skips_up=True, skips_drive=True)
        if method.scope == "mlp"
        else None,
    )


def flops_saved(
    calibration: Calibration, shares: Mapping[str, float], *, skips_up: bool = False, skips_drive: bool = False
) -> float:
    """Share of the blocks' weight products that zeros make needless; see step 4 of the module's description.

    Args:
        shares: share of zeros in the input of each thinned matrix.
        skips_up: the W_in of a gated MLP loses the rows of its zero neurons.
        skips_drive: so does the matrix before the activation function.
    """
    if any(mlp.drive is None for mlp in calibration.mlps):
        return math.nan
    saved = sum(matrix.flops * shares.get(matrix.name, 0.0) for matrix in calibration.projections)
    for mlp in calibration.mlps:
        share = shares.get(mlp.out.name, 0.0)
        saved += share * mlp.up.flops if skips_up and mlp.up is not None else 0.0
        saved += share * mlp.drive.flops if skips_drive and mlp.drive is not None else 0.0
    return saved / sum(matrix.flops for matrix in calibration.projections)


@torch.no_grad()
def generate(
    model: LoadedModel,
    calibration: Calibration,
    prompt: str,
    method: Method,
    level: float,
    *,
    new_tokens: int = 60,
) -> str:
    """The model's greedy continuation of `prompt` with a method at a level.

    Raises:
        InputError: an empty prompt, or one that leaves no room in the model's context.
    """
    ids = model.encode(prompt)
    if not ids:
        raise InputError("the prompt holds no token: write something to continue")
    room = model.info.n_ctx - 1 - len(ids)
    if room < 1:
        raise InputError(
            f"the prompt has {len(ids)} tokens and {model.info.name} takes {model.info.n_ctx - 1}: shorten it"
        )
    tokens = torch.tensor([model.begun(ids)], device=model.device)
    hf: Any = model.hf
    with enforced(model, calibration, method.keeps(level, calibration)):
        made = hf.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=min(new_tokens, room), do_sample=False,
            pad_token_id=model.bos_id,
        )  # fmt: skip
    return str(model.tokenizer.decode(made[0, tokens.shape[1] :]))
