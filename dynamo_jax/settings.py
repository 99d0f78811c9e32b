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

T = TypeVar("T")
PRESETS = Path(configs.__file__).parent


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Fill the dataclass ``cls``, nested dataclasses included; ``where`` names the source in errors."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a table of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [n for n in required if n not in values]:
        raise ValueError(f"{where}: missing key {', '.join(missing)}")
    filled: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            filled[key] = from_dict(hints[key], value, f"{where} [{key}]")  # type: ignore[arg-type]
        elif typing.get_origin(hints[key]) is tuple and isinstance(value, list):
            filled[key] = tuple(value)
        elif _fits(value, hints[key]):
            filled[key] = value
        else:
            expected = hints[key].__name__ if type(hints[key]) is type else hints[key]
            raise ValueError(f"{where}: {key} = {value!r}, expected {expected}")
    try:
        return cls(**filled)
    except ValueError as error:  # of a dataclass that checks its own values
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; a whole number may stand for a float."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, typing.get_args(hint)[1]) for v in value.values())
    if origin is tuple:
        return isinstance(value, tuple)
    if isinstance(value, bool):  # a bool is an int in Python, not in TOML
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def find_preset(name: str, kind: str = "") -> Path:
    """The file that ``name`` means: a path, or the short name of a preset that comes with the package.

    kind: the folder of the presets, "" or "train". ValueError names those that there are.
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
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, nesting past Python's limits
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    return from_dict(cls, values, str(path))
