"""Files and folders are whole or absent, whatever fails meanwhile."""

from __future__ import annotations

import json
import math

import pytest

from dynamo_jax.files import read_json, whole_folder, write_json, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, math.nan, {"b": -math.inf}], "c": (math.inf, 2)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None, {"b": None}], "c": [None, 2]}


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), ("{", "not JSON"), ("[1]", "a JSON object")])
def test_what_is_no_json_object_is_an_error_that_names_the_file(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json: .*{said}"):
        read_json(tmp_path / "a.json")


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as partial:
        (partial / "a").write_text("a")
        assert not out.exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(out) as partial:
        (partial / "new").write_text("new")
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]
