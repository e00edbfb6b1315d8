"""Choosing a device by name."""

import psutil
import torch

from sae.errors import InputError


def choose_device(device: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`. Raises InputError for what is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device} was asked for, but torch sees no CUDA device: use --device cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
    return place


def free_bytes(device: torch.device) -> int:
    """Memory that a device has left."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
