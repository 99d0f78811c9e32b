"""Is this a known dataset? Routing histograms compared by Jensen-Shannon divergence.

A known dataset's signature is its share of routed tokens for each layer and expert. The threshold
is how far windows of the known datasets themselves lie from their own signature.

Axes: L layers, E experts, S windows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dynamo_jax.analysis.dynamics import routing_divergence

THRESHOLD_MARGIN = 1.25


class Verdict(NamedTuple):
    """nearest: name of the closest known dataset; divergence: bits, to it; novel: above the threshold."""

    nearest: str
    divergence: float
    novel: bool


def mean_divergence(a: Float[np.ndarray, "L E"], b: Float[np.ndarray, "L E"]) -> float:
    """Routing divergence in bits, mean over layers. No tokens at all is an error."""
    divergence = float(routing_divergence(a, b).mean())
    if math.isnan(divergence):
        raise ValueError("routing counts of a layer sum to zero: no tokens were seen")
    return divergence


def novelty_threshold(windows: dict[str, Float[np.ndarray, "S L E"]], span: int) -> float:
    """The largest divergence that ``span`` successive windows of a known dataset have from the rest of it,
    times a margin. ``windows``: routing counts by window. Of a dataset with few windows half are compared."""
    worst = 0.0
    for counts in windows.values():
        size = max(1, min(span, len(counts) // 2))
        for s in range(0, max(1, len(counts) - size + 1), size):
            rest = counts.sum(axis=0) - counts[s : s + size].sum(axis=0)
            if rest.sum(axis=-1).min() > 0:
                worst = max(worst, mean_divergence(counts[s : s + size].sum(axis=0), rest))
    return worst * THRESHOLD_MARGIN


def judge(
    counts: Float[np.ndarray, "L E"], signatures: dict[str, Float[np.ndarray, "L E"]], threshold: float
) -> Verdict:
    """Compare a span of tokens with every known signature."""
    distances = {name: mean_divergence(counts, s) for name, s in signatures.items()}
    nearest = min(distances, key=distances.__getitem__)
    return Verdict(nearest, distances[nearest], distances[nearest] > threshold)
