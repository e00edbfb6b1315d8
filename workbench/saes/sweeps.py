"""Sweeps: rules x settings x widths x seeds, as training configurations for one pass over a harvest.

A sweep is a TOML file. Top-level keys are fields of `sae.TrainConfig`; every `[[rule]]` table names a selection
rule and holds its fields and, where it should differ, training settings. A list sweeps its key:

    tokens = 2_000_000
    d_sae = [4096, 16384]
    seed = [0, 1, 2]

    [[rule]]
    name = "topk"
    k = [16, 32, 64]

makes 2 x 3 x 3 SAEs. For a field that is itself a list (`betas`) a list of lists sweeps. The SAEs are named after the
sweep and the settings in which they differ from others of the same rule.

Before training, `estimate` gives what a sweep takes: memory as 16 bytes a parameter (weights, gradient and Adam's two
moments in float32) and the working memory of one step, time from a few steps of every distinct kind of SAE.
"""

import itertools
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from sae import rules
from sae.config import TrainConfig
from sae.errors import InputError
from sae.ranks import ALONE, Ranks
from sae.sharing import Sharing
from sae.source import BatchSource, TargetSource
from sae.training import StepMetrics, train
from workbench.disk.names import check_name
from workbench.models.devices import free_bytes
from workbench.saes.settings import check_keys, check_value, field_types, required_fields

BYTES_PER_PARAMETER = 16
BYTES_OF_FINISHING = 36
"""Per parameter of the widest SAE, for a moment at its end: the input's scale is folded in, it is saved and read back.
Measured on a CPU, where all of it is one memory: the peak at 200,000 features less that at 100,000."""
BYTES_MADE_WHOLE = 8
"""Per parameter of an SAE that several GPUs have shared out: at its end each has it whole, for a moment twice."""
TRIAL_STEPS = 3
"""The first step, which allocates, is not timed."""
SHORT_NAMES = {"d_sae": "d", "sparsity_coefficient": "sparsity"}
SHARED = ("batch_size",)
"""Settings that all SAEs on one stream of batches have in common."""
NOT_IN_FILE = ("name", "rule", "total_tokens")


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says: one mapping of settings for every SAE, before names and tokens are given."""

    variants: tuple[Mapping[str, Any], ...]
    """Training settings; `rule` is the rule."""
    tokens: int | None
    """Tokens to train on; one epoch when None."""

    def configs(self, name: str, total_tokens: int) -> list[TrainConfig]:
        """The training configurations, in the file's order.

        Raises:
            InputError: settings that cannot be trained with, or the same SAE twice.
        """
        names = _names(name, self.variants)
        repeated = next((made for made in names if names.count(made) > 1), None)
        if repeated is not None:
            raise InputError(f"the sweep makes the SAE {repeated!r} twice: take a repeated value or table out")
        configs = [
            TrainConfig(name=check_name(made, "SAE name"), total_tokens=total_tokens, **variant)
            for made, variant in zip(names, self.variants, strict=True)
        ]
        for config in configs:
            config.check()
        return configs


def read_sweep(file: Path | str) -> Sweep:
    """Reads a sweep file.

    Raises:
        InputError: no such file, no TOML, unknown keys (names the nearest known one), values of the wrong type.
    """
    try:
        document = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the sweep {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not TOML: {error}") from None
    return parse_sweep(document, where=str(file))


def parse_sweep(document: Mapping[str, Any], *, where: str = "sweep") -> Sweep:
    """The sweep that a parsed file describes; `where` begins error messages. Raises InputError as `read_sweep`."""
    training = {key: hint for key, hint in field_types(TrainConfig).items() if key not in NOT_IN_FILE}
    check_keys(document, [*training, "tokens", "rule"], where)
    tokens = document.get("tokens")
    if tokens is not None:
        check_value(tokens, int, f"{where}: tokens")
    for key in SHARED:
        if isinstance(document.get(key), list):
            raise InputError(f"{where}: {key} must be one value: all SAEs of a sweep share one stream of batches")
    tables = document.get("rule")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InputError(f'{where} names no selection rule: add a table [[rule]] with name = "topk" and k = 32')
    common = {key: value for key, value in document.items() if key not in ("tokens", "rule")}
    variants: list[dict[str, Any]] = []
    for number, table in enumerate(tables, start=1):
        variants += _table_variants(table, common, training, f"{where}, [[rule]] {number}")
    return Sweep(tuple(variants), tokens)


def _table_variants(
    table: Mapping[str, Any], common: Mapping[str, Any], training: Mapping[str, Any], where: str
) -> Iterator[dict[str, Any]]:
    name = table.get("name")
    check_keys({str(name): None}, rules.rule_names(), f"{where}: name", what="selection rule")
    fields = field_types(rules.rule_class(str(name)))
    own = {key: hint for key, hint in training.items() if key not in SHARED}
    check_keys(table, ["name", *fields, *own], where)
    settings = {**common, **{key: value for key, value in table.items() if key != "name"}}
    # A field that the rule and the trainer both have is the rule's.
    hints = {**training, **fields}
    axes = [[(key, value) for value in _values(settings[key], hints[key], f"{where}: {key}")] for key in settings]
    for choice in itertools.product(*axes):
        chosen = dict(choice)
        of_rule = {key: chosen.pop(key) for key in fields if key in chosen}
        yield {**chosen, "rule": _make_rule(name, of_rule, where)}


def _values(value: Any, hint: Any, where: str) -> list[Any]:
    """The values that one key sweeps over, each checked and turned into the field's type."""
    try:
        return [check_value(value, hint, where)]
    except InputError:
        if not isinstance(value, list):
            raise
    if not value:
        raise InputError(f"{where} is an empty list: give at least one value")
    return [check_value(item, hint, where) for item in value]


def _make_rule(name: Any, fields: dict[str, Any], where: str) -> rules.Rule:
    missing = [key for key in required_fields(rules.rule_class(name)) if key not in fields]
    if missing:
        raise InputError(f"{where}: {name} needs {' and '.join(missing)}: give it a value")
    return rules.from_dict({"name": name, **fields})


def _names(name: str, variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """`name`, the rule where there are several, and the settings in which SAEs of one rule differ."""
    # With defaults: a setting that one table has and another leaves out tells them apart.
    defaults = {field.name: field.default for field in fields(TrainConfig) if field.name not in NOT_IN_FILE}
    flat = [
        {
            **defaults,
            **{key: value for key, value in variant.items() if key != "rule"},
            **rules.to_dict(variant["rule"]),
        }
        for variant in variants
    ]
    seen: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for settings in flat:
        for key, value in settings.items():
            if value not in seen[settings["name"]][key]:
                seen[settings["name"]][key].append(value)
    made = []
    for settings in flat:
        rule = settings.pop("name")
        parts = [name] + ([rule] if len(seen) > 1 else [])
        # The rule's own settings first, the seed last, as in the names that `workbench train` gives.
        order = sorted(settings, key=lambda key: (key == "seed", key == "d_sae", key != "k", key))
        parts += [_label(key, settings[key]) for key in order if len(seen[rule][key]) > 1]
        made.append("-".join(part for part in parts if part))
    return made


def _label(key: str, value: Any) -> str:
    key = SHORT_NAMES.get(key, key)
    if isinstance(value, bool):
        return key if value else ""
    if value is None or value == ():
        return ""
    if isinstance(value, list | tuple):
        return key + "+".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"


@dataclass(frozen=True)
class SweepEstimate:
    """What training takes; sizes in bytes."""

    saes: int
    bytes: int
    free_bytes: int
    """Free memory of the device."""
    seconds: float

    def check(self) -> None:
        """Raises InputError when the memory does not suffice."""
        if self.bytes > self.free_bytes:
            raise InputError(
                f"{self.saes} SAE{'s need' if self.saes > 1 else ' needs'} about {self.bytes / 1e9:,.1f} GB and "
                f"{self.free_bytes / 1e9:,.1f} GB are free: train fewer at a time, narrower ones, or on smaller batches"
            )


def memory(configs: Sequence[TrainConfig], d_in: int, d_out: int) -> int:
    """Bytes of SAEs in training and of one step: gradients, the batch, its residual and its active rows."""
    parameters = sum(_parameters(config, d_in, d_out) for config in configs)
    step = max(4 * config.batch_size * (d_in + d_out) * 3 for config in configs)
    return BYTES_PER_PARAMETER * parameters + step


def _parameters(config: TrainConfig, d_in: int, d_out: int) -> int:
    return (d_in + d_out + 1) * config.d_sae + d_out + d_in * d_out * config.skip


def check_memory(
    configs: Sequence[TrainConfig],
    d_in: int,
    d_out: int,
    device: torch.device | str,
    more: int = 0,
    ranks: Ranks = ALONE,
) -> None:
    """Raises InputError, with what they take, when the device cannot hold these SAEs until they are finished.

    Args:
        more: bytes that something beside them takes.
        ranks: those that train them, each on a GPU of its own, or all in one memory.
    """
    where, sharing = torch.device(device), Sharing(configs, ranks)
    own = [configs[number] for number in sharing.own]
    widest = max(_parameters(config, d_in, d_out) for config in own)
    finishing = BYTES_OF_FINISHING if where.type == "cpu" else BYTES_MADE_WHOLE if sharing.shards.size > 1 else 0
    needed = memory(own, d_in, d_out) // sharing.shards.size + finishing * widest + more
    if where.type == "cpu":
        needed *= ranks.size
    SweepEstimate(len(configs), needed, free_bytes(where), 0.0).check()


def estimate(
    configs: Sequence[TrainConfig], source: BatchSource | TargetSource, *, device: torch.device | str, more: int = 0
) -> SweepEstimate:
    """Memory and time of training `configs` on one stream.

    Args:
        configs: what is to be trained.
        source: a stream for the trial; it is moved, so give one of its own.
        device: where training will run.
        more: bytes that something beside it takes.

    Raises:
        InputError: more memory than the device has free, before the trial.
    """
    where = torch.device(device)
    widths = (source.d_in, source.d_in) if not isinstance(source, TargetSource) else _first_widths(source)
    needed = SweepEstimate(len(configs), memory(configs, *widths) + more, free_bytes(where), 0.0)
    needed.check()
    kinds: dict[str, float] = {}
    seconds = 0.0
    for config in configs:
        kind = repr(replace(config, name="trial", seed=0))
        if kind not in kinds:
            kinds[kind] = _seconds_per_step(config, source, where)
        seconds += kinds[kind] * config.n_steps
    return replace(needed, seconds=seconds)


def _first_widths(source: TargetSource) -> tuple[int, int]:
    return source.pairs[0].d_in, source.pairs[0].d_out


def _seconds_per_step(config: TrainConfig, source: BatchSource | TargetSource, device: torch.device) -> float:
    """Steps of a run cut short after TRIAL_STEPS; reports come after every step and wait for the device."""
    reports: list[StepMetrics] = []
    trial = replace(config, total_tokens=TRIAL_STEPS * config.batch_size, dead_after_tokens=config.dead_after)
    train([trial], source, device=device, on_metrics=reports.append)
    if len(reports) < 2:
        return 0.0
    return (reports[-1].seconds - reports[0].seconds) / (len(reports) - 1)
