"""The command line starts at once: what takes seconds to load is loaded by the commands that use it.

Timings depend on the machine, so what is held is which modules are in memory when a command ends.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

from circuits import ablation, patching
from sae.formats import foreign
from workbench.circuits import tables
from workbench.cli import circuits, concepts, exchange, live, options, sparsity
from workbench.cli.main import app, run
from workbench.features import prompts, steering
from workbench.features.concepts import truth
from workbench.models import load
from workbench.sparsity import attention

HEAVY = {
    "torch", "transformers", "transformer_lens", "sae_lens", "streamlit", "plotly", "pandas", "numpy", "duckdb",
    "pyarrow",
}  # fmt: skip
COMMANDS = {name: [name] for name in get_command(app).commands}  # type: ignore[attr-defined]
for group in ("circuits", "sparsity"):
    for name in get_command(app).commands[group].commands:  # type: ignore[attr-defined]
        COMMANDS[f"{group} {name}"] = [group, name]


def test_no_help_text_loads_what_is_heavy() -> None:
    assert len(COMMANDS) > 30
    commands = [["--help"], *([*command, "--help"] for command in COMMANDS.values())]
    code = (
        "import json, sys\n"
        "from workbench.cli.main import run\n"
        f"for command in {commands!r}:\n"
        "    assert run(command) == 0, command\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(found.stderr.splitlines()[-1])) & HEAVY


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (live.Ranking, prompts.RANKINGS), (live.EditKind, steering.KINDS), (live.Where, steering.PLACES),
        (concepts.Language, get_args(truth.Language)),
        (exchange.Form, (*foreign.WRITERS, "circuit_tracer", "neuronpedia")),
        (options.Precision, ("auto", *load.DTYPES)), (circuits.Site, get_args(patching.Site)),
        (circuits.Direction, patching.DIRECTIONS), (circuits.Ablation, get_args(ablation.Ablation)),
        (circuits.Published, tables.PUBLISHED), (sparsity.Rest, attention.RESTS),
    ],
)  # fmt: skip
def test_choices_in_help_texts_are_the_librarys(offered: Any, known: Any) -> None:
    """They are written out: asking the library would load torch for --help."""
    assert sorted(get_args(offered)) == sorted(known)


def test_no_help_text_shows_a_list_type_for_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "steer", "explain"):
        assert run([command, "--help"]) == 0
    assert "list[" not in capsys.readouterr().out
    for command in get_command(app).commands.values():  # type: ignore[attr-defined]
        for one in getattr(command, "commands", {"": command}).values():
            several = [p for p in one.params if p.multiple or p.nargs == -1]
            assert all(parameter.metavar for parameter in several), one.name


@pytest.mark.parametrize(
    ("code", "light"),
    [
        (
            "from workbench.cli.main import run; from workbench.workspace import Workspace; import sys\n"
            "Workspace(sys.argv[1]); assert run(['info', '--workspace', sys.argv[1]]) == 0",
            {"torch", "transformers", "transformer_lens", "pandas", "plotly"},
        ),
        ("import workbench.saes.train", {"transformers", "transformer_lens", "plotly"}),
    ],
    ids=["info", "training on a harvest"],
)
def test_what_needs_no_model_loads_no_model_library(code: str, light: set[str], tmp_path: Path) -> None:
    """`workbench info` is there in a second, and a training run begins seconds earlier."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "w")], capture_output=True, text=True, check=True)
    assert not set(done.stderr.split()) & light
