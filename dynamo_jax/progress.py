"""How long work says how far it is: a callback of a stage, what is done and of how much."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, int], None]  # (stage, done, of)


def no_progress(stage: str, done: float, of: int) -> None:
    """The callback that shows nothing."""
