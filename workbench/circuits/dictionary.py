"""SAEs beside supervised dictionaries of a task's attributes and random directions (`circuits.supervised`).

1. A random half of the prompts fits the supervised dictionaries of every hook point; all dictionaries are judged on the
   other half. A value that the first half lacks has no vector: `known` is the share of judged prompts that have all.
2. Judged at each hook point are

       supervised (mse), supervised (mean)   codes are the attributes, of the clean and of the corrupted prompt
       the SAEs                              among them, where one was trained, those with a frozen random decoder
       random (features, L0)                 as many random unit directions as an SAE has features, round the mean of
                                             the first half; of each prompt as many as the SAE's mean L0, those most
                                             parallel to the activation, with least-squares values: untrained, so the
                                             floor under every dictionary of that size and sparsity

   by sufficiency and necessity, sparse control, and F1 against unions of at most ten values, not all (table
   `features`; SAEs and random directions only, as a supervised code is its value).
3. Table `attributes`, of every dictionary and attribute (means over the judged prompts that have a value):

       strength, effect        of the MSE features
       f1                      of the feature that shows the prompt's value best
       over_random             f1 less that of the random directions: of few prompts some feature always fires
       joined_f1, joined       of features joined while F1 rises, and their number: over-splitting
       occluded_by             an attribute of greater strength and smaller effect with the larger over_random;
                               the strongest such
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.metrics import Metric
from circuits.nodes import Bridge
from circuits.passes import OnProgress, answer_logits
from circuits.prompts import PromptSet
from circuits.scores import no_behaviour
from circuits.supervised import (
    Attributes,
    activation_at,
    approximation,
    fit,
    interpretations,
    joined,
    least_squares_code,
    sparse_control,
    strengths,
)
from sae.errors import InputError
from sae.model import SAE

FEWEST = 8
"""Prompts, half of them to fit."""
UNMOVED = 0.9
"""Of the predictions that patching leaves as they are: from there on nothing is left to control."""


@dataclass(frozen=True)
class _Dictionary:
    name: str
    codes: tuple[Float[Tensor, "n features"], Float[Tensor, "n features"]]
    """Of the clean and of the corrupted prompts."""
    decoder: Float[Tensor, "features d"]
    bias: Float[Tensor, "d"]
    random: str = ""
    """Of an SAE, the name of its random directions; of these, their own."""


def dictionary_tables(
    bridge: Bridge,
    prompts: PromptSet,
    saes: Mapping[str, SAE],
    *,
    metric: Metric,
    changes: Sequence[int],
    seed: int,
    batch_size: int,
    on_progress: OnProgress | None = None,
) -> dict[str, pd.DataFrame]:
    """Tables summary, approximation, control, attributes and features.

    Args:
        changes: features that an edit may change.
        seed: splits the prompts and draws the random directions.

    Raises:
        InputError: a task that knows no attributes, fewer than eight prompts, no change allowed, or an SAE of another
            width than its hook point.
    """
    if not prompts.attributes:
        raise InputError(
            f"task {prompts.name} knows no attributes of its prompts: choose another, or give a .jsonl file with "
            '"attributes" on each line'
        )
    if len(prompts) < FEWEST or not changes or min(changes) < 1:
        raise InputError(
            f"half of the prompts fit the dictionaries: ask for at least {FEWEST} prompts, not {len(prompts)}, and for "
            "at least one change"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).to(prompts.clean.device)
    fitted, judged = prompts[order[: len(order) // 2]], prompts[order[len(order) // 2 :]]
    clean, _ = _sides(judged)
    seen = {name: {*values} for name, values in _sides(fitted)[0].items()}
    known = [all(clean[name][row] in seen[name] for name in seen) for row in range(len(judged))]
    before, after = (
        torch.cat([metric(answer_logits(bridge, getattr(part, side), part.last), part)
                   for part in judged.batches(batch_size)]).mean().item()
        for side in ("clean", "corrupted")
    )  # fmt: skip
    tables: dict[str, list[pd.DataFrame]] = {"approximation": [], "control": [], "attributes": [], "features": []}
    hooks = list(dict.fromkeys(sae.hook_name for sae in saes.values()))
    for number, hook in enumerate(hooks):
        own = {name: sae for name, sae in saes.items() if sae.hook_name == hook}
        found = _at_hook(bridge, fitted, judged, hook, own, metric, changes, seed, batch_size)
        for name, table in found.items():
            table.insert(0, "hook", hook)
            tables[name].append(table)
        if on_progress is not None:
            on_progress(number + 1, len(hooks))
    together = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    note = no_behaviour(before, after) or _unmoved(together["control"])
    summary = pd.DataFrame(
        [{"task": prompts.name, "metric": metric.__name__, "fitted": len(fitted), "judged": len(judged),
          "known": sum(known) / len(known), "clean": before, "corrupted": after, "note": note}]
    )  # fmt: skip
    return {"summary": summary, **together}


def _unmoved(control: pd.DataFrame) -> str:
    """Where patching hardly changes a prediction, in one line; empty where it does everywhere."""
    kept = control.groupby("hook", sort=False)["unedited"].first()
    places = [f"{hook} ({share:.0%})" for hook, share in kept[kept >= UNMOVED].items()]
    if not places:
        return ""
    return (
        f"at {', '.join(places)} of the prompts the counterfactual's activation leaves the prediction as it is: "
        "nothing is left to control there, take an SAE of another place"
    )


def _at_hook(
    bridge: Bridge, fitted: PromptSet, judged: PromptSet, hook: str, saes: Mapping[str, SAE], metric: Metric,
    changes: Sequence[int], seed: int, batch_size: int,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """The tables of one hook point."""
    a, clean, corrupted = (
        activation_at(bridge, tokens, part, hook, batch_size)
        for tokens, part in ((fitted.clean, fitted), (judged.clean, judged), (judged.corrupted, judged))
    )
    known, sides = _sides(fitted)[0], _sides(judged)
    supervised = {method: fit(a, known, method) for method in ("mse", "mean")}
    dictionaries = [
        _Dictionary(f"supervised ({method})", (one.code(sides[0]), one.code(sides[1])), one.features, one.mean)
        for method, one in supervised.items()
    ]
    for name, sae in saes.items():
        pair = _sae_and_random(name, sae, a.mean(dim=0), clean, corrupted, seed)
        # SAEs of one size and L0 have the same random directions.
        dictionaries += [one for one in pair if one.name not in {other.name for other in dictionaries}]
    close, control, shown, features = [], [], [], []
    for one in dictionaries:
        present, wanted = one.codes
        active = present != 0
        found = approximation(
            bridge, judged, hook, present @ one.decoder + one.bias, metric=metric, batch_size=batch_size
        )
        close.append(
            {"dictionary": one.name, "features": len(one.decoder), "l0": active.sum(dim=1).double().mean().item(),
             "sufficiency": found.sufficiency, "necessity": found.necessity, "mean_ablated": found.mean_ablated}
        )  # fmt: skip
        for k in changes:
            edit = sparse_control(bridge, judged, hook, present, wanted, one.decoder, k=k, batch_size=batch_size)
            control.append({"dictionary": one.name, "k": k, **vars(edit)})
        if one.random:
            table = interpretations(active, sides[0])
            table["values"] = [[str(value) for value in values] for values in table["values"]]
            table.insert(0, "dictionary", one.name)
            features.append(table)
            shown += _shown(one, active, sides[0])
    strong = strengths(bridge, judged, hook, supervised["mse"], sides[0], metric=metric, batch_size=batch_size)
    attributes = _occlusion(pd.DataFrame(shown).merge(strong, on="attribute"))
    return {
        "approximation": pd.DataFrame(close), "control": pd.DataFrame(control), "attributes": attributes,
        "features": pd.concat(features, ignore_index=True),
    }  # fmt: skip


def _sae_and_random(
    name: str, sae: SAE, mean: Float[Tensor, "d"], clean: Float[Tensor, "n d"], corrupted: Float[Tensor, "n d"],
    seed: int,
) -> list[_Dictionary]:  # fmt: skip
    """An SAE and random directions of its size and sparsity."""
    codes = sae.encode(clean).to_dense().to(clean), sae.encode(corrupted).to_dense().to(clean)
    k = max(1, round((codes[0] != 0).sum(dim=1).double().mean().item()))
    drawn = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(drawn, dim=1).to(clean)
    parts = least_squares_code(clean - mean, directions, k), least_squares_code(corrupted - mean, directions, k)
    random = f"random ({sae.d_sae:,}, {k})"
    return [
        _Dictionary(name, codes, sae.W_dec.detach().to(clean), sae.b_dec.detach().to(clean), random),
        _Dictionary(random, parts, directions, mean, random),
    ]


def _sides(prompts: PromptSet) -> tuple[Attributes, Attributes]:
    """Attributes of the clean and of the corrupted prompts."""
    clean, corrupted = (
        {name: [pair[side] for pair in pairs] for name, pairs in prompts.attributes.items()} for side in (0, 1)
    )
    return clean, corrupted


def _shown(one: _Dictionary, active: Bool[Tensor, "n features"], attributes: Attributes) -> list[dict[str, object]]:
    """How well features show each attribute: one row an attribute."""
    rows: list[dict[str, object]] = []
    for name, given in attributes.items():
        means = torch.zeros(3, dtype=torch.float64)
        values = sorted({*given} - {None}, key=str)
        for value in values:
            truth = torch.tensor([item == value for item in given], device=active.device)
            path = joined(active, truth) or [0.0]
            means += int(truth.sum()) * torch.tensor([path[0], path[-1], len(path)], dtype=torch.float64)
        f1, last, number = (means / max(1, sum(value is not None for value in given))).tolist()
        rows.append(
            {"dictionary": one.name, "random": one.random, "attribute": name, "values": len(values), "f1": f1,
             "joined_f1": last, "joined": number}
        )  # fmt: skip
    return rows


def _occlusion(table: pd.DataFrame) -> pd.DataFrame:
    """Adds over_random and occluded_by to the rows of all dictionaries."""
    floor = table.set_index(["dictionary", "attribute"])["f1"].to_dict()
    table["over_random"] = table["f1"] - [floor[key] for key in zip(table["random"], table["attribute"], strict=True)]
    occluding = []
    for row in table.itertuples():
        others = table[
            (table["dictionary"] == row.dictionary) & (table["strength"] > row.strength)
            & (table["effect"] < row.effect) & (table["over_random"] > row.over_random)
        ].sort_values("strength", ascending=False)  # fmt: skip
        occluding.append(others["attribute"].iloc[0] if len(others) else "")
    columns = ["dictionary", "attribute", "values", "strength", "effect", "f1", "over_random", "joined_f1", "joined"]
    return table[columns].assign(occluded_by=occluding)
