"""The folder of a result: it is whole or absent, and files that are not its own are left alone.

    OUT/SHA256SUMS     the result's files and their digests, as ``sha256sum --check`` reads them
    OUT/..             these files
    OUT/unfinished/    what a job that runs, or was killed, has made so far; gone when the result is whole

A job makes its whole result in ``unfinished``. That is inside of OUT, so that moving it needs neither
another disk nor a right to write beside OUT, whether OUT is a mount point, a link or the current folder.
SHA256SUMS is written there last, and from that moment the new result is the result: ``located`` finds
its files, moved or not, and the next job in OUT moves what a killed one did not. Until then an earlier
result stays what it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamo_jax.files import check_readable, naming, read_json, read_whole, shown, sync, write_text

SUMS, UNFINISHED, JOB, LOCK = "SHA256SUMS", "unfinished", "job.json", "lock"
NOT_OURS = (UNFINISHED, "lost+found")  # in a folder that counts as empty; the second is a new disk's
PART = r"(?!\.\.?(?:/|$))[^/\\\x00-\x1f\x7f\ud800-\udfff]+"  # of a name; ``sha256sum`` writes others in another way
NAME = re.compile(f"{PART}(?:/{PART})*")
LINE = re.compile(f"([0-9a-f]{{64}})  ({NAME.pattern})\n")

Sums = dict[str, str]  # SHA-256 of each file by its name in the folder
Job = dict[str, Any]  # what tells a job from another one, as JSON has it; "command": what makes such results


def digest_of(path: Path) -> str:
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_text(sums: Sums) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_sums(path: Path) -> Sums:
    """ValueError, which names the file: it is missing, or not one that ``sums_text`` wrote."""
    text = read_whole(path)
    sums: Sums = {}
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        found = LINE.fullmatch(line)
        if not found or found[2] in sums:
            raise ValueError(f"{path}: damaged: a line is {shown(line, 100)}")
        sums[found[2]] = found[1]
    return sums


def located(folder: Path, name: str) -> Path:
    """Where the file ``name`` of the result in ``folder`` is: a run that was killed may have left it to be moved."""
    waiting = folder / UNFINISHED
    return waiting / name if _waits(folder) and (waiting / name).is_file() else folder / name


def _waits(out: Path) -> bool:
    """Whether a result is whole in ``unfinished``, and is to be moved."""
    return all((out / UNFINISHED / name).is_file() for name in (SUMS, JOB))


def _is_ours(folder: Path) -> bool:
    """Whether a run made ``unfinished``, if it is there: a run writes its job before anything else, and removes it
    after all else."""
    if folder.is_symlink():
        return False
    try:
        found = os.listdir(folder)
    except FileNotFoundError:  # a run may just have ended
        return True
    except NotADirectoryError:
        return False
    return JOB in found or all(name == LOCK or name.startswith(f".{JOB}.partial-") for name in found)


class Result:
    """A finished result to read. ValueError: ``folder`` has no SHA256SUMS, or a damaged one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sums = read_sums(located(folder, SUMS))

    def path(self, name: str) -> Path:
        """The file, after its digest was compared. ValueError: it is missing, or not what was written."""
        if name not in self.sums:
            raise ValueError(f"{self.folder / name}: no file of this result ({SUMS} does not name it)")
        path = located(self.folder, name)
        check_readable(path)
        if digest_of(path) != self.sums[name]:
            raise ValueError(f"{path}: damaged: its SHA-256 is not that of {SUMS}")
        return path

    def size(self) -> int:
        """Bytes of all files. ValueError: one is missing."""
        found = {name: located(self.folder, name) for name in self.sums}
        if missing := [name for name, path in found.items() if not path.is_file()]:
            raise ValueError(f"{self.folder / missing[0]}: no such file")
        return sum(path.stat().st_size for path in found.values()) + located(self.folder, SUMS).stat().st_size


def is_done(out: Path, marker: str, job: Job) -> bool:
    """Whether ``out`` holds the finished result of just this job, none of its files gone. marker: the result's JSON
    file, which holds its job under the key "job". What a killed run left to be moved is moved."""
    if _job_of(located(out, marker), "job") != _as_json(job):
        return False
    try:
        Result(out).size()
    except ValueError:
        return False
    folder = out / UNFINISHED
    if folder.is_dir() and _is_ours(folder) and (_waits(out) or _job_of(folder / JOB) in (None, _as_json(job))):
        _finish(out)
    return True


def _finish(out: Path) -> None:
    """Do what a run that was killed while it moved its files did not."""
    with _locked(out / UNFINISHED):
        _move(out)
        _remove(out / UNFINISHED)


def check_free(out: Path, marker: str, job: Job, overwrite: bool, compare: bool = True) -> Sums:
    """The files that a new result may replace: none in a folder that is missing or empty, with ``overwrite`` those of
    an earlier result, which must be as they were written (``compare``: their digests are). ValueError: the folder holds
    anything else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: exists and is not a folder")
    if out.name == UNFINISHED:
        raise ValueError(f"{out}: a name that is kept for unfinished work; choose another --out")
    if not _is_ours(out / UNFINISHED):
        raise ValueError(f"{out / UNFINISHED}: exists, and no run made it; move it away, or choose another --out")
    entries = sorted(p.name for p in out.iterdir() if p.name not in NOT_OURS) if out.exists() else []
    if not entries:
        return {}
    try:
        earlier = read_sums(located(out, SUMS))
    except ValueError:
        earlier = {}
    if marker not in earlier:
        raise ValueError(f"{out}: exists and holds something else ({entries[0]}); choose an empty or a new folder")
    if not overwrite:
        differs = _differences(_job_of(located(out, marker), "job"), _as_json(job))
        raise ValueError(
            f"{out}: holds a finished result ({differs}); --overwrite replaces it, or choose another --out"
        )
    for name, digest in earlier.items():
        path = located(out, name)
        if _in_the_way(out, name) or (compare and path.is_file() and digest_of(path) != digest):
            raise ValueError(
                f"{path}: not as it was written, so it is not replaced; move it away or delete it yourself"
            )
    return earlier


class Making:
    """The place where a job makes its result, ``folder``, and how it becomes the result. A context manager.

    resumes: whether an unfinished job goes on there, which a killed one's files then stay for; else they go.
    ValueError: OUT is not free (``check_free``), another run works there, or an unfinished one of another job lies
    there, which only ``overwrite`` gives up.
    """

    def __init__(self, out: Path, marker: str, job: Job, *, overwrite: bool = False, resumes: bool = True):
        self.out, self.folder = out, out / UNFINISHED
        self._marker, self._job, self._overwrite, self._resumes = marker, job, overwrite, resumes
        self._made, self._begun, self._published = not out.exists(), False, False

    def __enter__(self) -> Making:
        if _waits(self.out):
            _finish(self.out)
        check_free(self.out, self._marker, self._job, self._overwrite, compare=False)  # before anything is made there
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.folder))
            stack.callback(self._tidy)
            check_free(self.out, self._marker, self._job, self._overwrite)
            self._begin()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _begin(self) -> None:
        path, job = self.folder / JOB, _as_json(self._job)
        before = _job_of(path) if path.exists() else None
        if path.exists() and before != job and not self._overwrite:
            if self._resumes or before is None or before.get("command") != job["command"]:
                raise ValueError(
                    f"{self.folder}: an unfinished run lies here ({_differences(before, job)}); go on with it, delete "
                    "it, give it up with --overwrite, or choose another --out"
                )
        if before != job or not self._resumes:
            _clear(self.folder)
            write_text(path, json.dumps(job, indent=2) + "\n")
        self._begun = True

    def _tidy(self) -> None:
        """A job that failed before it had finished anything, or that does not resume, leaves nothing. What another one
        has finished, which this one was refused for, stays."""
        if not self._published and self.folder.is_dir() and not _waits(self.out):
            keeps = self._resumes or not self._begun
            if not (keeps and any(self.folder.glob("*.safetensors"))):
                with contextlib.suppress(OSError):
                    _remove(self.folder)
        if self._made:
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def publish(self, files: Sums) -> None:
        """Make ``files``, which lie in ``folder``, the result. ValueError: OUT holds something else by now;
        where the job resumes, the finished files wait until that is moved away."""
        if wrong := sorted(name for name in files if not NAME.fullmatch(name)):
            raise ValueError(f"{self.folder}: {shown(wrong[0])} is no name that {SUMS} can hold")
        try:
            earlier = check_free(self.out, self._marker, self._job, self._overwrite)
            taken = sorted({p for name in files if name not in earlier for p in _places(self.out, name)})
            if taken:
                raise ValueError(f"{taken[0]}: exists and is not of an earlier result; move it away")
        except ValueError as error:
            waits = f" (what is finished waits in {self.folder})" if self._resumes else ""
            raise ValueError(f"{error}{waits}") from error
        write_text(self.folder / SUMS, sums_text(files))
        _move(self.out)
        self._published = True  # and once the folder is removed, the next one of that name is another run's
        _remove(self.folder)


def _clear(folder: Path) -> None:
    """Remove all of ``unfinished`` but what says that it is a run's."""
    for path in folder.iterdir():
        if path.name not in (JOB, LOCK):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove(folder: Path) -> None:
    """Remove ``unfinished``, its job after all else: what a killed process leaves of it is a run's all the same."""
    _clear(folder)
    for name in (JOB, LOCK):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a run that waited for the lock has made it anew
        folder.rmdir()


def _in_the_way(out: Path, name: str) -> list[Path]:
    """What is neither a file in the place of the file ``name`` nor a folder on the way to it: a rename would fail, or
    lead out of OUT."""
    folders = [out / parent for parent in Path(name).parents if parent != Path(".")]
    found = [p for p in folders if p.is_symlink() or (p.exists() and not p.is_dir())]
    return found + ([out / name] if os.path.lexists(out / name) and not (out / name).is_file() else [])


def _places(out: Path, name: str) -> list[Path]:
    """What lies where the file ``name``, or a folder on the way to it, is to be."""
    return _in_the_way(out, name) + ([out / name] if (out / name).is_file() else [])


def _move(out: Path) -> None:
    """Move the files of a result that is whole in ``unfinished`` to their places, in any number of tries."""
    waiting = out / UNFINISHED
    if not _waits(out):
        return
    new = read_sums(waiting / SUMS)
    old = read_sums(out / SUMS) if (out / SUMS).is_file() else {}
    for name in new:
        if (waiting / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (waiting / name).replace(out / name)
    for name in old.keys() - new.keys():
        (out / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or OUT itself, which holds ``unfinished``
            (out / name).parent.rmdir()
    for folder in {(out / name).parent for name in new}:
        sync(folder)
    (waiting / SUMS).replace(out / SUMS)
    sync(out)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else works in ``folder``, which is made. ValueError: somebody does."""
    handle = -1
    while handle < 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        except (FileNotFoundError, FileExistsError):  # another run has just ended, and its folder with it
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), os.stat(folder / LOCK))
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(f"{folder}: another run is working here") from error
        except FileNotFoundError:  # another run has just ended, and its lock with it
            mine = False
        if not mine:
            os.close(handle)
            handle = -1
    try:
        yield
    finally:
        os.close(handle)


def _as_json(job: Job) -> Job:
    return json.loads(json.dumps(job))  # tuples become lists, as they do in a file


def _job_of(path: Path, key: str | None = None) -> Job | None:
    try:
        value: Any = read_json(path)
    except (ValueError, OSError):
        return None
    value = value if key is None else value.get(key)
    return value if isinstance(value, dict) else None


def _differences(before: Job | None, now: Job) -> str:
    """In words, what makes another job of it."""
    if before is None:
        return "of no known job"
    if before.get("command") != now.get("command"):
        return f"of {before.get('command')}"
    words = []
    for key in sorted(before.keys() | now.keys()):
        one, two = before.get(key), now.get(key)
        if one == two:
            continue
        if isinstance(one, dict) and isinstance(two, dict):
            changed = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
            words += [f"{k} {shown(one.get(k), 40)} there, {shown(two.get(k), 40)} here" for k in changed]
        else:
            words.append(f"other {key}")
    return "; ".join(words[:4]) + ("; .." if len(words) > 4 else "") if words else "of the same job"
