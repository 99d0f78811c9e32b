"""Where a long job keeps what it has finished: named bundles of arrays, in memory or in a folder.

In a folder a bundle is one safetensors file, written under a temporary name and renamed, so that it
is whole or absent at any moment. A job whose process was killed finds its bundles again.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Protocol

from dynamo_jax.files import write_text
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.storage.bundles import Bundle, read_bundle


class Work(Protocol):
    """Finished bundles by name."""

    def has(self, name: str) -> bool: ...

    def put(self, name: str, bundle: Bundle) -> None: ...

    def get(self, name: str) -> Bundle: ...

    def drop(self, name: str) -> None: ...


class MemoryWork:
    """Bundles in a dictionary; those whose names begin with ``unwanted`` are not kept."""

    def __init__(self, unwanted: tuple[str, ...] = ()):
        self._bundles: dict[str, Bundle] = {}
        self._unwanted = unwanted

    def has(self, name: str) -> bool:
        return name in self._bundles

    def put(self, name: str, bundle: Bundle) -> None:
        if not name.startswith(self._unwanted):
            self._bundles[name] = bundle

    def get(self, name: str) -> Bundle:
        return self._bundles[name]

    def drop(self, name: str) -> None:
        self._bundles.pop(name, None)


class FolderWork:
    """Bundles as files in ``folder``, which belongs to one job: ``job`` says which, and a folder that another
    job began, or that another one works in, is an error. A context manager, which lets go of the folder."""

    def __init__(self, folder: Path, job: dict[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(job)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(f"{folder}: another run is working here") from error
        except ValueError:
            os.close(self._lock)
            raise

    def _check(self, job: dict[str, Any]) -> None:
        path = self.folder / "job.json"
        job = json.loads(json.dumps(job))  # tuples become lists, as they do in the file
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if changed := [key for key in job.keys() | before.keys() if job.get(key) != before.get(key)]:
                raise ValueError(
                    f"{self.folder}: an unfinished run with another {', '.join(sorted(changed))} lies here; "
                    "delete it, finish it, or choose another --out"
                )
            return
        for leftover in self.folder.glob("*.safetensors"):  # of a job that had ended but for its last rename
            leftover.unlink()
        write_text(path, json.dumps(job, indent=2) + "\n")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def put(self, name: str, bundle: Bundle) -> None:
        write_tensors(self._path(name), bundle)

    def get(self, name: str) -> Bundle:
        return read_bundle(self._path(name))

    def drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Remove what only the job needed: what is left is its result."""
        for path in (self.folder / "job.json", self.folder / "lock", *self.folder.glob("*.partial*")):
            path.unlink(missing_ok=True)

    def __enter__(self) -> FolderWork:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
