"""Values that a field of a JSON or TOML file does not expect, as JSON text can hold them."""

from __future__ import annotations

import json
import math
import random
from typing import Any

ABSENT = object()  # the key is taken out
MANY_DIGITS = "\x00many digits\x00"  # stands for a number that json.dumps refuses to write
DEEP = "\x00deep\x00"  # and for lists nested deeper than any parser goes

ODD: tuple[Any, ...] = (
    *(ABSENT, None, True, False, MANY_DIGITS, DEEP),
    *(0, 1, 2, 3, 5, 7, 64, -1, -2, 10**4, 10**6, 10**9, 2**31, 2**32, 2**63, 10**20, -(10**20), 10**400),
    *(0.0, -0.0, 0.5, 1.5, 2.0, -1.0, 1e-300, 1e-30, 1e-9, 1e9, 1e30, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "2", "1e5", "nan", "default", "yarn", "\ud800", "\x00", "a\nb", "\u202e", "x" * 100_000),
    *([], [1], [1, 2], [None], ["x"], ["\ud800"], [[1]], [math.nan], [-1.0, 2.0], [1.0] * 4, [True], [10**20]),
    *(list(range(100_000)), {}, {"a": 1}, {"rope_type": "yarn"}, {"x" * 10_000: {"y": [{}]}}),
)


def near(value: Any, chance: random.Random) -> Any:
    """A neighbour of ``value``: of its kind, or nearly."""
    if isinstance(value, bool) or value is None:
        return chance.choice([not value, 0, 1, "true", 1.0])
    if isinstance(value, (int, float)):
        factor = chance.choice([2, 0.5, 10, 1e3, 1e6, 1e-3, -1])
        scaled = value * factor
        return chance.choice(
            [value + 1, value - 1, scaled, int(scaled) if abs(scaled) < 1e18 else 0, float(value), str(value), [value]]
        )
    if isinstance(value, str):
        return chance.choice([value.upper(), value + " ", value[:-1], [value], value * 50])
    if isinstance(value, list):
        return chance.choice([value[:-1], value * 2, value[::-1], [str(v) for v in value], [*value, None], [value]])
    return chance.choice([list(value), dict.fromkeys(value), {"type": value}, str(value)])


def dumps(value: Any) -> str:
    """JSON text, with NaN and the stand-ins written out."""
    text = json.dumps(value)
    text = text.replace(json.dumps(MANY_DIGITS), "9" * 5000)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def words(value: Any) -> str:
    """A value in a case's name."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, (list, str)) and len(value) > 100:
        return f"{value[:5]!r}.. ({len(value)})"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:30]}.. ({len(text)})"
