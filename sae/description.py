"""What an SAE says of itself as a dataclass, under the names that SAELens and SAEBench read."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DenseConfig:
    """What a custom SAE says of itself; the names are SAEBench's."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int | None
    hook_name: str
    architecture: str
    dtype: str
    device: str
    context_size: int | None = None
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    """Not known to the SAE itself."""
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None
