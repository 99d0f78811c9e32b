"""Texts of the ``datasets`` library, with a library that has three rows."""

from __future__ import annotations

import sys
import types

import pytest

from dynamo_jax.commands.options import read_datasets
from dynamo_jax.texts import library
from dynamo_jax.texts.library import Named, parsed, read_library


@pytest.fixture
def asked(monkeypatch):
    """What the library is asked for; its rows are one, two, and one without a text."""
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "org/none":
            raise FileNotFoundError("no dataset org/none\nsecond line")
        rows = [{"text": "one", "number": 1}, {"text": "two", "number": 2}]
        return iter([{"text": " "}] if name == "org/empty" else rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("datasets:org/name", Named("org/name", None, "train", "text")),
        ("datasets:org/name:body", Named("org/name", None, "train", "body")),
        ("datasets:org/name,raw", Named("org/name", "raw", "train", "text")),
        ("datasets:org/name,raw,test:body", Named("org/name", "raw", "test", "body")),
    ],
)
def test_the_parts_of_a_name(given, named):
    assert parsed(given) == named


def test_rows_are_one_text(asked):
    texts = read_datasets(["wiki=datasets:org/name,raw,test:text"], [])
    assert texts == {"known": {"wiki": "one\n\ntwo"}, "novel": {}}
    assert asked == [("org/name", "raw", "test", True)]


def test_reading_ends_where_there_is_enough(asked, monkeypatch):
    monkeypatch.setattr(library, "MOST", 3)
    assert read_library("datasets:org/name") == "one"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("datasets:org/name:body", "no field 'body'; there are text, number"),
        ("datasets:org/name:number", "field 'number' is int, not a string"),
        ("datasets:org/none", "cannot load it: FileNotFoundError: no dataset org/none \\(HF_HUB"),
        ("datasets:org/empty", "there is no text in 'text'"),
        ("datasets:", "expected datasets:NAME"),
        ("datasets:a,b,c,d", "expected datasets:NAME"),
        ("datasets:a,,c", "expected datasets:NAME"),
    ],
)
def test_what_cannot_be_read_is_named(asked, given, message):
    with pytest.raises(ValueError, match=message):
        read_library(given)


def test_without_the_library_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets, or give a file"):
        read_library("datasets:org/name")
