"""A TransformerBridge around a Hugging Face model, sharing its weights.

TransformerLens' adapter of a family does not fit every variant of it. Where it fails, a second one is made from it and
from what the model's first block is:

1. Attention is the module's own, in one piece: hook points at those of its matrices that the module has, at the pattern
   and at the output. Queries, keys and values that lie in one matrix are not told apart.
2. A norm that the block does not have under the adapter's name is the block's one module that nothing else names.

Whether that bridge computes the model is measured as of every other (`workbench.models.guards`). Of a mixture of
experts both adapters learn where its neurons are (`workbench.models.mixtures`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from circuits.nodes import Bridge
from sae.errors import InputError
from workbench.models.mixtures import add_out, widen

Change = Callable[[Any], None]
"""Of an adapter, before it is used."""


def wrapped(spec: str, location: str, hf: Any, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Bridge:
    """A TransformerBridge over a copy of `hf` that shares its weight tensors.

    `hf` itself is left as it is, but for the module `out` that its mixtures of experts get.

    Raises:
        InputError: a class that TransformerLens does not know, or a variant that neither adapter fits.
    """
    changes: list[Change] = [add_out] if widen(hf) else []
    try:
        with _changed_adapter(hf, changes):
            bridge = _boot(location, hf, tokenizer, dtype)
    except Exception as error:  # adapters that do not fit a model fail in many ways
        try:
            with _changed_adapter(hf, [*changes, lambda adapter: _in_one_piece(adapter, hf)]):
                bridge = _boot(location, hf, tokenizer, dtype)
        except Exception:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"TransformerLens cannot wrap {spec} ({type(hf).__name__}): {reason}") from None
    return bridge.eval().requires_grad_(False)


def _boot(location: str, hf: Any, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Bridge:
    from transformer_lens.model_bridge import TransformerBridge

    twin = copy.deepcopy(hf, {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())})
    # By its whole path: a folder that is called as TransformerLens calls a model ("mixtral") would be taken for that.
    place = str(Path(location).absolute()) if Path(location).is_dir() else location
    bridge: Bridge = TransformerBridge.boot_transformers(
        place, hf_model=twin, tokenizer=tokenizer, device=next(hf.parameters()).device, dtype=dtype
    )
    for part in bridge.adapter.component_mapping.values():
        parent, _, name = str(part.name).rpartition(".")
        if part.original_component is None and getattr(twin.get_submodule(parent), name) is part:
            # The adapter's part stands where this model has none (rotary positions, in some Granites).
            setattr(twin.get_submodule(parent), name, None)
    return bridge


@contextmanager
def _changed_adapter(hf: Any, changes: Sequence[Change]) -> Iterator[None]:
    """TransformerLens makes its adapter of the class of `hf` with some changes inside the context."""
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )

    name = type(hf).__name__
    first = SUPPORTED_ARCHITECTURES.get(name)
    if first is None or not changes:
        yield
        return

    def second(cfg: Any) -> Any:
        adapter = first(cfg)
        for change in changes:
            change(adapter)
        return adapter

    ArchitectureAdapterFactory.register_adapter(name, second)
    try:
        yield
    finally:
        ArchitectureAdapterFactory.register_adapter(name, first)


def _in_one_piece(adapter: Any, hf: nn.Module) -> None:
    """Changes an adapter as the module's description says."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge, LinearBridge, NormalizationBridge

    blocks = adapter.component_mapping["blocks"]
    block: Any = hf.get_submodule(blocks.name)[0]  # type: ignore[index]
    parts = blocks.submodules
    attention = parts["attn"]
    matrices = {
        name: LinearBridge(name=part.name)
        for name, part in attention.submodules.items()
        if isinstance(part, LinearBridge) and hasattr(getattr(block, attention.name), part.name)
    }
    parts["attn"] = AttentionBridge(
        name=attention.name, config=adapter.cfg, submodules=matrices, fused_qkv="q" not in matrices
    )
    lost = [part for part in parts.values() if isinstance(part, NormalizationBridge) and not hasattr(block, part.name)]
    spare = {name for name, _ in block.named_children()} - {part.name for part in parts.values()}
    if len(lost) == len(spare) == 1:
        lost[0].name = spare.pop()
    adapter.setup_component_testing = lambda *_, **__: None
