"""Evaluation of SAEs on held-out documents: reconstruction, and what reading through them costs the model.

For every batch of held-out contexts, with H the next-token cross-entropy in nats over the counted positions:

1. the clean pass gives H and the activations x at each hook point;
2. x is encoded and decoded: L0, FVU (ratio of sums), cosine, relative norm, firing densities (`sae.metrics`);
3. the pass is repeated from the hook's layer on with x_hat in x's place (H*, and KL(clean || spliced)), with zeros
   (H_0), and with the mean activation of the same held-out tokens (H_mean).

    added nats      H* - H
    loss recovered  (H_0 - H*) / (H_0 - H), and the same with H_mean
    KL score        1 - KL(clean || spliced) / KL(clean || zeros)

A transcoder is measured where it writes: x is encoded at its hook point, its prediction stands beside the value at its
target, and takes that value's place. With a skip, the share of the target's variance that goes with what the skip adds
is measured too: skip share = 1 - Var(y - x W_skip^T) / Var(y). `workbench.saes.replacement` has all layers at once.

BOS and padding are neither replaced nor counted: a position counts when its own token and the next are ordinary. With
`count_bos` BOS is an ordinary token, as SAEBench has it by default.

Losses are of predicting the next token. Of a model that predicts something else they say nothing: `Evaluation.note`
says so where the logits are no distribution over the vocabulary (the losses are NaN then) or where the clean loss is
worse than that of guessing.
The means come from a first pass over the same tokens, which stops at the hook point; the clean pass goes on from what
that one's last block before it handed on, where that fits into `MOST_KEPT`. All sums are in float64.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.metrics import ReconstructionMetrics, decoder_cosine_maxima, density_histogram
from sae.model import SAE
from sae.shown import Shown
from sae.transcoder import Transcoder
from workbench.models.contexts import BYTES_PER_ROW, ContextBatch, context_batches, context_length, losses, predicted
from workbench.models.hooks import read_hook, written_hook
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.models.places import HookSpec
from workbench.saes.spliced_passes import MOST_LOGITS_KEPT, Ablation, Begun, clean_pass, last_block_before, spliced_pass
from workbench.text.corpora import Corpus

MOST_KEPT = 1 << 30
"""Bytes of one residual stream over all tokens; a first pass over more is repeated up to the hook point."""


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """One SAE on held-out tokens; shares are between 0 and 1, losses in nats per token."""

    tokens: int
    """Held-out tokens encoded."""
    l0: float
    fvu: float
    explained_variance: float
    cosine: float
    relative_norm: float
    dead_share: float
    dense_share: float
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    added_nats: float
    loss_recovered_zero: float
    loss_recovered_mean: float
    kl: float
    decoder_cosine_max: float
    """Mean over features of the largest cosine of its decoder row with another's."""
    density_histogram: list[dict[str, float]]
    """`log10_density` (left edge) and `features` of every bin."""
    # Evaluations that were stored before these were measured lack them.
    explained_variance_per_token: float = math.nan
    explained_variance_uncentred: float = math.nan
    """As `sae.metrics` defines them; `explained_variance` is the ratio of sums."""
    reconstruction_bias: float = math.nan
    kl_zero: float = math.nan
    kl_score: float = math.nan
    skip_share: float = 0.0
    """See the module's description; 0 without a skip."""
    note: str = ""
    """What to know before reading the numbers, such as held-out text that ended early; empty where there is nothing."""

    @property
    def added_nats_zero(self) -> float:
        """By zeros in its place."""
        return self.ce_zero - self.ce_clean

    @property
    def added_nats_mean(self) -> float:
        """By the mean in its place."""
        return self.ce_mean - self.ce_clean

    def to_dict(self) -> dict[str, Any]:
        """The metrics by name, for JSON."""
        return asdict(self)


def evaluate_sae(
    model: LoadedModel,
    saes: Sequence[SAE],
    corpus: Corpus,
    *,
    max_tokens: int = 65_536,
    context_len: int | None = None,
    separate: bool = False,
    count_bos: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Evaluates SAEs of one model on the held-out documents of a corpus; see the module's description.

    Args:
        saes: or transcoders; their `hook_name` says where they read, several may share one.
        max_tokens: held-out rows to use, rounded down to whole contexts.
        separate: no context holds parts of two documents.
        count_bos: read BOS through the SAE too, and count it.
        on_progress: called with (rows done, rows in all).

    Raises:
        InputError: an SAE whose hook point or width does not fit the model, contexts longer than the model takes, or
            too few held-out tokens, or passes that memory cannot hold.
    """
    context_len = context_length(model, context_len)
    reads = [read_hook(model, sae) for sae in saes]
    hooks = [written_hook(model, sae) for sae in saes]
    sizes = {"max_tokens": max_tokens, "context_len": context_len}
    keep = max_tokens * model.info.d_model * model.dtype.itemsize <= MOST_KEPT
    _check_memory(model, saes, [*reads, *hooks], keep=keep, **sizes)
    batches = list(context_batches(model, corpus, "heldout", separate=separate, **sizes))
    if count_bos:
        batches = [replace(batch, ordinary=batch.ordinary | _is_bos(model, batch)) for batch in batches]
    total = sum(batch.tokens.numel() for batch in batches)
    saes = [_on_device(sae, batches[0].tokens.device) for sae in saes]
    means, begun = _first_passes(model, batches, reads, hooks, keep=keep)
    metrics = [
        ReconstructionMetrics(sae.d_out, sae.d_sae, model.device, mean=means[hook.name])
        for sae, hook in zip(saes, hooks, strict=True)
    ]
    ablated = {
        hook.name: (Ablation(model, hook, torch.zeros_like(means[hook.name])), Ablation(model, hook, means[hook.name]))
        for hook in _distinct(hooks)
    }
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=model.device))
    done = 0
    with torch.no_grad():
        for batch, first in zip(batches, begun, strict=True):
            _measure(model, batch, first, saes, reads, hooks, means, ablated, metrics, sums)
            done += batch.tokens.numel()
            if on_progress is not None:
                on_progress(done, total)
    skip_shares = [_skip_share(sums, number) for number in range(len(saes))]
    n_out = int(sums.pop("n_out"))
    loss = {name: (value / sums["count"]).item() for name, value in sums.items()}
    notes = [_note(model, loss["clean"], n_out), _ended(total, max_tokens, context_len)]
    note = "; ".join(said for said in notes if said)
    return [
        replace(_summary(sae, hook, number, loss, metric, note), skip_share=skip_shares[number])
        for number, (sae, hook, metric) in enumerate(zip(saes, hooks, metrics, strict=True))
    ]


def _is_bos(model: LoadedModel, batch: ContextBatch) -> Bool[Tensor, "batch pos"]:
    """Where BOS stands, padding apart, which some models write with the same token."""
    if model.bos_id is None:
        return torch.zeros_like(batch.ordinary)
    return (batch.tokens == model.bos_id) & (batch.doc >= 0)


def _check_memory(
    model: LoadedModel, saes: Sequence[SAE], hooks: Sequence[HookSpec], *, keep: bool, **sizes: int
) -> None:
    """The largest pass reads through an SAE beside the clean logits and activations of its batch."""
    kept = keep * model.info.d_model * model.dtype.itemsize
    moved = [sae for sae in saes if sae.W_dec.device != model.device]
    check_passes_fit(
        f"evaluating {len(saes)} SAE{'s' if len(saes) > 1 else ''}", model, **sizes, n_logits=2, attention=True,
        width=sum({hook.name: hook.width for hook in hooks}.values()), per_token=BYTES_PER_ROW + kept,
        more=sum(2 * sae.W_dec.numel() * sae.W_dec.element_size() for sae in moved)
        + 2 * len(_distinct(hooks)) * MOST_LOGITS_KEPT,
        instead="use fewer tokens or shorter contexts, or evaluate fewer SAEs at a time",
    )  # fmt: skip


def _note(model: LoadedModel, clean: float, n_out: int) -> str:
    """What there is to say about the losses of a model of `n_out` logits."""
    d_vocab = model.info.d_vocab
    if n_out != d_vocab:
        return (
            f"the model gives {n_out:,} logits for a vocabulary of {d_vocab:,}: it predicts something else than the "
            "next token, so there are no losses; the KL is of what it does predict"
        )
    if not model.causal:
        return "this model lets tokens see later ones, so its loss on the next token is not one of predicting it"
    if not clean <= math.log(n_out):
        return (
            f"the model's own loss, {clean:.3g} nats, is worse than guessing among {n_out:,} tokens "
            f"({math.log(n_out):.3g}): it does not predict the next token of this text, so what is added to the loss "
            "or recovered of it says nothing"
        )
    return ""


def _ended(rows: int, max_tokens: int, context_len: int) -> str:
    """What there is to say where held-out text did not fill the contexts that were asked for."""
    if rows >= max_tokens // context_len * context_len:
        return ""
    return f"the held-out text ended after {rows:,} of {max_tokens:,} tokens"


def _on_device(sae: SAE, device: torch.device) -> SAE:
    """The SAE itself, or a copy: the caller's stays where it is."""
    return sae if sae.W_dec.device == device else copy.deepcopy(sae).to(device)


@torch.no_grad()
def _first_passes(
    model: LoadedModel,
    batches: Sequence[ContextBatch],
    reads: Sequence[HookSpec],
    hooks: Sequence[HookSpec],
    *,
    keep: bool,
) -> tuple[dict[str, Float[Tensor, "width"]], list[Begun | None]]:
    """Means over the ordinary tokens at `hooks`, and of every batch where its other passes may begin, if to `keep`."""
    layer = min(last_block_before(model, hook) for hook in (*reads, *hooks))
    sums = {hook.name: torch.zeros(hook.width, dtype=torch.float64, device=model.device) for hook in hooks}
    begun: list[Begun | None] = []
    for batch in batches:
        first = clean_pass(model, batch, _distinct([*reads, *hooks]), None, whole=False)
        output = first.blocks.get(layer)
        # Blocks that hand on more than the stream would fill memory with it.
        begun.append((layer, output) if keep and isinstance(output, Tensor) else None)
        for name, total in sums.items():
            total += first.x[name].double().sum(dim=0)
    count = sum(int(batch.ordinary.sum()) for batch in batches)
    return {name: (total / count).to(model.dtype) for name, total in sums.items()}, begun


def _distinct(hooks: Sequence[HookSpec]) -> list[HookSpec]:
    return list({hook.name: hook for hook in hooks}.values())


def _measure(
    model: LoadedModel,
    batch: ContextBatch,
    begun: Begun | None,
    saes: Sequence[SAE],
    reads: Sequence[HookSpec],
    hooks: Sequence[HookSpec],
    means: dict[str, Tensor],
    ablated: dict[str, tuple[Ablation, Ablation]],
    metrics: Sequence[ReconstructionMetrics],
    sums: dict[str, Tensor],
) -> None:
    """Adds one batch to the metrics and sums."""
    clean = clean_pass(model, batch, _distinct([*reads, *hooks]), begun)
    assert clean.found is not None
    n_out = clean.found.logits[0].shape[-1]
    batch = replace(batch, of_tokens=n_out == model.info.d_vocab)
    sums["n_out"] = torch.tensor(n_out)
    sums["count"] += batch.counted.sum()
    sums["clean"] += losses(batch, clean.found)[0]

    for name, (zeroed, at_mean) in ablated.items():
        zero = losses(batch, zeroed.predicted(batch, clean), clean.found)
        sums[f"zero {name}"] += zero[0]
        sums[f"kl zero {name}"] += zero[1]
        sums[f"mean {name}"] += losses(batch, at_mean.predicted(batch, clean))[0]
    for number, (sae, read, hook) in enumerate(zip(saes, reads, hooks, strict=True)):
        x, y = clean.x[read.name], clean.x[hook.name]
        code = sae.encode(x)
        x_hat = sae.decode(code)
        if isinstance(sae, Transcoder) and sae.W_skip is not None:
            skipped = sae.skip(x)
            x_hat = x_hat + skipped.to(x_hat.dtype)
            _add_spread(sums, f"skip {number} target", y.double() - means[hook.name])
            _add_spread(sums, f"skip {number} rest", (y - skipped).double() - means[hook.name])
        metrics[number].update(y, code, x_hat)
        spliced = predicted(spliced_pass(model, batch, clean.blocks, hook, _constant(x_hat)))
        cross_entropy, divergence = losses(batch, spliced, clean.found)
        sums[f"spliced {number}"] += cross_entropy
        sums[f"kl {number}"] += divergence


def _add_spread(sums: dict[str, Tensor], name: str, rows: Float[Tensor, "n width"]) -> None:
    """Adds the sum, the sum of squares and the number of rows that a variance is made of."""
    sums[f"{name} sum"] = sums[f"{name} sum"] + rows.sum(dim=0)
    sums[f"{name} squares"] += rows.square().sum()
    sums[f"{name} rows"] += len(rows)


def _skip_share(sums: dict[str, Tensor], number: int) -> float:
    """1 - Var(y - skip) / Var(y); 0 without a skip. Takes its sums out."""
    found = []
    for name in (f"skip {number} target", f"skip {number} rest"):
        if f"{name} rows" not in sums:
            return 0.0
        total, squares, rows = (sums.pop(f"{name} {part}") for part in ("sum", "squares", "rows"))
        found.append(float(squares - total.square().sum() / rows))
    return 1 - found[1] / found[0]


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _summary(
    sae: SAE, hook: HookSpec, number: int, loss: dict[str, float], metric: ReconstructionMetrics, note: str
) -> Evaluation:
    found = metric.result()
    clean, spliced = loss["clean"], loss[f"spliced {number}"]
    zero, mean = loss[f"zero {hook.name}"], loss[f"mean {hook.name}"]
    kl, kl_zero = loss[f"kl {number}"], loss[f"kl zero {hook.name}"]
    return Evaluation(
        tokens=found.tokens,
        l0=found.l0,
        fvu=found.fvu,
        explained_variance=found.explained_variance,
        cosine=found.cosine,
        relative_norm=found.relative_norm,
        dead_share=found.dead_share,
        dense_share=found.dense_share,
        ce_clean=clean,
        ce_spliced=spliced,
        ce_zero=zero,
        ce_mean=mean,
        added_nats=spliced - clean,
        loss_recovered_zero=_share(zero - spliced, zero - clean),
        loss_recovered_mean=_share(mean - spliced, mean - clean),
        kl=kl,
        decoder_cosine_max=decoder_cosine_maxima(sae.W_dec, signed=sae.rule.signed).mean().item(),
        density_histogram=density_histogram(found.density, found.tokens),
        explained_variance_per_token=found.explained_variance_per_token,
        explained_variance_uncentred=found.explained_variance_uncentred,
        reconstruction_bias=found.reconstruction_bias,
        kl_zero=kl_zero,
        kl_score=_share(kl_zero - kl, kl_zero),
        note=note,
    )


def _share(recovered: float, lost: float) -> float:
    """recovered / lost; NaN where ablation costs nothing, so that there is nothing to recover."""
    return recovered / lost if lost else float("nan")
