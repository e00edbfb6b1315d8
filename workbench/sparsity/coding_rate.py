"""Coding rate of the residual stream by layer: is text compressed, as CRATE's layers must, in the heads' subspaces?

With Z the tokens' vectors, each scaled to length 1, [n, d], and a precision eps = 0.5:

    R(Z)      = 1/2 logdet(I + d / (n eps^2) Z^T Z)           nats a token needs up to that precision
    R^c(Z; U) = sum_k R(Z U_k),  U_k [d, p] orthonormal       ... within the subspaces of K heads

1. Both depend on Z through its second moment alone, which a pass over the text sums up: memory does not grow with it.
2. `rate` is R over that of tokens that point everywhere alike, d/2 log(1 + 1 / eps^2): a share, 1 at most.
3. U_k spans what head k's values are read from (its effective W_V). `heads` is R^c before attention (of what the block
   reads) and after (with attention's output added); a step of CRATE's attention lowers it.
4. Control: as many random subspaces of the same size, mean and standard deviation over draws.

(Yu et al. 2023, "White-Box Transformers via Sparse Rate Reduction"; there U is a layer's one matrix for queries, keys
and values. The unit length is that of MCR^2, Yu et al. 2020.)
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.effective_weights import effective_weights
from sae.errors import InputError
from workbench.models.capture import as_added, hooked
from workbench.models.contexts import ContextBatch
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.models.places import HookSpec

EPS = 0.5
DRAWS = 5
"""Sets of random subspaces."""
PLACES = {"resid_pre": "before", "attn_out": "attention", "resid_post": "after"}
"""What a block reads, the same with attention's output added, what the block hands on: by the hook point seen."""


def coding_rate(moment: Float[Tensor, "*k d d"], eps: float = EPS) -> Float[Tensor, "*k"]:
    """R in nats of vectors whose second moment Z^T Z / n is given."""
    d = moment.shape[-1]
    eye = torch.eye(d, dtype=moment.dtype, device=moment.device)
    found: Tensor = torch.linalg.slogdet(eye + d / eps**2 * moment).logabsdet
    return found / 2


def largest_rate(d: int, eps: float = EPS) -> float:
    """R of vectors of length 1 that point everywhere alike: the largest there is."""
    return d / 2 * math.log1p(1 / eps**2)


def rate_within(moment: Float[Tensor, "d d"], subspaces: Float[Tensor, "k d p"], eps: float = EPS) -> float:
    """R^c in nats, over orthonormal `subspaces`."""
    return float(coding_rate(subspaces.mT @ moment @ subspaces, eps).sum())


class CodingRates:
    """Second moments of a model's residual stream, and the rates they give.

    Raises:
        InputError: a model without a residual stream that attention adds to (see `workbench.models.hooks`).
    """

    def __init__(self, model: LoadedModel) -> None:
        d = model.info.d_model
        self._model = model
        self._moments = [
            {place: torch.zeros(d, d, dtype=torch.float64, device=model.device) for place in PLACES.values()}
            for _ in range(model.info.n_layers)
        ]
        self._tokens = 0
        self._hooks = [
            resolve_hook(model, f"blocks.{layer}.hook_{kind}")
            for layer in range(model.info.n_layers)
            for kind in PLACES
        ]

    @contextmanager
    def seeing(self, batch: ContextBatch) -> Iterator[None]:
        """Adds the ordinary tokens of some contexts while the bare model runs on them."""
        before: list[Tensor] = []

        def see(hook: HookSpec, value: Tensor) -> None:
            rows = as_added(hook, value, batch.tokens)[batch.ordinary].float()
            if hook.kind == "resid_pre":
                before[:] = [rows]
            elif hook.kind == "attn_out":
                rows = before[0] + rows
            unit = torch.nn.functional.normalize(rows, dim=1)
            self._moments[hook.layer][PLACES[hook.kind]] += unit.T @ unit

        with hooked(self._model, self._hooks, see):
            yield
        self._tokens += int(batch.ordinary.sum())

    def table(self, *, draws: int = DRAWS) -> pd.DataFrame:
        """One row a layer: layer, rate_before, rate_attention, rate_after (shares), heads_before, heads_attention (nats
        a token, missing where a layer's values have no matrix of their own) and random_before, random_attention,
        random_change_sd: the mean over draws, and the spread of what attention changes.

        Args:
            draws: sets of random subspaces; seeds 0 to draws - 1.
        """
        return pd.DataFrame([self._row(layer, draws) for layer in range(len(self._moments))])

    def _row(self, layer: int, draws: int) -> dict[str, Any]:
        moments = {place: moment / self._tokens for place, moment in self._moments[layer].items()}
        d = self._model.info.d_model
        found: dict[str, Any] = {"layer": layer}
        for place, moment in moments.items():
            found[f"rate_{place}"] = float(coding_rate(moment)) / largest_rate(d)
        try:
            values = effective_weights(self._model.bridge, "v", layer).W
        except InputError:
            return found
        own = torch.linalg.qr(values.double().movedim(1, 0)).Q
        random = [_random_subspaces(own, seed) for seed in range(draws)]
        for place in ("before", "attention"):
            found[f"heads_{place}"] = rate_within(moments[place], own)
        before, attention = (
            torch.tensor([rate_within(moments[place], drawn) for drawn in random]) for place in ("before", "attention")
        )
        return found | {
            "random_before": float(before.mean()), "random_attention": float(attention.mean()),
            "random_change_sd": float((attention - before).std()),
        }  # fmt: skip


def _random_subspaces(like: Float[Tensor, "k d p"], seed: int) -> Float[Tensor, "k d p"]:
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    return torch.linalg.qr(drawn.to(like.device)).Q
