"""Texts by name from the ``datasets`` library, which is optional: ``datasets:NAME[,CONFIG[,SPLIT]][:FIELD]``.

    datasets:Salesforce/wikitext,wikitext-2-raw-v1,test:text

Rows are read one after the other until ``MOST`` characters are there, so that no large dataset is downloaded whole.
With ``HF_HUB_OFFLINE=1`` they come from the library's local cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from dynamo_jax.files import shortened

PREFIX = "datasets:"
MOST = 32_000_000  # characters that are read


class Named(NamedTuple):
    """A dataset's name or folder, its configuration (None: the only one), its split and the field that has text."""

    name: str
    config: str | None
    split: str
    field: str


def parsed(given: str) -> Named:
    """What is behind ``PREFIX``. ValueError: it is of another form."""
    where, _, field = given.removeprefix(PREFIX).partition(":")
    name, *rest = where.split(",")
    if not name or len(rest) > 2 or not all(rest):
        raise ValueError(f"{given}: expected {PREFIX}NAME[,CONFIG[,SPLIT]][:FIELD]")
    config, split = [*rest, None, None][:2] if len(rest) < 2 else rest
    return Named(name, config, split or "train", field or "text")


def read_library(given: str) -> str:
    """The texts of a dataset, joined by blank lines.

    ValueError, which names the dataset: the library is missing, or cannot load it, there is no such field, or no text
    in it.
    """
    named = parsed(given)
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{given}: the library is not installed: pip install datasets, or give a file") from None
    try:
        offline = getattr(getattr(datasets, "config", None), "HF_HUB_OFFLINE", False)  # then from its local cache
        rows = datasets.load_dataset(named.name, named.config, split=named.split, streaming=not offline)
        texts = list(_texts(given, named, rows))
    except ValueError:
        raise
    except Exception as error:  # of the library, of what it reads, of the network
        said = shortened(str(error).strip().partition("\n")[0])
        raise ValueError(
            f"{given}: the datasets library cannot load it: {type(error).__name__}: {said} (HF_HUB_OFFLINE=1 takes it "
            "from the local cache)"
        ) from error
    if not any(map(str.strip, texts)):
        raise ValueError(f"{given}: there is no text in {named.field!r}")
    return "\n\n".join(texts)


def _texts(given: str, named: Named, rows: Any) -> Iterator[str]:
    characters = 0
    for row in rows:
        if named.field not in row:
            raise ValueError(f"{given}: no field {named.field!r}; there are {', '.join(map(str, row))}")
        text = row[named.field]
        if not isinstance(text, str):
            raise ValueError(f"{given}: field {named.field!r} is {type(text).__name__}, not a string")
        yield text
        characters += len(text)
        if characters >= MOST:
            return
