"""What one damaged input may lead to: a right result, or a ValueError of one short line that names the file.

A case is a name and a change to a folder. ``judge`` makes the change to a copy of a good folder, calls what is tried
on it, and says what is wrong with the outcome; it fails once for all cases, so that thousands fit into one test.
FUZZ_SEED and FUZZ_SCALE (how many times as many cases) come from the environment; FUZZ_ONLY is a part of the names of
the cases to run.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SCALE = float(os.environ.get("FUZZ_SCALE", "1"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ONLY = os.environ.get("FUZZ_ONLY", "")
SECONDS = 20.0  # for one case that compiles nothing; the slowest takes one or two where nothing else runs
LONGEST = 2000  # characters of a message
MORE_MEMORY = 1 << 30  # bytes that all cases together may add to the peak


class Case(NamedTuple):
    """name: says which change it is, and stays the same for a seed. change: makes it, to a folder."""

    name: str
    change: Callable[[Path], None]


class TooLong(BaseException):
    """Not an Exception, so that no handler of what is tried takes it for one of its own."""


def seeded(*what: Any) -> random.Random:
    """Random numbers of their own for each kind of case."""
    return random.Random(f"{SEED} {what}")


def count(number: int) -> int:
    """How many cases there are at this scale."""
    return max(1, round(number * SCALE))


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[Path], Any], folder: Path, seconds: float = SECONDS) -> tuple[str, str]:
    """("right" or "error" or "wrong", words). ``call`` raises AssertionError where its result is not right."""
    try:
        with time_limit(seconds):
            call(folder)
    except TooLong:
        return "wrong", f"no end after {seconds:g} s"
    except ValueError as error:
        message = str(error)
        if type(error).__name__.startswith(("Unicode", "JSONDecode")):
            return "wrong", f"{type(error).__name__}: {message[:200]}"
        if str(folder) not in message:
            return "wrong", f"names no file: {message[:300]}"
        if len(message) > LONGEST:
            return "wrong", f"a message of {len(message)} characters: {message[:300]}"
        if "\n" in message or (not message.isascii() and message.encode("utf-8", "ignore").decode() != message):
            return "wrong", f"not one line that can be printed: {message[:300]!r}"
        return "error", message
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "wrong", f"{type(error).__name__}: {str(error)[:300]}"
    return "right", ""


def judge(
    cases: Iterable[Case], good: Path, work: Path, call: Callable[[Path], Any], seconds: float = SECONDS
) -> Counter[str]:
    """How many cases ended well and how many in an error; AssertionError that lists those that did neither.

    good: a folder that is copied for each case. call: what is tried on the copy, for ``seconds`` at most; it raises
    AssertionError where what it finds is not right.
    """
    found: Counter[str] = Counter()
    wrong = []
    before = peak_bytes()
    for number, case in enumerate(case for case in cases if ONLY in case.name):
        folder = work / f"case-{number}"
        shutil.copytree(good, folder)
        try:
            case.change(folder)
            kind, words = outcome(call, folder, seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found[kind] += 1
        if kind == "wrong":
            wrong.append(f"{case.name}: {words}")
    said(sum(found.values()), ", ".join(f"{number} {kind}" for kind, number in found.items()))
    listed = "\n".join(wrong[:40])
    assert not wrong, f"seed {SEED}: {len(wrong)} of {sum(found.values())} cases\n{listed}"
    assert peak_bytes() - before < MORE_MEMORY
    return found


def said(number: int, words: str) -> None:
    """For ``pytest -s tests/fuzz | grep fuzz:``, which tells how many cases there are."""
    print(f"fuzz: {number} cases: {words}")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
