"""TOML files into frozen dataclasses; an unknown or missing key is an error that helps."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Fill the dataclass ``cls``, nested dataclasses included; ``where`` names the source in errors."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [n for n in required if n not in values]:
        raise ValueError(f"{where}: missing key {', '.join(missing)}")
    filled = {
        key: from_dict(hints[key], value, f"{where} [{key}]") if dataclasses.is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    return cls(**filled)


def load_toml(cls: type[T], path: str | Path) -> T:
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    return from_dict(cls, values, str(path))
