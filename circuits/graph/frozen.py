"""A transformer frozen on one prompt: what is linear in it once patterns and the norms' denominators are held.

With attention patterns P and every norm's denominator fixed at their values on the prompt, and each MLP's output taken
as given, the residual stream is affine in the token embeddings and in what the MLPs wrote:

    N(v) = C(v) * gain / scale + shift                C: centring for LayerNorm, identity for RMSNorm
    attn(v)[q] = post(sum_h sum_k P_h[q, k] (N1(v)[k] W_V[h] + b_V[h]) W_O[h] + b_O)
    resid_mid = resid_pre + attn(resid_pre)           resid_post = resid_mid + mlp_out
    logits = N_f(resid_post of the last layer) W_U + b_U

`post` is the norm after attention (Gemma 2, OLMo 2). Norms of queries and keys, rotary positions, soft caps and sliding
windows lie inside the patterns. Logits are those before a final soft cap, which is not linear. Where attention and MLP
run side by side (GPT-NeoX), the MLP reads resid_pre and both add to it.

Everything is computed anew from weights, patterns and MLP outputs (`freeze`) and compared with the model's own residual
stream: where they differ, the model is no such transformer and the layer is named. (Ameisen et al. 2025, "Circuit
Tracing"; the layout of the equations is ours.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import multiplier, norm_after, norm_before, output_bias, output_matrices
from circuits.effective_weights import linear_of, logit_scale, reading_matrix, stream_vector
from circuits.nodes import Bridge
from circuits.norms import measured_norm
from circuits.passes import taking
from sae.errors import InputError
from sae.shown import Shown


@dataclass(frozen=True, repr=False)
class FrozenNorm(Shown):
    """A norm with its denominators held at a prompt's."""

    gain: Float[Tensor, "d_model"]
    shift: Float[Tensor, "d_model"]
    centred: bool
    scale: Float[Tensor, "pos"]

    def linear(self, v: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """C(v) * gain / scale: the norm without its shift, of the first positions where v holds no more."""
        return self._centred(v) * self.gain / self.scale[: v.shape[-2], None]

    def adjoint(self, u: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """The transpose of `linear`: C(gain * u) / scale."""
        return self._centred(u * self.gain) / self.scale[: u.shape[-2], None]

    def adjoint_at(
        self, u: Float[Tensor, "n d_model"], positions: Int[Tensor, "n"]
    ) -> Float[Tensor, "n d_model"]:  # fmt: skip
        """`adjoint` of vectors that stand at one position each."""
        return self._centred(u * self.gain) / self.scale[positions, None]

    def into(self, W: Float[Tensor, "d_model d_out"]) -> Float[Tensor, "d_model d_out"]:
        """C diag(gain) W: what reads v / scale as W reads `linear(v)`."""
        return self._centred((self.gain[:, None] * W).T).T

    def _centred(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        return v - v.mean(dim=-1, keepdim=True) if self.centred else v


@dataclass(frozen=True, repr=False)
class FrozenLayer(Shown):
    """One block: attention with its pattern held, and the norm that its MLP reads through."""

    pattern: Float[Tensor, "heads query key"]
    W_V: Float[Tensor, "d_model heads d_head"]
    b_V: Float[Tensor, "heads d_head"]
    W_O: Float[Tensor, "heads d_head d_model"]
    b_O: Float[Tensor, "d_model"]
    before: FrozenNorm
    after: FrozenNorm | None
    """The norm of what attention writes."""
    mlp_norm: FrozenNorm
    constant: Float[Tensor, "pos d_model"]
    """What attention adds whatever it reads: its biases and the norms' shifts."""
    mlp_out: Float[Tensor, "pos d_model"]
    """What the MLP added to the residual stream."""

    def attention(
        self, v: Float[Tensor, "*batch pos d_model"], heads: slice | list[int] = slice(None)
    ) -> Float[Tensor, "*batch pos d_model"]:
        """What attention makes of v, constants apart; by some heads alone where they are named."""
        values = torch.einsum("...kd,dhz->...hkz", self.before.linear(v), self.W_V[:, heads])
        mixed = torch.einsum("hqk,...hkz->...qhz", self.pattern[heads], values)
        written = torch.einsum("...qhz,hzd->...qd", mixed, self.W_O[heads])
        return written if self.after is None else self.after.linear(written)

    @cached_property
    def reader(self) -> Float[Tensor, "d_model heads*d_head"]:
        """W_V as it reads the residual stream over its scale: the gain and the centring of the norm in it."""
        return self.before.into(self.W_V.flatten(1))

    @cached_property
    def mixing(self) -> Float[Tensor, "heads query key"]:
        """The pattern over the scale of each key."""
        return self.pattern / self.before.scale

    def spread(self, G: Float[Tensor, "pos batch d_model"]) -> Float[Tensor, "pos batch heads*d_head"]:
        """Gradients at the first positions carried back through W_O and the pattern, in front of `reader`."""
        n, (heads, d_head, _) = len(G), self.W_O.shape
        u = G if self.after is None else self.after.adjoint(G.transpose(0, 1)).transpose(0, 1)
        asked = (u.reshape(-1, u.shape[2]) @ self.W_O.flatten(0, 1).T).view(n, -1, heads, d_head)
        carried = torch.bmm(self.mixing[:, :n, :n].mT, asked.permute(2, 0, 1, 3).reshape(heads, n, -1))
        return carried.view(heads, n, -1, d_head).permute(1, 2, 0, 3).reshape(n, -1, heads * d_head)

    def read_by_heads(
        self, g: Float[Tensor, "batch d_model"], positions: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch heads d_model"]:
        """The direction that each head reads for vectors that stand at one position each: W_V W_O^T g."""
        u = g if self.after is None else self.after.adjoint_at(g, positions)
        asked = torch.einsum("bd,hzd->hbz", u, self.W_O)
        return torch.bmm(asked, self.reader.view(len(g[0]), *self.W_O.shape[:2]).permute(1, 2, 0)).transpose(0, 1)


@dataclass(frozen=True, repr=False)
class Frozen(Shown):
    """A model frozen on a prompt."""

    tokens: Int[Tensor, "pos"]
    embedded: Float[Tensor, "pos d_model"]
    """The residual stream before the first block, position embeddings apart."""
    positions: Float[Tensor, "pos d_model"]
    """Position embeddings added to it; zeros where there are none."""
    layers: tuple[FrozenLayer, ...]
    parallel: bool
    """Whether attention and MLP run side by side."""
    final: FrozenNorm
    W_U: Float[Tensor, "d_model vocab"]
    b_U: Float[Tensor, "vocab"]
    resid_pre: tuple[Float[Tensor, "pos d_model"], ...]
    """Entering each block, and leaving the last."""
    resid_mlp: tuple[Float[Tensor, "pos d_model"], ...]
    """What each MLP's norm reads."""
    probabilities: Float[Tensor, "vocab"]
    """Of the next token after the prompt, by the model itself."""

    def mlp_in(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What the MLP of a layer reads, after its norm (`mlp.hook_in`)."""
        norm = self.layers[layer].mlp_norm
        return norm.linear(self.resid_mlp[layer]) + norm.shift


@torch.no_grad()
def freeze(bridge: Bridge, tokens: Int[Tensor, "pos"], dtype: torch.dtype | None = None) -> Frozen:
    """Runs the model on a prompt (BOS first) and freezes it.

    Args:
        bridge: a TransformerBridge with raw weights.
        dtype: precision of everything made from it; the model's own, float32 at least, when None.

    Raises:
        InputError: a model that is no such transformer, with the layer at which it differs and what differs.
    """
    n_layers = bridge.cfg.n_layers
    for number, block in enumerate(bridge.blocks):
        if not hasattr(block, "attn"):
            raise InputError(
                f"this model cannot be frozen: its layer {number} has no attention heads to hold patterns of"
            )
        try:
            reading_matrix(block, "attn", "v")
        except InputError as error:
            raise InputError(f"this model cannot be frozen: {error}") from None
    names = ["embed.hook_out", f"blocks.{n_layers - 1}.hook_resid_post"]
    names += [
        f"blocks.{layer}.{inner}"
        for layer in range(n_layers)
        for inner in ("hook_resid_pre", "attn.hook_pattern", "hook_attn_out", "hook_mlp_out")
    ]
    positional = "pos_embed.hook_out" in bridge.hook_dict
    found: dict[str, Tensor] = {}
    with taking(bridge, [*names, "pos_embed.hook_out"] if positional else names, found):
        logits = bridge(tokens[None])[0, -1]
    precision = dtype or torch.promote_types(logits.dtype, torch.float32)
    seen = {name: value[0].to(precision) for name, value in found.items()}
    resid = seen["blocks.0.hook_resid_pre"]
    embedded, positions = resid, torch.zeros_like(resid)
    if positional:
        position = seen["pos_embed.hook_out"].expand_as(resid)
        if torch.allclose(seen["embed.hook_out"] + position, resid, rtol=1e-3, atol=1e-4 * float(resid.abs().max())):
            embedded, positions = resid - position, position
    parallel = bool(bridge.cfg.parallel_attn_mlp)
    layers: list[FrozenLayer] = []
    resids, mids = [resid], []
    for number in range(n_layers):
        layer, attended, read = _layer(bridge, number, resids[-1], seen, parallel)
        _check(resids[-1], seen[f"blocks.{number}.hook_resid_pre"], logits.dtype, number, "the residual stream")
        _check(attended, seen[f"blocks.{number}.hook_attn_out"], logits.dtype, number, "attention")
        layers.append(layer)
        mids.append(read)
        resids.append(resids[-1] + attended + layer.mlp_out)
    last = seen[f"blocks.{n_layers - 1}.hook_resid_post"]
    _check(resids[-1], last, logits.dtype, n_layers - 1, "what its block hands on")
    final = _norm(bridge, getattr(bridge, "ln_final", None), resids[-1])
    W_U, b_U = (logit_scale(bridge) * value.to(precision) for value in linear_of(bridge.unembed))
    if W_U.shape[1] > logits.shape[0]:
        W_U, b_U = W_U[:, : logits.shape[0]], b_U[: logits.shape[0]]
    probabilities = logits.to(precision).softmax(dim=0)
    read = (final.linear(resids[-1]) + final.shift)[-1] @ W_U + b_U
    _check_logits(bridge, read, logits)
    return Frozen(
        tokens, embedded, positions, tuple(layers), parallel, final, W_U, b_U, tuple(resids), tuple(mids),
        probabilities,
    )  # fmt: skip


def _layer(
    bridge: Bridge, number: int, resid: Float[Tensor, "pos d"], seen: dict[str, Tensor], parallel: bool
) -> tuple[FrozenLayer, Tensor, Tensor]:
    """A block, what its attention adds to the residual stream, and what its MLP's norm reads."""
    block = bridge.blocks[number]
    pattern = seen[f"blocks.{number}.attn.hook_pattern"]
    heads, like = pattern.shape[0], resid
    W_O = (output_matrices(bridge, number) * multiplier(bridge, number)).to(like)
    W_V, b_V = (value.to(like) for value in linear_of(reading_matrix(block, "attn", "v")))
    d_head = W_O.shape[1]
    if W_O.shape[0] != heads or heads % (W_V.shape[1] // d_head):
        raise InputError(f"this model cannot be frozen: values and output of layer {number} are not heads of one width")
    repeats = heads * d_head // W_V.shape[1]
    W_V = repeat(W_V, "d (h z) -> d (h r) z", r=repeats, z=d_head)
    b_V = repeat(b_V, "(h z) -> (h r) z", r=repeats, z=d_head)
    b_O = (output_bias(bridge, number) * multiplier(bridge, number)).to(like)
    before = _norm(bridge, norm_before(block, "attn"), resid)
    mixed = rearrange(pattern @ rearrange(before.shift @ W_V.flatten(1) + b_V.flatten(), "(h z) -> h 1 z", z=d_head)
                      .expand(heads, pattern.shape[2], d_head), "h q z -> q (h z)")  # fmt: skip
    constant = mixed @ W_O.flatten(0, 1) + b_O
    values = torch.einsum("kd,dhz->hkz", before.linear(resid), W_V)
    written = rearrange(pattern @ values, "h q z -> q (h z)") @ W_O.flatten(0, 1) + constant
    own = norm_after(block, "attn")
    after = None if own is None else _norm(bridge, own, written)
    if after is not None:
        written, constant = after.linear(written) + after.shift, after.linear(constant) + after.shift
    read = resid if parallel else resid + written
    mlp_norm = _norm(bridge, norm_before(block, "mlp"), read)
    mlp_out = seen[f"blocks.{number}.hook_mlp_out"]
    return FrozenLayer(pattern, W_V, b_V, W_O, b_O, before, after, mlp_norm, constant, mlp_out), written, read


def _norm(bridge: Bridge, component: Any, x: Float[Tensor, "pos d"]) -> FrozenNorm:
    """A norm held at what it divides x by; the identity where there is none."""
    if component is None:
        return FrozenNorm(torch.ones_like(x[0]), torch.zeros_like(x[0]), False, torch.ones_like(x[:, 0]))
    norm = measured_norm(component, stream_vector(bridge))
    return FrozenNorm(norm.gain.to(x), norm.shift.to(x), norm.centred, norm.scale(x))


def _check(
    ours: Float[Tensor, "pos d"], seen: Float[Tensor, "pos d"], dtype: torch.dtype, layer: int, what: str
) -> None:
    """Raises InputError where the model has another value."""
    error = float((ours - seen).norm(dim=-1).div(seen.norm(dim=-1).clamp(min=1e-20)).max())
    if not error <= max(1e-3, 32 * torch.finfo(dtype).eps):
        raise InputError(
            f"this model cannot be frozen: from patterns, norms and weights, {what} of layer {layer} comes out "
            f"otherwise than in the model (relative difference {error:.2g}), so something else is at work there"
        )


def _check_logits(bridge: Bridge, ours: Float[Tensor, "vocab"], logits: Float[Tensor, "vocab"]) -> None:
    capped = bridge.adapter.apply_output_logits_transform(ours / logit_scale(bridge))
    error = float((capped - logits).abs().max() / logits.abs().max().clamp(min=1e-20))
    if not error <= max(1e-3, 32 * torch.finfo(logits.dtype).eps):
        raise InputError(
            "this model cannot be frozen: the last residual stream through the final norm and the unembedding does "
            f"not give its logits (relative difference {error:.2g})"
        )


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of some tokens; their numbers where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    text: str = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    return text


def texts_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Every token's own text, likewise."""
    return [text_of(tokenizer, [token]) for token in tokens]
