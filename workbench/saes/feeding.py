"""What a training run draws its rows from: a finished harvest, or a model that runs beside training
(`workbench.saes.streaming`, loaded only then: a harvest asks for no model).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from sae.config import TrainConfig
from sae.ranks import meet
from sae.source import BatchSource, TargetSource
from workbench.catalog.catalog import Catalog
from workbench.harvest.loader import ActivationLoader
from workbench.harvest.pairs import PairLoader
from workbench.harvest.parts import PartLoader
from workbench.saes.hook_pairs import HookPairs, choose_pairs


class Feed(Protocol):
    """Where a run's rows come from."""

    @property
    def places(self) -> HookPairs:
        """Where they are taken."""

    @property
    def description(self) -> dict[str, Any]:
        """What `run.json` says of it."""

    @property
    def widths(self) -> tuple[int, int]:
        """(width of what is read, width of what is predicted), of the first pair."""

    @property
    def buffer_bytes(self) -> int:
        """Memory that it takes on the device, where it takes much."""

    @property
    def model_name(self) -> str:
        """As the model was given."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What an SAE's record says of it."""

    def rows(self, configs: Sequence[TrainConfig]) -> Any:
        """Context manager giving the stream that these configurations are trained on."""


class FromHarvest:
    """Rows of a finished harvest, or for crosscoders of several.

    Args:
        each: whether several hook points are an SAE's each.

    Raises:
        InputError: an unknown harvest or hook point, or harvests of different tokens.
    """

    buffer_bytes = 0

    def __init__(
        self,
        catalog: Catalog,
        names: str | Sequence[str],
        hook: str | Sequence[str] | None,
        target_hook: str | None,
        device: str,
        *,
        each: bool,
    ) -> None:
        harvests = [catalog.open_harvest(name) for name in ([names] if isinstance(names, str) else names)]
        self.harvest, self._device = harvests[0], device
        self.places = choose_pairs(harvests, hook, target_hook, each=each)
        self.description = {"harvest": names if isinstance(names, str) else " + ".join(names)}
        self.model_name = self.harvest.model["name"]

    @property
    def provenance(self) -> dict[str, Any]:
        """What an SAE's record says of it."""
        made: dict[str, Any] = {"harvest": self.harvest.provenance()}
        if self.places.parts:
            made["parts"] = [
                {"name": name, "harvest": place.harvest.provenance(), "hook": place.hook}
                for name, place in self.places.parts
            ]
        return made

    @property
    def widths(self) -> tuple[int, int]:
        """(width of what is read, width of what is predicted), of the first pair."""
        if self.places.parts:
            together = sum(place.harvest.vectors(place.hook).width for _, place in self.places.parts)
            return together, together
        hook, target = self.places.pairs[0]
        return self.harvest.vectors(hook).width, self.harvest.vectors(target or hook).width

    @contextmanager
    def rows(self, configs: Sequence[TrainConfig]) -> Iterator[BatchSource | TargetSource]:
        """Context manager giving the stream that these configurations are trained on."""
        pairs, seed, gradients = self.places.pairs, configs[0].seed, needs_gradients(configs)
        if self.places.parts:
            names, places = zip(*self.places.parts, strict=True)
            yield PartLoader(places, names, seed=seed, device=self._device, ranks=meet())
        elif len(pairs) > 1 or pairs[0][1]:
            yield PairLoader(
                self.harvest, pairs, seed=seed, device=self._device, with_gradients=gradients, ranks=meet()
            )
        else:
            hook = pairs[0][0]
            yield ActivationLoader(
                self.harvest, hook, seed=seed, device=self._device, with_gradients=gradients, ranks=meet()
            )


def needs_gradients(configs: Sequence[TrainConfig]) -> bool:
    """Whether a rule of these learns from the model's loss."""
    return any(config.rule.needs_gradients for config in configs)
