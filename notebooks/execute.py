"""Executes notebooks and stores their outputs: `python notebooks/execute.py [NOTEBOOK ...]`, all of them by default.

1. The notebook runs from top to bottom in a fresh kernel, in the folder it lies in.
2. Plotly figures are stored twice: as Plotly's own JSON, which Jupyter draws as an interactive figure, and as SVG,
   which is what web pages show that run no scripts (this needs Chrome or Chromium).
3. Times of execution and other things that differ from run to run without meaning anything are left out.

The tests call `execute` with small settings in place of those of the cell tagged `parameters`.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
RENDERERS = "plotly_mimetype+svg"
LARGEST = 500_000
"""Bytes of a stored notebook: more makes web pages slow to show it."""


def execute(path: Path, parameters: Mapping[str, Any] | None = None, *, renderers: str = RENDERERS) -> NotebookNode:
    """A notebook with the outputs of a fresh run; the file stays as it is.

    Args:
        path: the notebook.
        parameters: values for names that its cell tagged `parameters` sets.
        renderers: Plotly's renderers, joined by `+`; `plotly_mimetype` alone needs no browser.

    Raises:
        ValueError: a parameter that the notebook does not set.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    settings = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in (parameters or {}).items():
        if not any(line.startswith(f"{name} =") for cell in settings for line in cell.source.splitlines()):
            raise ValueError(f"{path.name} has no parameter {name}")
        settings[0].source += f"\n{name} = {value!r}"
    quiet = "ignore:IProgress not found"  # tqdm's advice to install ipywidgets, which nothing here uses
    environment = os.environ | {"PLOTLY_RENDERER": renderers, "PYTHONWARNINGS": quiet}
    with TemporaryDirectory() as folder:
        # Sockets in a folder of one's own: nobody else on the machine can talk to the kernel.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        client = NotebookClient(
            notebook, km=kernel, timeout=None, record_timing=False, resources={"metadata": {"path": path.parent}}
        )
        client.execute(env=environment)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def number(path: Path) -> int:
    """Of a notebook, by which they are read in order."""
    return int(path.stem.split("_")[0])


def main() -> None:
    """Executes the notebooks named on the command line and stores their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb"), key=number))
    for path in parser.parse_args().notebooks:
        start = time.monotonic()
        text = nbformat.writes(execute(path.resolve()))
        if len(text.encode()) > LARGEST:
            sys.exit(f"{path.name} would take {len(text.encode()):,} bytes with its outputs: at most {LARGEST:,}")
        path.write_text(text + "\n")
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
