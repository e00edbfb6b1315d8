"""Methods of enforcing sparsity, one file each; a new one is a file and a line here."""

from sae.errors import InputError
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


__all__ = ["METHODS", "Keep", "Method", "method_named"]
