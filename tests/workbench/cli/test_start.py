"""The command line starts at once: what takes seconds to load is loaded by the commands that use it.

Timings depend on the machine, so what is held is which modules are in memory when a command ends.
"""

import json
import subprocess
import sys

from typer.main import get_command

from workbench.cli.main import app

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
