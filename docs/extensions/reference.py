"""Sphinx extension: writes the reference from the code before the pages are read.

- reference/cli.md: every command with its arguments and options, from the Typer application;
- reference/python/PACKAGE.rst: every public module of a package, for autodoc;
- reference/tables: nothing is written by hand there, so the folder is not under version control.
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGES = ("sae", "circuits", "workbench")
LEFT_OUT = ("sae.kernels.triton", "workbench.cli", "workbench._bundled")
"""GPU kernels behind the signatures of sae.kernels (docs/kernels.md); the command line, which has its own page."""


def packages() -> dict[str, list[str]]:
    """The documented modules of every package, sub-packages apart; a package's own module comes first."""
    found: dict[str, list[str]] = {}
    for root in PACKAGES:
        package = import_module(root)
        found[root] = [root]
        for info in pkgutil.walk_packages(package.__path__, f"{root}."):
            if info.name.startswith(LEFT_OUT):
                continue
            parent = info.name if info.ispkg else info.name.rpartition(".")[0]
            found.setdefault(parent, []).append(info.name)
    return found


def python_pages() -> dict[str, str]:
    """File name and text of every page of the Python reference."""
    pages = {}
    for package, modules in packages().items():
        lines = [package, "=" * len(package), ""]
        for module in modules:
            if module != package:
                lines += [module, "-" * len(module), ""]
            lines += [f".. automodule:: {module}", "   :members:", "   :ignore-module-all:", ""]
        pages[f"{package}.rst"] = "\n".join(lines)
    return pages


def cli_page() -> str:
    """Every command as Markdown."""
    from typer.main import get_command

    from workbench.cli.main import app

    root = get_command(app)
    head = "# Command line\n\nEvery command also prints this with `--help`.\n"
    return head + "".join(_command(root, "workbench", level=2))


def _command(command: Any, path: str, level: int) -> list[str]:
    parts = []
    if path != "workbench":
        usage = " ".join(_usage(parameter) for parameter in command.params if parameter.param_type_name == "argument")
        parts = [
            f"\n{'#' * level} {path}\n\n```text\n{path} [OPTIONS] {usage}\n```\n\n",
            _unwrapped(command.help or ""),
            "\n",
        ]
        parts += _parameters(command)
    for name in getattr(command, "commands", {}):
        child = command.commands[name]
        if not child.hidden:
            parts += _command(child, f"{path} {name}", level if path == "workbench" else level + 1)
    return parts


def _usage(argument: Any) -> str:
    name = _argument(argument) + (" ..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _argument(argument: Any) -> str:
    return str(argument.metavar or argument.name).rstrip("._").upper()


def _unwrapped(text: str) -> str:
    return "\n\n".join(" ".join(line.strip() for line in block.splitlines()) for block in text.split("\n\n")) + "\n"


def _parameters(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "argument":
            names = f"`{_argument(parameter)}`"
        help_text = f"{_cell(getattr(parameter, 'help', None) or '')} {_choices(parameter)}".strip()
        rows.append(f"| {names} | {help_text} | {_default(parameter)} |\n")
    return ["\n| | | default |\n|---|---|---|\n", *rows] if rows else []


def _choices(parameter: Any) -> str:
    """What may be given, where that is a few words."""
    # Typer carries its own types since 0.26 and used click's before.
    kind = getattr(parameter, "type_descriptor", None) or getattr(parameter, "type", None)
    metavar = parameter.metavar or ""
    choices = getattr(kind, "choices", None) or (metavar.split("|") if "|" in metavar else ())
    return ", ".join(f"`{choice}`" for choice in choices)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if callable(value) or value is None or value is False or value in ([], ()):
        return ""
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"`{shown}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[[", "\\[\\[").replace("<", "&lt;")


def write(folder: Path) -> None:
    """Writes the pages; files that would not change keep their dates, so that a second build is quick."""
    wanted = {folder / "cli.md": cli_page()}
    wanted |= {folder / "python" / name: text for name, text in python_pages().items()}
    entries = "\n".join(f"   {name.removesuffix('.rst')}" for name in python_pages())
    wanted[folder / "python" / "index.rst"] = (
        "Python\n======\n\nEvery public module, class and function, from the docstrings.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{entries}\n"
    )
    for file in folder.rglob("*.*"):
        if file not in wanted:
            file.unlink()
    for file, text in wanted.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """Writes the reference when a build starts."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "reference"))
    return {"parallel_read_safe": True}
