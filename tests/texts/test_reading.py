"""Text in: what is read, windows of tokens, and errors that name file and line."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest

from dynamo_jax.texts.reading import read_text
from dynamo_jax.texts.windows import token_windows

ROOT = pathlib.Path(__file__).parent.parent


def test_jsonl_texts_are_joined_by_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "zwölf", "x": 1}\n', encoding="utf-8")
    assert read_text(path) == "one\n\nzwölf"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n ", "a.txt: the file is empty"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}', "a.jsonl: line 2 is not a JSON object with a field 'text'"),
        ("a.jsonl", b"{", "a.jsonl: line 1 is not"),
        ("a.jsonl", b"[1]", "a.jsonl: line 1 is not"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl: line 1: field 'text' is int"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_text(tmp_path / name)


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_text(tmp_path / "none.txt")


def test_windows_cover_the_tokens_in_order_and_share_one(bundled, texts):
    tokenizer = bundled[1]
    ids = tokenizer.encode(texts["verse"]).ids
    windows = token_windows(texts["verse"], tokenizer, 50, "verse")
    assert len(windows) == (len(ids) - 1) // 50
    np.testing.assert_array_equal(windows[:, 1:].reshape(-1), ids[1 : 1 + windows[:, 1:].size])
    np.testing.assert_array_equal(windows[1:, 0], windows[:-1, -1])
    assert len(token_windows(texts["verse"], tokenizer, 50, "verse", 3)) == 3


def test_too_few_tokens_for_a_window_is_named(bundled):
    with pytest.raises(ValueError, match=r"note: 1 tokens, fewer than one window of 51"):
        token_windows("a", bundled[1], 50, "note")
