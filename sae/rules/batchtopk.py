"""BatchTopK: a batch of n tokens keeps its k n largest of relu(z), wherever they are (arXiv 2412.06410, eq. 4-6).

Mutual choice (Ayonrinde 2024, arXiv 2411.02124) is the same rule under another name.

A token no longer has to find k features, so those that are small for all tokens fall silent, and the fewer are left the
worse the dictionary: they are to be revived soon. Hence `dead_after_mean_gaps`; docs/methods/rules.md has what it
is worth. (Not so for signed activations and aux-zipf, where it has not been found to help.)

Inference compares with one threshold, so that a token's code does not depend on its batch. The paper averages the
smallest selected activation over batches, E[min]. That is a mean of minima and its L0 need not be k; here the
threshold is the (k N)-th largest of N held-out tokens, which gives L0 = k on them by construction ("reconstructed").
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.code import SparseCode
from sae.kernels import batch_topk_encode, largest_of_shards, threshold_encode
from sae.ranks import Ranks
from sae.rules.base import NO_TENSORS, AuxKind, Batch, CodeRule, FusedEncoder, FusedInputs, Tensors, just_below


@dataclass(frozen=True)
class BatchTopK(CodeRule):
    """Keeps `k` entries a token on average over the batch."""

    name: ClassVar[str] = "batchtopk"
    needs_calibration: ClassVar[bool] = True
    dead_after_mean_gaps: ClassVar[int | None] = 500
    saelens: ClassVar[str | None] = "jumprelu"

    def select(self, batch: Batch) -> SparseCode:
        """The k n largest of the batch."""
        n_entries = self.k * batch.x.shape[0]
        return batch_topk_encode(batch.x, batch.W_enc, batch.b_enc, n_entries, absolute=self.signed)

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """Entries above the stored threshold."""
        return threshold_encode(x, W_enc, b_enc, state["threshold"], absolute=self.signed)

    def among(self, code: SparseCode, n_tokens: int, ranks: Ranks) -> SparseCode:
        """The k n largest of all ranks' lists."""
        return largest_of_shards(code, self.k * n_tokens, ranks)

    def fused_encoder(self, inputs: FusedInputs) -> FusedEncoder:
        """A list of candidates and the code that it gives, and a look at whether the list holds the answer."""
        from sae.kernels import triton as fast

        n_entries = min(self.k, inputs.d_sae) * inputs.n_tokens
        if self.k > fast.MAX_MEAN:
            waiting = partial(fast.batch_topk_encode, n_entries=n_entries, absolute=self.signed, sizes=inputs.sizes)
            return FusedEncoder(waiting, captured=False)
        listing = fast.Listing(n_entries, absolute=self.signed, sizes=inputs.sizes)

        def narrow(code: SparseCode) -> Bool[Tensor, "entries"]:
            return fast.largest(code.values, n_entries)

        return FusedEncoder(listing.encode, listing.prepare, listing.settle, narrow=narrow)

    def new_state(self, d_sae: int) -> dict[str, Tensor]:
        """A threshold, the same for every feature."""
        return {"threshold": torch.zeros(d_sae)}

    def calibrate(self, sample: Batch) -> dict[str, Tensor]:
        """The threshold that k entries a token of the sample exceed; 0 when fewer are positive."""
        wanted = self.k * sample.x.shape[0]
        magnitudes = self.select(sample).values.abs()
        lowest = just_below(magnitudes.min()) if magnitudes.shape[0] == wanted else magnitudes.new_zeros(())
        return {"threshold": lowest.expand_as(sample.b_enc).clone()}


@dataclass(frozen=True)
class MutualChoice(BatchTopK):
    """BatchTopK under Ayonrinde's name, with the auxiliary loss of that paper."""

    name: ClassVar[str] = "mutual_choice"
    dead_after_mean_gaps: ClassVar[int | None] = None
    default_aux: ClassVar[AuxKind] = "aux_zipf"


@dataclass(frozen=True)
class BatchAbsTopK(BatchTopK):
    """AbsTopK over the batch: keeps the `k` n entries of largest |z| and their signs.

    The official AbsTopK code calls it `batchabsolutek`. SAELens has no signed thresholds, so it cannot load these.
    """

    name: ClassVar[str] = "batch_abstopk"
    dead_after_mean_gaps: ClassVar[int | None] = None
    signed: ClassVar[bool] = True
    saelens: ClassVar[str | None] = None
