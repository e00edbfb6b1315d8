"""What a head is for, by the features of an attention-output SAE that read from it most, stored as
`circuit-head-features`.

1. Of every head its features: those that fire with the largest share of the head in their decoder row's squared norm,
   above the share that each head of the layer would have of an even row, with what they are called and their best
   concept (`workbench concepts`).
2. Of every such feature how far back it looks, from direct feature attribution (`circuits.dfa`) at the strongest tokens
   of its strongest contexts. Each source s but BOS weighs w_s, its positive part over all heads; then

       distance    sum_s w_s (t - s) / sum_s w_s, mean over the contexts: tokens from source to destination t
       induction   share of the weight on sources whose token before is the token at t: what followed it earlier
       family      induction where that share is above one half, else short up to 8 tokens of distance, else long

3. Of every such feature the relations that tell it (`workbench.circuits.relations`): the current token, the one before,
   what followed an earlier copy, ...; and its best concept, where that is good enough to call it after it, a number at
   its end left out, since depth 1 and depth 2 are one job.
4. Of every head its number of meanings: the fewest of these that tell all its features that any tells. Polysemantic
   is the share of heads with more than one, among those with two such features; the control deals the features of all
   heads out to the heads by lot.

(Kissane et al. 2024, arXiv 2406.17759, read these families off by eye and call a head polysemantic where its features
mean several things; the measures and bounds are reconstructed.)

Tables: `features` (node, rank, feature, share, name, concept, f1, distance, induction, family, relation, relation_f1,
tokens, told_by), `heads` (node, layer, head, features, told, meanings, and how many of each family), `summary` (heads
with two features told, polysemantic, dealt, dealt_least, dealt_greatest).
"""

import math
import re

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.dfa import attention_layer, direct_feature_attribution
from circuits.nodes import head_name
from circuits.passes import OnProgress
from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits.relations import TOLD, Neighbours, Told, meanings
from workbench.features.index.feature import LABEL_F1
from workbench.features.index.query import FeatureIndex
from workbench.models.load import LoadedModel
from workbench.models.memory import check_prompt_fits
from workbench.show.html import marked
from workbench.text.token_bytes import alone

HEAD_FEATURES = "circuit-head-features"
SHORT = 8
"""Tokens of mean distance up to which a feature looks back a short way."""
NUMBERED = r"_\d+$"
"""The end of a concept that is one of a series."""
DEALS = 20
"""Draws of the control."""
FAMILIES = ("induction", "short", "long")


def report_head_features(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    sae: tuple[str, SAE],
    *,
    n: int = 10,
    texts: int = 8,
    on_progress: OnProgress | None = None,
) -> Result:
    """Surveys the heads of an attention-output SAE that has an index, and stores the tables.

    Args:
        sae: its name and itself.
        n: features of a head.
        texts: strongest contexts of a feature in which it is traced back.

    Raises:
        InputError: an SAE of another hook point or without an index, or nothing asked for.
    """
    label, attention = sae
    layer = attention_layer(attention)
    if n < 1 or texts < 1:
        raise InputError(
            f"a survey needs at least one feature of a head and one text of a feature, not {n} and {texts}"
        )
    index = FeatureIndex.open(catalog, label)

    def make() -> Made:
        longest = int(index.meta["context_len"])
        check_prompt_fits("following a feature through contexts", model, longest, attention=True)
        nodes = [head_name(layer, head) for head in range(model.info.n_heads)]
        features = pd.concat([of_head(index, head, n).assign(node=node) for head, node in enumerate(nodes)])
        reach: dict[int, tuple[float, float]] = {}
        wanted = list(dict.fromkeys(features["feature"].tolist()))
        for done, feature in enumerate(wanted, 1):
            reach[feature] = looks_back(model, attention, index, feature, texts)
            if on_progress is not None:
                on_progress(done, len(wanted))
        for column, part in (("distance", 0), ("induction", 1)):
            features[column] = [reach[feature][part] for feature in features["feature"]]
        features["family"] = [family(*reach[feature]) for feature in features["feature"]]
        features = _told(index, features.reset_index(drop=True))
        features.insert(0, "node", features.pop("node"))
        heads = _heads(features, layer, nodes)
        return {"features": features, "heads": heads, "summary": _summary(features, heads)}, {}

    parameters = {"sae": label, "n": n, "texts": texts, "relations": TOLD, "built": index.settings}
    origin = Origin.of_measurement(model, saes={label: attention})
    try:
        return catalog.results.get_or_make(HEAD_FEATURES, name, parameters=parameters, origin=origin, make=make)
    finally:
        index.close()


def of_head(index: FeatureIndex, head: int, n: int) -> pd.DataFrame:
    """The n features that fire with the largest share of a head, above an even one: feature, share, name, concept, f1.

    A concept is given where its F1 is good enough to call the feature after it.
    """
    rows = index.frame(
        "SELECT feature, share FROM feature_heads JOIN feature_stats USING (feature) WHERE head = ? AND firings > 0 "
        "AND share > 1 / (1 + (SELECT max(head) FROM feature_heads)) ORDER BY share DESC, feature LIMIT ?",
        [head, n],
    )
    known = index.table().reindex(columns=["feature", "name", "concept", "concept_f1"])
    table = rows.merge(known.rename(columns={"concept_f1": "f1"}), on="feature", how="left", sort=False)
    good = table["f1"] >= LABEL_F1
    return table.assign(concept=table["concept"].where(good, None), f1=table["f1"].where(good))


def looks_back(model: LoadedModel, sae: SAE, index: FeatureIndex, feature: int, texts: int) -> tuple[float, float]:
    """Mean distance of a feature's sources and their induction share; NaN where nothing but BOS feeds it."""
    found = []
    for tokens in index.strongest_contexts(feature, texts):
        split = direct_feature_attribution(model.bridge, sae, tokens.to(model.device), feature)
        # A negative activation is brought about by negative terms.
        value = split.by_source() * math.copysign(1, split.pre_activation)
        found.append(reach_of(value.cpu(), tokens, n_bos=model.n_bos))
    kept = torch.tensor([one for one in found if not math.isnan(one[0])], dtype=torch.float64)
    return (math.nan, math.nan) if not len(kept) else tuple(kept.mean(dim=0).tolist())


def reach_of(value: Float[Tensor, "pos"], tokens: Int[Tensor, "pos"], *, n_bos: int = 1) -> tuple[float, float]:
    """Distance and induction share of one context's last token, from what its sources bring; see the module."""
    weight = value.double().clamp_min(0)
    weight[:n_bos] = 0
    total = weight.sum()
    if total == 0:
        return math.nan, math.nan
    weight = weight / total
    back = len(tokens) - 1 - torch.arange(len(tokens), dtype=torch.float64)
    follows = torch.zeros(len(tokens), dtype=torch.bool)
    # BOS is no earlier occurrence, nor is a token at its own position.
    follows[n_bos + 1 :] = tokens[n_bos:-1] == tokens[-1]
    return float(weight @ back), float(weight[follows].sum())


def family(distance: float, induction: float) -> str:
    """One of FAMILIES; empty where nothing but BOS feeds the feature."""
    if math.isnan(distance):
        return ""
    return "induction" if induction > 0.5 else "short" if distance <= SHORT else "long"


def _told(index: FeatureIndex, features: pd.DataFrame) -> pd.DataFrame:
    """With columns relation, relation_f1, tokens (up to three) and told_by (names, commas between)."""
    near = Neighbours(index)
    words = {
        token: marked(alone(text or "", bytes(part) if isinstance(part, bytes | bytearray) else None))
        for token, text, part in index.frame(f"SELECT token, text, bytes FROM {index.words}").itertuples(index=False)
    }
    rows: dict[int, tuple[str, float, str, str]] = {}
    for feature, concept in features[["feature", "concept"]].drop_duplicates("feature").itertuples(index=False):
        fired = index.frame("SELECT row, activation FROM feature_activations WHERE feature = ?", [int(feature)])
        found = near.tell(fired["row"].to_numpy(), fired["activation"].to_numpy())
        by = [relation for relation, told in found.items() if told.f1 >= TOLD]
        if isinstance(concept, str):
            by.append(re.sub(NUMBERED, "", concept))
        best = max(found, key=lambda relation: found[relation].chosen_f1, default="")
        told = found.get(best, Told(math.nan, math.nan, []))
        rows[feature] = (best, told.f1, " ".join(f'"{words[token]}"' for token in told.tokens[:3]), ", ".join(by))
    return features.assign(
        **{
            column: [rows[feature][part] for feature in features["feature"]]
            for part, column in enumerate(("relation", "relation_f1", "tokens", "told_by"))
        }
    )


def _heads(features: pd.DataFrame, layer: int, nodes: list[str]) -> pd.DataFrame:
    """One row a head."""
    rows = []
    for head, node in enumerate(nodes):
        own = features[features["node"] == node]
        told = _told_by(own)
        rows.append(
            {"node": node, "layer": layer, "head": head, "features": len(own), "told": sum(map(bool, told)),
             "meanings": meanings(told), **{kind: int((own["family"] == kind).sum()) for kind in FAMILIES}}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _told_by(features: pd.DataFrame) -> list[list[str]]:
    return [by.split(", ") if by else [] for by in features["told_by"]]


def _summary(features: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """One row: the polysemantic share, and that of heads to which the same features are dealt by lot."""
    nodes = heads["node"].tolist()
    known = pd.Series([polysemantic_share(_heads(_dealt(features, draw), 0, nodes)) for draw in range(DEALS)]).dropna()
    row = {"heads": int((heads["told"] >= 2).sum()), "polysemantic": polysemantic_share(heads), "dealt": known.mean(),
           "dealt_least": known.min(), "dealt_greatest": known.max()}  # fmt: skip
    return pd.DataFrame([row])


def _dealt(features: pd.DataFrame, draw: int) -> pd.DataFrame:
    """The features with other heads, by lot: every head has as many as before."""
    return features.assign(node=features["node"].sample(frac=1, random_state=draw).tolist())


def polysemantic_share(heads: pd.DataFrame) -> float:
    """Share of heads with more than one meaning, among those with two features that are told; NaN where none has.

    Args:
        heads: the table `heads`.
    """
    known = heads[heads["told"] >= 2]
    return float((known["meanings"] > 1).mean()) if len(known) else math.nan
