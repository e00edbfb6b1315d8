"""Streamlit's command line, told beforehand where the app lies and that the frame (main.py) lists the pages.

1. The folder that holds this package comes first where modules are looked for: beside `workbench` in a checkout,
   inside it in an installed wheel. No other package named `app` is taken for this one.
2. Left to itself Streamlit takes a folder named `pages` for an app of its older kind until the frame has run once: the
   first visitor of a server who follows a link to a page would see that page without the frame.
"""

import os
import sys
from pathlib import Path

from streamlit.runtime.pages_manager import PagesManager
from streamlit.web.cli import main

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    PagesManager.uses_pages_directory = False
    main(prog_name="streamlit", standalone_mode=False)
    sys.stdout.flush()
    # DuckDB's binding prints a page about whatever is still open when Python ends by itself.
    os._exit(0)
