"""The tensors of a checkpoint folder by name: shapes from headers alone, contents memory-mapped and on demand.

A folder holds one ``model.safetensors``, or several shards and ``model.safetensors.index.json``. Of both, the one
file is read, as in ``transformers``. Only safetensors and JSON are read; a pickle is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from dynamo_jax.files import check_readable, read_json, shortened, shown, written

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
OTHERS = {"U8": 1, "I8": 1, "I32": 4, "I64": 8, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}


class Header(NamedTuple):
    """One tensor: where it is and what it is; dtype is safetensors' name, such as BF16."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        size = (FLOATS | OTHERS).get(self.dtype, 1)
        return math.prod(self.shape) * size


class TensorFiles:
    """The tensors in ``folder``. Opening reads headers; ``read`` maps a file until ``release``.

    listing: the file that says which tensors there are. ValueError, which names the file: there are no weights, a shard
    is missing, unreadable or damaged, or does not hold what the index places there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.headers: dict[str, Header] = {}
        self._open: dict[Path, Any] = {}
        self.listing, files = _files(folder)
        for file, names in files.items():
            found = self._headers_of(file)
            self.release()
            if lost := sorted(set(names or found) - set(found)):
                raise ValueError(f"{file}: holds no tensor {shortened(lost[0])}, which {self.listing} places there")
            self.headers |= {name: found[name] for name in names or found}

    def _headers_of(self, file: Path) -> dict[str, Header]:
        handle = self._handle(file)
        found = {}
        for name in handle.keys():
            tensor = handle.get_slice(name)
            found[name] = Header(file, tuple(tensor.get_shape()), tensor.get_dtype())
        return found

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            check_readable(file)
            try:
                self._open[file] = safetensors.safe_open(file, framework="numpy")
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                said = shortened(str(error))
                raise ValueError(f"{file}: damaged or truncated safetensors file: {said}") from error
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def read(self, name: str, part: Any = None) -> np.ndarray:
        """The tensor, or ``tensor[part]``, copied out of the file. NaN or infinity is an error."""
        header = self.headers[name]
        handle = self._handle(header.file)
        try:
            array = handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{header.file}: {name} cannot be read: {shortened(str(error))}") from error
        if header.dtype in FLOATS and not np.isfinite(array).all():
            raise ValueError(f"{header.file}: {name} holds NaN or infinity")
        return array

    def release(self) -> None:
        """Unmap all files, so that the pages that were read count as memory no more."""
        self._open.clear()

    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers.values())

    def dtypes(self) -> dict[str, int]:
        """Tensors of each dtype."""
        return dict(Counter(header.dtype for header in self.headers.values()))


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, whole or absent. The library writes memory as it lies, hence the contiguous copies."""
    whole = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    try:
        with written(path) as partial:
            safetensors.numpy.save_file(whole, partial, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path}: cannot be written: {error}") from error


def _files(folder: Path) -> tuple[Path, dict[Path, list[str] | None]]:
    """What lists the folder's tensors, the files, and the tensors of each that count (None: all that are there)."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() or not (index.exists() or index.is_symlink()):
        if not (single.exists() or single.is_symlink()):
            raise ValueError(f"{single}: no such file{_others(folder)}")
        return single, {single: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map does not map tensors to files")
    files: dict[Path, list[str] | None] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not file.isprintable() or "/" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map does not map tensors to files, but {shown(name)} to {shown(file)}")
        files.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
    return index, files


def _others(folder: Path) -> str:
    """What the folder holds in place of the files that are looked for, for the error."""
    if found := sorted(p.name for p in folder.glob("*.safetensors")):
        names = ", ".join(map(shortened, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        return f"; there are {names}, but neither {SINGLE} nor {INDEX}, by which weights are found"
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        name = shortened(pickles[0])
        return f"; {name}: a pickle can run any code when it is read, so it is not; convert it to safetensors"
    return ""
