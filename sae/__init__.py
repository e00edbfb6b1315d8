"""Sparse autoencoders: codes, selection rules, training, metrics and file formats.

from sae import SAE
sae = SAE.load("saes/my-sae")
code = sae.encode(activations)      # the active features of every token
"""

from sae.code import SparseCode
from sae.errors import InputError
from sae.model import SAE
from sae.rules import TopK

__all__ = ["SAE", "InputError", "SparseCode", "TopK"]
