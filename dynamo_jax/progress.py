"""How long work says how far it is: a callback of a stage, what is done and of how much; and one for lines of text."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, int], None]  # (stage, done, of)
Log = Callable[[str], None]  # (line)


def no_progress(stage: str, done: float, of: int) -> None:
    """The callback that shows nothing."""


def no_log(line: str) -> None:
    """The callback that says nothing."""
