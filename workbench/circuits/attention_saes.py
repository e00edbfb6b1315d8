"""Direct and recursive attribution of a feature of an attention-output SAE on a text, stored as `circuit-dfa`.

Tables: `by_head` (source, head, value: the terms add up, with `summary.constant`, to the pre-activation), `steps`
(recursive DFA: every term of every step), `tokens`, `summary`. Method: `circuits.dfa`, `circuits.recursive_dfa`.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
import torch

from circuits.dfa import (
    FeatureAttribution,
    attention_layer,
    direct_feature_attribution,
    head_shares,
    residual_layer,
)
from circuits.nodes import head_name
from circuits.passes import activations
from circuits.recursive_dfa import recursive_dfa
from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits import figures
from workbench.models.load import LoadedModel
from workbench.models.memory import check_prompt_fits
from workbench.models.prompt_text import row_texts

DFA = "circuit-dfa"


def attribute(
    model: LoadedModel, sae: SAE, ids: Sequence[int], feature: int, position: int
) -> tuple[FeatureAttribution, go.Figure]:
    """What every head brings from every token to a feature's pre-activation at a position, and its figure.

    Args:
        ids: of the text's tokens, BOS first where the model has one.

    Raises:
        InputError: as `circuits.dfa.direct_feature_attribution`.
    """
    tokens = torch.tensor(ids, device=model.device)
    found = direct_feature_attribution(model.bridge, sae, tokens, feature, position)
    return found, figures.attribution_map(found, row_texts(model, ids))


def report_dfa(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    sae: tuple[str, SAE],
    text: str,
    *,
    feature: int | None = None,
    position: int = -1,
    residuals: Mapping[str, SAE] | None = None,
) -> Result:
    """Splits a feature's pre-activation on a text by source position and head, and stores the terms.

    Args:
        sae: name and attention-output SAE.
        feature: its number; the strongest at `position` when None.
        position: the token read, BOS being 0; the last when -1.
        residuals: residual SAEs by name for the recursion, on hook_resid_pre or hook_resid_post.

    Raises:
        InputError: an SAE of another hook point, an empty or too long text, or a feature or position there is not.
    """
    label, attention = sae
    layer = attention_layer(attention)
    ids = model.encode(text)
    if not ids or len(ids) + model.n_bos > model.info.n_ctx:
        raise InputError(f"the text has {len(ids)} tokens and should have 1 to {model.info.n_ctx - model.n_bos}")
    tokens = torch.tensor(model.begun(ids), device=model.device)
    if feature is None:
        feature = strongest_feature(model, attention, tokens, position)
    below = {residual_layer(residual): residual for residual in (residuals or {}).values()}

    def make() -> Made:
        check_prompt_fits("attribution on a text", model, len(tokens), attention=True)
        found, figure = attribute(model, attention, tokens.tolist(), feature, position)
        texts = row_texts(model, tokens.tolist())
        shares, of_norms = (
            head_shares(attention.W_dec, model.info.n_heads, squared=squared)[feature].tolist()
            for squared in (True, False)
        )
        tables = {
            "by_head": found.table(),
            "heads": pd.DataFrame(
                {"head": [head_name(layer, head) for head in range(model.info.n_heads)],
                 "dfa": found.by_head().tolist(), "decoder_share": shares, "decoder_share_of_norms": of_norms}
            ),
            "tokens": pd.DataFrame(
                {"position": range(len(texts)), "token": texts, "dfa": found.by_source().tolist()}
            ),
            "summary": pd.DataFrame(
                [{"sae": label, "feature": feature, "position": found.destination, "constant": found.constant,
                  "pre_activation": found.pre_activation}]
            ),
        }  # fmt: skip
        if below:
            chain = recursive_dfa(model.bridge, attention, below, tokens, feature, position)
            steps = [terms.table.assign(step=number, target=terms.target) for number, terms in enumerate(chain)]
            tables["steps"] = pd.concat(steps, ignore_index=True)
        return tables, {"dfa": figure}

    parameters = {
        "sae": label, "feature": feature, "position": position % len(tokens), "text": text,
        "residuals": list(residuals or {}),
    }  # fmt: skip
    origin = Origin.of_measurement(model, saes={label: attention, **(residuals or {})})
    return catalog.results.get_or_make(DFA, name, parameters=parameters, origin=origin, make=make, keep=True)


@torch.no_grad()
def strongest_feature(model: LoadedModel, sae: SAE, tokens: torch.Tensor, position: int) -> int:
    """The feature of largest |activation| at a position of `tokens` [pos]. Raises InputError where there is none."""
    if not -len(tokens) <= position < len(tokens):
        counted = " with BOS" if model.n_bos else ""
        raise InputError(f"position {position} does not exist: the text has {len(tokens)} tokens{counted}")
    z = activations(model.bridge, tokens[None], [sae.hook_name])[sae.hook_name][0, position].flatten()
    _, features, values = sae.encode(z[None]).entries()
    if not len(features):
        raise InputError(f"no feature fires at position {position % len(tokens)}: give the number of one")
    return int(features[values.abs().argmax()])
