"""The passes of a model that an evaluation makes over a batch: without a change, and with something in an activation's
place. All begin after the last block that the change leaves as it is.

With one vector in place of a whole residual stream, contexts differ by what is left of them alone: nothing, or the
first token, where that is BOS. Those that have the same left give the same logits and are run once (`Ablation`): an
evaluation's ablations, half of its passes, then cost next to nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.resume import recorded_block, resumed_after
from circuits.splice import splice
from workbench.models.contexts import ContextBatch, Predicted, predicted
from workbench.models.fused_attention import bridge_logits
from workbench.models.load import LoadedModel
from workbench.models.places import HookSpec

MOST_LOGITS_KEPT = 1 << 26
"""Bytes of the logits that an ablation keeps; longer contexts are run once a batch."""
NO_TOKEN = -1
"""Where nothing of a context is left."""

Begun = tuple[int, Any]
"""A block, and what it handed on."""
Row = tuple[Float[Tensor, "pos vocab"], Float[Tensor, "pos"]]
"""Logits of one context, and the logarithms of their sums."""


@dataclass(frozen=True)
class CleanPass:
    """A pass without a change."""

    found: Predicted | None
    """None of a pass that stopped at the last hook point."""
    x: dict[str, Float[Tensor, "ordinary width"]]
    """Activations of the ordinary tokens by hook name."""
    blocks: dict[int, Any]
    """What the last block before each hook's layer handed on."""


class _Seen(Exception):
    """Every hook point has been seen."""


def last_block_before(model: LoadedModel, hook: HookSpec) -> int:
    """The last block that a change at the hook point leaves as it is; -1 if there is none, or none is known."""
    if not hasattr(model.structure, "blocks"):
        return -1
    return hook.layer if hook.kind == "resid_post" else hook.layer - 1


def clean_pass(
    model: LoadedModel, batch: ContextBatch, hooks: Sequence[HookSpec], begun: Begun | None, *, whole: bool = True
) -> CleanPass:
    """A pass without a change, from `begun` on where there is one, to the end unless it is not to be `whole`."""
    x: dict[str, Tensor] = {}
    logits = None
    with suppress(_Seen), ExitStack() as stack:
        if begun is not None:
            stack.enter_context(resumed_after(model.bridge, *begun))
        blocks = {
            layer: stack.enter_context(recorded_block(model.bridge, layer))
            for layer in {last_block_before(model, hook) for hook in hooks}
            if layer >= 0
        }
        for hook in hooks:

            def record(value: Tensor, name: str = hook.name) -> Tensor:
                x[name] = value
                if not whole and len(x) == len(hooks):
                    raise _Seen
                return value

            stack.enter_context(splice(model.bridge, hook.name, record, keep=~batch.ordinary))
        logits = bridge_logits(model, batch.tokens)
    return CleanPass(
        None if logits is None else predicted(logits), x, {layer: outputs[0] for layer, outputs in blocks.items()}
    )


def spliced_pass(
    model: LoadedModel,
    batch: ContextBatch,
    blocks: dict[int, Any],
    hook: HookSpec,
    function: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch pos vocab"]:
    """Logits with `function` of the ordinary tokens' activations [ordinary, width] in their place.

    Args:
        blocks: of the batch's clean pass.
    """
    with ExitStack() as stack:
        before = last_block_before(model, hook)
        if before >= 0:
            stack.enter_context(resumed_after(model.bridge, before, blocks[before]))
        stack.enter_context(splice(model.bridge, hook.name, function, keep=~batch.ordinary))
        return bridge_logits(model, batch.tokens)


@dataclass
class Ablation:
    """A model with one vector in place of the ordinary tokens' activations at a hook point.

    That contexts with the same left give the same logits is not taken for granted, since some models read their tokens
    again in later layers: the first of them that differ in their tokens are all run. Where they do not agree, so are
    all others.
    """

    model: LoadedModel
    hook: HookSpec
    vector: Float[Tensor, "width"]
    _known: dict[int, tuple[Int[Tensor, "pos"], Row]] = field(default_factory=dict)
    """By what is left: the tokens of a context that has been run, and what it gave."""
    _agree: bool | None = None
    """Whether contexts with the same left agree; None before any were compared."""

    def predicted(self, batch: ContextBatch, clean: CleanPass) -> Predicted:
        """What every context gives; contexts that give the same share one tensor.

        Args:
            clean: the batch's pass without a change.
        """
        before = last_block_before(self.model, self.hook)
        blocks = {before: clean.blocks[before]} if before in clean.blocks else {}
        if self._agree is False or not all(isinstance(output, Tensor) for output in blocks.values()):
            return self._run(batch, blocks)
        left = self._left(batch)
        if self._agree is None:
            ran = self._run(batch, blocks)
            for token, rows in left.items():
                self._compare(token, batch.tokens[rows], [_row(ran, row) for row in rows])
            return ran
        first = {token: rows[0] for token, rows in left.items() if token not in self._known}
        same = {row for rows in left.values() for row in rows}
        run = sorted([*first.values(), *(row for row in range(len(batch.tokens)) if row not in same)])
        found: dict[int, Row] = {}
        if run:
            fresh = self._run(batch.part(run), {layer: output[run] for layer, output in blocks.items()})
            found = {row: _row(fresh, number) for number, row in enumerate(run)}
        for token, rows in left.items():
            if token in first:
                self._keep(token, batch.tokens[rows[0]], found[rows[0]])
            found |= dict.fromkeys(rows, self._known[token][1] if token in self._known else found[rows[0]])
        logits, log_z = zip(*(found[row] for row in range(len(batch.tokens))), strict=True)
        return Predicted(logits, log_z)

    def _left(self, batch: ContextBatch) -> dict[int, list[int]]:
        """Contexts by the token that is left of them, NO_TOKEN where none is; not those of which more is left."""
        found: dict[int, list[int]] = {}
        if not self.model.causal or not self.hook.kind.startswith("resid"):
            return found
        for row in torch.nonzero(batch.ordinary[:, 1:].all(dim=1)).flatten().tolist():
            left = NO_TOKEN if batch.ordinary[row, 0] else int(batch.tokens[row, 0])
            found.setdefault(left, []).append(row)
        return found

    def _compare(self, left: int, tokens: Int[Tensor, "n pos"], rows: Sequence[Row]) -> None:
        """Whether contexts with the same left agree with the first of them, as far as they have other tokens."""
        if left not in self._known:
            self._keep(left, tokens[0], rows[0])
        known_tokens, (known, _) = self._known.get(left, (tokens[0], rows[0]))
        # Rounding alone, since batches of another size may be summed in another order.
        rounding = max(1e-5, 4 * torch.finfo(known.dtype).eps) * known.abs().max()
        for own, (logits, _) in zip(tokens, rows, strict=True):
            if (own != known_tokens).any():
                self._agree = self._agree is not False and bool(((logits - known).abs() <= rounding).all())

    def _keep(self, left: int, tokens: Int[Tensor, "pos"], row: Row) -> None:
        if (len(self._known) + 1) * row[0].nbytes <= MOST_LOGITS_KEPT:
            self._known[left] = tokens, (row[0].clone(), row[1].clone())

    def _run(self, batch: ContextBatch, blocks: dict[int, Any]) -> Predicted:
        return predicted(spliced_pass(self.model, batch, blocks, self.hook, self.vector.expand_as))


def _row(found: Predicted, row: int) -> Row:
    return found.logits[row], found.log_z[row]
