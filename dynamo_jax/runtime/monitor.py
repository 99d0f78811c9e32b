"""Is this a known dataset, and which? Routing histograms compared by Jensen-Shannon divergence.

A known dataset's signature is its share of routed tokens for each layer and expert. Two questions:

- **A stretch of text** (``judge``): is its divergence from the nearest signature above a threshold, how far windows of
  the known datasets themselves lie from their own signature?
- **Streams** (``watch``): every ``HOP`` tokens, where do the last ``2 * HOP`` lie? A dataset's windows scatter around a
  place of their own among the signatures: the logarithms of the divergences from all of them are close to normal,
  with a mean and a covariance that calibration's windows give (``learn``). Data is of the dataset to which the squared
  Mahalanobis distance, over its limit, is least, and novel where it is past the limit of all. A limit is what that
  distance has by chance, by Hotelling's distribution, at the rate of false alarms that was asked for. The label
  changes only when two decisions in a row agree, so that mixed text does not flap. State and update are arrays and a
  pure function, for a jitted step; each request of a batch has a state of its own.

Axes: A known datasets, L layers, E experts, S windows, B requests, K pieces of text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Int

from dynamo_jax.analysis.dynamics import routing_divergence

THRESHOLD_MARGIN = 1.25
HOP = 128  # tokens between two decisions; each looks at twice as many
LONGEST = 3 * HOP  # tokens of a window that streams can be compared by
FALSE_ALARMS = 1e-5  # a token of unchanged text
RIDGE = 0.1  # of each variance, added to it
LEAST_SPREAD = 0.05  # of a log divergence: no dataset is taken to scatter less
UNKNOWN = -1  # label before the first decision; A is the label of novel data


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
    times a margin; 1, which no divergence passes, where there is one window of each only. ``windows``: routing counts
    by window. Of a dataset with few windows half are compared."""
    worst = 0.0
    for counts in windows.values():
        size = max(1, min(span, len(counts) // 2))
        for s in range(0, max(1, len(counts) - size + 1), size):
            rest = counts.sum(axis=0) - counts[s : s + size].sum(axis=0)
            if rest.sum(axis=-1).min() > 0:
                worst = max(worst, mean_divergence(counts[s : s + size].sum(axis=0), rest))
    return worst * THRESHOLD_MARGIN if worst else 1.0


def judge(
    counts: Float[np.ndarray, "L E"], signatures: dict[str, Float[np.ndarray, "L E"]], threshold: float
) -> Verdict:
    """Compare a span of tokens with every known signature."""
    distances = {name: mean_divergence(counts, s) for name, s in signatures.items()}
    nearest = min(distances, key=distances.__getitem__)
    return Verdict(nearest, distances[nearest], distances[nearest] > threshold)


class Signatures(NamedTuple):
    """What ``watch`` compares with. shares: each dataset's share of the routed tokens; centre[a, b]: mean log
    divergence of windows of a from b; inverse: of the covariances; limit: of the squared distance, infinite where
    calibration had too few windows of every dataset to tell."""

    shares: Float[Array, "A L E"]
    centre: Float[Array, "A A"]
    inverse: Float[Array, "A A A"]
    limit: Float[Array, " A"]


class Watch(NamedTuple):
    """The state of B streams. older, newer: routed tokens of the last whole hop and of the one that goes on. label: a
    dataset's number, A for novel, UNKNOWN; candidate: what the last decision said; score: the least squared distance
    over its limit, above 1 for novel data; decisions: so far."""

    older: Float[Array, "B L E"]
    newer: Float[Array, "B L E"]
    older_tokens: Float[Array, " B"]
    newer_tokens: Float[Array, " B"]
    label: Int[Array, " B"]
    candidate: Int[Array, " B"]
    score: Float[Array, " B"]
    decisions: Int[Array, " B"]


def spans(windows: Float[np.ndarray, "S L E"], size: int) -> Float[np.ndarray, "Z L E"]:
    """Sums of ``size`` successive windows; of all, if there are fewer."""
    whole = max(1, len(windows) // size)
    return windows[: whole * size].reshape(whole, -1, *windows.shape[1:]).sum(axis=1)


def learn(windows: list[Float[np.ndarray, "S L E"]], rate: float = FALSE_ALARMS) -> Signatures:
    """Signatures from the known datasets' routing counts, by window of about ``2 * HOP`` tokens; ``rate``: wanted false
    alarms a token, without the second decision that a change of label waits for."""
    totals = np.stack([w.sum(axis=0) for w in windows])
    if not (totals.sum(axis=-1) > 0).all():
        raise ValueError("a known dataset has no tokens in a layer")
    datasets = len(windows)
    covariances = np.zeros((datasets,) * 3)
    centre, limit = np.zeros((datasets,) * 2), np.full(datasets, np.inf)
    for a, own in enumerate(windows):
        places = []
        for window in own:
            others = totals.copy()
            if len(own) > 1:
                others[a] = totals[a] - window  # what a window is compared with must not hold it
            places.append(_place(window, others))
        found = np.array(places)
        count = len(found)
        centre[a] = found.mean(axis=0)
        covariance = np.cov(found.T).reshape(datasets, datasets) if count > 1 else np.zeros((datasets,) * 2)
        spread = np.maximum(np.diag(covariance), LEAST_SPREAD**2)
        covariances[a] = covariance + np.diag(spread - np.diag(covariance) + RIDGE * spread)
        if count > datasets:
            tail = scipy.stats.f.isf(min(1.0, rate * HOP), datasets, count - datasets)
            limit[a] = tail * datasets * (count + 1) * (count - 1) / (count * (count - datasets))
    told = np.isfinite(limit)
    if told.any():  # one with too few windows is taken to scatter as the others do
        covariances[~told], limit[~told] = covariances[told].mean(axis=0), limit[told].max()
    inverse = np.linalg.inv(covariances)
    shares = totals / totals.sum(axis=-1, keepdims=True)
    return Signatures(*(jnp.asarray(a, jnp.float32) for a in (shares, centre, inverse, limit)))


def _place(counts: Float[np.ndarray, "L E"], signatures: Float[np.ndarray, "A L E"]) -> Float[np.ndarray, " A"]:
    return np.log(
        np.maximum(routing_divergence(np.broadcast_to(counts, signatures.shape), signatures).mean(axis=-1), 1e-6)
    )


def start(signatures: Signatures, requests: int = 1) -> Watch:
    """Streams of which nothing has been seen."""
    none = jnp.zeros((requests, *signatures.shares.shape[1:]))
    unknown, zero = jnp.full(requests, UNKNOWN, jnp.int32), jnp.zeros(requests)
    return Watch(none, none, zero, zero, unknown, unknown, zero, jnp.zeros(requests, jnp.int32))


def watch(signatures: Signatures, state: Watch, counts: Float[Array, "B K L E"], tokens: Float[Array, "B K"]) -> Watch:
    """The state after K pieces of text of at most HOP tokens each, one after the other; where routed tokens of each
    piece went. A piece of no tokens changes nothing."""

    def piece(state: Watch, one: tuple[Array, Array]) -> tuple[Watch, None]:
        own = state._replace(newer=state.newer + one[0], newer_tokens=state.newer_tokens + one[1])
        ended = own.newer_tokens >= HOP

        def decided(own: Watch) -> Watch:
            after = jax.vmap(lambda one: _hop(signatures, one))(own)
            return jax.tree.map(lambda a, b: jnp.where(ended.reshape(-1, *[1] * (a.ndim - 1)), a, b), after, own)

        return jax.lax.cond(ended.any(), decided, lambda own: own, own), None

    pieces = (jnp.moveaxis(counts, 1, 0).astype(jnp.float32), tokens.T.astype(jnp.float32))
    return jax.lax.scan(piece, state, pieces)[0]


def _hop(signatures: Signatures, state: Watch) -> Watch:
    """The end of one stream's hop: a decision, if two hops have been seen."""
    label, score = decide(signatures, state.older + state.newer)
    seen = state.older_tokens > 0
    agreed = (label == state.candidate) | (state.label == UNKNOWN)
    return Watch(
        older=state.newer,
        newer=jnp.zeros_like(state.newer),
        older_tokens=state.newer_tokens,
        newer_tokens=jnp.zeros_like(state.newer_tokens),
        label=jnp.where(seen & agreed, label, state.label),
        candidate=jnp.where(seen, label, state.candidate),
        score=jnp.where(seen, score, state.score),
        decisions=state.decisions + seen.astype(jnp.int32),
    )


def decide(signatures: Signatures, counts: Float[Array, "L E"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The dataset that ``2 * HOP`` tokens with these routing counts are of, A for none, and the score."""
    share = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    middle = (share + signatures.shares) / 2

    def entropy(p: Array) -> Array:
        return jnp.sum(jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1) / middle), 0), axis=-1)

    divergence = (entropy(share) + entropy(signatures.shares)).mean(axis=-1) / 2
    away = jnp.log(jnp.maximum(divergence, 1e-6)) - signatures.centre  # (A, A)
    own = jnp.eye(len(away), dtype=bool)
    away = jnp.where(own, jnp.maximum(away, 0), away)  # nearer to itself than usual is no sign of novelty
    squared = jnp.einsum("ab,abc,ac->a", away, signatures.inverse, away)
    finite = jnp.isfinite(signatures.limit)
    # where too few windows set no limit, the nearest is what it is
    over = squared / jnp.where(finite, signatures.limit, jnp.maximum(squared.max(), 1.0))
    nearest = jnp.argmin(over).astype(jnp.int32)
    novel = jnp.asarray(len(signatures.limit), jnp.int32)
    return jnp.where(over[nearest] > 1, novel, nearest), over[nearest]
