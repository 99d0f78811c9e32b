"""Damaged tensor files and indexes, and odd things in the place of files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from fuzz.judge import Case, count, seeded
from fuzz.values import ABSENT, ODD, dumps, words

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: str, data: bytes, length: int | None = None) -> None:
    text = header.encode("utf-8", "surrogatepass")
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def header_edit(tensor: int, key: str, value: Any) -> Case:
    """One field of one tensor's entry."""

    def change(folder: Path) -> None:
        header, data = split(folder / SINGLE)
        name = sorted(header)[tensor % len(header)]
        header[name] = {k: v for k, v in (header[name] | {key: value}).items() if v is not ABSENT}
        join(folder / SINGLE, dumps(header), data)

    return Case(f"header of tensor {tensor}: {key}={words(value)}", change)


def bit_flip(at: float, bit: int) -> Case:
    """One bit of the header, its length included; ``at``: where, as a share of it."""

    def change(folder: Path) -> None:
        data = bytearray((folder / SINGLE).read_bytes())
        length = 8 + int.from_bytes(data[:8], "little")
        data[int(at * length)] ^= 1 << bit
        (folder / SINGLE).write_bytes(data)

    return Case(f"bit {bit} at {at:.6f} of the header", change)


def truncated(share: float) -> Case:
    def change(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(data[: int(share * len(data))])

    return Case(f"truncated to {share:.6f}", change)


def with_tensors(name: str, edit: Callable[[dict[str, np.ndarray]], None]) -> Case:
    """The one file's tensors, edited and written anew."""

    def change(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / SINGLE)
        edit(tensors)
        safetensors.numpy.save_file(tensors, folder / SINGLE)

    return Case(name, change)


def tensor_edit(chance: random.Random) -> Case:
    """One tensor dropped, renamed, doubled, of another shape, type or value."""
    kind = chance.choice(["drop", "rename", "copy", "shape", "type", "value"])
    number, detail = chance.randrange(1000), chance.randrange(1000)
    suffixes = [".bias", ".weight", "_scale", "x", "\u00e9", ".rotary_emb.inv_freq", "_blocks"]
    odd = [np.nan, np.inf, -np.inf]

    def edit(tensors: dict[str, np.ndarray]) -> None:
        names = sorted(tensors)
        name = names[number % len(names)]
        array = tensors[name]
        if kind == "drop":
            del tensors[name]
        elif kind == "rename":
            tensors[name + suffixes[detail % len(suffixes)]] = tensors.pop(name)
        elif kind == "copy":
            stem = name.rpartition(".")[0] or name
            tensors[stem + suffixes[detail % len(suffixes)]] = array.copy()
        elif kind == "shape":
            shapes = [array.reshape(-1), array[None], array[:-1], array[:0], np.concatenate([array, array])]
            tensors[name] = np.ascontiguousarray(shapes[detail % len(shapes)])
        elif kind == "type":
            types = [np.float16, np.float64, np.int8, np.int64, np.uint8, bool]
            tensors[name] = array.astype(types[detail % len(types)])
        else:
            array = array.copy()
            whole = np.issubdtype(array.dtype, np.integer)
            values = [np.iinfo(array.dtype).min, np.iinfo(array.dtype).max, 1] if whole else odd
            array.reshape(-1)[detail % array.size] = values[detail % 3]
            tensors[name] = array

    return with_tensors(f"tensor {number} {kind} {detail}", edit)


def tensor_cases(name: str) -> Iterator[Case]:
    chance = seeded("tensors", name)
    for _ in range(count(60)):
        yield bit_flip(chance.random(), chance.randrange(8))
    values = [*ODD, [0, 0], [2**63, 0], [0, 2**64], "F32", "F16", "BF16", "F4"]
    for _ in range(count(30)):
        key = chance.choice(["dtype", "shape", "data_offsets", "x"])
        yield header_edit(chance.randrange(1000), key, chance.choice(values))
    for _ in range(count(20)):
        yield truncated(chance.random() ** 3)
    for _ in range(count(60)):
        yield tensor_edit(chance)


def index_edit(value: Any, key: str = "weight_map") -> Case:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index = {k: v for k, v in (index | {key: value}).items() if v is not ABSENT}
        (folder / INDEX).write_text(dumps(index))

    return Case(f"index: {key}={words(value)}", change)


def place_edit(tensor: int, file: Any) -> Case:
    """Where the index places one tensor."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        places = index["weight_map"]
        places[sorted(places)[tensor % len(places)]] = file
        index["weight_map"] = {k: v for k, v in places.items() if v is not ABSENT}
        (folder / INDEX).write_text(dumps(index))

    return Case(f"index: tensor {tensor} in {words(file)}", change)


FILES = (
    *("../x.safetensors", "/etc/passwd", "..", "", ".", "~", "model-00001-of-00002.safetensors\x00", "x.bin"),
    *("sub/../model.safetensors", "config.json", "\ud800.safetensors", "x" * 300 + ".safetensors", "x.safetensors"),
    *("model-00001-of-00002.safetensors", "MODEL-00001-of-00002.safetensors", INDEX, "a\nb.safetensors"),
)


def index_cases(name: str) -> Iterator[Case]:
    chance = seeded("index", name)
    for _ in range(count(20)):
        yield index_edit(chance.choice(ODD), chance.choice(["weight_map", "weight_map", "metadata"]))
    for _ in range(count(60)):
        yield place_edit(chance.randrange(1000), chance.choice([*ODD, *FILES]))


# What may lie in the place of a file.
def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


ODD_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
    "an empty file": lambda path: path.write_bytes(b""),
    "a link to nothing": link_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "endless zeros": link_to("/dev/zero"),
    "a terminal": link_to("/dev/tty"),
    "a git-lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a page": lambda path: path.write_text("<!DOCTYPE html><html></html>"),
    "Latin-1": lambda path: path.write_bytes('{"model_type": "\u00e9"}'.encode("latin-1")),
    "UTF-16": lambda path: path.write_bytes('{"model_type": "mixtral"}'.encode("utf-16")),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "a list": lambda path: path.write_text("[1]"),
    "a number": lambda path: path.write_text("1" * 5000),
    "a deep list": lambda path: path.write_text("[" * 100_000),
    "deep objects": lambda path: path.write_text('{"a":' * 100_000),
    "a hole of a terabyte": lambda path: hole(path, 1 << 40),
    "a large header": lambda path: path.write_bytes((10**12).to_bytes(8, "little") + b"{}"),
    "a header of spaces": lambda path: join(path, " " * 10**6, b""),
    "no tensors": lambda path: join(path, "{}", b""),
    "many tensors": lambda path: join(path, dumps({f"t{i}": EMPTY for i in range(50_000)}), b""),
    "a long name": lambda path: join(path, dumps({"x" * 10**6: EMPTY}), b""),
}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def hole(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def odd_file_cases(names: tuple[str, ...]) -> Iterator[Case]:
    """Each odd thing in the place of each file; all of them at any scale."""
    for name in names:
        for kind, make in ODD_FILES.items():
            yield Case(f"{kind} as {name}", lambda folder, name=name, make=make: _put(folder / name, make))


def _put(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink(missing_ok=True)
    make(path)
