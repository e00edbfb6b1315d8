"""Sphinx extension: docstrings are plain text, and stay it in the code.

What the project writes in docstrings: paragraphs, `code` between single backticks, lists with `-` or `1.`, Google
sections (Args:, Returns:, Raises:), and formulas or tables as blocks whose layout matters. reStructuredText reads all
but the paragraphs in another way, so this turns one into the other:

1. a block is shown as it is when it is indented after a blank line, is a table with `|`, or has aligned columns;
2. backticks around a class or a full dotted name link to it where it is documented, others are code;
3. every character that reStructuredText would take for markup is escaped;
4. napoleon reads the sections.
"""

import re
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):\s*$")
ITEM = re.compile(r"\s*([-*]|\d+\.)\s+\S")
ALIGNED = re.compile(r"\S {2,}\S")
NAME = re.compile(r"(sae|circuits|workbench)(\.\w+)+|[A-Z]\w*[a-z]\w*")


def to_rst(lines: list[str]) -> list[str]:
    """A docstring without its common indentation, as reStructuredText."""
    found: list[str] = []
    in_section = False
    for block in _blocks(lines):
        if SECTION.match(block[0]):
            in_section = True
        elif not block[0].startswith(" "):
            in_section = False
        if in_section:
            found += [block[0], *map(escape, block[1:])] if SECTION.match(block[0]) else list(map(escape, block))
        elif _is_literal(block, found):
            found += ["::", "", *(f"    {line}" for line in block)]
        else:
            found += _prose(block)
        found.append("")
    return found


def escape(line: str) -> str:
    """One line of prose: code stays code, names become links, nothing else is markup."""
    parts = re.split(r"(`+[^`]+`+)", line)
    return "".join(_code(part) if part.startswith("`") else _plain(part) for part in parts)


def _code(part: str) -> str:
    inner = part.strip("`")
    return f"`{inner}`" if NAME.fullmatch(inner) else f"``{inner.strip()}``"


def _plain(part: str) -> str:
    bullet = re.match(r"\s*(-|\d+\.)\s+", part)
    start = bullet.end() if bullet else 0
    return part[:start] + re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", part[start:])


def _blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines between blank ones; a section's header starts a block of its own."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if not line.strip() or SECTION.match(line):
            blocks.append([])
        if line.strip():
            blocks[-1].append(line.rstrip())
    return [block for block in blocks if block]


def _is_literal(block: list[str], before: list[str]) -> bool:
    if all(line.startswith("|") and line.endswith("|") for line in block):
        return True
    if block[0].startswith(" "):
        last = next((line for line in reversed(before) if line and not line.startswith(" ")), "")
        indent = len(block[0]) - len(block[0].lstrip())
        return not (ITEM.match(last) and indent < 4)
    return len(block) > 1 and all(ALIGNED.search(line) for line in block)


def _prose(block: list[str]) -> list[str]:
    """A paragraph or a list; what stands further in than the text of its item is shown as it is."""
    found: list[str] = []
    hanging = 0
    literal = False
    for line in block:
        indent = len(line) - len(line.lstrip())
        item = ITEM.match(line)
        if literal != (bool(hanging) and not item and indent > hanging + 1):
            literal = not literal
            found += ["", f"{' ' * hanging}::", ""] if literal else [""]
        if item:
            if not hanging:
                found.append("")
            hanging = item.end() - 1
        elif hanging and indent < hanging and not literal:
            found.append("")
            hanging = 0
        found.append(line if literal else escape(line if hanging else line.lstrip()))
    return found


def _on_docstring(app: Any, what: Any, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)
    # An attribute has no sections, and napoleon would take what stands before a colon for its type.
    if what not in ("attribute", "data", "property"):
        config: Any = Config()
        lines[:] = GoogleDocstring(lines, config, app, what, name, obj, options).lines()


def setup(app: Any) -> dict[str, Any]:
    """Converts docstrings as autodoc reads them."""
    app.connect("autodoc-process-docstring", _on_docstring)
    return {"parallel_read_safe": True}
