"""What a pass of a model over a corpus is asked for, and the sizes that follow from it and the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from sae.errors import InputError
from workbench.disk.names import lasting_name
from workbench.harvest.record import GRADIENT
from workbench.models.contexts import context_length
from workbench.models.hooks import resolve_hooks
from workbench.models.load import DTYPES, LoadedModel
from workbench.models.places import HookSpec
from workbench.text.python_source import Split

BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}
BLOCK_ROWS = 32_768
TOKEN_BYTES = 13
"""Per row: token, document and position as int32, flags as uint8."""
DATABASE_BYTES = 9
"""Per row in the DuckDB file, measured on Python source, rounded up."""
BLOCK_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Memory of a block at most: harvests of many or wide hook points get blocks of fewer rows."""


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested."""

    model: str
    corpus: str
    hooks: tuple[str, ...]
    """A * for the layer stands for every layer."""
    text_field: str = "text"
    context_len: int | None = None
    """Tokens a context, BOS included; 256, or as many as a shorter model takes, when None."""
    max_tokens: int = 2_000_000
    """Rows at most, BOS included."""
    split: Split = "train"
    dtype: str = "auto"
    """Stored precision; `auto` is the checkpoint's own (massive activations overflow float16 in some models)."""
    model_dtype: str = "auto"
    """Precision the model runs in; `auto` is its own on a GPU and float32 on a CPU."""
    gradients: bool = False
    """Also store the gradient of the summed next-token loss at every hook point."""
    separate: bool = False
    """No context holds parts of two documents; what is left of a document's last one is padding."""
    bos: bool = True
    """Whether contexts and documents begin with BOS, where the model has one."""

    def absolute(self) -> "HarvestConfig":
        """The same with paths that mean the same wherever the workspace is opened from."""
        return replace(self, model=lasting_name(self.model), corpus=lasting_name(self.corpus, "python-stdlib"))


@dataclass(frozen=True)
class HarvestPlan:
    """Sizes that follow from a configuration and a model."""

    hooks: list[HookSpec]
    dtype: torch.dtype
    gradients: bool
    context_len: int
    n_contexts: int
    batch_contexts: int
    block_contexts: int
    """A multiple of `batch_contexts`, so that going on from a block's border repeats the same batches."""

    @classmethod
    def of(cls, model: LoadedModel, config: HarvestConfig) -> "HarvestPlan":
        """Raises InputError for settings that cannot work."""
        if not config.hooks:
            raise InputError("a harvest needs at least one hook point, such as blocks.0.hook_resid_post")
        context_len = context_length(model, config.context_len)
        if config.split not in get_args(Split):
            raise InputError(f"unknown split {config.split!r}: choose {' or '.join(get_args(Split))}")
        if config.dtype != "auto" and config.dtype not in DTYPES:
            raise InputError(f"unknown dtype {config.dtype!r}: choose auto, {', '.join(DTYPES)}")
        if config.dtype == "auto" and model.info.checkpoint_dtype not in DTYPES:
            raise InputError(
                f"{model.info.name} has {model.info.checkpoint_dtype} weights, which are not stored: "
                f"choose --dtype {', '.join(DTYPES)}"
            )
        if config.max_tokens < context_len:
            raise InputError(
                f"{config.max_tokens} tokens do not fill one context of {context_len}: "
                "harvest more tokens or use shorter contexts"
            )
        hooks = resolve_hooks(model, config.hooks)
        dtype = DTYPES[model.info.checkpoint_dtype if config.dtype == "auto" else config.dtype]
        row_bytes = _row_bytes(_widths(hooks, config.gradients), dtype)
        per_block = max(1, min(BLOCK_ROWS, BLOCK_BYTES[model.device.type] // row_bytes) // context_len)
        batch_contexts = min(max(1, BATCH_TOKENS[model.device.type] // context_len), per_block)
        return cls(
            hooks=hooks,
            dtype=dtype,
            gradients=config.gradients,
            context_len=context_len,
            n_contexts=config.max_tokens // context_len,
            batch_contexts=batch_contexts,
            block_contexts=per_block // batch_contexts * batch_contexts,
        )

    @property
    def rows(self) -> int:
        """Rows to store, BOS and padding included."""
        return self.n_contexts * self.context_len

    @property
    def widths(self) -> dict[str, int]:
        """Width of what is stored, by hook; gradients under `HOOK.grad`."""
        return _widths(self.hooks, self.gradients)

    @property
    def bytes_per_row(self) -> int:
        """On disk, upper bound."""
        return _row_bytes(self.widths, self.dtype) + DATABASE_BYTES


def _widths(hooks: Sequence[HookSpec], gradients: bool) -> dict[str, int]:
    widths = {hook.name: hook.width for hook in hooks}
    return widths | ({hook.name + GRADIENT: hook.width for hook in hooks} if gradients else {})


def _row_bytes(widths: Mapping[str, int], dtype: torch.dtype) -> int:
    """Of one row in a block."""
    return sum(widths.values()) * dtype.itemsize + TOKEN_BYTES
