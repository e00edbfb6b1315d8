"""Which numbers of the documentation are older than the code they measure.

Every table of measured numbers is followed by a record, one for all tables of its section since the last, and prose
that states a spread (`0.5 ± 0.1`, `0.5 (0.4 to 0.6)`) stands in a section that has one:

    <!-- measured
    command: python benchmarks/planted.py --cases dead_features
    on: 2026-11-27, 75adaf2
    code: benchmarks/planted.py 1a2b3c4d, sae/losses.py:rare_features 5e6f7a8b
    -->

`on` is the date and the commit. `code` names what the numbers rest on, files or names in files (`PATH:Class.method`),
with digests of what they said then: of their text without docstrings, comments, imports, annotations, messages of
errors, white space, trailing commas and a dataclass' base `Shown`, so that an edit of these makes no table old. Name
the formula, the benchmark's settings and, of what is trained, the defaults that it leaves alone
(`sae/config.py:TrainConfig.decay`), not all that they call. Timings have no `code`: they belong to the machine and the
day that the page names, and under docs/methods say so (`timings: yes`).

A number is older than its code where a digest has changed. Then

    python docs/measured.py                                     # names such records, and numbers without a record
    python docs/measured.py --stamp docs/methods/planted.md:57  # after measuring them again: digests, date and commit

where 57 is the line on which that record begins, as the first command and `--list PAGE` say. What cannot be measured
again now has a line `older: WORDS` in its record, and the same words on the page for its readers. So has a record none
of whose tables states a spread or several values in a cell: `single: WORDS` says what the numbers are of.
"""

import argparse
import ast
import datetime
import hashlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RECORD = re.compile(r"<!-- measured\n(.*?)-->", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d")
SPREAD = re.compile(r"\d ± \d|\d\S* \([-+]?[\d.]+%? to [-+]?[\d.]+")
SEVERAL = re.compile(SPREAD.pattern + r"|\d[;,] [-+]?\d")
PLACE = re.compile(r"(?P<path>[\w/.-]+?)(?::(?P<name>[\w.]+))? (?P<digest>[0-9a-f]{8})$")


@dataclass(frozen=True)
class Record:
    """One record of a page."""

    line: int
    """Of the page, from 1."""
    fields: dict[str, str]

    def code(self) -> list[tuple[str, str | None, str]]:
        """(path, name or None for the whole file, digest) of everything measured."""
        found = []
        for entry in filter(None, self.fields.get("code", "").split(", ")):
            place = PLACE.match(entry)
            if place is None:
                raise ValueError(f"line {self.line}: {entry!r} is not PATH DIGEST or PATH:NAME DIGEST")
            found.append((place["path"], place["name"], place["digest"]))
        return found


def digest(source: str, name: str | None = None) -> str | None:
    """Of a file's code or of one of its top-level definitions; None where it has none of that name."""
    tree = ast.parse(source)
    lines = [bytearray(line, "utf-8") for line in source.splitlines(keepends=True)]

    def blank(first: int, start: int, last: int | None, end: int | None) -> None:
        assert last is not None
        for number in range(first, last + 1):
            line = lines[number - 1]
            begin, stop = start if number == first else 0, (end or 0) if number == last else len(line)
            line[begin:stop] = b" " * (stop - begin)

    chosen = tree.body if name is None else _defined(tree.body, name)
    if not chosen:
        return None
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
                blank(node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
            case ast.arg(annotation=ast.expr() as kind):
                blank(node.lineno, node.col_offset + len(node.arg.encode()), kind.end_lineno, kind.end_col_offset)
            case ast.AnnAssign(target=target, annotation=kind):
                blank(target.end_lineno or 0, target.end_col_offset or 0, kind.end_lineno, kind.end_col_offset)
            case ast.Raise(exc=ast.Call(args=[first, *others])):
                last = others[-1] if others else first
                blank(first.lineno, first.col_offset, last.end_lineno, last.end_col_offset)
            case ast.FunctionDef(returns=ast.expr() as kind):
                blank(kind.lineno, kind.col_offset, kind.end_lineno, kind.end_col_offset)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = len(token.line[: token.start[1]].encode())
            blank(token.start[0], start, token.start[0], start + len(token.string.encode()))
    parts = []
    for node in chosen:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(one.lineno for one in decorators)])
        parts.append(b"".join(lines[first - 1 : node.end_lineno]))
    text_of = re.sub(rb"\s+", b"", b"\n".join(parts))
    text_of = re.sub(rb",repr=False\)(class\w+)\(Shown(?:Table)?\):", rb")\1:", text_of)
    return hashlib.sha256(re.sub(rb",(?=[)\]}])|->", b"", text_of)).hexdigest()[:8]


def _defined(body: list[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements that define a name, `Class.method` among them."""
    first, _, rest = name.partition(".")
    found = [node for node in body if first in _names(node)]
    return [inner for node in found for inner in _defined(getattr(node, "body", []), rest)] if rest else found


def _names(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def records(text: str) -> list[Record]:
    """The records of a page, in order."""
    found = []
    for match in RECORD.finditer(text):
        pairs = (line.split(": ", 1) for line in match[1].strip().splitlines())
        found.append(Record(text.count("\n", 0, match.start()) + 1, {pair[0]: pair[-1] for pair in pairs}))
    return found


def measured_tables(text: str) -> Iterator[int]:
    """Lines on which tables begin more than half of whose cells, titles aside, begin with a number."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("|") or (number and lines[number - 1].startswith("|")):
            continue
        end = next((i for i in range(number, len(lines)) if not lines[i].startswith("|")), len(lines))
        cells = [cell.strip() for row in lines[number + 2 : end] for cell in row.strip("|").split("|")[1:]]
        if 2 * sum(bool(NUMBER.match(cell)) for cell in cells) > len(cells):
            yield number + 1


def measured_prose(text: str) -> Iterator[int]:
    """Lines on which paragraphs begin that state a spread."""
    shown = RECORD.sub(lambda match: "\n" * match[0].count("\n"), text)
    number = 1
    for block in re.split(r"(\n\s*\n)", shown):
        if not block.startswith("|") and SPREAD.search(" ".join(block.split())):
            yield number
        number += block.count("\n")


def complaints(text: str) -> list[str]:
    """One line for every measured number without a record, and for every record that is older than its code."""
    found = []
    kept = records(text)
    lines = text.splitlines()
    headings = [number for number, line in enumerate(lines, 1) if line.startswith("#")]
    alone: dict[int, bool] = {}
    for table in measured_tables(text):
        section_end = next((number for number in headings if number > table), sys.maxsize)
        record_line = next((record.line for record in kept if table < record.line < section_end), None)
        if record_line is None:
            found.append(f"line {table}: no record follows this table: see docs/measured.py")
        else:
            rows = takewhile(lambda line: line.startswith("|"), lines[table + 1 :])
            alone[record_line] = alone.get(record_line, True) and not any(map(SEVERAL.search, rows))
    for paragraph in measured_prose(text):
        section = max((number for number in headings if number <= paragraph), default=0)
        section_end = next((number for number in headings if number > paragraph), sys.maxsize)
        if not any(section < record.line < section_end for record in kept):
            found.append(f"line {paragraph}: no record in the section of this paragraph: see docs/measured.py")
    visible = " ".join(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).split())
    for record in kept:
        older = record.fields.get("older")
        for words in (older, record.fields.get("single")):
            if words is not None and words not in visible:
                found.append(f"line {record.line}: the page does not tell its readers {words!r}")
        if record.code() and alone.get(record.line) and "single" not in record.fields:
            found.append(f"line {record.line}: no spread in its tables, and no `single: WORDS`: see docs/measured.py")
        if not {"command", "on"} <= record.fields.keys():
            found.append(f"line {record.line}: the record names no command or no date")
        for path, name, stamped in record.code():
            file = REPOSITORY / path
            now = digest(file.read_text(encoding="utf-8"), name) if file.is_file() else None
            place = f"{path}:{name}" if name else path
            if now is None:
                found.append(f"line {record.line}: {place} is no longer there")
            elif now != stamped and older is None:
                command = record.fields.get("command")
                found.append(f"line {record.line}: {place} has changed since this was measured: {command}")
    return found


def stamped(text: str, lines: Collection[int], on: str) -> str:
    """The page with new dates and digests of the records that begin on these lines; others keep theirs."""
    missing = set(lines) - {record.line for record in records(text)}
    if missing:
        raise ValueError(f"no record begins on line {min(missing)}")

    def renew(match: re.Match[str]) -> str:
        if text.count("\n", 0, match.start()) + 1 not in lines:
            return match[0]
        record = records(match[0])[0]
        entries = []
        for path, name, _ in record.code():
            now = digest((REPOSITORY / path).read_text(encoding="utf-8"), name)
            entries.append(f"{path}:{name} {now}" if name else f"{path} {now}")
        fields = {**record.fields, "on": on} | ({"code": ", ".join(entries)} if entries else {})
        fields.pop("older", None)
        return "<!-- measured\n" + "".join(f"{key}: {value}\n" for key, value in fields.items()) + "-->"

    return RECORD.sub(renew, text)


def pages() -> list[Path]:
    """The pages of the documentation."""
    return sorted(page for page in (REPOSITORY / "docs").rglob("*.md") if "_build" not in page.parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamp", nargs="+", metavar="PAGE:LINE", help="the records that were measured anew")
    parser.add_argument("--list", type=Path, metavar="PAGE", help="where its records begin, and their commands")
    options = parser.parse_args()
    if options.list:
        for record in records(options.list.read_text(encoding="utf-8")):
            print(f"{options.list}:{record.line}  {record.fields.get('on')}  {record.fields.get('command')}")
        return
    if options.stamp:
        chosen: dict[Path, set[int]] = {}
        for place in options.stamp:
            name, _, line = place.rpartition(":")
            if not name or not line.isdigit():
                parser.error(f"{place} names no record: it is PAGE:LINE, see --list PAGE")
            chosen.setdefault(Path(name), set()).add(int(line))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        on = f"{datetime.date.today()}, {commit.stdout.strip()}"
        for page, lines in chosen.items():
            try:
                page.write_text(stamped(page.read_text(encoding="utf-8"), lines, on), encoding="utf-8")
            except ValueError as error:
                parser.error(f"{page}: {error}")
        return
    found = [
        f"{page.relative_to(REPOSITORY)}, {one}" for page in pages() for one in complaints(page.read_text("utf-8"))
    ]
    print("\n".join(found) or "Every measured number has a record, and none is older than its code.")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
