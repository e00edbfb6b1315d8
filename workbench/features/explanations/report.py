"""Explaining features with a language model, and scoring each explanation on texts that did not make it.

A feature's strongest examples are shown, the tokens on which it fires between << and >>, and the model says in a phrase
what it responds to (Bills et al. 2023, "Language models can explain neurons in language models"; marks as in Paulo et
al. 2024, arXiv 2410.13928). The phrase is then tested by detection (Paulo et al., section 3): the model, given the
phrase and one text at a time, says whether the feature fires in it. The texts are unseen examples from all strength
quantiles and as many random texts of the harvest in which the feature does not fire. The score is the balanced
accuracy, (share right where it fires + share right where it does not) / 2: 0.5 by chance. An answer that is neither
yes nor no counts as wrong.

One result of kind `explanations` per SAE, a row for every feature and model, with the table

    features   feature, sign, explanation, score, fires_right, silent_right, unclear, texts, model
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import versions
from workbench.catalog.results import Result
from workbench.features.explanations.language_models import LanguageModel, PromptTooLongError
from workbench.features.index.feature import Example, Feature
from workbench.features.index.query import FeatureIndex
from workbench.features.index.titles import EXPLANATIONS, explanations_path

MAX_CHARACTERS = 200
EXPLANATION_TOKENS, ANSWER_TOKENS = 60, 4
_EXPLAIN = """A unit inside a language model was observed on a corpus. In each text below, the tokens on which the \
unit is active stand between << and >>.

{texts}

What does the unit respond to? Answer with one short phrase that names the words, the syntax or the meaning that the \
marked tokens share, and nothing else.
Answer:"""
_DETECT = """A unit inside a language model responds to: {explanation}

Here is a text:

{text}

Does the text contain what the unit responds to? Answer yes or no.
Answer:"""


def explain_features(
    catalog: Catalog,
    sae: str,
    features: Sequence[int],
    model: LanguageModel,
    *,
    examples: int = 10,
    texts: int = 10,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Explains features of an indexed SAE and scores the explanations; stored after every feature.

    Features that the same model has explained before are left as they are; other models' explanations stay beside it.
    Dead features are passed over.

    Args:
        features: their numbers.
        model: asked once for an explanation and once for each text of the score.
        examples: strongest examples shown to it; half of them, and so on, where they do not fit into its context.
        texts: in which the feature fires, and as many in which it does not, for the score; 0 leaves the score out.
        on_progress: called with (features done, features in all).

    Raises:
        InputError: an SAE without an index, a feature that does not exist, a model that does not answer.
    """
    if examples < 1 or texts < 0:
        raise InputError(f"explaining takes at least one example and no fewer than 0 texts: {examples}, {texts}")
    index = FeatureIndex.open(catalog, sae)
    wanted = list(dict.fromkeys(features))
    rows = _stored(catalog, sae)
    try:
        index.check(wanted)
        for done, number in enumerate(wanted, start=1):
            if (number, model.name) not in rows:
                feature = index.feature(number)
                if not feature.dead:
                    silent = index.silent_examples(number, texts, seed=number) if texts else []
                    rows[number, model.name] = _explained(feature, silent, model, examples, texts)
                    _save(catalog, sae, rows)
            if on_progress is not None:
                on_progress(done, len(wanted))
    finally:
        index.close()
    if not rows:
        raise InputError(f"nothing to explain: none of these features of {sae} fires on the indexed tokens")
    return catalog.results.open(EXPLANATIONS, sae)


def marked(example: Example, sign: int) -> str:
    """An example's text with the tokens on which the feature fires with a sign between << and >>, runs joined."""
    pieces, active = [], False
    for token, activation in zip(example.tokens, example.activations, strict=True):
        if (activation * sign > 0) != active:
            pieces.append(">>" if active else "<<")
            active = not active
        pieces.append(token)
    return "".join(pieces) + ">>" * active


def cleaned(answer: str) -> str:
    """The explanation in an answer: its first line with text, without quotation marks and a closing period."""
    lines = [line.strip().strip("\"'`*").strip() for line in answer.splitlines()]
    return next((line.rstrip(".")[:MAX_CHARACTERS] for line in lines if line), "")


def decided(answer: str) -> bool | None:
    """Yes or no, None for anything else."""
    word = answer.strip().strip("\"'`*").lower()
    return True if word.startswith("yes") else False if word.startswith("no") else None


def _explanation(examples: Sequence[Example], sign: int, model: LanguageModel) -> str:
    """The phrase for examples; the stronger half of them where all do not fit into the model's context."""
    listed = "\n\n".join(f"Text {number}: {marked(one, sign)}" for number, one in enumerate(examples, start=1))
    try:
        return cleaned(model.complete(_EXPLAIN.format(texts=listed), EXPLANATION_TOKENS))
    except PromptTooLongError:
        if len(examples) == 1:
            raise
        return _explanation(examples[: len(examples) // 2], sign, model)


def _explained(
    feature: Feature, silent: Sequence[Example], model: LanguageModel, examples: int, texts: int
) -> dict[str, Any]:
    """One row of the table."""
    # One phrase cannot speak of both signs: the one that most firings have.
    sign = 1 if 2 * feature.stats.positive >= feature.stats.firings else -1
    strongest, firing = _shown_and_unseen(feature, sign, examples, texts)
    explanation = _explanation(strongest, sign, model)
    row: dict[str, Any] = {"feature": feature.feature, "sign": sign, "explanation": explanation, "model": model.name}
    return row | _detection(explanation, firing, silent, model)


def _shown_and_unseen(
    feature: Feature, sign: int, examples: int, texts: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """The strongest examples of a sign, and up to `texts` others, spread evenly over the strength quantiles."""
    groups = [group for group in feature.groups if group.sign == sign]
    strongest = groups[0].examples[:examples]
    shown = {example.row for example in strongest}
    others = [example for group in groups[1:] for example in group.examples if example.row not in shown]
    return strongest, [others[place * len(others) // texts] for place in range(min(texts, len(others)))]


def _detection(
    explanation: str, firing: Sequence[Example], silent: Sequence[Example], model: LanguageModel
) -> dict[str, Any]:
    """The score of an explanation; None where there is nothing to score."""
    if not (explanation and firing and silent):
        return {"score": None, "fires_right": None, "silent_right": None, "unclear": 0, "texts": 0}
    answers = [
        decided(model.complete(_DETECT.format(explanation=explanation, text="".join(one.tokens)), ANSWER_TOKENS))
        for one in (*firing, *silent)
    ]
    right = sum(answer is True for answer in answers[: len(firing)]) / len(firing)
    rejected = sum(answer is False for answer in answers[len(firing) :]) / len(silent)
    return {
        "score": (right + rejected) / 2, "fires_right": right, "silent_right": rejected,
        "unclear": sum(answer is None for answer in answers), "texts": len(answers),
    }  # fmt: skip


def _stored(catalog: Catalog, sae: str) -> dict[tuple[int, str], dict[str, Any]]:
    """The rows there are, by feature and model."""
    if not explanations_path(catalog, sae).is_file():
        return {}
    table = catalog.results.open(EXPLANATIONS, sae).table("features")
    return {(int(row["feature"]), row["model"]): row for row in table.to_dict(orient="records")}


def _save(catalog: Catalog, sae: str, rows: dict[tuple[int, str], dict[str, Any]]) -> None:
    columns = {
        "feature": int, "sign": int, "explanation": str, "score": float, "fires_right": float, "silent_right": float,
        "unclear": int, "texts": int, "model": str,
    }  # fmt: skip
    table = pd.DataFrame([rows[place] for place in sorted(rows)], columns=list(columns)).astype(columns)
    catalog.results.save(
        EXPLANATIONS, sae, parameters={}, provenance={"sae": sae, "versions": versions()}, tables={"features": table}
    )
