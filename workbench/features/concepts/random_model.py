"""A copy of a model with random weights: what an SAE finds in it comes from the text and the architecture alone.

Every parameter is replaced by normal numbers of the same mean and standard deviation, so that the scale of
activations stays about what it was; tied parameters stay tied. Configuration and tokenizer are the model's own.

Source: Heap et al. 2025 (arXiv 2501.17727), re-randomised models, embeddings included.
"""

from pathlib import Path

import torch
from torch import Tensor

from sae.errors import InputError
from workbench.models.load import LoadedModel


@torch.no_grad()
def save_random_copy(model: LoadedModel, folder: Path | str, *, seed: int = 0) -> Path:
    """Makes a model folder.

    Args:
        model: the model; stays as it is.
        folder: new folder.

    Returns:
        `folder`, which `load_model` and `workbench harvest --model` take.

    Raises:
        InputError: the folder exists.
    """
    target = Path(folder)
    if target.exists():
        raise InputError(f"{target} exists: name a new folder for the random copy")
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    # parameters() lists a tied parameter once; state_dict() lists it under all its names.
    for parameter in model.hf.parameters():
        values = parameter.detach().float().cpu()
        normal = torch.randn(values.shape, generator=generator)
        drawn[id(parameter)] = (values.mean() + values.std(correction=0) * normal).to(parameter.dtype)
    state = {name: drawn.get(id(value), value) for name, value in model.hf.state_dict(keep_vars=True).items()}
    model.hf.save_pretrained(target, state_dict=state)  # type: ignore[operator]
    model.tokenizer.save_pretrained(target)
    return target
