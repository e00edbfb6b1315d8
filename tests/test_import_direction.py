"""The packages depend one way: app -> workbench -> circuits -> sae; and `import sae` stays light."""

import ast
import json
import subprocess
import sys
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


def imported_modules(file: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files, f"{package}/ holds no Python files"
    for file in files:
        forbidden = (imported_modules(file) & set(MAY_IMPORT)) - MAY_IMPORT[package] - {package}
        assert not forbidden, f"{file.relative_to(REPOSITORY)} imports {sorted(forbidden)}"


def test_sae_uses_no_other_libraries() -> None:
    for file in sorted((REPOSITORY / "sae").rglob("*.py")):
        foreign = imported_modules(file) - LIBRARIES_OF_SAE - set(sys.stdlib_module_names) - {"sae"}
        assert not foreign, f"{file.relative_to(REPOSITORY)} imports {sorted(foreign)}"


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
