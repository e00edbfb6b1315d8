"""A loaded model: what is recorded of it, what was measured of it, its two forms, and text to tokens and back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from circuits.nodes import Bridge
from circuits.prompts import ids
from circuits.turns import take_turns
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.places import HookSpec
from workbench.text.token_bytes import alone, part_bytes


@dataclass(frozen=True, repr=False)
class Checks(Shown):
    """What was found of one model."""

    hooks: Mapping[str, HookSpec]
    """Hook points that hold what their names say, by name."""
    refused: Mapping[str, str]
    """Why the others are not used, by name."""
    wrong_bridge: str | None
    """Why nothing may run on the TransformerBridge, if so."""
    delegated: bool
    """Whether the bridge's attention is the module's own."""
    cached: bool
    """Whether a step with the cache of those before it gives what the whole pass gives."""
    fused: bool
    """Whether passes may run the module's own attention where nothing looks into it."""
    editable_patterns: bool
    """Whether a changed attention pattern changes the pass."""
    unread: str | None
    """Why the unembedding cannot be read through the final norm, if so."""


UNCHECKED = Checks({}, {}, None, delegated=False, cached=False, fused=False, editable_patterns=False, unread=None)
"""Before anything was measured: no hook point may be used."""


OWN = ("live", "python", "file")
"""Sources of models of one's own (`ModelInfo.source`): the only ones that may have no BOS."""


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded; recorded with everything made from it."""

    name: str
    """As the user gave it; of a file or a folder its place from the root on."""
    source: str
    """`bundled`, `folder`, `hub`, `file` (a checkpoint of a HookedTransformer), `python` or `live`."""
    revision: str | None
    """Commit on the hub, where there is one."""
    weights_sha256: str
    """Over the checkpoint's files, see `weights_sha256`, and so the same in every precision the model runs in; over the
    tensors in memory and the forward pass for a model of one's own (`workbench.models.own_hash`)."""
    processing: str
    """`raw`: no folding, no centring; `as given`: whatever was done to a live model before."""
    architecture: str
    checkpoint_dtype: str
    """Precision of the weights as stored."""
    dtype: str
    """Precision the model runs in."""
    device: str
    n_layers: int
    """0, like all sizes of blocks and heads, for a module that is known by its hook points alone."""
    d_model: int
    n_heads: int
    d_head: int
    d_attention: int
    """Width of all heads' outputs side by side."""
    d_mlp: int
    n_ctx: int
    d_vocab: int
    parallel_attention: bool
    transformer_lens: str

    @classmethod
    def of(cls, hf: Any, bridge: Bridge, *, processing: str = "raw", **recorded: Any) -> "ModelInfo":
        """The shape of a module and its bridge, with what is `recorded` of where the weights came from."""
        shape = bridge.cfg
        return cls(
            processing=processing,
            architecture=type(getattr(hf, "called", hf)).__name__,
            dtype=str(next(hf.parameters()).dtype).removeprefix("torch."),
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            d_head=shape.d_head,
            d_attention=shape.n_heads * shape.d_head,
            d_mlp=shape.d_mlp,
            n_ctx=shape.n_ctx,
            d_vocab=hf.get_input_embeddings().weight.shape[0],
            parallel_attention=bool(shape.parallel_attn_mlp),
            transformer_lens=version("transformer-lens"),
            **recorded,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model ready to run; threads that use it take turns (`circuits.turns`)."""

    info: ModelInfo
    hf: nn.Module
    """The bare Hugging Face model."""
    structure: Bridge
    """TransformerBridge over the same weights, for its names and shapes; `bridge` is the one to run."""
    tokenizer: PreTrainedTokenizerBase
    bos_id: int | None
    """Token put before every document and context; the end-of-text token where the tokenizer has no BOS. None for a
    model of one's own that knows none."""
    checks: Checks = UNCHECKED
    """What a few random tokens showed of it."""
    causal: bool = True
    """Whether no token sees later ones."""
    gives_tokens: bool = True
    """Whether its logits are of the tokens that it reads, and not of classes."""
    weights_at_load: tuple[tuple[int, int], ...] | None = None
    """Of a model of one's own, which its owner can train on: `states_of_weights` when they were hashed."""

    def __post_init__(self) -> None:
        take_turns(self.hf, self.structure)

    def __repr__(self) -> str:
        info = self.info
        sizes = f"{info.n_layers} layers of width {info.d_model}, {info.n_heads} heads, " if info.n_layers else ""
        return (
            f"LoadedModel({info.name!r}): {info.architecture}, {sizes}{info.d_vocab:,} tokens, "
            f"{info.dtype} on {info.device}"
        )

    @property
    def bridge(self) -> Bridge:
        """The TransformerBridge. Raises InputError where it computes another model than the module."""
        if self.checks.wrong_bridge is not None:
            raise InputError(self.checks.wrong_bridge)
        return self.structure

    def states_of_weights(self) -> tuple[tuple[int, int], ...]:
        """Where every weight lies and how often it was written to, which changes with an optimiser's step."""
        weights = self.hf.parameters()
        return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights)

    def check_unchanged(self) -> None:
        """Raises InputError when weights were changed after they were hashed, so that the hash is of others."""
        if self.weights_at_load not in (None, self.states_of_weights()):
            raise InputError(
                f"the weights of {self.info.name} were changed or moved after it was loaded, so that their hash is "
                "that of others: load the model again, load_model(...)"
            )

    def component(self, path: str) -> nn.Module | None:
        """The bare module at a TransformerLens path such as `blocks.0.attn.o`, None where this model has none."""
        try:
            found: nn.Module | None = self.structure.adapter.get_component(getattr(self.hf, "called", self.hf), path)
        except (ValueError, AttributeError, KeyError, IndexError):
            return None
        return found if isinstance(found, nn.Module) else None

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision it runs in."""
        return next(self.hf.parameters()).dtype

    @cached_property
    def token_texts(self) -> list[str]:
        """Text of every token id, as it reads inside a text."""
        return [self.text([token]) for token in range(self.info.d_vocab)]

    @cached_property
    def token_parts(self) -> list[bytes | None]:
        """Bytes of every token id that is a part of a character, None for the others (`workbench.text.token_bytes`)."""
        return [part_bytes(self.tokenizer, token, text) for token, text in enumerate(self.token_texts)]

    def token_alone(self, token: int) -> str:
        """Text of a token that stands by itself in a table, parts of characters as bytes, such as \\xe4."""
        text = self.text([token])
        return alone(text, part_bytes(self.tokenizer, token, text))

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token that texts are decoded after, and its own text."""
        try:
            tokens = self.encode("a")[-1:]
        except InputError:
            # Where "a" is no text any token does: words and numbers have a space between them.
            tokens = [0]
        return tokens, self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    @property
    def n_bos(self) -> int:
        """Tokens that stand before a text: 1, or 0 for a model without BOS."""
        return int(self.bos_id is not None)

    def begun(self, tokens: Sequence[int]) -> list[int]:
        """A row of tokens as the model reads it: after BOS, where it has one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *tokens]

    def beginning(self, bos: bool) -> "LoadedModel":
        """The same model, with texts and contexts that begin with BOS, where it has one, or without."""
        return self if bos or self.bos_id is None else replace(self, bos_id=None)

    @property
    def outcome(self) -> str:
        """What its logits are of: the `next token`, or a `class`."""
        return "next token" if self.gives_tokens else "class"

    def label_of(self, output: int, n_out: int) -> str:
        """What one of its `n_out` logits stands for: a token's text, or a number where they are no vocabulary."""
        return self.token_alone(output) if n_out == self.info.d_vocab else f"output {output}"

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, without BOS; the text of a special token, such as a chat marker, is that one token."""
        found = ids(self.tokenizer, text)
        self.check_tokens(max(found, default=0))
        return found

    def check_tokens(self, highest: int) -> None:
        """Raises InputError when a token has no row in the embedding: some tokenizers have tokens added to them."""
        if highest >= self.info.d_vocab:
            raise InputError(
                f"the text holds the token {highest} ({self.tokenizer.decode([highest])!r}), which the embedding of "
                f"{self.info.name} with its {self.info.d_vocab} rows does not have: take it out of the text"
            )

    def text(self, tokens: Sequence[int]) -> str:
        """Text of some tokens in the middle of a text: SentencePiece tokenizers drop a space at its start."""
        anchor, before = self._anchor
        return self.tokenizer.decode([*anchor, *tokens], clean_up_tokenization_spaces=False).removeprefix(before)
