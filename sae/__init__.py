"""Sparse autoencoders: codes, selection rules, training, metrics and file formats.

from sae import SAE
sae = SAE.load("saes/my-sae")
code = sae.encode(activations)      # the active features of every token
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae.errors import InputError

if TYPE_CHECKING:
    from sae.code import SparseCode
    from sae.model import SAE
    from sae.rules import TopK

_HOMES = {"SAE": "sae.model", "SparseCode": "sae.code", "TopK": "sae.rules"}
__all__ = ["SAE", "InputError", "SparseCode", "TopK"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: whoever wants InputError alone, such as the command line, does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
