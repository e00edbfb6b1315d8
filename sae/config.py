"""What one SAE is and how it is trained: `TrainConfig`, its defaults, its schedules and its checks."""

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from sae import optim, rules
from sae.errors import InputError
from sae.rules import AuxKind, CodeRule, Rule, ThresholdRule, TopK

BDecInit = Literal["geometric_median", "mean", "zero"]
LR_AT_16K = 2e-3
"""Ten times Gao et al.'s 2e-4, which is for billions of tokens. Held-out FVU on the demo model (k 32, batch 4096):
d_sae 4096, 2M tokens: 0.222, 0.105, 0.082 at 4e-4, 2e-3, 4e-3; 20M: 0.070, 0.052, 0.050; d_sae 16384, 2M: 0.227,
0.092, 0.070. At 8e-3 features begin to die."""
MAX_DEAD_AFTER = 10_000_000
ANNEAL_SHARE = 0.7
"""Share of the steps over which k goes from its start to its final value (CSRv2)."""


def steps_of(total_tokens: int, batch_size: int) -> int:
    """Whole batches that come nearest to so many tokens, at least one."""
    return max(1, round(total_tokens / batch_size))


@dataclass(frozen=True)
class TrainConfig:
    """What one SAE is and how it is trained."""

    name: str
    total_tokens: int
    d_sae: int = 4096
    rule: Rule = field(default_factory=lambda: TopK(32))
    lr: float | None = None
    """Peak learning rate; LR_AT_16K * sqrt(2^14 / d_sae), Gao et al.'s (2024) scaling with the width, when None."""
    batch_size: int = 4096
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.2
    """Share of the steps over which it falls to zero at the end."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad_norm: float | None = None
    """Largest norm of all gradients together; None for no limit. For the loss in SAELens' and dictionary_learning's
    units, squared error a token of inputs with mean norm sqrt(d_in), so that their 1 is 1 here."""
    sparsity_coefficient: float | None = None
    """Weight of the penalty of rules without a k; the rule's default when None."""
    sparsity_warmup: float = 0.05
    """Share of the steps over which that weight rises from 0."""
    aux: AuxKind | None = None
    """The auxiliary loss: none, aux_k or aux_zipf; the rule's default when None."""
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int | None = None
    """A feature is dead when it has not fired for this long; when None min(10M, a tenth of the budget), and for
    BatchTopK also at most 500 d_sae / k (`Rule.dead_after_mean_gaps`)."""
    b_dec_init: BDecInit = "geometric_median"
    normalize_input: bool = True
    skip: bool = False
    """Whether a transcoder has a linear path beside its features; an SAE has none."""
    frozen_decoder: bool = False
    """Keeps the decoder at its random start: the baseline that shows what the encoder alone can do."""
    matryoshka: tuple[int, ...] = ()
    """Widths of nested prefixes that each reconstruct; d_sae is added. Empty for the plain error."""
    multi_k: float = 0.0
    """Weight of the error at 4 k, so that codes stay useful beyond k; Gao et al. take 1/8."""
    anneal_from_k: int | None = None
    """k of the first step, or JumpReLU's target; it goes to the rule's own linearly over the first 70% of the steps."""
    seed: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Matryoshka's prefixes up to d_sae."""
        if not self.matryoshka or self.matryoshka[-1] == self.d_sae:
            return self.matryoshka
        return (*self.matryoshka, self.d_sae)

    @property
    def aux_kind(self) -> AuxKind:
        """The auxiliary loss: the one asked for, or the rule's default."""
        return self.aux if self.aux is not None else self.rule.default_aux

    def k_at(self, step: int) -> int:
        """k of a step: round(k0 (1 - p) + k p) with p = step / (0.7 n_steps), at most 1."""
        assert isinstance(self.rule, CodeRule)
        if self.anneal_from_k is None:
            return self.rule.k
        done = min(1.0, step / (ANNEAL_SHARE * self.n_steps))
        return round(self.anneal_from_k * (1 - done) + self.rule.k * done)

    def target_at(self, step: int) -> float | None:
        """The L0 that a threshold rule's penalty steers to at a step, which is annealed as k is; None for none."""
        assert isinstance(self.rule, ThresholdRule)
        if self.rule.target is None or self.anneal_from_k is None:
            return self.rule.target
        done = min(1.0, step / (ANNEAL_SHARE * self.n_steps))
        return self.anneal_from_k * (1 - done) + self.rule.target * done

    def sparsity_at(self, step: int) -> float:
        """Weight of the sparsity penalty at a step."""
        assert isinstance(self.rule, ThresholdRule)
        peak = self.rule.default_sparsity if self.sparsity_coefficient is None else self.sparsity_coefficient
        return peak * min(1.0, (step + 1) / max(1.0, self.sparsity_warmup * self.n_steps))

    @property
    def peak_lr(self) -> float:
        """The learning rate asked for, or LR_AT_16K sqrt(2^14 / d_sae): falling with width as in Gao et al. 2024."""
        return self.lr if self.lr is not None else LR_AT_16K * math.sqrt(2**14 / self.d_sae)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: up to its peak and at the end down to zero, as `warmup` and `decay` say."""
        return optim.learning_rate(step, self.n_steps, self.peak_lr, self.warmup, self.decay)

    @property
    def n_steps(self) -> int:
        """Number of steps; see `steps_of`."""
        return steps_of(self.total_tokens, self.batch_size)

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a feature counts as dead."""
        gaps = self.rule.dead_after_mean_gaps
        if self.dead_after_tokens is not None or gaps is None or not isinstance(self.rule, CodeRule):
            return self._memory
        return max(1, min(self._memory, gaps * self.d_sae // self.rule.k))

    @property
    def _memory(self) -> int:
        """Tokens over which running densities forget: as many as make a feature dead where the rule says nothing."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(1, min(MAX_DEAD_AFTER, self.total_tokens // 10))

    def has_aux(self, step: int) -> bool:
        """Whether a step adds the auxiliary loss: not before any feature can have died."""
        return self.aux_kind != "none" and self.aux_coefficient != 0 and step * self.batch_size >= self.dead_after

    def density_rate(self, step: int) -> float:
        """Weight of a step's batch in the running densities.

        A plain mean over the first steps, then one that forgets over `dead_after_tokens`, or a tenth of the budget.
        """
        return min(1.0, max(self.batch_size / self._memory, 1 / (step + 1)))

    def check(self) -> None:
        """Raises InputError for settings that cannot be trained with."""
        if self.batch_size < 2 or self.total_tokens < 1:
            raise InputError(
                f"{self.name}: needs at least 2 tokens a batch and 1 in all, "
                f"got {self.batch_size} and {self.total_tokens}"
            )
        self.rule.check(self.d_sae, self.batch_size)
        self._check_goes_with_rule()
        self._check_losses()
        if not 0 <= self.seed < 2**63:
            raise InputError(f"{self.name}: the seed must be a whole number from 0 to 2^63 - 1, got {self.seed}")
        if not (0 < self.peak_lr < math.inf):
            raise InputError(f"{self.name}: the learning rate must be positive, got {self.lr}")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise InputError(f"{self.name}: dead_after_tokens must be at least 1, got {self.dead_after_tokens}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"{self.name}: betas are two numbers from 0 to below 1, got {self.betas}")
        # Written so that NaN fails too.
        if not (min(self.warmup, self.decay) >= 0 and self.warmup + self.decay <= 1):
            raise InputError(
                f"{self.name}: warm-up and decay are shares of the steps and at most 1 together, "
                f"got {self.warmup} and {self.decay}"
            )
        if self.b_dec_init not in get_args(BDecInit):
            raise InputError(
                f"{self.name}: unknown b_dec_init {self.b_dec_init!r}: choose {', '.join(get_args(BDecInit))}"
            )

    def _check_goes_with_rule(self) -> None:
        """Settings that only rules with a k, or only those without, can use."""
        if self.aux is not None and self.aux not in get_args(AuxKind):
            raise InputError(f"{self.name}: unknown aux {self.aux!r}: choose {', '.join(get_args(AuxKind))}")
        if isinstance(self.rule, ThresholdRule):
            unused: dict[str, Any] = {
                "matryoshka": self.matryoshka,
                "multi_k": self.multi_k,
            }
            given = [name for name, value in unused.items() if value]
            if given:
                raise InputError(f"{self.name}: {given[0]} needs a rule with a k, and {self.rule.name} has none")
            if self.anneal_from_k is not None and self.rule.target is None:
                raise InputError(
                    f"{self.name}: anneal_from_k needs a rule with a k or a target, and {self.rule.name} has none"
                )
        elif self.sparsity_coefficient is not None:
            raise InputError(
                f"{self.name}: sparsity_coefficient is for relu and jumprelu; set k to make {self.rule.name} sparser"
            )

    def _check_losses(self) -> None:
        if not (0 <= self.sparsity_warmup <= 1):
            raise InputError(f"{self.name}: sparsity_warmup is a share of the steps, got {self.sparsity_warmup}")
        if self.clip_grad_norm is not None and not 0 < self.clip_grad_norm < math.inf:
            raise InputError(f"{self.name}: clip_grad_norm must be positive, or none, got {self.clip_grad_norm}")
        for name in ("sparsity_coefficient", "multi_k", "aux_coefficient"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{self.name}: {name} must be 0 or larger, got {value}")
        edges = (0, *self.widths)
        if any(a >= b for a, b in itertools.pairwise(edges)) or edges[-1] > self.d_sae:
            raise InputError(
                f"{self.name}: matryoshka widths must rise from 1 to at most {self.d_sae}, got {list(self.matryoshka)}"
            )
        if self.anneal_from_k is not None and not 1 <= self.anneal_from_k <= self.d_sae:
            raise InputError(
                f"{self.name}: anneal_from_k must lie between 1 and {self.d_sae}, got {self.anneal_from_k}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON; `from_dict` is the inverse."""
        lists: dict[str, Any] = {"betas": list(self.betas), "matryoshka": list(self.matryoshka)}
        return {**asdict(self), "rule": rules.to_dict(self.rule), **lists}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`. Raises InputError for an unknown rule or settings it does not have."""
        lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("betas", "matryoshka") if name in fields}
        return cls(**{**fields, "rule": rules.from_dict(fields["rule"]), **lists})
