"""Files that are whole or absent: made under a temporary name, and renamed when the disk has them.

A killed process or a full disk leaves the old file or none, never a half of one. Folders of results are
``storage/results.py``'s.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of ``path``, to write; it becomes ``path`` when the block has ended and the disk
    has the bytes. Its mode is that of any new file, whatever a library gave it. What a killed process left of an
    earlier try goes."""
    for left in path.parent.glob(f".{path.name}.partial-*"):
        if not _runs(left.name.rpartition("-")[2]):
            left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; ValueError that names the file if there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers or nesting past Python's limits
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value
