"""Files and folders that are whole or absent: made under a temporary name and renamed when they are done.

A killed process or a full disk leaves the old file or none, never a half of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT_LIMIT = 64 << 20  # bytes of a file that is read whole; the largest published indexes have 20 MB
LFS_POINTER = b"version https://git-lfs"


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8; ``errors`` as ``str.encode`` takes it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name ``folder`` if nothing fails meanwhile; else nothing of it stays."""
    folder = folder.absolute()
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that had this number before
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, folder: Path) -> None:
    """Give the whole folder ``partial`` its name; an earlier result of that name goes."""
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
