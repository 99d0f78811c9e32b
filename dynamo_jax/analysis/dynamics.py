"""How far routing and significance move: between datasets, and between spans of one dataset's windows.

Four measures, each a number a layer. Routing divergence: Jensen-Shannon, bits, 0 (the same routing) to 1 (no
expert in common). Rank correlation: Spearman's, 1 (the same order) to -1. Overlap of the top decile: the share of
the top ceil(n / 10) of n experts or channel blocks in common; by chance ceil(n / 10) / n. Busiest share: the
busiest expert's tokens over the mean expert's.

Functions of arrays; no model is known here. What cannot be said is nan: a layer without tokens, the correlation
with a constant, a dataset without a second span or half. One dataset has no pairs.

Two samples of one text differ too, so datasets are compared with themselves: for routing each is cut into spans of as
many windows, for significance into halves, and spans or halves of one dataset are compared as those of two are.

Axes: L layers, E experts, N channel blocks of an expert, S windows, n items that are ordered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

SPANS = 4  # of a dataset, at most

Pair = tuple[str, str]
A = TypeVar("A")
T = TypeVar("T")


class Agreement(NamedTuple):
    """Of two orders, by layer: rank correlation, and overlap of the top decile."""

    correlation: Float[np.ndarray, " L"]
    overlap: Float[np.ndarray, " L"]


class Shift(NamedTuple):
    """From one sample's routing to another's, by layer: divergence in bits, agreement on the experts in use."""

    divergence: Float[np.ndarray, " L"]
    use: Agreement


class Spans(NamedTuple):
    """Shifts between spans of ``windows`` windows, means over pairs of spans: of one dataset, and of two."""

    windows: int
    within: dict[str, Shift]
    between: dict[Pair, Shift]


class Significance(NamedTuple):
    """Of one sample, at one width."""

    experts: Float[np.ndarray, "L E"]
    blocks: Float[np.ndarray, "L E N"]


class Orders(NamedTuple):
    """Agreement of two samples on what matters, by layer: the orders of experts, of all blocks of a layer, and (rank
    correlation only, mean over experts) of the blocks of one expert."""

    experts: Agreement
    blocks: Agreement
    within_experts: Float[np.ndarray, " L"]


class Halves(NamedTuple):
    """Agreement between the halves of one dataset's windows, and, mean over the four pairs of halves, of two."""

    within: dict[str, Orders]
    between: dict[Pair, Orders]


class Dynamics(NamedTuple):
    """Everything by layer. routing, significance: of pairs of datasets, all tokens. chance_experts, chance_blocks: the
    overlaps expected of orders that have nothing to do with each other."""

    routing: dict[Pair, Shift]
    significance: dict[Pair, Orders]
    busiest: dict[str, Float[np.ndarray, " L"]]
    spans: Spans
    halves: Halves
    chance_experts: float
    chance_blocks: float


def routing_divergence(a: Float[np.ndarray, "*S L E"], b: Float[np.ndarray, "*S L E"]) -> Float[np.ndarray, "*S L"]:
    """Jensen-Shannon divergence in bits between routing counts; nan where one side has no tokens."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    p, q = (_over(x, x.sum(axis=-1, keepdims=True)) for x in (a, b))
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), math.nan), where=b > 0)


def _relative_entropy(p: np.ndarray, middle: np.ndarray) -> np.ndarray:
    ratio = np.divide(p, middle, out=np.ones_like(p), where=p > 0)
    return (p * np.log2(ratio)).sum(axis=-1)


def busiest_share(counts: Float[np.ndarray, "*S L E"]) -> Float[np.ndarray, "*S L"]:
    """The busiest expert's tokens over the mean expert's, 1 to E; nan where there are no tokens."""
    counts = np.asarray(counts, np.float64)
    return _over(counts.max(axis=-1), counts.mean(axis=-1))


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's, over the pairs that are finite; nan where there are fewer than two or one side is constant."""
    a, b = _finite(a, b)
    if len(a) < 2:
        return math.nan
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else math.nan


def _finite(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    return a[both], b[both]


def decile_overlap(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """The share of the top ceil(n / 10) that a and b have in common, over the pairs that are finite.

    Ties at the edge of the top are broken at random and the mean is returned, so a constant overlaps with anything
    as by chance. nan where nothing is finite.
    """
    a, b = _finite(a, b)
    if not len(a):
        return math.nan
    return float(_in_top(a) @ _in_top(b)) / decile(len(a))


def decile(n: int) -> int:
    """How many of n items the top decile has."""
    return -(-n // 10)


def chance_overlap(n: int) -> float:
    """The overlap of the top deciles expected of two unrelated orders of n items: about 0.1."""
    return decile(n) / n if n else math.nan


def _in_top(values: np.ndarray) -> np.ndarray:
    """The chance of each item to be in the top decile when ties are broken at random."""
    top = decile(len(values))
    edge = np.sort(values)[-top]
    above, tied = values > edge, values == edge
    return above + tied * (top - above.sum()) / tied.sum()


def agreement(a: Float[np.ndarray, "L n"], b: Float[np.ndarray, "L n"]) -> Agreement:
    """Layer by layer."""
    return Agreement(
        np.array([rank_correlation(x, y) for x, y in zip(a, b)]),
        np.array([decile_overlap(x, y) for x, y in zip(a, b)]),
    )


def routing_shift(a: Float[np.ndarray, "L E"], b: Float[np.ndarray, "L E"]) -> Shift:
    """From routing counts to routing counts."""
    return Shift(routing_divergence(a, b), agreement(a, b))


def agreement_within_experts(a: Float[np.ndarray, "L E N"], b: Float[np.ndarray, "L E N"]) -> Float[np.ndarray, " L"]:
    """Rank correlation of an expert's channel blocks, mean over the experts where it exists."""
    return _finite_mean(np.array([[rank_correlation(x, y) for x, y in zip(*layer)] for layer in zip(a, b)]), axis=1)


def _finite_mean(values: np.ndarray, axis: int) -> np.ndarray:
    known = np.isfinite(values)
    return _over(np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis))


def orders(a: Significance, b: Significance) -> Orders:
    """Of two samples."""
    flat = (s.blocks.reshape(len(s.blocks), -1) for s in (a, b))
    return Orders(agreement(a.experts, b.experts), agreement(*flat), agreement_within_experts(a.blocks, b.blocks))


def mean_agreement(found: Sequence[Agreement]) -> Agreement:
    """Layer by layer over what is finite."""
    return Agreement(*_finite_mean(np.array(found), axis=0))


def half_orders(halves: dict[str, tuple[Significance, Significance]]) -> Halves:
    """Within and between datasets at half of each one's windows."""

    def between(s: tuple[Significance, Significance], t: tuple[Significance, Significance]) -> Orders:
        experts, blocks, within = zip(*(orders(x, y) for x, y in itertools.product(s, t)))
        return Orders(mean_agreement(experts), mean_agreement(blocks), _finite_mean(np.array(within), axis=0))

    return Halves({n: orders(*pair) for n, pair in halves.items()}, by_pair(halves, between))


def by_pair(of: dict[str, A], compare: Callable[[A, A], T]) -> dict[Pair, T]:
    """Every pair of datasets once, in their order."""
    return {(a, b): compare(of[a], of[b]) for a, b in itertools.combinations(of, 2)}


def mean_shift(shifts: list[Shift], layers: int) -> Shift:
    """Layer by layer over what is finite; nan where there is nothing."""
    rows = np.array([(s.divergence, *s.use) for s in shifts]).reshape(-1, 3, layers)
    divergence, correlation, overlap = _finite_mean(rows, axis=0)
    return Shift(divergence, Agreement(correlation, overlap))


def cut(windows: Float[np.ndarray, "S L E"], size: int) -> Float[np.ndarray, "P L E"]:
    """Routing counts of up to ``SPANS`` spans of ``size`` successive windows, spread evenly over the dataset."""
    count = min(SPANS, len(windows) // size)
    starts = [i * len(windows) // count for i in range(count)]
    return np.stack([np.asarray(windows[s : s + size], np.float64).sum(axis=0) for s in starts])


def span_shifts(windows: dict[str, Float[np.ndarray, "S L E"]]) -> Spans:
    """Shifts within and between datasets at the same number of tokens, a quarter of the shortest dataset's.

    A dataset of one window has no second span: nan within.
    """
    if empty := [n for n, w in windows.items() if not len(w)]:
        raise ValueError(f"{empty[0]}: no windows, expected at least one")
    size = max(1, min(map(len, windows.values()), default=1) // SPANS)
    spans = {n: cut(w, size) for n, w in windows.items()}

    def within(s: np.ndarray) -> Shift:
        return mean_shift([routing_shift(x, y) for x, y in itertools.combinations(s, 2)], s.shape[1])

    def between(s: np.ndarray, t: np.ndarray) -> Shift:
        return mean_shift([routing_shift(x, y) for x, y in itertools.product(s, t)], s.shape[1])

    return Spans(size, {n: within(s) for n, s in spans.items()}, by_pair(spans, between))


def dynamics(
    windows: dict[str, Float[np.ndarray, "S L E"]],
    significance: dict[str, Significance],
    halves: dict[str, tuple[Significance, Significance]],
) -> Dynamics:
    """Of datasets by name: routing counts of each window, significance of the whole and of both halves."""
    counts = {n: np.asarray(w).sum(axis=0) for n, w in windows.items()}
    return Dynamics(
        routing=by_pair(counts, routing_shift),
        significance=by_pair(significance, orders),
        busiest={n: busiest_share(c) for n, c in counts.items()},
        spans=span_shifts(windows),
        halves=half_orders(halves),
        chance_experts=chance_overlap(max((c.shape[-1] for c in counts.values()), default=0)),
        chance_blocks=chance_overlap(max((s.blocks[0].size for s in significance.values()), default=0)),
    )
