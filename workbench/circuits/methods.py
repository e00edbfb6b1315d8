"""The circuit methods that run on a task, as data: the one list that runs, stores, names and offers them.

A method gives what it finds as one kind of result:

    circuit-nodes      a number for every node            tables nodes, summary, prompts
    circuit-edges      a number for every edge            tables edges, nodes, curves, summary, prompts
    circuit-features   a circuit of SAE features          tables nodes, edges, summary, prompts
    circuit-discrete   heads by discrete codes            tables nodes, edges, prompts
    circuit-dictionary SAEs against a task's attributes   tables summary, approximation, control, attributes, features,
                                                          prompts

A new method is a function in `report` and a line here. Nothing heavy is imported before a method is run.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from sae.errors import InputError

NODES, EDGES, FEATURES, DISCRETE = "circuit-nodes", "circuit-edges", "circuit-features", "circuit-discrete"
DICTIONARY = "circuit-dictionary"


@dataclass(frozen=True)
class Method:
    """One method."""

    name: str
    """As the command line and the names of results have it."""
    title: str
    """As the app has it."""
    kind: str
    """Of its results."""
    function: str
    """In `workbench.circuits.report`: takes a `Run` and the method's own options, gives tables and figures."""
    needs_saes: bool = False
    """SAEs are what it works on; the others take none."""
    metric: str | None = None
    """The only metric that it can tell apart; any when None."""
    on_page: bool = True
    """Whether the app offers it: what takes one pass an edge, or needs more than a task, is for the command line."""

    @property
    def run(self) -> Callable[..., Any]:
        """The function; loads torch and the method."""
        found: Callable[..., Any] = resolve_name(f"workbench.circuits.report:{self.function}")
        return found

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All of the method's own options: those given, and the usual values of the others.

        Raises:
            InputError: an option that it does not have.
        """
        usual = {
            name: parameter.default
            for name, parameter in inspect.signature(self.run).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name in given:
            if name not in usual:
                raise InputError(f"the method {self.name} has no option {name!r}: {', '.join(usual) or 'it has none'}")
        return usual | dict(given)


METHODS = (
    Method("ig-inputs", "EAP-IG (edges)", EDGES, "eap_ig"),
    Method("eap", "EAP (edges)", EDGES, "eap"),
    Method("ig-activations", "EAP-IG at activations (edges)", EDGES, "eap_ig"),
    Method("exact", "every edge patched (edges)", EDGES, "exact", on_page=False),
    Method("patching", "patching (heads)", NODES, "patching"),
    Method("path-patching", "path patching (heads)", NODES, "path_patching", on_page=False),
    Method("ablation", "ablation (heads)", NODES, "ablation"),
    Method("attribution", "direct logit attribution", NODES, "attribution", metric="logit_difference"),
    Method("discrete", "discrete codes (heads)", DISCRETE, "discrete"),
    Method("features", "SAE features", FEATURES, "features", needs_saes=True),
    Method("dictionary", "supervised dictionaries", DICTIONARY, "dictionary", needs_saes=True,
           metric="logit_difference"),
)  # fmt: skip
"""In the order in which the app offers them."""


def method_named(name: str) -> Method:
    """A method by name. Raises InputError naming those there are."""
    for method in METHODS:
        if method.name == name:
            return method
    raise InputError(f"unknown method {name!r}: choose {', '.join(method.name for method in METHODS)}")
