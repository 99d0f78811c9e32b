"""What calibration's windows say of the known datasets' routing: where each lies, and how far its own text strays.

A stretch of text is a point: its share of routed tokens at each expert, layer by layer. Its distance from a dataset is
that from the mean of the dataset's windows, in units of how windows scatter about their own means: each share by its
own scatter, and along the few directions in which windows scatter most (a topic, a style) by theirs. Logarithms of
distances are close to normal. Each dataset has a place, the mean of its own windows', and a limit, what chance adds
to it at the rate of false alarms that was asked for. Both come from windows that the measure was not made from, since
text to come is compared in that way.

A dataset may hold odd stretches: a table of contents, pages in another language. They would widen all that is learned
here until nothing is novel. So it begins with the half of the windows that lie closest together, and takes in others
as long as they are no farther off than chance has it and are no group of their own (``main_kind``): what stays out is
odd. Up to nearly half of the windows may be.

Axes: A known datasets, L layers, E experts, S windows, D = L * E shares, K directions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float

SPAN = 256  # tokens that are looked at together
FALSE_ALARMS = 1e-5  # a token of unchanged text
BY_CHANCE = 1e-4  # of windows of the main kind, that may be taken for odd ones
SELDOM = 1e-2  # of these, that lie where a group of them is looked for that is another kind
GROUP = 4  # windows that may be another kind
NEARER, APART = np.log(2), 1.1  # log distances by which each of a group, and half of it, is nearer to the group
FEWEST = 6  # windows of a dataset in which odd ones are looked for
DIRECTIONS = 12  # at most
ROWS = 4  # windows of all datasets, at least, for each direction
FLOOR = 0.3  # of the mean variance of a share, added to each
PRIOR = 10  # windows that the datasets together count for in how distances from one scatter
LEAST_SPREAD = 0.05  # of a log distance: no dataset is taken to scatter less
ENOUGH = 24  # windows, of which half stand for the dataset; of fewer three quarters do
FREEDOM = 8  # windows beyond the first of each dataset, in all, without which no limit is set
TINY = 1e-8  # variance of a share; distance


class Signatures(NamedTuple):
    """What stretches of text are compared with. shares: of routed tokens, mean over a dataset's windows. weight: of a
    share, one over its scatter. directions: unit vectors among weighted shares; damping: what is taken off the square
    along each. place: mean log distance of windows of a dataset from it; limit: what may be added to it, infinite
    where calibration had too few windows to tell."""

    shares: Float[Array, "A L E"]
    weight: Float[Array, "L E"]
    directions: Float[Array, "K L E"]
    damping: Float[Array, " K"]
    place: Float[Array, " A"]
    limit: Float[Array, " A"]


class _Fit(NamedTuple):
    means: Float[np.ndarray, "A D"]
    weight: Float[np.ndarray, " D"]
    directions: Float[np.ndarray, "K D"]
    damping: Float[np.ndarray, " K"]


def squared(away: Any, weight: Any, directions: Any, damping: Any) -> Any:
    """Squared distances (..) of differences of shares (.., D); numpy's arrays or JAX's."""
    scaled = away * weight
    along = scaled @ directions.T
    return (scaled * scaled).sum(-1) - (along * along) @ damping


def spans(windows: Float[np.ndarray, "S L E"], size: int) -> Float[np.ndarray, "Z L E"]:
    """Sums of ``size`` successive windows; of all, if there are fewer."""
    whole = max(1, len(windows) // size)
    return windows[: whole * size].reshape(whole, -1, *windows.shape[1:]).sum(axis=1)


def learn(
    windows: list[Float[np.ndarray, "S L E"]], rate: float = FALSE_ALARMS
) -> tuple[Signatures, list[Bool[np.ndarray, " S"]]]:
    """Signatures, and which windows of each dataset are of its main kind.

    windows: the known datasets' routing counts, of about ``SPAN`` tokens each. rate: wanted false alarms a token,
    without the second decision that a change of label waits for. ValueError: a layer of a dataset without tokens.
    """
    if not all((w.sum(axis=0).sum(axis=-1) > 0).all() for w in windows):
        raise ValueError("a known dataset has no tokens in a layer")
    layers = windows[0].shape[1:]
    shares = [(w / np.maximum(w.sum(axis=-1, keepdims=True), 1)).reshape(len(w), -1) for w in windows]
    kept = main_kind(shares)
    fit = _fit([own[main] for own, main in zip(shares, kept)])
    place, limit = _limits(_left_out(shares, kept), kept, rate * SPAN / 2)
    rows = (fit.means, fit.weight[None], fit.directions)
    means, weight, directions = (a.reshape(-1, *layers) for a in rows)
    arrays = (means, weight[0], directions, fit.damping, place, limit)
    return Signatures(*(jnp.asarray(a, jnp.float32) for a in arrays)), kept


def main_kind(shares: list[Float[np.ndarray, "S D"]]) -> list[Bool[np.ndarray, " S"]]:
    """The windows of each dataset but for odd ones, never fewer than half."""
    kept = [_closest_half(own) for own in shares]
    others = _other_kinds(shares, kept)
    for _ in range(20):  # two to five do
        found = _left_out(shares, kept)
        place, limit = _limits(found, kept, BY_CHANCE)
        new = [_within(*one) for one in zip(found, place + limit, others)]
        if all(np.array_equal(a, b) for a, b in zip(new, kept)):
            break
        kept = new
    return kept


def _other_kinds(
    shares: list[Float[np.ndarray, "S D"]], kept: list[Bool[np.ndarray, " S"]]
) -> list[Bool[np.ndarray, " S"]]:
    """The windows of each dataset that are a kind of their own, by the half that is kept."""
    found = _left_out(shares, kept)
    place, limit = _limits(found, kept, SELDOM)
    fit = _fit([own[main] for own, main in zip(shares, kept)])
    return [_group(own, d, d > most, fit) for own, d, most in zip(shares, found, place + limit)]


def _group(
    shares: Float[np.ndarray, "S D"], distances: Float[np.ndarray, " S"], outside: Bool[np.ndarray, " S"], fit: _Fit
) -> Bool[np.ndarray, " S"]:
    """Those of the windows ``outside`` that lie closer to each other than to the dataset, if that is a group.

    What strays from a kind of text strays in all directions; a foreign stretch is a kind of its own.
    """
    found, numbers = np.zeros(len(shares), bool), np.flatnonzero(outside)
    if len(numbers) < GROUP or len(shares) < FEWEST:
        return found
    group = shares[numbers]
    rest = (group.sum(axis=0) - group) / (len(group) - 1)
    nearer = distances[numbers] - np.log(np.maximum(squared(group - rest, *fit[1:]), TINY))
    alike = nearer > NEARER
    if alike.sum() >= GROUP and np.median(nearer[alike]) > APART:
        found[numbers[alike]] = True
    return found


def _closest_half(shares: Float[np.ndarray, "S D"]) -> Bool[np.ndarray, " S"]:
    """Those whose overlap with other windows is largest on the median; all, of few windows."""
    count = len(shares)
    if count < FEWEST:
        return np.ones(count, bool)
    roots = np.sqrt(shares)
    overlap = roots @ roots.T
    others = overlap[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    kept = np.zeros(count, bool)
    kept[np.argsort(-np.median(others, axis=1))[: count // 2 + 1]] = True
    return kept


def _within(distances: Float[np.ndarray, " S"], most: float, others: Bool[np.ndarray, " S"]) -> Bool[np.ndarray, " S"]:
    if len(distances) < FEWEST:
        return np.ones(len(distances), bool)
    within = (distances <= most) & ~others
    return within if 2 * within.sum() > len(within) else distances <= np.sort(distances)[len(distances) // 2]


def _fit(shares: list[Float[np.ndarray, "S D"]]) -> _Fit:
    """Means of the datasets, and how their windows scatter about them, together."""
    means = np.stack([own.mean(axis=0) for own in shares])
    rows = np.concatenate([own - mean for own, mean in zip(shares, means)])
    count, size = rows.shape
    variance = np.square(rows).mean(axis=0)
    weight = 1 / np.sqrt(variance + FLOOR * max(variance.mean(), TINY))
    _, singular, directions = np.linalg.svd(rows * weight, full_matrices=False)
    energy = np.square(singular) / count
    most = max(1, min(DIRECTIONS, count // ROWS, size - 1))
    rest = max(float(energy[most:].sum()) / max(size - most, 1), TINY)
    return _Fit(
        means, weight / np.sqrt(rest), directions[:most], np.maximum(0, 1 - rest / np.maximum(energy[:most], TINY))
    )


def _left_out(shares: list[Float[np.ndarray, "S D"]], kept: list[Bool[np.ndarray, " S"]]) -> list[np.ndarray]:
    """Log distances of windows from their own datasets as fits measure them that did not see them.

    The windows that are kept are cut into parts, and each fit leaves one part of each dataset out. Nan of the only
    window of a dataset.
    """
    count = 2 if min(int(main.sum()) for main in kept) >= ENOUGH else 4
    parts = []
    for main in kept:
        part, number = np.full(len(main), -1), int(main.sum())
        if number > 1:  # the only window of a dataset is in all fits
            part[main] = np.arange(number) * count // number
        parts.append(part)
    fits = [_fit([own[m & (p != out)] for own, m, p in zip(shares, kept, parts)]) for out in range(count)]
    found = []
    for index, (own, main, part) in enumerate(zip(shares, kept, parts)):
        each = np.stack([np.log(np.maximum(squared(own - f.means[index], *f[1:]), TINY)) for f in fits])
        distances = each.mean(axis=0)
        distances[main] = each[part[main], np.flatnonzero(main)] if main.sum() > 1 else np.nan
        found.append(distances)
    return found


def _limits(
    distances: list[np.ndarray], kept: list[Bool[np.ndarray, " S"]], rate: float
) -> tuple[Float[np.ndarray, " A"], Float[np.ndarray, " A"]]:
    """Place and limit of each dataset: Student's, for the next distance after as many as there are."""
    own = [d[main][np.isfinite(d[main])] for d, main in zip(distances, kept)]
    freedom = np.array([max(len(d) - 1, 0) for d in own])
    if freedom.sum() < FREEDOM:
        return np.zeros(len(own)), np.full(len(own), np.inf)
    sums = np.array([np.square(d - d.mean()).sum() if len(d) else 0.0 for d in own])
    place = np.array([d.mean() if len(d) else np.nan for d in own])
    # of an only window nothing is known but that it strays from the mean as far as others will from it
    place[np.isnan(place)] = np.nanmean(place) + np.log(2)
    prior = np.minimum(PRIOR, freedom.sum() - freedom)
    together = freedom + prior
    spread = np.maximum(np.sqrt((sums + prior * sums.sum() / freedom.sum()) / together), LEAST_SPREAD)
    student = -scipy.special.stdtrit(together, min(1.0, rate))  # scipy.stats takes a second to import
    return place, student * spread * np.sqrt(1 + 1 / (freedom + 1))
