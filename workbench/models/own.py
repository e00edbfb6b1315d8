"""A model of one's own: any torch module, with a description of what the workbench cannot know of it.

1. It is called on tokens [batch, pos] and gives logits [batch, pos, outputs], or [batch, outputs] of one answer.
2. A hook point is a name for the input or output of one of its modules, a tensor [batch, pos, width].
3. `ModuleBridge` offers what splicing asks of a TransformerBridge: hooks at those points, and at the tokens
   (`embed.hook_in`). What needs blocks, heads or an unembedding finds none and says so.

A module that is a HookedTransformer or a TransformerBridge has its hook points already (`workbench.models.hooked`).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from circuits.turns import turn_of
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.places import KINDS, HookSpec, first_input

TOKENS_POINT = "embed.hook_in"


@dataclass(frozen=True, repr=False)
class OwnModel(Shown):
    """A module and what is to be known of it, for `load_model`."""

    module: nn.Module
    d_vocab: int | None = None
    """Tokens it reads; the module's own where it is a HookedTransformer or a TransformerBridge."""
    n_ctx: int | None = None
    """Longest sequence it takes; likewise."""
    hooks: Mapping[str, str] = field(default_factory=dict)
    """Path of a submodule by the name of the hook point that is its output, or its input: `layers.0.mlp:input`."""
    call: Callable[[nn.Module, Int[Tensor, "batch pos"]], Float[Tensor, "batch *pos outputs"]] | None = None
    """Gives the logits; the module itself is called on the tokens when left out."""
    vocabulary: Sequence[str] | None = None
    """Text of every token. Without one, and without a tokenizer, prompts are numbers between spaces."""
    tokenizer: PreTrainedTokenizerBase | None = None
    bos_id: int | None = None
    """Token that every sequence begins with, where there is one."""
    name: str = "own"


class Lacking(InputError, AttributeError):
    """What a described module does not have: `hasattr` says no, and a use of it is one line."""


class Called(nn.Module):
    """A module as Hugging Face's are called: on tokens, for an object with `logits` [batch, pos, outputs]."""

    def __init__(
        self,
        module: nn.Module,
        d_vocab: int,
        call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.called, self.d_vocab, self._call = module, d_vocab, call

    def forward(self, tokens: Int[Tensor, "batch pos"], use_cache: bool = False) -> SimpleNamespace:
        """The module's logits; one answer a sequence stands at all positions.

        Raises:
            InputError: what the module gives are no logits.
        """
        logits = self.called(tokens) if self._call is None else self._call(self.called, tokens)
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
            raise InputError(
                f"{type(self.called).__name__} gives {_described(logits)} for tokens: expected logits [batch, pos, "
                "outputs] or [batch, outputs]; say with `call` how to get them"
            )
        if logits.ndim == 2:
            logits = logits[:, None].expand(-1, tokens.shape[1], -1)
        return SimpleNamespace(logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """The module's first embedding of as many rows as tokens. Raises InputError where there is none."""
        for module in self.called.modules():
            if getattr(module, "num_embeddings", None) == self.d_vocab:
                return module
        raise InputError(
            f"{type(self.called).__name__} has no nn.Embedding of {self.d_vocab} rows that gradients could start from"
        )


class ModuleBridge:
    """What splicing asks of a TransformerBridge, over a described module.

    Args:
        called: the module.
        hooks: its hook points by name.
    """

    def __init__(self, called: Called, hooks: Mapping[str, HookSpec]) -> None:
        self.original_model = called
        self.hook_dict = {TOKENS_POINT: None, **hooks}
        self._added: list[tuple[str, Callable[..., Any]]] = []

    @property
    def adapter(self) -> Any:
        """Finds a module by its path, as a TransformerBridge's adapter does."""
        return SimpleNamespace(get_component=lambda module, path: module.get_submodule(path))

    def __getattr__(self, name: str) -> Any:
        raise Lacking(
            f"{type(self.original_model.called).__name__} is known by its hook points alone, and this needs what a "
            f"transformer has (`{name}`): give a HookedTransformer, a TransformerBridge or a Hugging Face model"
        )

    def __call__(self, tokens: Int[Tensor, "batch pos"], return_type: str = "logits") -> Float[Tensor, "b p outputs"]:
        with turn_of(self):
            for name, function in self._added:
                if name == TOKENS_POINT:
                    function(tokens, hook=None)
            logits: Tensor = self.original_model(tokens).logits
        return logits

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
        """Passes inside the context hand the values at hook points to functions, which may give others."""
        with turn_of(self), ExitStack() as stack:
            before = self._added
            for name, function in fwd_hooks:
                if name != TOKENS_POINT:
                    stack.callback(self._register(name, function).remove)
            self._added = [*before, *fwd_hooks]
            try:
                yield
            finally:
                self._added = before

    def _register(self, name: str, function: Callable[..., Any]) -> Any:
        hook = self.hook_dict.get(name)
        if hook is None:
            raise Lacking(f"the model has no hook point {name!r}: it has {', '.join(list(self.hook_dict)[1:])}")
        module = self.original_model.called.get_submodule(hook.component)

        def changed(value: Tensor) -> Tensor | None:
            if not hook.positions_first:
                return function(value, hook=None)
            new = function(value.transpose(0, 1), hook=None)
            return None if new is None else new.transpose(0, 1)

        def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = changed(first_input(args, kwargs))
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): new})

        def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            new = changed(output[0] if isinstance(output, tuple | list) else output)
            if new is None:
                return None
            return type(output)((new, *output[1:])) if isinstance(output, tuple | list) else new

        if hook.side == "input":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)


def described_hooks(own: OwnModel) -> dict[str, HookSpec]:
    """The hook points that a description names, their widths still 0.

    Raises:
        InputError: none, a submodule the module does not have, or a name that stands for something else here.
    """
    if not own.hooks:
        raise InputError(
            f"{own.name} names no hook points: give hooks={{'NAME': 'path.of.a.submodule'}}, such as "
            f"{', '.join([name for name, _ in own.module.named_modules() if name][:4])}"
        )
    if not isinstance(own.hooks, Mapping):
        raise InputError(f"{own.name}: hooks are {{'NAME': 'path.of.a.submodule'}}, and no {type(own.hooks).__name__}")
    found = {}
    for name, place in own.hooks.items():
        path, _, side = place.partition(":")
        if side not in ("", "input", "output"):
            raise InputError(f"hook point {name}: {place!r} ends in {side!r}, expected :input or :output")
        try:
            own.module.get_submodule(path)
        except AttributeError:
            paths = [known for known, _ in own.module.named_modules() if known]
            raise InputError(f"hook point {name}: no submodule {path!r}; there are {', '.join(paths[:12])}") from None
        if name.endswith("hook_resid_mid") or name == TOKENS_POINT:
            raise InputError(f"hook point {name}: this name stands for more than one module's value; choose another")
        found[name] = HookSpec(name, *_layer_and_kind(name), path, _side(side), 0)
    return found


def _layer_and_kind(name: str) -> tuple[int, str]:
    """Those of TransformerLens' names; other hook points lie in no block."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    kinds = {inner: kind for kind, inner in KINDS.items()}
    return (int(found[1]), kinds[found[2]]) if found and found[2] in kinds else (0, "named")


def _side(side: str) -> Literal["input", "output"]:
    return "input" if side == "input" else "output"


def tensors_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's tensors, names, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
