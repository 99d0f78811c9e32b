"""Text in: UTF-8 files to documents, tokens and fixed windows, with errors that name the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def read_text(path: str | Path) -> str:
    """A .txt file whole, or the ``text`` fields of a .jsonl file joined by blank lines."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    if path.suffix == ".jsonl":
        text = "\n\n".join(_jsonl_texts(path, text))
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _jsonl_texts(path: Path, text: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            field = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a JSON object with a field 'text'") from error
        if not isinstance(field, str):
            raise ValueError(f"{path}: line {number}: field 'text' is {type(field).__name__}, not a string")
        texts.append(field)
    return texts


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
