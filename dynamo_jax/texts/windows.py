"""Texts as windows of tokens, and windows in batches of one shape.

Axes: S, W windows of T tokens, T1 = T + 1.
"""

from __future__ import annotations

import numpy as np
import tokenizers
from jaxtyping import Int


def token_windows(
    text: str, tokenizer: tokenizers.Tokenizer, window: int, name: str, limit: int | None = None
) -> Int[np.ndarray, "W T1"]:
    """Consecutive windows of ``window`` + 1 tokens (each predicts ``window``); neighbours share one token.

    At most ``limit`` windows; what does not fill a last one is left out. Fewer tokens than one window is an error.
    """
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    count = (len(ids) - 1) // window
    if count < 1:
        raise ValueError(f"{name}: {len(ids)} tokens, fewer than one window of {window + 1}")
    count = min(count, limit or count)
    return np.stack([ids[i * window : i * window + window + 1] for i in range(count)])


def batches(windows: Int[np.ndarray, "S T1"], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of exactly ``size`` windows with masks (size, T); the last one is filled with masked copies."""
    out = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        mask = np.zeros((size, windows.shape[1] - 1), np.float32)
        mask[: len(part)] = 1
        out.append((np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)]), mask))
    return out
