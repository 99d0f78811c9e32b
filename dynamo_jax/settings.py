"""TOML and JSON into frozen dataclasses; an unknown or missing key or a wrong type is an error that helps."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from dynamo_jax import configs
from dynamo_jax.files import read_whole, shortened, shown

T = TypeVar("T")
PRESETS = Path(configs.__file__).parent
TOML_LIMIT, LINE_LIMIT = 1 << 16, 2000  # bytes and characters; a key of many parts takes time by their square
WHOLE_LIMIT = 2**63  # what arrays and seeds take
KIND = "kind"  # the key by which a table says which dataclass of several it is
FLOAT_LIMIT = 1e300  # a finite number, with room to calculate


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Fill the dataclass ``cls``, nested dataclasses included; ``where`` names the source in errors."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a table of keys, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key[:100], fields, n=1)
            raise ValueError(f"{where}: unknown key {shown(key)}" + (f", did you mean {near[0]!r}?" if near else ""))
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [n for n in required if n not in values]:
        raise ValueError(f"{where}: missing key {', '.join(missing)}")
    filled: dict[str, Any] = {}
    for key, value in values.items():
        if (kind := _dataclass_of(hints[key], value)) is not None:
            values = {k: v for k, v in value.items() if k != KIND} if isinstance(value, dict) else value
            filled[key] = from_dict(kind, values, f"{where} [{key}]")
            continue
        if typing.get_origin(hints[key]) is tuple and isinstance(value, list):
            value = _items(hints[key], value, f"{where} [{key}]")
        if not _fits(value, hints[key]):
            expected = hints[key].__name__ if type(hints[key]) is type else hints[key]
            raise ValueError(f"{where}: {key} = {shown(value)}, expected {expected}")
        filled[key] = value
    try:
        return cls(**filled)
    except ValueError as error:  # of a dataclass that checks its own values
        raise ValueError(f"{where}: {shortened(str(error), 500)}") from error


def _items(hint: Any, values: list[Any], where: str) -> tuple[Any, ...]:
    """The items of a list; tables become the dataclass that a tuple of any length has."""
    item = typing.get_args(hint)[0]
    if not dataclasses.is_dataclass(item):
        return tuple(values)
    return tuple(from_dict(item, value, f"{where} {i}") for i, value in enumerate(values, 1))  # type: ignore[arg-type]


def _dataclass_of(hint: Any, value: Any) -> type | None:
    """The dataclass that a table stands for: the field's own, or that of a union which the table names by ``KIND``."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [kind for kind in choices if dataclasses.is_dataclass(kind)]
    if isinstance(value, dict) and KIND in value:
        kinds = [kind for kind in kinds if kind.__name__ == value[KIND]]  # type: ignore[union-attr]
    return kinds[0] if len(kinds) == 1 and value is not None else None  # type: ignore[return-value]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; a whole number may stand for a float, NaN and infinity for nothing."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, typing.get_args(hint)[1]) for v in value.values())
    if origin is tuple:
        kinds = typing.get_args(hint)
        if kinds[-1] is ...:
            return isinstance(value, tuple) and all(_fits(v, kinds[0]) for v in value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if isinstance(value, bool):  # a bool is an int in Python, not in TOML
        return hint is bool
    if hint is int:
        return isinstance(value, int) and abs(value) < WHOLE_LIMIT
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) < FLOAT_LIMIT  # which NaN is not
    return isinstance(value, hint)


def find_preset(name: str, kind: str = "") -> Path:
    """The file that ``name`` means: a path, or the short name of a preset that comes with the package.

    kind: the folder of the presets, "", "train" or "recipes". ValueError names those that there are.
    """
    folder = PRESETS / kind
    short = folder / f"{name}.toml"
    if short.is_file() and "/" not in name:
        return short
    if not Path(name).is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise ValueError(f"{name}: no such file, and no preset of that name; presets are {known}")
    return Path(name)


def load_toml(cls: type[T], path: str | Path) -> T:
    """Fill the dataclass ``cls`` from a file; ValueError, which names it: unreadable, no TOML, or as ``from_dict``."""
    text = read_whole(Path(path), TOML_LIMIT)
    if (longest := max(map(len, text.splitlines()), default=0)) > LINE_LIMIT:
        raise ValueError(f"{path}: a line of {longest:,} characters; {LINE_LIMIT:,} are the most in a TOML file")
    try:
        values = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: not a TOML file that can be read: nested too deeply") from error
    except ValueError as error:  # damaged, or a number of thousands of digits
        raise ValueError(f"{path}: not a TOML file: {shortened(str(error))}") from error
    return from_dict(cls, values, str(path))
