"""A task of one's own from a JSONL file: one object a line with clean, corrupted, answers and wrong.

    {"clean": "The capital of France is", "corrupted": "The capital of Italy is", "answers": [" Paris"],
     "wrong": [" Rome"]}

`answers` and `wrong` may be single strings. `attributes`, which a line may add, says what is known of the prompt for
`workbench circuits dictionary`, as one value, or as a pair where the corrupted prompt's is another (null: none):

    "attributes": {"country": ["France", "Italy"], "relation": "capital"}
"""

import json
from pathlib import Path
from typing import Any

from circuits.prompts import Prompt, PromptSet, encode
from sae.errors import InputError

FIELDS = ("clean", "corrupted", "answers", "wrong")


def user_task(path: Path | str, tokenizer: Any, bos_id: int | None) -> PromptSet:
    """Reads a task; its name is that of the file.

    Raises:
        InputError: no such file; one that is not UTF-8; a line that is no JSON object with the four fields, or whose
            attributes are no such values; or see `circuits.prompts.encode`.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no task file at {file}: give a JSONL file with {', '.join(FIELDS)} on each line")
    try:
        # Not splitlines: JSON may hold characters that it takes for line ends, such as U+2028.
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text: convert the file first") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file.name} line {number} is not JSON ({error.msg}): write one object a line") from None
        if not isinstance(row, dict) or any(field not in row for field in FIELDS):
            raise InputError(f"{file.name} line {number}: expected an object with {', '.join(FIELDS)}")
        clean, corrupted = row["clean"], row["corrupted"]
        answers, wrong = (_texts(row[field], file.name, number, field) for field in ("answers", "wrong"))
        if not isinstance(clean, str) or not isinstance(corrupted, str):
            raise InputError(f"{file.name} line {number}: clean and corrupted have to be strings")
        prompts.append(Prompt(clean, corrupted, answers, wrong, _attributes(row, file.name, number)))
    return encode(file.stem, prompts, tokenizer, bos_id)


def _texts(value: Any, file: str, number: int, field: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{file} line {number}: {field} has to be a string or a list of strings")
    return tuple(texts)


def _attributes(row: dict[str, Any], file: str, number: int) -> dict[str, Any]:
    given = row.get("attributes", {})
    if isinstance(given, dict):
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        pairs = [value if isinstance(value, tuple) else (value, value) for value in found.values()]
        if all(len(pair) == 2 and not any(isinstance(one, dict | list) for one in pair) for pair in pairs):
            return found
    raise InputError(
        f"{file} line {number}: attributes has to be an object of values, or of pairs [clean, corrupted] of values"
    )
