"""Files that are whole or absent: made under a temporary name, and renamed when the disk has them.

A killed process or a full disk leaves the old file or none, never a half of one. Folders of results are
``storage/results.py``'s.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT_LIMIT = 64 << 20  # bytes of a file that is read whole; the largest published indexes have 20 MB
LFS_POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block that names no file, as those of full and of broken disks, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of ``path``, to write; it becomes ``path`` when the block has ended and the disk
    has the bytes. Its mode is that of any new file, whatever a library gave it. A link's target is written, not the
    link. What a killed process left of an earlier try goes. OSError: it cannot be written, or ``path`` is a folder or a
    device."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: exists and is no regular file")
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        if not _runs(left.name.rpartition("-")[2]):
            left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with naming(path):
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8; ``errors`` as ``str.encode`` takes it."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def write_bytes(path: Path, content: bytes) -> None:
    with written(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value``; numbers that are not finite, which JSON does not have, become null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any, limit: int = 200) -> str:
    """``repr(value)`` for an error, of at most ``limit`` characters; long and deep values are cut before they are
    written out."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 6, 20, 20
    short.maxstring = short.maxother = short.maxlong = 100
    return shortened(short.repr(value), limit)


def shortened(text: str, limit: int = 200) -> str:
    """A text for an error: one line that can be encoded, of at most ``limit`` characters, the middle left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2 - 3]} ... {text[len(text) - limit // 2 + 2 :]}"
    return " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").splitlines())


def check_readable(path: Path) -> None:
    """ValueError, which names the file and what is wrong, unless it can be read.

    A pipe or a device would be waited for; what git-lfs left in place of a file is told from a damaged one.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"{path}: a folder, expected a file")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path}: a pipe or a device, expected a file")
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: not readable: {(error.strerror or str(error)).lower()}") from error
    if start == LFS_POINTER:
        raise ValueError(f"{path}: a git-lfs pointer in place of the file; `git lfs pull` in its folder fetches it")


def read_whole(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The UTF-8 text of a file of at most ``limit`` bytes.

    ValueError, which names the file: it is missing, no regular file, unreadable, too large or not UTF-8.
    """
    check_readable(path)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"{path}: larger than the {limit:,} bytes that are read of such a file")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"{path}: not readable: {(error.strerror or str(error)).lower()}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; ValueError, which names the file, if there is none or it is not readable."""
    text = read_whole(path)
    if not text:
        raise ValueError(f"{path}: an empty file")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # damaged, or a number of thousands of digits
        raise ValueError(f"{path}: not JSON: {shortened(str(error))}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def cache_folder(name: str) -> Path:
    """Where what can be had again is kept: below $XDG_CACHE_HOME, or ~/.cache. ValueError: there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo_jax" / name
    except RuntimeError as error:
        raise ValueError(f"no home folder to keep {name} in ({error}): set XDG_CACHE_HOME") from error
