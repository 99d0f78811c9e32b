"""How long work says how far it is: a callback of a stage, what is done and of how much; and one for lines of text.

``Clock`` is such a callback, which keeps what each stage took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

Progress = Callable[[str, float, int], None]  # (stage, done, of)
Log = Callable[[str], None]  # (line)


def no_progress(stage: str, done: float, of: int) -> None:
    """The callback that shows nothing."""


def no_log(line: str) -> None:
    """The callback that says nothing."""


class Spent(NamedTuple):
    """What a stage took. memory: the most bytes that the process has had until its end; None where nobody counts."""

    seconds: float
    memory: int | None


class Clock:
    """Passes progress on, and keeps what each stage took: the time that went by until it said how far it was."""

    def __init__(self, progress: Progress = no_progress):
        self.stages: dict[str, Spent] = {}
        self._progress, self._last = progress, time.perf_counter()

    def __call__(self, stage: str, done: float, of: int) -> None:
        now = time.perf_counter()
        before = self.stages.get(stage, Spent(0.0, None))
        self.stages[stage] = Spent(before.seconds + now - self._last, peak_bytes())
        self._last = now
        self._progress(stage, done, of)


def peak_bytes() -> int | None:
    """The most memory that this process has had, as the operating system counts it; None where it does not."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
