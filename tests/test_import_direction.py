"""The plan of the house is held: packages depend one way, rooms have one order, files form no circle.

1. app -> workbench -> circuits -> sae, and `import sae` stays light.
2. The rooms of workbench/ have one order (ROOMS); a room imports only itself and rooms before it.
3. No circle of files but a result and the page or figures that draw it.
4. Below `workbench/workspace.py` nobody knows `Workspace`: analyses take a `Catalog`.
5. A file name stands for one role: `report.py` runs and stores, `figures.py` draws; no other name twice in workbench/.
6. Only cli/ and show/ print (the app has Streamlit for it), and only show/ knows colours.
7. No file over 450 lines, no function over 70.
8. Every global name that code reads is bound somewhere: ruff and mypy cannot say, for jaxtyping's axes are names too.
"""

import ast
import builtins
import json
import re
import subprocess
import symtable
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "sae": set(),
    "circuits": {"sae"},
    "workbench": {"sae", "circuits"},
    "app": {"workbench"},
}
LIBRARIES_OF_SAE = {"torch", "einops", "triton", "safetensors", "jaxtyping"}
ROOMS = ("show", "disk", "text", "models", "harvest", "catalog", "saes", "features", "circuits", "sparsity", "bench",
         "studies", "workspace", "cli")  # fmt: skip
"""Lowest first; `studies` and `workspace` are files: the two halves of the Workspace's verbs."""
SHARED_NAMES = {"__init__.py", "report.py", "figures.py"}
COMMANDS = "workbench/cli/"
"""Its files are named after what they command."""
MAX_FILE, MAX_FUNCTION = 450, 70


def files_of(package: str) -> list[Path]:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files, f"{package}/ holds no Python files"
    return files


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_of(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exported_from() -> dict[str, str]:
    """`workbench.HarvestConfig -> workbench.harvest.plan.HarvestConfig`: where the workbench's own exports lie."""
    import workbench

    return {f"workbench.{name}": f"{home}.{name}" for name, home in workbench._HOMES.items()}


def imported(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in the file it does so; types count too."""
    homes = exported_from()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (homes.get(name, name) for name in names)


def imported_packages(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(file)}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    for file in files_of(package):
        forbidden = (imported_packages(file) & set(MAY_IMPORT)) - MAY_IMPORT[package] - {package}
        assert not forbidden, f"{file.relative_to(REPOSITORY)} imports {sorted(forbidden)}"


def test_sae_uses_no_other_libraries() -> None:
    for file in files_of("sae"):
        foreign = imported_packages(file) - LIBRARIES_OF_SAE - set(sys.stdlib_module_names) - {"sae"}
        assert not foreign, f"{file.relative_to(REPOSITORY)} imports {sorted(foreign)}"


def test_every_room_of_the_workbench_has_its_place() -> None:
    folders = {path.name for path in (REPOSITORY / "workbench").iterdir() if (path / "__init__.py").is_file()}
    files = {path.stem for path in (REPOSITORY / "workbench").glob("*.py")} - {"__init__", "__main__"}
    assert folders | files == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    own = [file for file in files_of("workbench") if module_of(file).split(".")[1:2] == [room]]
    assert own
    for file in own:
        rooms = {name.split(".")[1] for name in imported(file) if name.startswith("workbench.")}
        assert not rooms & later, f"{file.relative_to(REPOSITORY)} imports {sorted(rooms & later)}"


def test_nobody_below_the_workspace_knows_it() -> None:
    above = ("workbench/__init__.py", "workbench/workspace.py", COMMANDS)
    for file in [*files_of("circuits"), *files_of("workbench")]:
        path = str(file.relative_to(REPOSITORY))
        if not path.startswith(above):
            named = [name for name in imported(file) if name.endswith(".Workspace") or name == "workbench.workspace"]
            assert not named, f"{path} imports {named}"


def file_graph() -> dict[str, set[str]]:
    """module -> modules of the house that it imports; a package's `__init__` only where it is imported for itself."""
    modules = {module_of(file): file for package in MAY_IMPORT for file in files_of(package)}
    graph: dict[str, set[str]] = defaultdict(set)
    for module, file in modules.items():
        names = set(imported(file))
        for name in names:
            if name in modules and not any(other.startswith(f"{name}.") and other in modules for other in names):
                graph[module].add(name)
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one file (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = set()
            while node not in component:
                component.add(stack.pop())
            if len(component) > 1:
                found.append(component)

    for node in list(graph):
        if node not in index:
            visit(node)
    return found


def is_a_result_and_its_page(circle: set[str]) -> bool:
    """Two files of one room, one of which draws what the other holds and is imported when it is to be drawn."""
    drawing = {name for name in circle if name.endswith(("page", "figures"))}
    return len(circle) == 2 and len(drawing) == 1 and len({name.rpartition(".")[0] for name in circle}) == 1


def test_files_form_no_circle() -> None:
    # An SAE, or the transcoder or crosscoder that is one, saves and loads itself in its own format: the field's idiom.
    saved = {"sae.model", "sae.transcoder", "sae.crosscoder", "sae.formats.saelens"}
    wrong = [
        sorted(circle) for circle in circles(file_graph()) if not is_a_result_and_its_page(circle) and circle != saved
    ]
    assert not wrong


def test_the_search_for_circles_finds_them() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}
    assert circles(graph) == [{"a", "b", "c"}]


def test_a_file_name_stands_for_one_role() -> None:
    places = defaultdict(list)
    for file in files_of("workbench"):
        path = str(file.relative_to(REPOSITORY))
        if file.name not in SHARED_NAMES and not path.startswith(COMMANDS):
            places[file.name].append(path)
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_only_the_command_line_prints() -> None:
    for file in [*files_of("sae"), *files_of("circuits"), *files_of("workbench")]:
        path = str(file.relative_to(REPOSITORY))
        calls = (node.func for node in ast.walk(parsed(file)) if isinstance(node, ast.Call))
        printing = any(isinstance(called, ast.Name) and called.id == "print" for called in calls)
        assert not printing or path.startswith((COMMANDS, "workbench/show/")), f"{path} prints"


def test_only_show_knows_colours() -> None:
    colour = re.compile(r"#(?:[0-9a-fA-F]{3,4}){1,2}\b|rgba?\(\s*\d")
    for file in [*files_of("circuits"), *files_of("workbench"), *files_of("app")]:
        path = str(file.relative_to(REPOSITORY))
        found = colour.search(file.read_text(encoding="utf-8"))
        assert found is None or path.startswith("workbench/show/"), f"{path} has the colour {found and found[0]}"


def unbound(file: Path) -> set[str]:
    """Names that a file's code reads as globals and that neither it nor Python binds; annotations in strings do not
    count."""
    bound, read = set(dir(builtins)) | {"__file__"}, set()
    top = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec")
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            # An inner `:=` binds globally too.
            if table is top or symbol.is_global():
                binds = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
                (bound if binds else read).add(symbol.get_name())
    return read - bound


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_global_name_is_bound(package: str) -> None:
    wrong = {str(file.relative_to(REPOSITORY)): names for file in files_of(package) if (names := unbound(file))}
    assert not wrong


def test_the_search_for_unbound_names_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("import os\n\ndef f(x):\n    return os.path, len(x), Gone, [y for y in x]\n")
    assert unbound(file) == {"Gone"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_files_and_functions_stay_short(package: str) -> None:
    long = []
    for file in files_of(package):
        path = file.relative_to(REPOSITORY)
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            long.append(f"{path}: {lines} lines")
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION:
                long.append(f"{path}:{node.lineno} {node.name}: {(node.end_lineno or 0) - node.lineno + 1} lines")
    assert not long


def test_importing_sae_is_light_and_quick() -> None:
    """Neither the model library, the database nor the app is loaded; under 2 s beyond torch."""
    program = (
        "import json, sys, time; import torch; start = time.perf_counter(); import sae; "
        "print(json.dumps({'seconds': time.perf_counter() - start, 'modules': sorted(sys.modules)}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY
    ).stdout
    report = json.loads(output)
    for module in ("transformer_lens", "duckdb", "streamlit", "sae_lens"):
        assert module not in report["modules"]
    assert report["seconds"] < 2.0
