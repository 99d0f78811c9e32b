"""The report's section on how far routing and significance move between the known datasets, layer by layer.

Two pictures, a lane for each layer, and the sentences that say what they show. The first compares datasets with
each other and with themselves at the same number of tokens; the second shows how far the orders of experts and of
channel blocks agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dynamo_jax.analysis.dynamics import Agreement, Dynamics, Pair
from dynamo_jax.report import charts
from dynamo_jax.report.charts import Mark, element, number, text
from dynamo_jax.report.content import ReportContent
from dynamo_jax.report.findings import listed, span
from dynamo_jax.report.pieces import figure, nothing, table

WITHIN, BETWEEN = "rtn", "auto"  # looks of marks: a grey square, a green diamond
USE, EXPERTS, BLOCKS = "rtn", "auto", "baseline"


def dynamics_section(content: ReportContent) -> str:
    moved = content.dynamics
    if moved is None or not any(len(b) for b in moved.busiest.values()):
        return ""
    busiest = [float(v) for shares in moved.busiest.values() for v in shares if math.isfinite(v)]
    words = f"The busiest expert of a layer takes {span(busiest, '.1f')} times its share." if busiest else ""
    if not moved.routing:
        return nothing("One dataset only: nothing moves between datasets. " + words)
    sentences = [_distance_words(moved), _order_words(moved), words]
    lead = element("p", text(" ".join(s for s in sentences if s)))
    return lead + _distances(moved) + _orders(moved) + _halves(moved) + _table(moved)


def _finite(arrays: Iterable[np.ndarray]) -> list[float]:
    return [float(v) for array in arrays for v in np.ravel(array) if math.isfinite(v)]


def _distance_words(moved: Dynamics) -> str:
    """Datasets against each other and against themselves, in as many tokens."""
    between = np.array([s.divergence for s in moved.spans.between.values()])
    within = np.array([s.divergence for s in moved.spans.within.values()])
    if not _finite([between]):
        return ""
    words = f"Routing of two datasets diverges by {number(float(np.mean(_finite([between]))), '.3f')} bits on the mean"
    if not _finite([within]):
        return words + "; no dataset has enough windows to be compared with itself."
    noise = float(np.mean(_finite([within])))
    words += f", that of two spans of one dataset by {number(noise, '.3f')}."
    apart = sum(_apart(_finite([b]), _finite([w])) for b, w in zip(between.T, within.T))
    return words + (
        f" In {apart} of {between.shape[1]} layers every pair of datasets is further apart than any dataset is from "
        "itself."
    )


def _apart(between: list[float], within: list[float]) -> bool:
    return bool(between and within) and min(between) > max(within)


def _order_words(moved: Dynamics) -> str:
    parts = []
    experts = _finite(o.experts.correlation for o in moved.significance.values())
    overlap = _finite(o.experts.overlap for o in moved.significance.values())
    within = _finite(o.within_experts for o in moved.significance.values())
    if experts:
        parts.append(f"the ranks of experts by significance correlate at {_mean(np.array(experts))}")
    if overlap:
        parts.append(
            f"{number(float(np.mean(overlap)), '.0%')} of the top tenth of experts are in common "
            f"(by chance {number(moved.chance_experts, '.0%')})"
        )
    if within:
        parts.append(f"the ranks of the channel blocks of one expert correlate at {_mean(np.array(within))}")
    words = f"Between datasets, on the mean of layers and pairs, {listed(parts)}." if parts else ""
    within, between = (
        _finite(o.experts.correlation for o in side.values()) for side in (moved.halves.within, moved.halves.between)
    )
    if within and between:
        words += (
            f" On half of their windows, the ranks of experts correlate at {_mean(np.array(within))} within a dataset "
            f"and at {_mean(np.array(between))} between two."
        )
    return words


def _distances(moved: Dynamics) -> str:
    within = [(WITHIN, f"within {n}", s.divergence) for n, s in moved.spans.within.items()]
    between = [(BETWEEN, _named(p), s.divergence) for p, s in moved.spans.between.items()]
    caption = (
        "Routing divergence (Jensen-Shannon) of a layer's experts, bits: 0 is the same routing, 1 no expert in common. "
        f"A mark is a dataset or a pair of datasets, the mean over its spans of {moved.spans.windows} windows. The "
        "squares are what as many tokens of one text show; diamonds to the right of them are more than chance and "
        "drift within a text."
    )
    keys = ((WITHIN, "spans of one dataset"), (BETWEEN, "spans of two datasets"))
    return _lanes(caption, keys, within + between, [0.0], "bits", " bits")


def _orders(moved: Dynamics) -> str:
    own = moved.significance.items()
    use = [(USE, f"use, {_named(p)}", s.use.correlation) for p, s in moved.routing.items()]
    experts = [(EXPERTS, f"significance, {_named(p)}", o.experts.correlation) for p, o in own]
    blocks = [(BLOCKS, f"blocks of an expert, {_named(p)}", o.within_experts) for p, o in own]
    caption = (
        "Spearman's rank correlation between two datasets: 1 is the same order, 0 no relation. A mark is a pair of "
        "datasets. Significance: predicted loss when one expert, or one channel block, is rounded to 2 bits. Of "
        "blocks, the mean over the experts of the layer."
    )
    keys = (
        (USE, "use of experts"),
        (EXPERTS, "significance of experts"),
        (BLOCKS, "significance of channel blocks within an expert"),
    )
    return _lanes(caption, keys, use + experts + blocks, [0.0, 1.0], "rank correlation")


def _halves(moved: Dynamics) -> str:
    """Significance as the first picture shows routing."""
    if not _finite(o.experts.correlation for o in moved.halves.within.values()):
        return ""
    within = [(WITHIN, f"halves of {n}", o.experts.correlation) for n, o in moved.halves.within.items()]
    between = [(BETWEEN, f"halves of {_named(p)}", o.experts.correlation) for p, o in moved.halves.between.items()]
    caption = (
        "Spearman's rank correlation of the significance of experts, measured on half of a dataset's windows. The "
        "squares are how well half a dataset says what the other half needs; diamonds to the left of them are kinds of "
        "text that need something else."
    )
    keys = ((WITHIN, "halves of one dataset"), (BETWEEN, "halves of two datasets"))
    return _lanes(caption, keys, within + between, [0.0, 1.0], "rank correlation")


def _lanes(
    caption: str,
    keys: Iterable[tuple[str, str]],
    series: list[tuple[str, str, np.ndarray]],
    shown: list[float],
    label: str,
    unit: str = "",
) -> str:
    """A picture with a lane for each layer. keys: looks and what they stand for; series: look, words and the values
    by layer (L,) of each mark; shown: numbers the axis shows in any case."""
    layers = len(series[0][2])
    rows = [(f"layer {i}", [_mark(v[i], look, words, unit) for look, words, v in series]) for i in range(layers)]
    legend = element("p", *(charts.key(look, words) for look, words in keys))
    return figure(caption, legend, element("div", charts.strip_chart(rows, shown, label), class_="strip"))


def _mark(value: float, series: str, words: str, unit: str) -> Mark:
    return Mark(float(value), None, series, "", f"{words}: {number(float(value), '.3f')}{unit}")


def _named(pair: Pair) -> str:
    return f"{pair[0]} and {pair[1]}"


def _table(moved: Dynamics) -> str:
    """A line for each pair, means over layers."""
    head = ["datasets", "divergence, bits", "most", "use: ranks", "use: top tenth", "experts: ranks"]
    head += ["experts: top tenth", "blocks: ranks", "blocks: top tenth", "blocks of an expert: ranks"]
    lines = []
    for pair, shift in moved.routing.items():
        most = max(_finite([shift.divergence]), default=math.nan)
        values = [_mean(shift.divergence, ".3f"), number(most, ".3f"), *_two(shift.use)]
        orders = moved.significance[pair]
        values += [*_two(orders.experts), *_two(orders.blocks), _mean(orders.within_experts)]
        lines.append([_named(pair), *values])
    caption = (
        "All calibration tokens, means over layers (most: of a layer). Ranks: rank correlation of a layer's experts or "
        "blocks. Top tenth: share of the most used or most significant tenth in common, by chance "
        f"{number(moved.chance_experts, '.2f')} of experts and {number(moved.chance_blocks, '.2f')} of blocks."
    )
    return figure(caption, table(head, lines))


def _mean(values: np.ndarray, form: str = "z.2f") -> str:
    finite = _finite([values])
    return number(float(np.mean(finite)) if finite else math.nan, form)


def _two(agreement: Agreement) -> tuple[str, str]:
    return _mean(agreement.correlation), _mean(agreement.overlap)
