"""The fused step of a rule that compares with thresholds, of which no k bounds the entries: JumpReLU and ReLU.

1. The entries that count - active ones, and those in their threshold's window - are listed.
2. The host asks how many there are, and
3. the batch is learnt from them, in memory for a power of two; or, where more than one entry in
   `KernelSizes.dense_share` counts, as at the start of training, by dense products.

Which of the two depends on the batch and the weights alone, and the power of two leaves no trace in the results, so a
resumed run ends in the same bits. After a dense batch the next one is taken for dense too, which saves its list: the
dense pass counts what a list would have found, and where that was not too long it is thrown away.

Of ranks that share out the features each lists its own; the one that lists most decides for all.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.fused_parts import Part, StepPlan, StepTools
from sae.rules import ActiveSums, ThresholdRule

if TYPE_CHECKING:
    from sae.kernels.triton import Centred, DensePass, ListedAbove, OwnTensor, WindowSums

MIN_PLACES = 2**14


class ThresholdProgram:
    """Steps of one plan.

    Args:
        step: whose steps they are.
        plan: of a rule with thresholds.
    """

    def __init__(self, step: StepTools, plan: StepPlan) -> None:
        assert isinstance(plan.rule, ThresholdRule)
        self.step, self.plan, self.rule = step, plan, plan.rule
        state, config = step.state, step.state.config
        # Activations are lengths in what is predicted: its width sets their scale.
        self.width, self.n_tokens = state.sae.d_out, config.batch_size
        self.bandwidth = self.rule.bandwidth_at(self.width)
        self.slots = config.batch_size * state.sae.d_sae // step.sizes.dense_share
        self.coefficient = step.scalars[3]
        self.target = None if self.rule.target is None else step.scalars[4]
        self.penalty = torch.zeros((), device=state.device)
        self._listed: tuple[Centred, Tensor, ListedAbove] | None = None
        self._counted = torch.zeros((), dtype=torch.int64, device=state.device)
        self._list = Part(self._make_list, capture=step.capture)
        self._learn: Part | None = None
        self._places = 0
        self._dense: tuple[Part, Part] | None = None
        self._passed: tuple[Centred, DensePass] | None = None

    @property
    def is_captured(self) -> bool:
        """Whether what the last step learnt by is replayed."""
        last = self._learn if self._dense is None else self._dense[1]
        return last is not None and last.graph is not None

    def __call__(self) -> None:
        """Makes a step."""
        if self._dense is not None and self._learn_densely():
            return
        self._list()
        assert self._listed is not None
        count = int(self._counted)
        if count > self.slots:
            self._learn, self._places = None, 0
            self._learn_densely()
            return
        wanted = min(self.slots, max(MIN_PLACES, 1 << (max(count, 1) - 1).bit_length()))
        # A count near a power of two must not have the step captured again and again.
        if self._learn is None or self._places < wanted or self._places > 4 * wanted:
            self._learn, self._places = None, wanted
            self._learn = Part(partial(self._learn_from, wanted), capture=self.step.capture, after=self._list)
        self._learn()

    def _threshold(self) -> Tensor:
        return self.rule.threshold(self.step.state.own, self.step.state.sae.W_enc)

    def _make_list(self) -> None:
        from sae.kernels import triton as fast

        centred, parameters = self.step.centre(), self.step.shadowed()
        threshold = self._threshold()
        listed = fast.list_above(
            centred.x, parameters.padded_enc.T, parameters.b_enc, threshold - self.bandwidth / 2, self.slots,
            sizes=self.step.sizes,
        )  # fmt: skip
        self._listed = centred, threshold, listed
        self._count(listed.counter)

    def _count(self, counter: Tensor) -> None:
        """Notes how many entries count, of several ranks on the one with most: all must go on alike."""
        shards = self.step.state.shards
        self._counted.copy_(counter if shards.size == 1 else shards.gather(counter.long()).max())

    def _learn_from(self, places: int) -> None:
        from sae.kernels import triton as fast

        assert self._listed is not None
        centred, threshold, listed = self._listed
        step, config = self.step, self.step.state.config
        entries = fast.entries_of(listed, places)
        theta = threshold[entries.feature]
        # Written so that NaN is active, as everywhere: it is seen, and not hidden.
        code = entries.code(entries.real & ~(entries.z <= theta), step.state.sae.d_sae)
        near = entries.real & ((entries.z - theta).abs() < self.bandwidth / 2)
        terms = fast.ThresholdTerms(self._shrink(), self._own, entries.real, near)
        result = fast.learn(
            centred, code, step.shadowed(), step.state.tokens_since_fired, step.adam(),
            decoder=not config.frozen_decoder, clip=config.clip_grad_norm, aux=step.aux(self.plan), thresholds=terms,
            sizes=step.sizes,
        )  # fmt: skip
        step.record(result, self.plan, self.penalty)

    def _learn_densely(self) -> bool:
        """Makes the step by dense products, unless too little of the batch counts; whether it did."""
        if self._dense is None:
            first = Part(self._make_pass, capture=self.step.capture)
            self._dense = first, Part(self._learn_from_pass, capture=self.step.capture, after=first)
        first, learn = self._dense
        first()
        assert self._passed is not None
        if int(self._counted) <= self.slots:
            # Their memory, some of [n, d_sae], is not kept for a dense batch that may come later.
            self._dense = self._passed = None
            return False
        learn()
        return True

    def _make_pass(self) -> None:
        from sae.kernels import triton as fast

        centred = self.step.centre()
        made = fast.dense_pass(
            centred.x, centred.target, self.step.shadowed(), self._threshold(), centred.scale, self._shrink(),
            self.bandwidth, sizes=self.step.sizes,
        )  # fmt: skip
        self._passed = centred, made
        self._count(made.counter)

    def _learn_from_pass(self) -> None:
        from sae.kernels import triton as fast

        assert self._passed is not None
        step, config = self.step, self.step.state.config
        terms = fast.ThresholdTerms(self._shrink(), self._own)
        result = fast.learn_densely(
            *self._passed, step.shadowed(), terms, step.state.tokens_since_fired, step.adam(),
            decoder=not config.frozen_decoder, clip=config.clip_grad_norm, aux=step.aux(self.plan),
        )  # fmt: skip
        step.record(result, self.plan, self.penalty)

    def _shrink(self) -> Tensor:
        return torch.zeros_like(self.coefficient) + self.rule.shrinkage(self.coefficient, self.width) / self.n_tokens

    def _own(self, windows: "WindowSums", firings: Tensor, magnitude: Tensor) -> list["OwnTensor"]:
        """The rule's tensors with their gradients; notes the penalty."""
        from sae.kernels.triton import Moments, OwnTensor

        state = self.step.state
        active, size = state.shards.sum_(torch.stack([firings.sum().float(), magnitude.float()]))
        sums = ActiveSums(self.n_tokens, active, size, windows.count, windows.gradient, self.target)
        self.penalty.copy_(self.rule.penalty(sums, self.coefficient, self.width))
        gradients = self.rule.own_gradients(state.own, sums, self.coefficient, self.width)
        made = []
        for name, parameter in state.own.items():
            kept = state.adam.state[parameter]
            made.append(OwnTensor(parameter, gradients[name], Moments(kept["exp_avg"], kept["exp_avg_sq"])))
        return made
