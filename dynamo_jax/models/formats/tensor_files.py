"""The tensors of a checkpoint folder by name: shapes from headers alone, contents memory-mapped and on demand.

A folder holds one ``model.safetensors``, or several shards and ``model.safetensors.index.json``. Of both, the one
file is read, as in ``transformers``. Only safetensors and JSON are read; a pickle is refused. The safetensors library
checks a file's header (sizes, offsets, overlaps); contents are read by offset, since its numpy reader knows no FP8.
What the tensors mean is said one level up (``stored.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from dynamo_jax.files import check_readable, read_json, shortened, shown, written

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, Any] = {  # by safetensors' names; NaN is looked for in the first row
    **{"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu},
    **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "BOOL": np.bool_},
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64},
}
FLOATS = ("F32", "F16", "BF16")


class Header(NamedTuple):
    """One tensor: where it is and what it is; dtype is safetensors' name, such as BF16, and start the place of its
    first byte in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int


class TensorFiles:
    """The tensors in ``folder``. Opening reads headers; ``read`` maps a file until ``release``.

    listing: the file that says which tensors there are. ValueError, which names the file: there are no weights, a shard
    is missing, unreadable or damaged, or does not hold what the index places there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.headers: dict[str, Header] = {}
        self._open: dict[Path, np.memmap[Any, Any]] = {}
        self.listing, files = _files(folder)
        for file, names in files.items():
            found = _headers_of(file)
            if lost := sorted(set(names or found) - set(found)):
                raise ValueError(f"{file}: holds no tensor {shortened(lost[0])}, which {self.listing} places there")
            self.headers |= {name: found[name] for name in names or found}

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def read(self, name: str, part: Any = None) -> np.ndarray:
        """The tensor, or ``tensor[part]``, copied out of the file in its dtype. NaN or infinity is an error."""
        header = self.headers[name]
        try:
            if header.file not in self._open:
                check_readable(header.file)
                self._open[header.file] = np.memmap(header.file, np.uint8, "r")
            data = self._open[header.file][header.start : header.start + header.nbytes]
            array = data.view(DTYPES[header.dtype]).reshape(header.shape)
            array = np.array(array if part is None else array[part])
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{header.file}: {name} cannot be read: {shortened(str(error))}") from error
        if not is_finite(array, header.dtype):
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


def is_finite(array: np.ndarray, dtype: str) -> bool:
    """Whether all are numbers, of the dtypes that models have; FP8 has one code for NaN with either sign, or 255."""
    if dtype == "BF16":  # by its exponents: three times as fast
        return bool(((array.view(np.uint16) & 0x7F80) != 0x7F80).all())
    if dtype in FLOATS:
        return bool(np.isfinite(array).all())
    if dtype == "F8_E4M3":
        return bool(((array.view(np.uint8) & 0x7F) != 0x7F).all())
    return dtype != "F8_E8M0" or bool((array.view(np.uint8) != 0xFF).all())


def _headers_of(file: Path) -> dict[str, Header]:
    check_readable(file)
    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as data:
            length = int.from_bytes(data.read(8), "little")
            entries = json.loads(data.read(length))
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            found[name] = Header(file, tuple(entry["shape"]), entry["dtype"], 8 + length + start, end - start)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = shortened(str(error))
        raise ValueError(f"{file}: damaged or truncated safetensors file: {said}") from error
    return found


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
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not file.isprintable() or "/" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map does not map tensors to files, but {shown(name)} to {shown(file)}")
        files.setdefault(file, []).append(name)
    return index, {folder / file: names for file, names in files.items()}


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
