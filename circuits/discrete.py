"""Circuit identification with discrete codes: which heads say something on positive prompts that they never say on
negative ones.

1. Each head's output in the residual stream, averaged over the positions of a prompt: [prompts, heads, d_model].
2. One SAE for all heads, trained on a few prompts of either kind by full-batch Adam:
   h = relu((x - b) W_enc + b_enc),  x_hat = h W_dec + b,  loss = mean squared error + 0.02 mean |h|.
3. A head's code on a prompt is its most active feature, argmax h.
4. Node score: number of codes seen on positive and never on negative prompts, over the number seen at all where
   `normalised`; a softmax over heads puts scores on one scale. Edge score of two heads of different layers: number of
   pairs of codes seen together on positive and never on negative prompts.

(O'Neill & Bui 2024, arXiv 2405.12522. Inputs are brought to a mean square of one over the training prompts, which
the paper does not say: without it the learning rate would mean another thing in every model.)
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuits.blocks import attention_scale, head_weights
from circuits.nodes import Bridge, graph_of, z_names
from circuits.passes import OnProgress, activations
from circuits.prompts import PromptSet
from sae.errors import InputError
from sae.shown import ShownTable


@dataclass(frozen=True, repr=False)
class DiscreteCircuit(ShownTable):
    """Scores of heads and of pairs of heads."""

    heads: list[str]
    nodes: Float[Tensor, "heads"]
    """After the softmax: they sum to one."""
    edges: Float[Tensor, "heads heads"]
    """Zero unless the first head is in an earlier layer."""
    codes: Int[Tensor, "prompts heads"]
    """Positive prompts first."""

    def table(self) -> pd.DataFrame:
        """Columns node, score, codes (distinct ones seen); strongest first."""
        seen = [len(self.codes[:, head].unique()) for head in range(len(self.heads))]
        table = pd.DataFrame({"node": self.heads, "score": self.nodes.tolist(), "codes": seen})
        return table.sort_values("score", ascending=False, ignore_index=True)

    def edge_table(self, top: int | None = None) -> pd.DataFrame:
        """Columns writer, reader, score; strongest first."""
        rows, columns = torch.nonzero(self.edges, as_tuple=True)
        table = pd.DataFrame(
            {
                "writer": [self.heads[row] for row in rows.tolist()],
                "reader": [self.heads[column] for column in columns.tolist()],
                "score": self.edges[rows, columns].tolist(),
            }
        )
        return table.sort_values("score", ascending=False, ignore_index=True)[:top]


def discrete_circuit(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    n_train: int = 10,
    n_features: int = 200,
    epochs: int = 500,
    normalised: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> DiscreteCircuit:
    """Heads and pairs of heads whose codes tell clean (positive) from corrupted (negative) prompts.

    Args:
        n_train: prompts that the SAE is trained on, half of either kind.
        on_progress: called with (epochs trained, epochs in all).

    Raises:
        InputError: fewer prompts than the training needs, or see `circuits.nodes.graph_of`.
    """
    half = n_train // 2
    if half < 1 or half > len(prompts):
        raise InputError(f"training on {n_train} prompts needs {max(half, 1)} of either kind, got {len(prompts)}")
    graph = graph_of(bridge)
    positive, negative = (
        mean_head_outputs(bridge, tokens, prompts.last, batch_size) for tokens in (prompts.clean, prompts.corrupted)
    )
    scale = torch.cat([positive[:half], negative[:half]]).square().mean().sqrt()
    inputs = torch.cat([positive, negative]) / scale
    training = torch.cat([inputs[:half], inputs[len(prompts) : len(prompts) + half]])
    codes = train_codes(training.flatten(0, 1), inputs, n_features, epochs, seed, on_progress)
    nodes = node_scores(codes[: len(prompts)], codes[len(prompts) :], normalised)
    edges = edge_scores(codes[: len(prompts)], codes[len(prompts) :], n_features)
    layers = torch.arange(len(graph.heads)) // graph.n_heads
    return DiscreteCircuit(
        graph.heads, nodes.softmax(dim=0), torch.where(layers[:, None] < layers[None], edges, 0.0), codes
    )


@torch.no_grad()
def mean_head_outputs(
    bridge: Bridge, tokens: Int[Tensor, "n pos"], last: Int[Tensor, "n"], batch_size: int = 32
) -> Float[Tensor, "n heads d_model"]:
    """Every head's output in the residual stream, averaged over the positions of each prompt, padding left out."""
    names = z_names(bridge.cfg.n_layers)
    pieces = []
    for rows, ends in zip(tokens.split(batch_size), last.split(batch_size), strict=True):
        real = (torch.arange(rows.shape[1], device=rows.device) <= ends[:, None]).float()
        weights = real / real.sum(dim=1, keepdim=True)
        found = activations(bridge, rows, names)
        outputs = []
        for layer, name in enumerate(names):
            scale = attention_scale(bridge, layer, found[name])
            share = weights.to(found[name]) if scale is None else weights.to(found[name]) / scale
            mean_z = torch.einsum("nphz,np->nhz", found[name], share)
            outputs.append(torch.einsum("nhz,hzd->nhd", mean_z, head_weights(bridge, layer)))
        pieces.append(torch.cat(outputs, dim=1))
    return torch.cat(pieces)


def train_codes(
    training: Float[Tensor, "rows d_model"],
    inputs: Float[Tensor, "prompts heads d_model"],
    n_features: int,
    epochs: int,
    seed: int,
    on_progress: OnProgress | None = None,
) -> Int[Tensor, "prompts heads"]:
    """Trains the SAE of step 2 and gives the code of every head on every prompt."""
    generator = torch.Generator().manual_seed(seed)
    d = training.shape[1]
    W_enc = (torch.rand(d, n_features, generator=generator) * 2 - 1) / d**0.5
    W_dec = (torch.rand(n_features, d, generator=generator) * 2 - 1) / n_features**0.5
    parameters = [
        nn.Parameter(tensor.to(training)) for tensor in (W_enc, torch.zeros(n_features), W_dec, torch.zeros(d))
    ]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def encode(x: Tensor) -> Tensor:
        return torch.relu((x - parameters[3]) @ parameters[0] + parameters[1])

    with torch.enable_grad():
        for epoch in range(epochs):
            h = encode(training)
            loss = (h @ parameters[2] + parameters[3] - training).square().mean() + 0.02 * h.abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if on_progress is not None:
                on_progress(epoch + 1, epochs)
    with torch.no_grad():
        return encode(inputs).argmax(dim=-1).cpu()


def node_scores(
    positive: Int[Tensor, "n heads"], negative: Int[Tensor, "m heads"], normalised: bool
) -> Float[Tensor, "heads"]:
    """Codes seen on positive and never on negative prompts, head by head."""
    scores = []
    for head in range(positive.shape[1]):
        seen, other = set(positive[:, head].tolist()), set(negative[:, head].tolist())
        scores.append(len(seen - other) / (len(seen | other) if normalised else 1))
    return torch.tensor(scores, dtype=torch.float64)


def edge_scores(
    positive: Int[Tensor, "n heads"], negative: Int[Tensor, "m heads"], n_features: int
) -> Float[Tensor, "heads heads"]:
    """Pairs of codes seen together on positive and never on negative prompts, for every pair of heads."""
    n_heads = positive.shape[1]
    pairs = [codes[:, :, None] * n_features + codes[:, None, :] for codes in (positive, negative)]
    scores = torch.zeros(n_heads, n_heads, dtype=torch.float64)
    for one in range(n_heads):
        for two in range(n_heads):
            if one != two:
                seen, other = (set(part[:, one, two].tolist()) for part in pairs)
                scores[one, two] = len(seen - other)
    return scores


def roc_auc(scores: Float[Tensor, "n"], truth: Bool[Tensor, "n"]) -> float:
    """Area under the ROC curve: how often a true item outranks a false one, ties counting half.

    Raises:
        InputError: nothing true or nothing false.
    """
    true, false = scores[truth], scores[~truth]
    if not len(true) or not len(false):
        raise InputError("a ROC curve needs both members and non-members of the circuit")
    above = (true[:, None] > false[None]).double() + 0.5 * (true[:, None] == false[None]).double()
    return above.mean().item()
