"""The public interface is documented in full: a check, not a promise.

Public is every name without a leading underscore in `sae`, `circuits` and `workbench`; the docstrings of the command
line are what `--help` prints, so rule 4 takes the place of the others there. The rules:

1. every module, class, function, method and property has a docstring;
2. every tensor that goes in or out has its shape in its type, `Float[Tensor, "n d_in"]`. A bare `Tensor` will do where
   the docstring (a field's own, or its class') gives the shape in brackets or says that it may be any shape, and in a
   mapping of tensors by name;
3. a function that raises InputError itself says when;
4. every command and every option of the command line has a help text.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from workbench.cli.main import app

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FILES = [
    file
    for package in ("sae", "circuits", "workbench")
    for file in sorted((REPOSITORY / package).rglob("*.py"))
    if file.parent.name != "cli"
]
SHAPED = {"Bool", "Float", "Int", "Num", "Real", "Shaped", "UInt8"}
MAPPINGS = {"Mapping", "dict"}
SHAPE = re.compile(r"\[[^\]]+\]|\bany shape\b")
Definition = ast.FunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions, and methods of public classes, with their dotted names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield owner + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{owner}{node.name}.")


def has_bare_tensor(annotation: ast.expr | None) -> bool:
    """Whether a type holds a tensor without a shape, outside mappings by name."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if annotation is None:
        return False
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        return annotation.value.id not in SHAPED | MAPPINGS and has_bare_tensor(annotation.slice)
    if isinstance(annotation, ast.Name | ast.Attribute):
        return ast.unparse(annotation).rpartition(".")[2] == "Tensor"
    return any(has_bare_tensor(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def shapeless(name: str, node: Definition) -> Iterator[str]:
    """Parameters, results and fields that are tensors of unknown shape."""
    doc = ast.get_docstring(node) or ""
    if SHAPE.search(doc):
        return
    if isinstance(node, ast.FunctionDef):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        yield from (f"{name}({argument.arg})" for argument in given if has_bare_tensor(argument.annotation))
        if has_bare_tensor(node.returns):
            yield f"the result of {name}"
        return
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and has_bare_tensor(field.annotation):
            said = after.value if isinstance(after, ast.Expr) else None
            text = said.value if isinstance(said, ast.Constant) else ""
            if not SHAPE.search(str(text)):
                yield f"{name}.{ast.unparse(field.target)}"


def raises_input_error(node: ast.FunctionDef) -> bool:
    """Whether the function's own body raises it."""
    raised = (child.exc for child in ast.walk(node) if isinstance(child, ast.Raise))
    return any(isinstance(error, ast.Call) and ast.unparse(error.func) == "InputError" for error in raised)


def problems(source: str) -> list[str]:
    """What a module leaves undocumented."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for name, node in definitions(tree.body):
        doc = ast.get_docstring(node)
        if not doc:
            found.append(f"{name} has no docstring")
        found += [f"{tensor} has no shape" for tensor in shapeless(name, node)]
        if isinstance(node, ast.FunctionDef) and raises_input_error(node) and "InputError" not in (doc or ""):
            found.append(f"{name} raises InputError and does not say when")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_the_public_api_is_documented(file: Path) -> None:
    found = problems(file.read_text(encoding="utf-8"))
    assert not found, "; ".join(found)


def test_the_check_finds_what_is_missing() -> None:
    source = '''
class Code:
    values: Tensor
    """Activations."""
    indices: Tensor
    """Features, [n, k]."""

    @property
    def width(self) -> int:
        return 1

def encode(x: "Tensor | None", w: Float[Tensor, "d f"], named: dict[str, Tensor]) -> list[torch.Tensor]:
    """Codes."""
    if x is None:
        raise InputError("no")

def _private(x: Tensor): ...
'''
    assert problems(source) == [
        "the module has no docstring",
        "Code has no docstring",
        "Code.values has no shape",
        "Code.width has no docstring",
        "encode(x) has no shape",
        "the result of encode has no shape",
        "encode raises InputError and does not say when",
    ]


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


def test_every_command_and_option_has_help() -> None:
    for path, command in commands(get_command(app), "workbench"):
        assert command.help, f"{path} has no help"
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{path}: {parameter.name} has no help"
