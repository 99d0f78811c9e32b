"""Is this a known dataset? Routing histograms compared by Jensen-Shannon divergence.

A known dataset's signature is its share of routed tokens for each layer and expert. The threshold
is how far windows of the known datasets themselves lie from their own signature.

Axes: L layers, E experts, S windows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

THRESHOLD_MARGIN = 1.25


class Verdict(NamedTuple):
    """nearest: name of the closest known dataset; divergence: bits, to it; novel: above the threshold."""

    nearest: str
    divergence: float
    novel: bool


def routing_divergence(a: Float[np.ndarray, "*S L E"], b: Float[np.ndarray, "*S L E"]) -> Float[np.ndarray, "*S"]:
    """Jensen-Shannon divergence in bits between routing counts, mean over layers. No tokens at all is an error."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if not ((a.sum(axis=-1) > 0).all() and (b.sum(axis=-1) > 0).all()):
        raise ValueError("routing counts of a layer sum to zero: no tokens were seen")
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (a, b))
    middle = (p + q) / 2
    return ((_entropy_sum(p, middle) + _entropy_sum(q, middle)) / 2).mean(axis=-1)


def _entropy_sum(p: np.ndarray, middle: np.ndarray) -> np.ndarray:
    ratio = np.divide(p, middle, out=np.ones_like(p), where=p > 0)
    return (p * np.log2(ratio)).sum(axis=-1)


def novelty_threshold(windows: dict[str, Float[np.ndarray, "S L E"]], span: int) -> float:
    """The largest divergence that ``span`` successive windows of a known dataset have from the rest of it,
    times a margin. ``windows``: routing counts by window. Of a dataset with few windows half are compared."""
    worst = 0.0
    for counts in windows.values():
        size = max(1, min(span, len(counts) // 2))
        for s in range(0, max(1, len(counts) - size + 1), size):
            rest = counts.sum(axis=0) - counts[s : s + size].sum(axis=0)
            if rest.sum(axis=-1).min() > 0:
                worst = max(worst, float(routing_divergence(counts[s : s + size].sum(axis=0), rest)))
    return worst * THRESHOLD_MARGIN


def judge(
    counts: Float[np.ndarray, "L E"], signatures: dict[str, Float[np.ndarray, "L E"]], threshold: float
) -> Verdict:
    """Compare a span of tokens with every known signature."""
    distances = {name: float(routing_divergence(counts, s)) for name, s in signatures.items()}
    nearest = min(distances, key=distances.__getitem__)
    return Verdict(nearest, distances[nearest], distances[nearest] > threshold)
