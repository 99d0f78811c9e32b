"""The folder of a result: nobody else's files are touched, and a killed run leaves the old result or the new one."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from dynamo_jax.storage.results import Making, Result, check_free, digest_of, is_done, located, read_sums

MARKER = "marker.json"
JOB = {"command": "make", "settings": {"bits": 3.0}, "texts": ["a"]}


class Killed(BaseException):
    pass


def make(out, files, job=JOB, **options):
    """A job that writes ``files``, name -> text, and its marker."""
    with Making(out, MARKER, job, **options) as making:
        for name, text in (files | {MARKER: json.dumps({"job": job})}).items():
            (making.folder / name).parent.mkdir(exist_ok=True)
            (making.folder / name).write_text(text)
        making.publish({name: digest_of(making.folder / name) for name in [*files, MARKER]})


def read(out):
    """The files of a result but its marker."""
    result = Result(out)
    return {name: result.path(name).read_text() for name in result.sums if name != MARKER}


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


OLD, NEW = {"a": "old", "only/old": "1", "b": "same"}, {"a": "new", "b": "same", "deep/new": "2"}
OTHER = JOB | {"settings": {"bits": 4.0}}


def test_a_result_is_its_files_and_their_digests(tmp_path):
    make(tmp_path / "deep" / "out", NEW)
    assert read(tmp_path / "deep" / "out") == NEW
    assert names(tmp_path / "deep" / "out") == ["SHA256SUMS", "a", "b", "deep/new", MARKER]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "deep" / "out", check=True)


@pytest.mark.parametrize("name", ["deep/tool use.jinja", "Größe", ".hidden", "-a", "a\u2028b", "..a/b..", "a+b [1]"])
def test_names_that_people_give_are_read_back(tmp_path, name):
    make(tmp_path, {name: "1"})
    assert read(tmp_path) == {name: "1"} and is_done(tmp_path, MARKER, JOB)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\udc80"])
def test_a_name_that_the_list_cannot_hold_is_refused_before_anything_is_moved(tmp_path, name):
    with pytest.raises(ValueError, match="is no name that SHA256SUMS can hold"):
        make(tmp_path, {name: "1"})
    assert not (tmp_path / "unfinished").exists()


def test_files_that_are_not_ours_keep_their_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds something else \(thesis.txt\)"):
            make(tmp_path, NEW, overwrite=overwrite)
    assert names(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("sums", ["", "0" * 64 + "  thesis.txt\n", "damaged"])
def test_a_folder_that_only_looks_like_a_result_is_left_alone(tmp_path, sums):
    for name, text in (("thesis.txt", "mine"), (MARKER, "{}"), ("SHA256SUMS", sums)):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="holds something else"):
        make(tmp_path, NEW, overwrite=True)
    assert names(tmp_path) == ["SHA256SUMS", MARKER, "thesis.txt"]


def test_a_finished_result_is_replaced_only_when_asked_and_what_lies_beside_it_stays(tmp_path):
    make(tmp_path, OLD)
    (tmp_path / "notes").write_text("mine")
    assert is_done(tmp_path, MARKER, JOB) and not is_done(tmp_path, MARKER, OTHER)
    with pytest.raises(ValueError, match=r"finished result \(bits 3.0 there, 4.0 here\); --overwrite replaces it"):
        make(tmp_path, NEW, OTHER)
    assert read(tmp_path) == OLD
    make(tmp_path, NEW, OTHER, overwrite=True)
    assert read(tmp_path) == NEW
    assert names(tmp_path) == ["SHA256SUMS", "a", "b", "deep/new", MARKER, "notes"]
    assert not (tmp_path / "only").exists()


def test_a_file_of_a_result_that_somebody_changed_is_not_replaced(tmp_path):
    make(tmp_path, OLD)
    (tmp_path / "a").write_text("edited")
    with pytest.raises(ValueError, match="a: not as it was written"):
        make(tmp_path, NEW, OTHER, overwrite=True)
    assert (tmp_path / "a").read_text() == "edited" and not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize("name", ["a", "SHA256SUMS"])
def test_a_result_that_has_lost_a_file_is_not_done_already(tmp_path, name):
    make(tmp_path, OLD)
    (tmp_path / name).unlink()
    assert not is_done(tmp_path, MARKER, JOB)
    if name == "a":
        with pytest.raises(ValueError, match=r"a finished result \(of the same job\); --overwrite replaces it"):
            make(tmp_path, OLD)
        make(tmp_path, OLD, overwrite=True)
        assert read(tmp_path) == OLD and is_done(tmp_path, MARKER, JOB)


@pytest.mark.parametrize("kind", ["folder in place of a file", "link in place of a folder", "link to nothing"])
def test_what_lies_in_a_result_in_another_way_than_it_was_written_is_not_replaced(tmp_path, kind):
    out = tmp_path / "out"
    make(out, OLD)
    if kind == "link in place of a folder":
        (out / "only").rename(tmp_path / "elsewhere")
        (out / "only").symlink_to(tmp_path / "elsewhere")
    else:
        (out / "a").unlink()
        (out / "a").symlink_to(tmp_path / "nothing") if "link" in kind else (out / "a").mkdir()
    before = names(tmp_path)
    with pytest.raises(ValueError, match="not as it was written, so it is not replaced"):
        make(out, NEW | OLD, OTHER, overwrite=True)
    assert names(tmp_path) == before and not (out / "unfinished").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "a"])
def test_a_file_that_appears_while_a_job_runs_is_left_and_the_result_waits(tmp_path, name):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"{name}.*what is finished waits in {out / 'unfinished'}"):
        with Making(out, MARKER, JOB) as making:
            (making.folder / "a.safetensors").write_text("finished")
            (out / name).write_text("mine")
            making.publish({"a.safetensors": digest_of(making.folder / "a.safetensors")})
    assert (out / name).read_text() == "mine" and (out / "unfinished" / "a.safetensors").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_beside_an_earlier_result_a_new_name_may_be_taken_too(tmp_path, kind):
    out = tmp_path / "out"
    make(out, OLD)
    (tmp_path / "elsewhere").mkdir()
    taken = out / "deep" / "new" if kind == "folder" else out / "deep"
    if kind == "link":
        taken.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        taken.mkdir(parents=True)
    else:
        taken.write_text("mine")
    with pytest.raises(ValueError, match=f"{taken}: exists and is not of an earlier result"):
        make(out, NEW, OTHER, overwrite=True)
    assert read(out) == OLD and taken.exists() and not list((tmp_path / "elsewhere").iterdir())


def kills(monkeypatch, at):
    """The process is killed before its ``at``-th rename or removal of a file."""
    count = 0

    def counted(function):
        def wrapper(*args, **options):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return function(*args, **options)

        return wrapper

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(Making, "_tidy", lambda self: None)


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_between_any_two_steps_the_old_or_the_new_result_is_whole_and_the_next_call_finishes(
    tmp_path, monkeypatch, earlier
):
    for at in range(1, 30):
        out = tmp_path / str(at)
        if earlier:
            make(out, OLD)
        with monkeypatch.context() as patch:
            kills(patch, at)
            try:
                make(out, NEW, OTHER, overwrite=True)
                break
            except Killed:
                pass
        if earlier or (out / "unfinished" / "SHA256SUMS").exists() or (out / "SHA256SUMS").exists():
            assert read(out) in ([OLD, NEW] if earlier else [NEW])
        if not is_done(out, MARKER, OTHER):
            make(out, NEW, OTHER, overwrite=True)
        assert read(out) == NEW
        assert names(out) == ["SHA256SUMS", "a", "b", "deep/new", MARKER], at
        assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["deep"]
    assert at > 8  # the marks were hit, and the last run was not killed


def test_two_runs_in_one_folder_are_told_apart(tmp_path):
    with Making(tmp_path, MARKER, JOB):
        with pytest.raises(ValueError, match="another run is working here"):
            Making(tmp_path, MARKER, JOB).__enter__()


def test_a_run_that_begins_as_another_one_ends_keeps_its_folder(tmp_path):
    with Making(tmp_path, MARKER, JOB) as making:
        (making.folder / MARKER).write_text(json.dumps({"job": JOB}))
        making.publish({MARKER: digest_of(making.folder / MARKER)})
        other = Making(tmp_path, MARKER, OTHER, overwrite=True)
        other.__enter__()
    assert (tmp_path / "unfinished" / "job.json").exists()
    other.__exit__()
    assert names(tmp_path) == ["SHA256SUMS", MARKER]


def test_an_unfinished_job_goes_on_and_another_one_needs_to_say_so(tmp_path):
    with pytest.raises(RuntimeError), Making(tmp_path, MARKER, JOB) as making:
        (making.folder / "layer.safetensors").write_text("hours of work")
        raise RuntimeError
    with pytest.raises(ValueError, match=r"an unfinished run lies here \(bits 3.0 there, 4.0 here\)"):
        Making(tmp_path, MARKER, OTHER).__enter__()
    with Making(tmp_path, MARKER, JOB) as making:
        assert (making.folder / "layer.safetensors").exists()
    with Making(tmp_path, MARKER, OTHER, overwrite=True) as making:
        assert not (making.folder / "layer.safetensors").exists()


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_unfinished_that_no_run_made_is_left_alone(tmp_path, kind, earlier):
    """A user's drafts may lie in a folder of that name."""
    out, drafts = tmp_path / "out", tmp_path / "drafts"
    make(out, OLD) if earlier else out.mkdir()
    drafts.mkdir()
    (drafts / "chapter").write_text("mine")
    if kind == "folder":
        drafts.rename(out / "unfinished")
    elif kind == "link":
        (out / "unfinished").symlink_to(drafts)
    else:
        (out / "unfinished").write_text("mine")
    before = names(tmp_path)
    for resumes in (True, False):
        with pytest.raises(ValueError, match=f"{out / 'unfinished'}: exists, and no run made it"):
            make(out, NEW, OTHER, overwrite=True, resumes=resumes)
    assert is_done(out, MARKER, JOB) == earlier and names(tmp_path) == before


@pytest.mark.parametrize("resumes", [False, True])
def test_a_job_that_is_refused_for_an_unfinished_one_leaves_it(tmp_path, resumes):
    with pytest.raises(RuntimeError), Making(tmp_path, MARKER, JOB) as making:
        (making.folder / "layer.safetensors").write_text("hours of work")
        raise RuntimeError
    for _ in range(2):
        with pytest.raises(ValueError, match="an unfinished run lies here"):
            make(tmp_path, NEW, {"command": "export"}, resumes=resumes)
    assert (tmp_path / "unfinished" / "layer.safetensors").read_text() == "hours of work"


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("at", [5, 6, 7])
def test_the_next_job_moves_what_a_killed_one_left_though_it_is_refused_itself(tmp_path, monkeypatch, at, resumes):
    with monkeypatch.context() as patch:
        kills(patch, at)
        with pytest.raises(Killed):
            make(tmp_path, NEW, resumes=resumes)
    assert (tmp_path / "unfinished").exists() and read(tmp_path) == NEW
    with pytest.raises(ValueError, match="holds a finished result"):
        make(tmp_path, OLD, OTHER, resumes=resumes)
    assert read(tmp_path) == NEW and not (tmp_path / "unfinished").exists()


def test_a_job_that_fails_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), Making(tmp_path / "out", MARKER, JOB):
        raise RuntimeError
    with pytest.raises(RuntimeError), Making(tmp_path / "out", MARKER, JOB, resumes=False) as making:
        (making.folder / "a.safetensors").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_killed_job_that_does_not_resume_leaves_nothing_to_its_next_try(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "job.json").write_text(json.dumps(JOB | {"texts": ["b"]}))
    (tmp_path / "unfinished" / "shard.safetensors").write_text("half")
    make(tmp_path, NEW, resumes=False)
    assert names(tmp_path) == ["SHA256SUMS", "a", "b", "deep/new", MARKER]


def test_a_link_to_another_disk_the_current_folder_and_a_new_disk_are_filled_in_place(tmp_path, monkeypatch):
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    make((tmp_path / "link").resolve(), NEW)
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "disk") == NEW
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make(Path(".").resolve(), NEW)
    assert Path.cwd() == tmp_path / "here" and read(Path.cwd()) == NEW


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_whose_parent_may_not_be_written_is_filled(tmp_path):
    (tmp_path / "closed" / "out").mkdir(parents=True)
    (tmp_path / "closed").chmod(stat.S_IRUSR | stat.S_IXUSR)
    make(tmp_path / "closed" / "out", NEW)
    assert read(tmp_path / "closed" / "out") == NEW


def test_nothing_but_renames_inside_of_the_folder_is_asked_of_the_disk(tmp_path, monkeypatch):
    """So a mount point may be the folder, and its parent may belong to somebody else."""
    replace = Path.replace
    moved = []
    monkeypatch.setattr(Path, "replace", lambda self, to: moved.append((self, Path(to))) or replace(self, to))
    out = tmp_path / "out"
    make(out, NEW)
    assert moved and all(out in a.parents and out in b.parents for a, b in moved)


@pytest.mark.parametrize(
    "line", ["", "x", "0" * 63 + "  a", "0" * 64 + " a", "0" * 64 + "  ../a", "0" * 64 + "  /a", "0" * 64 + "  a/../b"]
)
def test_digests_that_nobody_wrote_are_refused(tmp_path, line):
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(ValueError, match="SHA256SUMS: damaged"):
        read_sums(tmp_path / "SHA256SUMS")


def test_a_missing_and_a_damaged_file_are_named(tmp_path):
    make(tmp_path, NEW)
    (tmp_path / "a").write_text("nww")
    (tmp_path / "b").unlink()
    result = Result(tmp_path)
    for name, said in (("a", "damaged: its SHA-256"), ("b", "no such file"), ("c", "no file of this result")):
        with pytest.raises(ValueError, match=f"{tmp_path / name}: {said}"):
            result.path(name)
    assert located(tmp_path, "a") == tmp_path / "a"


def test_a_result_does_not_go_into_another_ones_unfinished_work(tmp_path):
    with pytest.raises(ValueError, match="unfinished: a name that is kept"):
        make(tmp_path / "unfinished", NEW)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a folder"):
        check_free(tmp_path / "file", MARKER, JOB, True)
