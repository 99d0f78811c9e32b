"""Texts as windows of tokens, and windows in batches of one shape.

Axes: S, W windows of T tokens, T1 = T + 1.
"""

from __future__ import annotations

import numpy as np
import tokenizers
from jaxtyping import Int

from dynamo_jax.models.tokenizer import check_ids, encode

MARGIN = 64  # tokens before a cut that are not taken: a cut may change the last ones before it
FIRST_GUESS = 5  # characters a token
LONGEST_SEARCH = 256  # characters before a cut in which a space is looked for


def token_windows(
    text: str,
    tokenizer: tokenizers.Tokenizer,
    window: int,
    name: str,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> Int[np.ndarray, "W T1"]:
    """Consecutive windows of ``window`` + 1 tokens (each predicts ``window``); neighbours share one token.

    At most ``limit`` windows, for which no more of the text is tokenized than they need; what does not fill a last one
    is left out. vocab_size: of the model that they are for. ValueError, which has ``name``: fewer tokens than one
    window, an id past the vocabulary, a text that the tokenizer fails on.
    """
    try:
        ids = encode(tokenizer, text) if limit is None else first_ids(text, tokenizer, limit * window + 1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    count = (len(ids) - 1) // window
    if count < 1:
        raise ValueError(f"{name}: {len(ids)} tokens, fewer than one window of {window + 1}")
    count = min(count, limit or count)
    ids = ids[: count * window + 1]
    check_ids(ids, 2**31 if vocab_size is None else vocab_size, name)
    whole = np.asarray(ids, np.int32)
    return np.stack([whole[i * window : i * window + window + 1] for i in range(count)])


def first_ids(text: str, tokenizer: tokenizers.Tokenizer, count: int) -> list[int]:
    """The first ``count`` ids of the whole text, of which no more is tokenized than it takes.

    A tokenizer splits a text into words first, at spaces at the latest, and a word's ids depend on that word alone: a
    beginning that is cut before a space has the ids of the whole but for the last few. Not all tokenizers split, so the
    ids are compared with those of a beginning that is longer by a third; where they differ, or hardly grow with
    the beginning, the whole text is tokenized.
    """
    size = FIRST_GUESS * (count + MARGIN)
    while 2 * size < len(text):
        near = encode(tokenizer, text[: _cut(text, size)])
        if len(near) >= count + MARGIN:
            far = encode(tokenizer, text[: _cut(text, size + size // 3 + LONGEST_SEARCH)])
            if far[:count] == near[:count]:
                return near[:count]
            break
        size = int(1.1 * size * max(1.0, min((count + MARGIN) / max(len(near), 1), 4.0)))
    return encode(tokenizer, text)[:count]


def _cut(text: str, size: int) -> int:
    """A place near ``size`` and not past it that is before a space and after none, if there is one."""
    for place in range(min(size, len(text)), max(size - LONGEST_SEARCH, 1), -1):
        if text[place : place + 1].isspace() and not text[place - 1].isspace():
            return place
    return size


def batches(windows: Int[np.ndarray, "S T1"], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of exactly ``size`` windows with masks (size, T); the last one is filled with masked copies."""
    out = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        mask = np.zeros((size, windows.shape[1] - 1), np.float32)
        mask[: len(part)] = 1
        out.append((np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)]), mask))
    return out
