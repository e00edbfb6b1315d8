"""SQL over a million activations: how long the queries take that a researcher asks.

    python benchmarks/sql.py [--rows 1000000] [--width 768] [--rounds 5] [--json]

Median milliseconds of each query, in DuckDB with numpy columns and as `Workspace.sql` gives it (every number a Python
object, which for many vectors takes longer than the query), over a float16 harvest in page cache; and the memory that
the queries took at their peak, mapped blocks (which the system can drop at any time) aside. The rows of one token are
those of one of middling frequency.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from synthetic_harvest import HOOK, synthetic_harvest

from workbench.catalog import sql as query


def queries(width: int) -> dict[str, str]:
    """SQL by what it asks."""
    direction = [round(0.01 * (-1) ** i, 2) for i in range(width)]
    score = f"list_dot_product(vector, {direction}::FLOAT[])"
    return {
        "one row's vector": "SELECT text, vector FROM activations WHERE row = 777777",
        "all rows of one token": "SELECT row, doc, vector FROM activations WHERE token = 700",
        "tokens only, whole table": "SELECT token, count(*) FROM activations GROUP BY token",
        "full scan of vectors": "SELECT sum(vector[1]), count(*) FROM activations",
        "dot product with every row": f"SELECT max({score}) FROM activations",
        "top ten by dot product": f"""
            WITH best AS (SELECT row, {score} AS score FROM activations ORDER BY score DESC LIMIT 10)
            SELECT row, score, text, vec('{HOOK}', row) FROM best JOIN tokens USING (row) JOIN vocabulary USING (token)
        """,
    }


class PeakMemory:
    """Bytes of memory of this process at their peak over those at the start, file mappings aside (Linux)."""

    def __init__(self) -> None:
        self.start = self.peak = self.now()

    @staticmethod
    def now() -> int:
        info = psutil.Process().memory_info()
        return int(info.rss - info.shared)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Samples every few milliseconds while the context lasts."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.005):
                self.peak = max(self.peak, self.now())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @property
    def megabytes(self) -> float:
        return (self.peak - self.start) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    milliseconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        harvest = synthetic_harvest(Path(folder) / "h", arguments.rows, arguments.width)
        memory = PeakMemory()
        start = time.perf_counter()
        with query.connect([harvest]) as connection, memory.watched():
            milliseconds["connect"] = (time.perf_counter() - start) * 1e3
            for name, sql in queries(arguments.width).items():
                arms = {
                    name: lambda sql=sql: connection.execute(sql).fetchnumpy(),
                    f"{name}, as Python rows": lambda sql=sql: query.run(connection, sql),
                }
                for arm, ask in arms.items():
                    times = []
                    for _ in range(arguments.rounds + 1):
                        start = time.perf_counter()
                        ask()
                        times.append((time.perf_counter() - start) * 1e3)
                    milliseconds[arm] = statistics.median(times[1:])  # the first reads the file into page cache
        report = {
            "rows": harvest.n_rows,
            "width": arguments.width,
            "milliseconds": milliseconds,
            "peak_memory_mb": memory.megabytes,
        }
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{report['rows']:,} rows of {arguments.width} float16")
    for name, value in milliseconds.items():
        print(f"  {name:40} {value:9.1f} ms")
    print(f"  {'peak memory':40} {memory.megabytes:9.1f} MB")


if __name__ == "__main__":
    main()
