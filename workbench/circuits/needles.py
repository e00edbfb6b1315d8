"""Retrieval heads, causally: what a model still finds when the heads that copy or look at a needle are masked.

A `circuit-retrieval` result of needle tests without language (`heads.needle_rows`):

    heads    node, layer, head, retrieval (copy score), retrieval_steps (as the paper's code counts it), active,
             evidence (`circuits.retrieval`), and masked_recall: the recall of needles with this head alone masked
    masks    order, masked (number of heads), draw, recall: the heads of largest retrieval or evidence score masked
             together, and as many random ones
    summary  recall with nothing masked, tests and successful generations behind the scores, tests that heads are masked
             on (judged), heads above the paper's 0.1, heads that hold half of the positive evidence

Masked heads hand over their mean over the prompts. Heads are scored on one set of tests and masked on another, drawn
with the next seed.
"""

import pandas as pd
import torch

from circuits.nodes import head_names
from circuits.passes import OnProgress
from circuits.retrieval import (
    THRESHOLD,
    evidence_scores,
    heads_of_half,
    masking,
    needle_means,
    needle_recall,
    retrieval_scores,
)
from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits import figures
from workbench.circuits.heads import NEEDLES, check_needles_fit, few_needles, first_and_others, needle_rows
from workbench.models.load import LoadedModel

RETRIEVAL = "circuit-retrieval"
MASKED = (1, 2, 4)
JUDGED = 64
"""Tests that heads are masked on: all of them count, found or not."""


def report_retrieval(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    *,
    needles: int = NEEDLES,
    draws: int = 10,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Result:
    """Scores every head and masks heads; stores both.

    Args:
        needles: tests for the scores; heads are masked on JUDGED others, or as many where these are fewer.
        draws: of random heads; `seed` draws them and the tests.

    Raises:
        InputError: no needle or draw asked for, a context or a vocabulary too small, or a model that finds no needle.
    """
    if needles < 1 or draws < 1:
        raise InputError(f"masking needs at least one needle and one draw, got {needles} and {draws}")
    parameters = {"needles": needles, "draws": draws, "seed": seed}

    def make() -> Made:
        check_needles_fit(model, needles, first_and_others(model)[1])
        return _scored_and_masked(model, needles, draws, seed, on_progress)

    return catalog.results.get_or_make(
        RETRIEVAL, name, parameters=parameters, origin=Origin.of_measurement(model), make=make, keep=True
    )


def needles_behind(result: Result, column: str) -> str:
    """On how many needle tests a score rests, as a sentence; where few were found, how uncertain that leaves it.

    Args:
        result: of a kind with needle tests, `circuit-retrieval` or `circuit-heads`.
        column: of its table of heads or scores.
    """
    needles = int(result.parameters["needles"])
    if result.kind == RETRIEVAL:
        summary = result.table("summary").iloc[0]
        found = int(summary["successful"])
        # Results of before masked heads on as many tests as they scored them on.
        judged = int(summary.get("judged", needles))
    else:
        found, judged = int(result.table("scores")["needles_found"].iloc[0]), 0
    if column in ("evidence", "masked_recall"):
        return f"It rests on {judged if column == 'masked_recall' else needles} needles, found or not."
    return f"It rests on {found} needles found of {needles}. {few_needles(needles, found)}".rstrip()


def _scored_and_masked(model: LoadedModel, needles: int, draws: int, seed: int, on_progress: OnProgress | None) -> Made:
    """Tables and figures of the module's description."""
    first, vocabulary = first_and_others(model)
    scored = needle_rows(model, vocabulary, first, needles, seed)
    judged = needle_rows(model, vocabulary, first, min(needles, JUDGED), seed + 1)
    found = retrieval_scores(model.bridge, scored)
    if not found.successful:
        raise InputError(
            f"{model.info.name} repeats none of {needles} needles of random tokens: it has no retrieval to mask"
        )
    evidence = evidence_scores(model.bridge, scored)
    means = needle_means(model.bridge, judged)
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    places = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    plan = _plan(found.values.flatten(), evidence.flatten(), draws, seed)
    total = 1 + len(places) + len(plan)
    done = 0

    def recall(heads: list[int]) -> float:
        nonlocal done
        hooks = masking(means, [places[head] for head in heads])
        value = needle_recall(model.bridge, judged, hooks)
        done += 1
        if on_progress is not None:
            on_progress(done, total)
        return value

    clean = recall([])
    heads = pd.DataFrame(
        {"node": head_names(n_layers, n_heads), "layer": [layer for layer, _ in places],
         "head": [head for _, head in places], "retrieval": found.values.flatten().tolist(),
         "retrieval_steps": found.steps.flatten().tolist(), "active": found.active.flatten().tolist(),
         "evidence": evidence.flatten().tolist(),
         "masked_recall": [recall([place]) for place in range(len(places))]}
    )  # fmt: skip
    masks = pd.DataFrame(
        [
            {"order": order, "masked": len(chosen), "draw": draw, "recall": recall(chosen)}
            for order, draw, chosen in plan
        ]
    )
    summary = pd.DataFrame(
        [{"recall": clean, "tests": needles, "successful": found.successful, "judged": len(judged),
          "above_threshold": int((found.values > THRESHOLD).sum()),
          "half_of_evidence": heads_of_half(evidence), "heads": len(places)}]
    )  # fmt: skip
    lost = clean - torch.tensor(heads["masked_recall"].to_numpy()).view(n_layers, n_heads)
    return {"heads": heads, "masks": masks, "summary": summary}, {
        "evidence": figures.head_heatmap(evidence, "attention from the question to the needle, less uniform"),
        "masked": figures.head_heatmap(lost, f"recall lost of {clean:.2f} with one head masked"),
    }


def _plan(copying: torch.Tensor, evidence: torch.Tensor, draws: int, seed: int) -> list[tuple[str, int, list[int]]]:
    """(order, draw, heads) of every mask of several heads, and of the best by either score alone."""
    generator = torch.Generator().manual_seed(seed)
    ranked = [(order, 0, scores.argsort(descending=True)) for order, scores in
              (("retrieval", copying), ("evidence", evidence))]  # fmt: skip
    ranked += [("random", draw, torch.randperm(len(copying), generator=generator)) for draw in range(draws)]
    sizes = [size for size in MASKED if size < len(copying)]
    return [(order, draw, places[:size].tolist()) for order, draw, places in ranked for size in sizes]
