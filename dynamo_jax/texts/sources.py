"""A text by what is given for it: a file, ``datasets:..`` of the datasets library, or ``demo:KIND``."""

from __future__ import annotations

from pathlib import Path

from dynamo_jax.texts.demo import KINDS, collect
from dynamo_jax.texts.library import PREFIX, read_library
from dynamo_jax.texts.reading import read_text

PINNED = "demo:"  # before one of ``demo.KINDS``, the same bytes on every machine


def read_source(given: str, folder: Path | None = None) -> str:
    """The text whole; folder: of the pinned packages, as ``fetched.opened`` takes it.

    ValueError, which names it: as of ``read_text`` and ``read_library``, no such kind, or its package is not to be had.
    """
    if given.startswith(PREFIX):
        return read_library(given)
    if not given.startswith(PINNED):
        return read_text(given)
    kind = given.removeprefix(PINNED)
    if kind not in KINDS:
        raise ValueError(f"{given}: no such kind of text; there are {', '.join(KINDS)}")
    return collect(KINDS[kind](folder))
