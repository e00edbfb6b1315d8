"""Runs and stores how well codes find a document's other half: the pooled codes of an SAE (`halves`, kind `halves`,
under its name), and codes of whole passages of a few active features (`sparse`, kind `sparse-documents`, under the
harvest's name).
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin, versions
from workbench.catalog.results import Made, Result
from workbench.features.documents.contrastive import Recipe
from workbench.features.documents.halves import find_halves
from workbench.features.documents.sparse import sparse_codes
from workbench.features.index.query import FeatureIndex
from workbench.models.devices import choose_device
from workbench.saes.hook_pairs import choose_hook

KIND, SPARSE_KIND = "halves", "sparse-documents"


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

        def make() -> Made:
            return find_halves(catalog, index, tokens=tokens, draws=draws, seed=seed, documents=documents), {}

        origin = catalog.origin(sae).measured_with(index=index.settings)
        return catalog.results.get_or_make(KIND, sae, parameters=parameters, origin=origin, make=make)


def sparse_documents(
    catalog: Catalog,
    harvest: str,
    *,
    hook: str | None = None,
    k: Sequence[int] = (2, 4, 8),
    anneal_from: int = 64,
    gamma: float = 1.0,
    width: int = 1024,
    steps: int = 2000,
    tokens: int = 600,
    draws: int = 4,
    seed: int = 0,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Trains k-sparse codes of passages with and without annealing and labels and measures them, or finds the stored
    result of the same (kind `sparse-documents`, under the harvest's name).

    Args:
        hook: needed where the harvest has several.
        k: numbers of active features.
        anneal_from: where k starts that is annealed.
        gamma: weight of the labels, where they are used.
        width: features in all.
        steps: of training, of 256 passages each.
        tokens: of each half that is to be found.
        draws: of documents, windows and training.
        seed: of the first draw.
        on_progress: called with (codes trained, codes in all).

    Returns:
        With the tables `summary` and `draws` of `workbench.features.documents.sparse.sparse_codes`.

    Raises:
        InputError: no such harvest or hook point, settings out of range, or too little text.
    """
    source = catalog.open_harvest(harvest)
    chosen = choose_hook(source.hooks, f"harvest {harvest!r}", hook)
    k = list(dict.fromkeys(k))
    if not k or min(k) < 1 or max(k) > width or min(steps, tokens, draws) < 1 or seed < 0:
        raise InputError(
            f"k, {k}, lie between 1 and the width, {width}; steps, tokens and draws are at least 1, the seed at least 0"
        )
    if not max(k) <= anneal_from <= width:
        raise InputError(f"annealing starts between the largest k, {max(k)}, and the width, {width}; got {anneal_from}")
    if not 0 < gamma < float("inf"):
        raise InputError(f"the weight of the labels must be positive, got {gamma}")
    recipes = [
        Recipe(one, start, weight, width, steps)
        for one in k
        for start in (None, anneal_from)
        for weight in (0.0, gamma)
    ]

    def make() -> Made:
        return sparse_codes(
            source, chosen, recipes, tokens=tokens, draws=draws, seed=seed, device=choose_device(device),
            on_progress=on_progress,
        ), {}  # fmt: skip

    parameters = {"hook": chosen, "recipes": [asdict(one) for one in recipes], "tokens": tokens, "draws": draws,
                  "seed": seed}  # fmt: skip
    origin = Origin.of_sae({"harvest": source.provenance(), "hook": chosen, "versions": versions()})
    return catalog.results.get_or_make(SPARSE_KIND, harvest, parameters=parameters, origin=origin, make=make)
