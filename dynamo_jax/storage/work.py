"""Where a long job keeps what it has finished: named bundles of arrays, in memory or in a folder.

In a folder a bundle is one safetensors file, written under a temporary name and renamed, so that it
is whole or absent at any moment. A job whose process was killed finds its bundles again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from dynamo_jax.files import naming
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.runtime.hosts import Hosts
from dynamo_jax.storage.bundles import Bundle, read_bundle
from dynamo_jax.storage.results import JOB, LINE, LOCK, Sums, digest_of, sums_text


class Work(Protocol):
    """Finished bundles by name."""

    def has(self, name: str) -> bool: ...

    def put(self, name: str, bundle: Bundle) -> None: ...

    def get(self, name: str) -> Bundle: ...

    def drop(self, name: str) -> None: ...

    def names(self) -> list[str]: ...


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

    def names(self) -> list[str]:
        return list(self._bundles)


class SharedWork:
    """The work of several processes, which the first one keeps in ``own``: it alone needs a folder. The processes take
    the same steps, so that each knows what is finished; a bundle that one asks for is sent to all."""

    def __init__(self, own: Work, hosts: Hosts):
        self._own, self._hosts = own, hosts
        self._finished = set(hosts.of_first(lambda: {name: np.zeros(0) for name in own.names()}))

    def has(self, name: str) -> bool:
        return name in self._finished

    def put(self, name: str, bundle: Bundle) -> None:
        """What others than the first process give is not looked at."""
        if self._hosts.first:
            self._own.put(name, bundle)
        self._finished.add(name)

    def get(self, name: str) -> Bundle:
        return self._hosts.of_first(lambda: self._own.get(name))

    def drop(self, name: str) -> None:
        if self._hosts.first:
            self._own.drop(name)
        self._finished.discard(name)

    def names(self) -> list[str]:
        return sorted(self._finished)


class FolderWork:
    """Bundles as files in ``folder`` (``results.Making``), and ``digests``, a line for each, written after its file: a
    bundle without a line is taken for absent. ValueError, from ``get`` and ``sums``: one that an earlier process
    finished is not what it was."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._journal = folder / "digests"
        self._digests = self._read_journal()
        self._checked: set[str] = set()
        for path in folder.iterdir():  # of a process that was killed while it wrote
            if path.name not in (JOB, LOCK, self._journal.name) and path.stem not in self._digests:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read_journal(self) -> Sums:
        if not self._journal.exists():
            return {}
        content = self._journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self._journal, len(whole))  # of a process that was killed as it wrote a line
        lines = whole.decode("utf-8", errors="replace").splitlines(keepends=True)
        return {found[2]: found[1] for found in map(LINE.fullmatch, lines) if found}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return name in self._digests and self._path(name).exists()

    def names(self) -> list[str]:
        """Of all finished bundles."""
        return [name for name in self._digests if self._path(name).exists()]

    def put(self, name: str, bundle: Bundle) -> None:
        path = self._path(name)
        write_tensors(path, bundle)
        self._digests[name] = digest_of(path)
        self._checked.add(name)
        with naming(self._journal), self._journal.open("ab") as file:
            file.write(sums_text({name: self._digests[name]}).encode())
            file.flush()
            os.fsync(file.fileno())

    def _check(self, name: str) -> Path:
        path = self._path(name)
        if name not in self._checked:
            if not self.has(name):
                raise ValueError(f"{path}: gone since it was finished; delete {self.folder} to begin anew")
            if digest_of(path) != self._digests[name]:
                said = "damaged since it was finished (its SHA-256 is another)"
                raise ValueError(f"{path}: {said}; delete {self.folder} to begin anew")
        self._checked.add(name)
        return path

    def get(self, name: str) -> Bundle:
        return read_bundle(self._check(name))

    def drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def sums(self, names: Iterable[str]) -> Sums:
        """Digests of the files of bundles, by file name."""
        return {self._check(name).name: self._digests[name] for name in names}
