"""The scripts in data/ are not a package: they import each other as `python data/<script>.py` finds them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
