"""The tensors of a checkpoint folder by name: shapes from headers alone, contents memory-mapped and on demand.

A folder holds one ``model.safetensors``, or several shards and ``model.safetensors.index.json``.
Only safetensors and JSON are read; a pickle is refused.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from dynamo_jax.files import read_json, written

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
        return int(np.prod(self.shape, dtype=np.int64)) * size


class TensorFiles:
    """The tensors in ``folder``. Opening reads headers; ``read`` maps a file until ``release``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.headers: dict[str, Header] = {}
        self._open: dict[Path, Any] = {}
        for file, names in _files(folder).items():
            found = self._headers_of(file)
            if lost := sorted(set(names or found) - set(found)):
                raise ValueError(f"{file}: holds no tensor {lost[0]}, which {folder / INDEX} places there")
            self.headers |= {name: found[name] for name in names or found}
        self.release()

    def _headers_of(self, file: Path) -> dict[str, Header]:
        handle = self._handle(file)
        found = {}
        for name in handle.keys():
            tensor = handle.get_slice(name)
            found[name] = Header(file, tuple(tensor.get_shape()), tensor.get_dtype())
        return found

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise ValueError(f"{file}: no such file")
            try:
                self._open[file] = safetensors.safe_open(file, framework="numpy")
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{file}: damaged or truncated safetensors file: {error}") from error
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
            raise ValueError(f"{header.file}: {name} cannot be read: {error}") from error
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


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of the folder, and the tensors that the index places in each (None: all that are there)."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists() and (pickles := _pickles(folder)):
            raise ValueError(
                f"{pickles[0]}: a pickle can run any code when it is read, so it is not; convert it to safetensors"
            )
        return {folder / SINGLE: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) and "/" not in v for v in places.values()):
        raise ValueError(f"{index}: weight_map does not map tensors to files")
    files: dict[Path, list[str] | None] = {}
    for name, file in places.items():
        files.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
    return files


def _pickles(folder: Path) -> list[Path]:
    return sorted(p for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
