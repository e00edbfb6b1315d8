"""Reports of several models, checkpoints or corpora side by side.

A report is everything stored under one name; parts that were not measured are left out. One row per report:

    exact_zero, active, mass_90, dead     means over layers (`mlp_stats.MLPSummary`)
    clean_loss                            nats per held-out token, nothing enforced
    ppl_1% ...                            PPL-p% sparsity
    METHOD_at_0.1                         share of zeros at COST added nats, found by search (`at_cost`); where all
                                          levels cost less, that of the last; reports from before the search lack it
    flops_saved_at_0.1                    the largest share of weight products saved at COST, over methods
    sink                                  mean attention on BOS over heads
    own_core, corpus_core                 added nats on second halves of contexts that may use no neurons but a core of
                                          CORE_SHARE of them (`core`): that of the first half, the training text's
    predicted                             recall of a token's neurons by a predictor of an eighth of the width, mean
                                          over layers (`predictor`)
    experts_in_use, busiest_expert        of mixtures (`experts`), means over layers: 2^H of the loads, the largest load
    unused_experts                        that no token chose, in all layers
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Result
from workbench.sparsity.measurements import ATTENTION, CURVES, EXPERTS, HEADS, MLP, PREDICT, SAES

KINDS = (MLP, CURVES, ATTENTION, HEADS, PREDICT, SAES, EXPERTS)
COST = 0.1
"""Added nats at which methods are compared."""
CORE_SHARE = 0.4
"""Of a layer's neurons, the size of core at which cores are compared."""


def report_names(catalog: Catalog) -> list[str]:
    """Names under which anything about sparsity is stored, oldest first."""
    found = [result for kind in KINDS for result in catalog.results.find(kind)]
    return list(dict.fromkeys(result.name for result in sorted(found, key=lambda result: result.created)))


def report_parts(catalog: Catalog, name: str) -> dict[str, Result]:
    """The results of one report by kind.

    Raises:
        InputError: nothing of that name.
    """
    parts = {kind: result for kind in KINDS for result in catalog.results.find(kind) if result.name == name}
    if not parts:
        known = ", ".join(report_names(catalog)) or "none"
        raise InputError(f"no sparsity report {name!r} in this workspace: it has {known}")
    return parts


def compare(catalog: Catalog, names: Sequence[str] = ()) -> pd.DataFrame:
    """One row per report; NaN where a report lacks a part.

    Args:
        names: all when left out.

    Raises:
        InputError: a name without a report, or a workspace without reports.
    """
    names = names or report_names(catalog)
    if not names:
        raise InputError("no sparsity report in this workspace: make one with `workbench sparsity report NAME`")
    return pd.DataFrame([_row(name, report_parts(catalog, name)) for name in names])


def _row(name: str, parts: Mapping[str, Result]) -> dict[str, Any]:
    origin = next(iter(parts.values())).origin
    row: dict[str, Any] = {
        "name": name,
        "model": origin.model,
        "corpus": origin.corpus,
    }
    if MLP in parts:
        layers = parts[MLP].table("layers")
        row |= {column: float(layers[column].mean()) for column in ("exact_zero", "active", "mass_90", "dead")}
    if CURVES in parts:
        points = parts[CURVES].table("points")
        row["clean_loss"] = float((points["loss"] - points["added_nats"]).iloc[0])
        if parts[CURVES].parameters["ps"]:
            row |= {f"ppl_{100 * item.p:g}%": item.sparsity for item in parts[CURVES].table("ppl").itertuples()}
        if "costs" in parts[CURVES].parameters:
            costs = parts[CURVES].table("costs").query("cost == @COST")
            row |= {f"{item.method}_at_{COST:g}": item.sparsity for item in costs.itertuples()}
            row[f"flops_saved_at_{COST:g}"] = float(costs["flops_saved"].max())
    if ATTENTION in parts:
        row["sink"] = float(parts[ATTENTION].table("heads")["sink"].mean())
    if PREDICT in parts:
        row |= _prediction(parts[PREDICT])
    if EXPERTS in parts:
        layers = parts[EXPERTS].table("layers")
        row |= {
            "experts_in_use": float(layers["in_use"].mean()), "busiest_expert": float(layers["max_load"].mean()),
            "unused_experts": int(layers["unused"].sum()),
        }  # fmt: skip
    return row


def _prediction(result: Result) -> dict[str, float]:
    cores = result.table("cores").query("share == @CORE_SHARE").set_index("core")["added_nats"]
    row = {f"{core}_core": float(cores[core]) for core in ("own", "corpus")}
    if "predictor" in result.tables():
        found = result.table("predictor")
        # The largest rank is the width, by which all neurons are told.
        row["predicted"] = float(found.loc[found["rank"] == found["rank"].max() // 8, "recall"].mean())
    return row
