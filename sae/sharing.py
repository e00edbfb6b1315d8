"""How the ranks of a run share out its SAEs.

As many SAEs as ranks, or more: each rank trains whole ones, every so many-th, on the one stream that all read alike.
Nothing of a step is exchanged, only reports. Fewer SAEs than ranks: each has its features shared out over all ranks, in
spans; every rank reads all tokens, and what is exchanged in a step does not grow with the number of features:

1. Every rank chooses among its features, and from what all have chosen its own among the best (`sae.kernels.shards`).
2. What the ranks' features write is added up; all have the error.
3. Every rank moves its features: their gradients need that error alone. Of b_dec's gradient, and of the norm that
   clipping looks at, the ranks' parts are added up.

Gao et al. 2024 (arXiv 2406.04093) shard so, with a choice that equals one device's up to four ranks and but for ties.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sae.config import TrainConfig
from sae.errors import InputError
from sae.model import SAE
from sae.plain_step import MULTI_K
from sae.ranks import ALONE, Ranks
from sae.rules import CodeRule, ThresholdRule

AGREE_EVERY = 16
"""Steps after which ranks agree on whether to write a checkpoint or to stop: Ctrl-C meets them at different steps."""


@dataclass(frozen=True)
class TrainedSAE:
    """What became of one configuration: a finished SAE, or the reason why there is none."""

    config: TrainConfig
    sae: SAE | None
    error: str | None = None


class Sharing:
    """Which SAEs a rank trains, and over which ranks their features are shared out.

    Attributes:
        ranks, configs: all of them.
        own: the numbers of the configurations whose SAEs this rank has, or has a part of.
        shards: the ranks that have these SAEs' features.

    Raises:
        InputError: an SAE that cannot be shared out over so many ranks.
    """

    def __init__(self, configs: Sequence[TrainConfig], ranks: Ranks) -> None:
        self.ranks, self.configs = ranks, configs
        self._n = len(configs)
        together = self._n < ranks.size
        self.shards = ranks if together else ALONE
        self.own = list(range(self._n)) if together else list(range(ranks.rank, self._n, ranks.size))
        if together:
            for config in configs:
                check_shards(config, ranks)

    @property
    def is_alone(self) -> bool:
        """Whether the run has one SAE, or a part of each, so that none goes on without another."""
        return self._n == 1 or self.shards.size > 1

    @property
    def reports(self) -> bool:
        """Whether this rank reports on what it has; of an SAE that all share, the first one does."""
        return self.shards.size == 1 or self.ranks.leads

    def agrees_at(self, step: int, n_steps: int) -> bool:
        """Whether the ranks speak after that step of so many: now and then, and after the last."""
        return self.ranks.size == 1 or step % AGREE_EVERY == 0 or step == n_steps

    def collected(self, results: Mapping[int, TrainedSAE]) -> list[TrainedSAE]:
        """The results of all configurations, on the first rank with their SAEs."""
        if self.shards.size == self.ranks.size:
            return [results[number] for number in range(self._n)]
        every: list[TrainedSAE] = []
        for number in range(self._n):
            owner, result = number % self.ranks.size, results.get(number)
            if result is not None and result.sae is not None and not self.ranks.leads:
                result = TrainedSAE(result.config, result.sae.cpu(), result.error)
            told = self.ranks.to_lead(result, owner)
            if told is not None:
                every.append(told)
        return every


def check_shards(config: TrainConfig, ranks: Ranks) -> None:
    """Raises InputError for an SAE whose features cannot be shared out over so many ranks."""
    rule, least = config.rule, config.d_sae // ranks.size
    if isinstance(rule, ThresholdRule):
        if any(len(tensor) != config.d_sae for tensor in rule.trained_tensors(config.d_sae, 1).values()):
            raise InputError(f"{config.name}: the rule {rule.name} trains tensors that are not of its features")
        return
    assert isinstance(rule, CodeRule)
    if not rule.has_among():
        raise InputError(
            f"{config.name}: the rule {rule.name} must see all features of a token or a batch on one rank: train it "
            f"without torchrun, or at least {ranks.size} SAEs side by side, of which each rank has whole ones"
        )
    largest = max(rule.k, config.anneal_from_k or 0) * (MULTI_K if config.multi_k else 1)
    if min(largest, config.d_sae) > least:
        raise InputError(
            f"{config.name}: {largest} features of a token do not fit in the {least} that each of {ranks.size} ranks "
            "has: take fewer ranks, or a larger SAE"
        )
