"""What every head attends to and copies: a row of scores a head.

Over the queries q of each row of tokens, A[q, k] the attention from q to k, BOS at position 0, which is no query, as
it sees nothing but itself:

    previous_token   mean of A[q, q - 1] over q >= 2
    duplicate_token  mean over queries whose token t occurred before of sum_k A[q, k], k < q, t_k = t_q
    induction        mean over the same queries of sum_k A[q, k], t_{k-1} = t_q: the tokens that followed
    sink             mean over q of A[q, 0]; sink_excess is it minus that of uniform attention, 1 / (q + 1)
    entropy          mean over q of -sum_k A log A, in nats
    keys_95          mean over q of the least number of keys that hold 95% of the attention

and from the weights alone

    copying          sum of the eigenvalues of W_E W_V W_O W_U over the sum of their absolute values: 1 when attending
                     to any token raises that token's own logit. Weights are effective ones (LayerNorm folded in), and
                     the eigenvalues those of W_O W_U W_E W_V, the same but for zeros, [d_head, d_head].

(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", eigenvalues of copying heads; Olsson et al.
2022, arXiv 2209.11895; attention sinks: Gu et al. 2024, arXiv 2410.10781.) Use `repeated_tokens` for the first
three; text for the sink, entropy and keys.

`prefix_induction` tells induction heads that match one token from those that match longer prefixes (Kissane et al.
2024, arXiv 2406.17759): see there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import head_weights
from circuits.effective_weights import effective_weights
from circuits.nodes import Bridge, head_name, head_names
from circuits.passes import activations
from circuits.unembedding import check_unembedding
from sae.errors import InputError
from sae.shown import ShownTable

COLUMNS = ("previous_token", "duplicate_token", "induction", "sink", "sink_excess", "entropy", "keys_95", "copying")


@dataclass(frozen=True, repr=False)
class HeadScores(ShownTable):
    """Scores of every head, `values` [layers, heads, len(COLUMNS)]; NaN where no query qualified."""

    values: Float[Tensor, "layers heads scores"]

    def __getitem__(self, score: str) -> Float[Tensor, "layers heads"]:
        return self.values[..., COLUMNS.index(score)]

    def table(self) -> pd.DataFrame:
        """One row a head: node, layer, head and the scores."""
        n_layers, n_heads, _ = self.values.shape
        table = pd.DataFrame(self.values.flatten(0, 1).numpy(), columns=list(COLUMNS))
        layers = [layer for layer in range(n_layers) for _ in range(n_heads)]
        heads = list(range(n_heads)) * n_layers
        table.insert(0, "node", head_names(n_layers, n_heads))
        table.insert(1, "layer", layers)
        table.insert(2, "head", heads)
        return table

    def best(self, score: str, top: int = 5) -> list[str]:
        """Heads of largest score."""
        table = self.table().sort_values(score, ascending=False, na_position="last")
        return list(table.node[:top])


def repeated_tokens(
    vocabulary: Sequence[int], bos_id: int, n: int = 16, length: int = 32, seed: int = 0
) -> Int[Tensor, "n pos"]:
    """BOS, `length` random tokens, all different, and the same once more. Raises InputError if there are too few."""
    tokens = torch.tensor([token for token in vocabulary if token != bos_id])
    if len(tokens) < length:
        raise InputError(f"{length} different tokens were asked for, the vocabulary has {len(tokens)}: ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([tokens[torch.randperm(len(tokens), generator=generator)[:length]] for _ in range(n)])
    return torch.cat([torch.full((n, 1), bos_id), rows, rows], dim=1)


@torch.no_grad()
def head_scores(bridge: Bridge, tokens: Int[Tensor, "n pos"], *, batch_size: int = 8) -> HeadScores:
    """Scores of every head on rows of tokens, BOS first and without padding.

    Copying is NaN where a model's weights do not say it: an unembedding that does not give its logits, or attention
    without a matrix for values alone.

    Raises:
        InputError: rows of fewer than three tokens.
    """
    if tokens.shape[1] < 3:
        raise InputError(f"head scores need rows of at least three tokens, got {tokens.shape[1]}")
    n_layers = bridge.cfg.n_layers
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
    totals = torch.zeros(n_layers, bridge.cfg.n_heads, len(COLUMNS) - 1, dtype=torch.float64)
    queries = torch.zeros(len(COLUMNS) - 1, dtype=torch.float64)
    for rows in tokens.split(batch_size):
        found = activations(bridge, rows, names)
        for layer, name in enumerate(names):
            sums, counts = pattern_sums(found[name].double(), rows)
            totals[layer] += sums.cpu()
            if layer == 0:
                queries += counts.cpu()
    return HeadScores(torch.cat([totals / queries, _copying_where_read(bridge)[..., None]], dim=-1))


def pattern_sums(
    pattern: Float[Tensor, "n heads q k"], tokens: Int[Tensor, "n pos"]
) -> tuple[Float[Tensor, "heads scores"], Float[Tensor, "scores"]]:
    """Sums over queries of the scores read off attention patterns, and the number of queries of each."""
    n, n_pos = tokens.shape
    device = tokens.device
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    # BOS is no earlier occurrence of anything.
    same[:, :, 0] = False
    followers = torch.zeros_like(same)
    followers[:, :, 1:] = same[:, :, :-1]
    repeated = same.any(dim=2)
    seen = pattern[:, :, 1:]
    sink = seen[..., 0].sum(dim=(0, 2))
    keys_seen = torch.arange(2, n_pos + 1, device=device, dtype=pattern.dtype)
    entropy = -torch.special.xlogy(seen, seen).sum(dim=(0, 2, 3))
    # Rounding must not cost a key: a uniform row of 20 keys needs 19 for exactly 95%.
    held = seen.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    keys = (held < 0.95 - 1e-6).sum(dim=-1) + 1
    sums = [
        pattern.diagonal(-1, dim1=2, dim2=3)[..., 1:].sum(dim=(0, 2)),
        torch.einsum("nhqk,nqk->h", pattern, same.to(pattern.dtype)),
        torch.einsum("nhqk,nqk->h", pattern, followers.to(pattern.dtype)),
        sink,
        sink - n * (1 / keys_seen).sum(),
        entropy,
        keys.sum(dim=(0, 2)).to(pattern.dtype),
    ]
    n_queries, n_repeated = n * (n_pos - 1), int(repeated.sum())
    counts = [n * (n_pos - 2), n_repeated, n_repeated, n_queries, n_queries, n_queries, n_queries]
    return torch.stack(sums, dim=-1), torch.tensor(counts, dtype=torch.float64, device=device)


@torch.no_grad()
def copying_scores(bridge: Bridge, layer: int) -> Float[Tensor, "heads"]:
    """Eigenvalue positivity of every head's full OV circuit, in float64; see the module's docstring.

    NaN where the outputs are no tokens: there is nothing to copy.

    Raises:
        InputError: an unembedding that does not give the model's logits, or attention without a matrix for values.
    """
    check_unembedding(bridge)
    return _copying(bridge, layer)


def _copying_where_read(bridge: Bridge) -> Float[Tensor, "layers heads"]:
    try:
        check_unembedding(bridge)
        return torch.stack([_copying(bridge, layer) for layer in range(bridge.cfg.n_layers)])
    except InputError:
        return torch.full((bridge.cfg.n_layers, bridge.cfg.n_heads), torch.nan, dtype=torch.float64)


def _copying(bridge: Bridge, layer: int) -> Float[Tensor, "heads"]:
    W_U = effective_weights(bridge, "unembed").W
    W_E = bridge.embed.original_component.weight.to(W_U.dtype)
    if W_U.shape[1] < W_E.shape[0]:
        return torch.full((bridge.cfg.n_heads,), float("nan"), dtype=torch.float64)
    shared = (W_U[:, : W_E.shape[0]] @ W_E).double().cpu()
    W_V = effective_weights(bridge, "v", layer).W.double().cpu()
    W_O = head_weights(bridge, layer).double().cpu()
    W_V = W_V.repeat_interleave(W_O.shape[0] // W_V.shape[1], dim=1)
    eigenvalues = torch.linalg.eigvals(torch.einsum("hzd,de,ehy->hzy", W_O, shared, W_V))
    return eigenvalues.sum(dim=-1).real / eigenvalues.abs().sum(dim=-1)


@dataclass(frozen=True, repr=False)
class PrefixInduction(ShownTable):
    """Attention to the token after a repeated prefix, by the prefix's length."""

    lengths: list[int]
    intact: Float[Tensor, "layers heads lengths"]
    corrupted: Float[Tensor, "layers heads lengths"]
    """With all of the second prefix but its last token moved away from it."""

    def table(self) -> pd.DataFrame:
        """One row a head and length: node, length, intact, corrupted."""
        n_layers, n_heads, _ = self.intact.shape
        rows = [
            (head_name(layer, head), length, float(self.intact[layer, head, i]), float(self.corrupted[layer, head, i]))
            for layer in range(n_layers)
            for head in range(n_heads)
            for i, length in enumerate(self.lengths)
        ]
        return pd.DataFrame(rows, columns=["node", "length", "intact", "corrupted"])


@torch.no_grad()
def prefix_induction(
    bridge: Bridge,
    vocabulary: Sequence[int],
    bos_id: int,
    *,
    lengths: Sequence[int] = (1, 2, 4, 8),
    n: int = 16,
    seed: int = 0,
) -> PrefixInduction:
    """Induction by prefix length: random tokens in which p tokens occur twice, at a1 and a2.

    The score is the attention from a2 + p - 1, the last token of the second prefix, to a1 + p, the token that
    followed the first. A head that matches one token scores alike for every p. One that scores more the longer the
    prefix may match all of it, or only be surer where more tokens have occurred before. The control tells these apart:
    the same p tokens repeat, but the p - 1 before the last stand, in order, as many places earlier as the longest
    prefix has tokens. What matches the prefix falls to its value at p = 1; what counts repeats stays. All rows have the
    same length and places, whatever p, so that distance does not enter.

    Raises:
        InputError: a vocabulary too small for the longest prefix.
    """
    longest = max(lengths)
    total = 4 * longest + 4
    tokens = torch.tensor([token for token in vocabulary if token != bos_id])
    if len(tokens) < total:
        raise InputError(f"prefixes of {longest} tokens need a vocabulary of {total}, got {len(tokens)}: shorten them")
    generator = torch.Generator().manual_seed(seed)
    target, query = longest + 1, 3 * longest + 2
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    device = next(bridge.parameters()).device
    scores: dict[bool, list[Tensor]] = {False: [], True: []}
    base = torch.stack([tokens[torch.randperm(len(tokens), generator=generator)[: query + 1]] for _ in range(n)])
    base[:, 0] = bos_id
    for length in lengths:
        for corrupt in (False, True):
            rows = base.clone()
            rows[:, query] = base[:, target - 1]
            end = query - longest if corrupt else query
            rows[:, end - length + 1 : end] = base[:, target - length : target - 1]
            found = activations(bridge, rows.to(device), names)
            scores[corrupt].append(
                torch.stack([found[name][:, :, query, target].double().mean(dim=0).cpu() for name in names])
            )
    return PrefixInduction(list(lengths), torch.stack(scores[False], dim=-1), torch.stack(scores[True], dim=-1))
