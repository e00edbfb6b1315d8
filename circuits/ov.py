"""What a head's OV circuit does to the logits when it attends to one token.

    effect(t) = W_E[t] W_V W_O W_U

with effective weights (LayerNorm's gain and centring folded in): the token's embedding through the head straight to
the logits, LayerNorm's scales, biases and positions left out, so that sizes compare within one row only. A copying
head raises the token's own logit. (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.blocks import head_weights
from circuits.effective_weights import effective_weights
from circuits.nodes import Bridge, graph_of
from circuits.unembedding import check_unembedding


@torch.no_grad()
def ov_effects(bridge: Bridge, head: str, tokens: Sequence[int]) -> Float[Tensor, "tokens vocab"]:
    """Logit effects of attending to each token.

    Raises:
        InputError: no such head, an unembedding that does not give the model's logits, or see
            `circuits.nodes.graph_of`.
    """
    graph = graph_of(bridge, heads_alone=True)
    layer, number = graph.head(head)
    check_unembedding(bridge)
    W_U = effective_weights(bridge, "unembed").W
    W_V = effective_weights(bridge, "v", layer).W[:, number // (graph.n_heads // graph.n_kv_heads)]
    rows = torch.as_tensor(list(tokens), device=W_U.device)
    embedded = bridge.embed.original_component.weight[rows].to(W_U.dtype)
    return embedded @ W_V @ head_weights(bridge, layer)[number].to(W_U.dtype) @ W_U
