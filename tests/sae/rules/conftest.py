"""Makes `naive_selection`, the references of this folder's tests, importable from them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
