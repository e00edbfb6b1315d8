"""A workspace's SAEs on text of one's own: prompts read, features steered; see `prompts`, `steering`.

The model is the one the SAE was trained on (its provenance, else its own configuration). What the index knows comes
along where there is one: names, densities, and the feature's maximum as the unit of steering.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.features.index.query import FeatureIndex
from workbench.features.prompts import KnownFeatures, PromptReading, read_prompt, read_through
from workbench.features.steering import Edit, Steering, steer
from workbench.features.steering_sweep import Sweep, sweep
from workbench.models.load import LoadedModel
from workbench.models.prompt_text import check_text


@dataclass(frozen=True)
class LiveSAE:
    """An SAE of a workspace with what it takes to run it on text; the app keeps it open."""

    name: str
    sae: SAE
    model: LoadedModel
    known: KnownFeatures | None
    """From its index, where it has one."""

    def read(self, text: str) -> PromptReading:
        """Reads a prompt; see `workbench.features.prompts.read_prompt`."""
        return read_prompt(self.model, self.sae, text, name=self.name, known=self.known)

    def steer(
        self,
        edit: Edit,
        text: str,
        *,
        chat: bool | None = None,
        new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Steering:
        """Continues a prompt with and without an edit, strengths in maxima; see `workbench.features.steering.steer`."""
        edit.check(self.sae.d_sae)
        names = {feature: self.feature_name(feature) for feature in edit.strengths}
        return steer(
            self.model, self.sae, edit, text, unit=self.units(edit), name=self.name,
            names={feature: name for feature, name in names.items() if name is not None}, chat=chat,
            new_tokens=new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip

    def sweep(self, edit: Edit, text: str, *, chat: bool | None = None) -> Sweep:
        """The edit at several strengths; see `workbench.features.steering_sweep.sweep`."""
        edit.check(self.sae.d_sae)
        return sweep(self.model, self.sae, edit, text, unit=self.units(edit), chat=chat)

    def units(self, edit: Edit) -> dict[int, float]:
        """`unit` of every feature that is edited."""
        return {feature: self.unit(feature) for feature in edit.strengths}

    def unit(self, feature: int) -> float:
        """What a strength of 1 stands for: the feature's maximum in the index; 1 where it is not known."""
        maximum = self.known.strongest[feature] if self.known else np.nan
        return float(maximum) if np.isfinite(maximum) else 1.0

    def feature_name(self, feature: int) -> str | None:
        """What to call a feature; None without an index."""
        return self.known.names[feature] if self.known else None


def read_with(saes: Sequence[LiveSAE], text: str) -> list[PromptReading]:
    """Reads a prompt through several SAEs of one model in the same passes; see `workbench.features.prompts`."""
    return read_through(saes[0].model, {one.name: (one.sae, one.known) for one in saes}, text)


def model_name(catalog: Catalog, sae: str) -> str:
    """The model an SAE reads, as `load_model` takes it. Raises InputError where nothing says it."""
    name = catalog.origin(sae).model
    if not name:
        raise InputError(f"SAE {sae!r} does not say which model it reads: import it again with --model")
    return name


def model_of(catalog: Catalog, sae: str, model: LoadedModel | None = None, device: str = "auto") -> LoadedModel:
    """The model an SAE reads, or `model` once it is known to have the weights the SAE was trained on; texts begin with
    BOS if its contexts did.

    Raises:
        InputError: a model that cannot be loaded, or one with other weights.
    """
    if model is None:
        model_name(catalog, sae)
    return catalog.origin(sae).load(f"SAE {sae!r}", model, device)


def known_features(index: FeatureIndex) -> KnownFeatures:
    """Names, densities and maxima of all features."""
    table = index.table()
    return KnownFeatures(table["name"].tolist(), table["density"].to_numpy(float), table["strongest"].to_numpy(float))


def open_live(
    catalog: Catalog,
    sae: str,
    *,
    text: str | None = None,
    edit: Edit | None = None,
    model: LoadedModel | None = None,
    device: str = "auto",
) -> LiveSAE:
    """Opens an SAE with its model and what its index knows.

    Args:
        text, edit: what it is opened for, checked before the model is loaded.

    Raises:
        InputError: as `model_of`, or a text or an edit that is none.
    """
    if text is not None:
        check_text(text)
    coder, known = catalog.coder(sae), None
    if edit is not None:
        edit.check(coder.d_sae)
    if catalog.index_path(sae).is_file():
        index = FeatureIndex.open(catalog, sae)
        try:
            known = known_features(index)
        finally:
            index.close()
    return LiveSAE(sae, coder, model_of(catalog, sae, model, device), known)
