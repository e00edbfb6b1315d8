"""Codebooks of a workspace: fitted to a harvest, and an SAE of the rule `codebook` from there on."""

from collections.abc import Callable

from sae.codebook import BATCH, fit_codebook
from sae.errors import InputError
from sae.model import SAE
from sae.rules.registry import to_dict
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import versions
from workbench.harvest.loader import ActivationLoader
from workbench.models.devices import choose_device
from workbench.saes.hook_pairs import choose_hook


def fit_codebook_to(
    catalog: Catalog,
    name: str,
    harvest: str,
    *,
    hook: str | None = None,
    n_codes: int = 4096,
    k: int = 32,
    total_tokens: int = 1_500_000,
    heads: int = 1,
    lr: float = 3e-3,
    seed: int = 0,
    device: str = "auto",
    on_step: Callable[[int, int, float], None] | None = None,
) -> SAE:
    """Fits a codebook and saves it under a new name.

    Args:
        name: the name it gets.
        harvest: whose rows it is fitted to.
        hook: hook point; may be left out where the harvest has one.
        n_codes, k, total_tokens, heads, lr, seed, on_step: as for `sae.codebook.fit_codebook`.

    Raises:
        InputError: a taken name, no such harvest or hook point, fewer rows than codes, or as `fit_codebook`.
    """
    catalog.check_new_sae(name)
    source = catalog.open_harvest(harvest)
    chosen = choose_hook(source.hooks, f"harvest {harvest!r}", hook)
    if n_codes > source.n_rows:
        raise InputError(
            f"{n_codes:,} codes start as rows, and harvest {harvest!r} has {source.n_rows:,}: use fewer codes or "
            "harvest more text"
        )
    where = choose_device(device)
    rows = ActivationLoader(source, chosen, seed=seed, device=where)
    made = fit_codebook(
        rows, n_codes, k, total_tokens=total_tokens, heads=heads, lr=lr, seed=seed, device=where, on_step=on_step
    ).to("cpu")
    made.hook_name, made.model_name = chosen, source.model["name"]
    training = {
        "name": name, "rule": to_dict(made.rule), "d_sae": n_codes,
        "total_tokens": total_tokens - total_tokens % BATCH, "batch_size": BATCH, "lr": lr, "seed": seed,
    }  # fmt: skip
    record = {"harvest": source.provenance(), "hook": chosen, "versions": versions(), "training": training}
    catalog.add_sae(name, made, record)
    return made
