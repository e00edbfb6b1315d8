"""Streamlit's command line, told beforehand that the frame (main.py) lists the pages.

Left to itself Streamlit takes a folder named `pages` for an app of its older kind until the frame has run once: the
first visitor of a server who follows a link to a page would see that page without the frame.
"""

from streamlit.runtime.pages_manager import PagesManager
from streamlit.web.cli import main

if __name__ == "__main__":
    PagesManager.uses_pages_directory = False
    main(prog_name="streamlit")
