"""Methods of enforcing sparsity, one file each; a new one is a file and a line here."""

from collections.abc import Sequence

from sae.errors import InputError
from workbench.sparsity.layers import MLP
from workbench.sparsity.methods import cats, cett, statistical_topk, teal, threshold, topk, wina, zero
from workbench.sparsity.methods.base import Keep, Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (zero, threshold, topk, statistical_topk, cett, cats, teal, wina)
}


def method_named(name: str) -> Method:
    """A method by name, whatever the case. Raises InputError naming those there are."""
    for known, method in METHODS.items():
        if known.lower() == name.lower():
            return method
    raise InputError(f"unknown sparsity method {name!r}: choose from {', '.join(METHODS)}")


def usable_methods(mlps: Sequence[MLP]) -> list[Method]:
    """The methods that these MLPs can be thinned with."""
    return [method for method in METHODS.values() if _can_thin(method, mlps)]


def check_methods(methods: Sequence[Method], mlps: Sequence[MLP]) -> None:
    """Raises InputError for a method that these MLPs cannot be thinned with."""
    for method in methods:
        if not _can_thin(method, mlps):
            raise InputError(
                f"{method.name} looks at single matrices into the MLP's activations, and a mixture of experts has none "
                f"that is one: choose {', '.join(known.name for known in usable_methods(mlps))}"
            )


__all__ = ["METHODS", "Keep", "Method", "check_methods", "method_named", "usable_methods"]


def _can_thin(method: Method, mlps: Sequence[MLP]) -> bool:
    return not (method.needs_matrices_in and any(mlp.drive is None for mlp in mlps))
