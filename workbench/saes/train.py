"""Training runs of a workspace: SAEs, transcoders or crosscoders, side by side on one stream of activations, of a
harvest or of a model that runs beside training (`workbench.saes.feeding`).

1. The run's record is written first; a run of the same name and settings is resumed, or answered at once when it is
   finished.
2. Under the run's lock the trainer streams batches, reports metrics and leaves checkpoints (`sae.train`).
3. Every SAE is saved under its configuration's name with what it was made from, the transcoders of a set together
   under the set's name; the metrics move into the run's
   DuckDB file, which marks it as finished; the checkpoints go.

Started by torchrun, all ranks run this alike and train together (`sae.sharing`), and the first alone writes records and
SAEs.

A kill between saving the SAEs and finishing the run leaves some that are this run's own: they are kept. A run that
failed as a whole keeps its record, which says why, until another of its name is started; one that was refused before
its first step leaves nothing.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sae import checkpoint
from sae.config import TrainConfig
from sae.errors import InputError
from sae.model import SAE
from sae.ranks import Ranks, meet
from sae.training import StepMetrics, TrainedSAE, check_configs, train
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench.catalog.catalog import PROVENANCE, Catalog
from workbench.catalog.origin import versions
from workbench.catalog.runs import Run
from workbench.disk.locks import RunLock
from workbench.disk.names import new_folder
from workbench.models.devices import choose_device
from workbench.saes.feeding import Feed, FromHarvest, needs_gradients
from workbench.saes.sweeps import SweepEstimate, check_memory, estimate

if TYPE_CHECKING:
    from workbench.harvest.plan import HarvestConfig

OnMetrics = Callable[[StepMetrics], None]


def train_all(
    catalog: Catalog,
    run: str,
    source: "str | Sequence[str] | HarvestConfig",
    configs: Sequence[TrainConfig],
    *,
    hook: str | Sequence[str] | None = None,
    target_hook: str | None = None,
    each: bool = False,
    device: str = "auto",
    on_metrics: OnMetrics | None = None,
    **streaming: Any,
) -> list[TrainedSAE]:
    """Trains SAEs side by side and saves them; see the module's description.

    Args:
        run: the run's name; the SAEs are saved under their configurations' names.
        source: name of a finished harvest, several of the same tokens, of two models say, for crosscoders; or what a
            harvest would be made from: then the model runs beside training, and nothing is stored. How many tokens are
            read is said by the configurations.
        configs: one configuration per SAE.
        hook: hook point to train on; may be left out when there is only one. Several for crosscoders.
        target_hook: hook point that transcoders predict. With a * for the layer in both, one configuration makes a set,
            a transcoder for every layer, saved as one thing.
        each: several hook points are an SAE's each, `NAME-HOOK`, in place of a crosscoder of all.
        device: `auto`, `cpu`, `cuda`, ...
        on_metrics: called with every SAE's metrics as they are reported.
        streaming: without a harvest: `keep`, the name of a harvest to write on the way, `buffer_rows`, how many rows
            are shuffled together, `model` and `corpus`, already loaded.

    Returns:
        One entry per configuration and hook point, in their order: the SAE, or the reason why there is none. An SAE
        that fails leaves the others running.

    Raises:
        InputError: unknown harvest, model, corpus or hook, names taken, a finished run whose SAE was removed, too
            little memory, or harvests of different tokens.
    """
    ranks = meet()
    chosen = str(choose_device(device))
    feed = _feed(catalog, source, configs, hook, target_hook, chosen, each=each, **streaming)
    configs = feed.places.spread(configs)
    check_configs(configs)
    record = Run(new_folder(catalog.run_folder(run)))
    description = {
        **feed.description, "hook": feed.places.hook, "device": chosen,
        "configs": [config.to_dict() for config in configs],
    }  # fmt: skip
    if feed.places.target_hook is not None:
        description["target_hook"] = feed.places.target_hook
    if ranks.lead(lambda: _is_finished(record, description)):
        return _finished(catalog, record, configs)
    check_memory(configs, *feed.widths, chosen, feed.buffer_bytes, ranks)
    done, resuming = ranks.lead(lambda: _start(catalog, record, configs, description, feed.places.is_set))
    try:
        errors = _run(catalog, record, feed, configs, chosen, resuming, done, on_metrics, ranks)
    except InputError:
        if ranks.leads and not resuming and not len(record.metrics()):
            shutil.rmtree(record.folder)
        raise
    return [_trained(catalog, config, error) for config, error in zip(configs, errors, strict=True)]


def _is_finished(record: Run, description: dict[str, Any]) -> bool:
    """Whether a run of this name and description is finished; one that failed as a whole is removed."""
    if record.failed:
        shutil.rmtree(record.folder)
    if record.finished:
        record.start(description)
    return record.finished


def _start(
    catalog: Catalog, record: Run, configs: Sequence[TrainConfig], description: dict[str, Any], is_set: bool
) -> tuple[Set[str], bool]:
    """Records the run; which SAEs it has saved before, and whether it is resumed."""
    done = {config.name for config in configs if _is_of(catalog, record.name, config)}
    for config in configs:
        if config.name not in done:
            catalog.check_new_sae(config.name)
            if is_set:
                catalog.check_new_transcoders(config.name.rpartition(".")[0])
    return done, record.start(description)


def estimate_training(
    catalog: Catalog,
    source: "str | Sequence[str] | HarvestConfig",
    configs: Sequence[TrainConfig],
    *,
    hook: str | Sequence[str] | None = None,
    target_hook: str | None = None,
    each: bool = False,
    device: str = "auto",
    **streaming: Any,
) -> SweepEstimate:
    """Memory and time of training `configs` side by side, from a few steps of each kind; see `saes.sweeps`.

    Raises:
        InputError: as `train_all`.
    """
    chosen = str(choose_device(device))
    feed = _feed(catalog, source, configs, hook, target_hook, chosen, each=each, **{**streaming, "keep": None})
    configs = feed.places.spread(configs)
    with feed.rows(configs) as rows:
        return estimate(configs, rows, device=chosen, more=feed.buffer_bytes)


def _feed(
    catalog: Catalog,
    source: "str | Sequence[str] | HarvestConfig",
    configs: Sequence[TrainConfig],
    hook: str | Sequence[str] | None,
    target_hook: str | None,
    device: str,
    *,
    each: bool,
    **streaming: Any,
) -> Feed:
    if not isinstance(source, str | Sequence):
        # The model library takes seconds to load.
        from workbench.saes.streaming import FromModel

        gradients = needs_gradients(configs)
        return FromModel(catalog, source, hook, target_hook, device, each=each, gradients=gradients, **streaming)
    wrong = next((name for name, value in streaming.items() if value is not None), None)
    if wrong is not None:
        raise InputError(f"{wrong} is for training without a harvest: leave it out, or the harvest")
    return FromHarvest(catalog, source, hook, target_hook, device, each=each)


def _run(
    catalog: Catalog,
    record: Run,
    feed: Feed,
    configs: Sequence[TrainConfig],
    device: str,
    resuming: bool,
    done: Set[str],
    on_metrics: OnMetrics | None,
    ranks: Ranks,
) -> list[str | None]:
    """Steps 2 and 3 of the module's description; why an SAE came to nothing, or None, for each. `done` are SAEs that
    this run has saved before."""
    with ExitStack() as stack:
        lock = RunLock(record.folder)
        ranks.lead(lambda: stack.enter_context(lock) and None)
        try:
            trained = _train(record, feed, configs, device, resuming, on_metrics, ranks)
        except RuntimeError as error:
            if ranks.size > 1:
                # The others cannot go on, and it need not be this one that failed.
                raise
            # Out of memory, say; beside others the trainer takes out the one it happens to.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            trained = [TrainedSAE(config, None, reason) for config in configs]

        def conclude() -> list[str | None]:
            saved = _save(catalog, record, feed, trained, done)
            record.finish(
                [config.to_dict() for config in configs],
                errors={result.config.name: result.error for result in saved if result.error},
            )
            shutil.rmtree(record.checkpoints, ignore_errors=True)
            return [result.error for result in saved]

        return ranks.lead(conclude)


def _save(catalog: Catalog, record: Run, feed: Feed, trained: list[TrainedSAE], done: Set[str]) -> list[TrainedSAE]:
    """Saves what was trained and is not there yet, and returns what became of it all."""

    def provenance(sae: SAE, config: TrainConfig) -> dict[str, Any]:
        target = {"target_hook": sae.target_hook_name} if isinstance(sae, Transcoder) else {}
        made = {"run": record.name, **feed.provenance, "hook": sae.hook_name, **target}
        return {**made, "versions": versions(), "training": config.to_dict()}

    if not feed.places.is_set:
        for result in trained:
            if result.sae is not None and result.config.name not in done:
                catalog.add_sae(result.config.name, result.sae, provenance(result.sae, result.config))
        return trained
    sets: dict[str, list[TrainedSAE]] = {}
    for result in trained:
        sets.setdefault(result.config.name.rpartition(".")[0], []).append(result)
    saved = []
    for name, layers in sets.items():
        failed = next((result for result in layers if result.error), None)
        if failed is not None:
            reason = f"a set needs all its layers, and {failed.config.name} failed ({failed.error})"
            layers = [replace(result, sae=None, error=result.error or reason) for result in layers]
        elif layers[0].config.name not in done:
            coders = {layer: result.sae for layer, result in enumerate(layers) if isinstance(result.sae, Transcoder)}
            records = [provenance(coder, layers[layer].config) for layer, coder in coders.items()]
            catalog.add_transcoders(name, TranscoderSet(coders), records)
        saved += layers
    return saved


def _train(
    record: Run,
    feed: Feed,
    configs: Sequence[TrainConfig],
    device: str,
    resuming: bool,
    on_metrics: OnMetrics | None,
    ranks: Ranks,
) -> list[TrainedSAE]:
    """The trainer on the stream, its metrics kept in the run's record."""
    if resuming and ranks.leads:
        record.drop_metrics_after(checkpoint.tokens_done(record.checkpoints))

    def report(metrics: StepMetrics) -> None:
        record.append_metrics(dataclasses.asdict(metrics))
        if on_metrics is not None:
            on_metrics(metrics)

    with feed.rows(configs) as rows:
        return train(
            configs,
            rows,
            pairs=feed.places.pairs_of(len(configs)),
            device=device,
            checkpoint_dir=record.checkpoints,
            resume=resuming,
            on_metrics=report,
            hook_name=feed.places.hook,
            model_name=feed.model_name,
            ranks=ranks,
        )


def _finished(catalog: Catalog, record: Run, configs: Sequence[TrainConfig]) -> list[TrainedSAE]:
    """What a finished run made. Raises InputError when one of its SAEs is gone."""
    errors = record.errors()
    gone = [c.name for c in configs if c.name not in errors and not catalog.sae_folder(c.name).exists()]
    if gone:
        raise InputError(
            f"run {record.name!r} is finished and its SAE {gone[0]!r} was removed: remove the run as well with "
            f"`workbench gc --run {record.name}`, then train again"
        )
    return [_trained(catalog, config, errors.get(config.name)) for config in configs]


def _is_of(catalog: Catalog, run: str, config: TrainConfig) -> bool:
    """Whether there is an SAE that `run` made by this configuration."""
    if not (catalog.sae_folder(config.name) / PROVENANCE).is_file():
        return False
    origin = catalog.origin(config.name)
    asked: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return origin.run == run and origin.training == asked


def _trained(catalog: Catalog, config: TrainConfig, error: str | None) -> TrainedSAE:
    return TrainedSAE(config, None if error else catalog.coder(config.name), error)
