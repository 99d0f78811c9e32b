"""Text in: UTF-8 files as one text, with errors that name the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dynamo_jax.models.tokenizer import whole_characters

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
LARGEST = 4 * 2**30  # bytes of a file; a text is in memory whole


def read_text(path: str | Path) -> str:
    """A text file whole, or of .jsonl and .json the fields ``text`` of their objects, joined by blank lines.

    A .jsonl file (or .ndjson) has an object on each line, a .json file an array of objects, one, or lines as well.
    Halves of characters that JSON's escapes may leave become U+FFFD. ValueError, which names the file: missing, no
    file, not UTF-8, larger than ``LARGEST``, empty, JSON of another form, or JSON under another suffix.
    """
    path = Path(path)
    text = read_file(path)
    if path.suffix.lower() in JSON_SUFFIXES:
        fields = _array(path, text) if path.suffix.lower() == ".json" else None
        text = whole_characters("\n\n".join(_lines(path, text) if fields is None else fields))
    elif _is_json(text):
        raise ValueError(f"{path}: it holds JSON; name it .json or .jsonl to have the fields 'text' read")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_file(path: Path) -> str:
    """A UTF-8 file as it stands, but for a byte order mark. ValueError: as of ``read_text``."""
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "not a regular file" if path.exists() else "no such file"
        raise ValueError(f"{path}: {what}")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path}: {size:,} bytes, more than the {LARGEST:,} that are read; 100 kB is plenty")
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _is_json(text: str) -> bool:
    """Whether a text is an array or an object, or its first line is one that has a text."""
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return False
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        pass
    try:
        first = json.loads(start.partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get("text"), str)


def _array(path: Path, text: str) -> list[str] | None:
    """The texts of an array of objects, or of one object; None of a file that has objects on lines."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise ValueError(f"{path}: not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, list):
        return [_field(path, "it", value)]
    return [_field(path, f"element {number}", one) for number, one in enumerate(value, 1)]


def _lines(path: Path, text: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not a JSON object with a field 'text'") from error
        texts.append(_field(path, f"line {number}", value))
    return texts


def _field(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, dict) or "text" not in value:
        raise ValueError(f"{path}: {where} is not a JSON object with a field 'text'")
    if not isinstance(value["text"], str):
        raise ValueError(f"{path}: {where}: field 'text' is {type(value['text']).__name__}, not a string")
    return value["text"]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
