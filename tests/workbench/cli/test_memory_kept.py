"""The command line keeps the memory that one pass leaves for the next."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource
from workbench import cli
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [bytearray(20 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
before = faults()
cli._keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_is_not_fetched_from_the_system_again() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    # What glibc does by itself: eighty megabytes are 20,480 pages, fetched every time.
    assert before > 100_000
    assert after < before / 10
