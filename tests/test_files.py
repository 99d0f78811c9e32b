"""Files are whole or absent, whatever fails meanwhile."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynamo_jax.files import read_json, write_bytes, write_json, write_text
from dynamo_jax.models.formats.tensor_files import write_tensors


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


def test_modes_follow_the_umask_whatever_wrote_the_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "text", "a")
        write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(3)})
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def test_what_a_killed_process_left_of_a_file_goes_with_the_next_try(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".a.partial-{ended.pid}").write_text("half")
    running = tmp_path / f".a.partial-{os.getppid()}"
    running.write_text("somebody else's")
    write_text(tmp_path / "a", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a", running.name}


def test_a_full_disk_names_the_file(tmp_path):
    for write in (lambda: write_text(tmp_path / "a", "b" * 5000), lambda: write_bytes(tmp_path / "a", bytes(5000))):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            with pytest.raises(OSError, match=f"'{tmp_path / 'a'}'"):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_what_looks_like_the_rest_of_another_file_stays(tmp_path):
    other = tmp_path / ".a1.partial-999999999"
    other.write_text("mine")
    write_text(tmp_path / "a[1]", "whole")
    assert other.exists()


def test_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr("os.fsync", lambda handle: steps.append(os.readlink(f"/proc/self/fd/{handle}")))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: steps.append("renamed") or replace(self, to))
    write_text(tmp_path / "a", "whole")
    assert [Path(s).name for s in steps] == [f".a.partial-{os.getpid()}", "renamed", tmp_path.name]


def test_a_link_is_written_through_and_a_device_is_left_alone(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "a")
    write_text(tmp_path / "link", "whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "other" / "a").read_text() == "whole"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "other"):
        with pytest.raises(OSError, match=f"{path}: exists and is no regular file"):
            write_text(path, "whole")
    assert (tmp_path / "pipe").is_fifo()
