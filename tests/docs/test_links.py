"""Links between the repository's pages lead to files that are there; the docs' own references are Sphinx's to check."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Made by `make docs`.
GENERATED = re.compile(r"reference/(cli|python/)")


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return listed.stdout.split()


@pytest.mark.parametrize("page", pages())
def test_relative_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    gone = [target for target in targets if target and not GENERATED.search(target)
            and not ((REPOSITORY / page).parent / target).exists()]  # fmt: skip
    assert not gone, f"{page} links to what is not there: {', '.join(gone)}"
