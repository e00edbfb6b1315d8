"""Runs and stores how well the pooled codes of an SAE find a document's other half (`halves`), as kind `halves`."""

from contextlib import closing
from typing import TYPE_CHECKING

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Result
from workbench.features.documents.halves import find_halves
from workbench.features.index.query import FeatureIndex

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

KIND = "halves"


def document_halves(
    catalog: Catalog, sae: str, *, tokens: int = 600, draws: int = 4, seed: int = 0, documents: int = 500
) -> Result:
    """Measures on the index of an SAE, or finds the stored result of the same (kind `halves`, under the SAE's name).

    Args:
        tokens: of each half.
        draws: of the places in the documents; all methods see the same.
        seed: of the first draw.
        documents: at most, drawn at random where there are more.

    Returns:
        With the tables `summary` and `draws` of `workbench.features.documents.halves.find_halves`.

    Raises:
        InputError: an SAE without index, numbers that are too small, or too few documents that are long enough.
    """
    if min(tokens, draws, documents) < 1 or seed < 0:
        raise InputError(
            f"tokens, draws and documents must be at least 1 and the seed at least 0, got {tokens}, {draws}, "
            f"{documents} and {seed}"
        )
    parameters = {"sae": sae, "tokens": tokens, "draws": draws, "seed": seed, "documents": documents}
    with closing(FeatureIndex.open(catalog, sae)) as index:

        def make() -> "tuple[dict[str, pd.DataFrame], dict[str, go.Figure]]":
            return find_halves(catalog, index, tokens=tokens, draws=draws, seed=seed, documents=documents), {}

        origin = catalog.origin(sae).measured_with(index=index.settings)
        return catalog.results.get_or_make(KIND, sae, parameters=parameters, origin=origin, make=make)
