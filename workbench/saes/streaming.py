"""Rows for a training run straight from a model that runs beside it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from sae.config import TrainConfig
from sae.errors import InputError
from sae.ranks import meet
from sae.source import TargetSource
from sae.training import CALIBRATION_ROWS
from workbench.catalog.catalog import Catalog
from workbench.disk.names import new_folder
from workbench.harvest.keeping import KeptHarvest
from workbench.harvest.pairs import PairSource, hooks_of, targets_of
from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.run import made_from, opened
from workbench.harvest.stream import ModelRows, buffer_bytes, columns_of
from workbench.models.contexts import CONTEXT_LEN
from workbench.models.hooks import check_hooks
from workbench.models.model import LoadedModel
from workbench.saes.hook_pairs import EVERY_LAYER, HookPairs, as_hooks, at_layer, pairs_among
from workbench.text.corpora import Corpus


class FromModel:
    """Rows of a model's activations over a corpus, which the model computes while training goes on.

    Args:
        config: what runs over what; hook points beside those asked for are kept, and one alone need not be asked for.
        each: whether several hook points are an SAE's each.
        keep: name of a harvest to write on the way.
        buffer_rows: rows that are shuffled together, see `workbench.harvest.stream`.
        gradients: whether a rule needs them.
        model, corpus: what the configuration names, already loaded.

    The model is not loaded before something of it is asked for: a finished run answers without it.
    """

    def __init__(
        self,
        catalog: Catalog,
        config: HarvestConfig,
        hook: str | Sequence[str] | None,
        target_hook: str | None,
        device: str,
        *,
        each: bool,
        gradients: bool,
        keep: str | None = None,
        buffer_rows: int | None = None,
        model: LoadedModel | None = None,
        corpus: Corpus | None = None,
    ) -> None:
        self._hooks = as_hooks(hook)
        if len(self._hooks) > 1 and not each and target_hook is None:
            raise InputError(
                "crosscoders train on a harvest: make one of these hook points, or say --each for an SAE at each"
            )
        if buffer_rows is not None and buffer_rows < 1:
            raise InputError(f"a buffer of {buffer_rows} rows holds none: give more with --buffer")
        self._config, self._target = replace(config, gradients=gradients).absolute(), target_hook
        self._device, self._keep, self._buffer_rows, self._given = device, keep, buffer_rows, (model, corpus)
        self._folder = None if keep is None else new_folder(catalog.harvest_folder(keep))

    @property
    def description(self) -> dict[str, Any]:
        """What `run.json` says of it."""
        # The model says what it takes of the usual length, and is not loaded for this.
        usual = self._config.context_len or CONTEXT_LEN
        made: dict[str, Any] = {"stream": asdict(replace(self._config, hooks=self._asked, context_len=usual))}
        if self._buffer_rows is not None:
            made["buffer_rows"] = self._buffer_rows
        return made if self._keep is None else {**made, "keep": self._keep}

    @property
    def _asked(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._config.hooks, *self._hooks, *([self._target] if self._target else []))))

    @cached_property
    def places(self) -> HookPairs:
        """Where rows are taken: for patterns, in every layer that the model has. Raises InputError without a hook
        point."""
        known: list[str] = []
        for name in self._asked:
            layers = range(self._opened[1].info.n_layers) if EVERY_LAYER in name else range(1)
            known += [at_layer(name, layer) for layer in layers]
        if not known:
            raise InputError("nothing is read without a hook point: give one, --hook blocks.2.hook_resid_post")
        return pairs_among(known, self._config.model, self._hooks, self._target)

    @cached_property
    def _opened(self) -> tuple[HarvestConfig, LoadedModel, Corpus]:
        if self._given[0] is None:
            check_hooks(self._config.model, self._asked)
        return opened(self._config, *self._given, self._device)

    @cached_property
    def _prepared(self) -> tuple[HarvestConfig, HarvestPlan]:
        config, model, _ = self._opened
        every = dict.fromkeys([*self._config.hooks, *hooks_of(self.places.pairs)])
        config = replace(config, hooks=tuple(every))
        return config, HarvestPlan.of(model, config)

    @property
    def widths(self) -> tuple[int, int]:
        """(width of what is read, width of what is predicted), of the first pair."""
        hook, target = self.places.pairs[0]
        widths = self._prepared[1].widths
        return widths[hook], widths[target or hook]

    @property
    def _columns(self) -> list[str]:
        slopes = targets_of(self.places.pairs) if self._config.gradients else []
        return columns_of(hooks_of(self.places.pairs), slopes)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the two chunks between which training and the model change."""
        return buffer_bytes(self._prepared[1], self._columns, self._buffer_rows, self._opened[1].device)

    @property
    def model_name(self) -> str:
        """As the model was given."""
        return self._opened[1].info.name

    @property
    def provenance(self) -> dict[str, Any]:
        """What an SAE's record says of it: the harvest that was kept, or what would have been one."""
        _, model, corpus = self._opened
        record = made_from(self._prepared[0], model, corpus)
        return {"stream": record} if self._keep is None else {"harvest": {"name": self._keep, **record}}

    @contextmanager
    def rows(self, configs: Sequence[TrainConfig]) -> Iterator[TargetSource]:
        """Context manager giving the stream that these configurations are trained on; when it is left without an
        error, the kept harvest is finished."""
        (config, plan), (_, model, corpus) = self._prepared, self._opened
        expected = configs[0].n_steps * configs[0].batch_size
        if any(one.rule.needs_calibration for one in configs):
            expected += CALIBRATION_ROWS
        kept, ranks = None, meet()
        if self._folder is not None and ranks.leads:
            kept = KeptHarvest(self._folder, model, corpus, config, plan, expected_rows=expected)
        rows = ModelRows(
            model, corpus, config, plan, self._columns, seed=configs[0].seed, buffer_rows=self._buffer_rows,
            expected_rows=expected, keeping=kept, ranks=ranks,
        )  # fmt: skip
        if kept is None:
            with rows:
                yield PairSource(rows, self.places.pairs, plan.widths, rows.scales)
            return
        with kept, rows:
            yield PairSource(rows, self.places.pairs, plan.widths, rows.scales)
            kept.finish()
