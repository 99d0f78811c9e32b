"""Pieces of HTML and SVG: heat maps, lollipop, range and bar charts, their axes and legends.

Functions of numbers that return markup; no dataset or model is known here. ``element`` escapes
attributes and ``text`` escapes words, and nothing else writes a tag, so that tags balance. A number
that is not finite is shown as missing and never reaches a coordinate. Colours of words and marks are
CSS variables (``style.py``). Palettes are safe for colour-blind readers, and a digit, sign or shape
repeats what a colour says.

Axes: L layers, E experts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MINUS, PLUS_MINUS, TIMES, ELLIPSIS = (
    "\N{MINUS SIGN}",
    "\N{PLUS-MINUS SIGN}",
    "\N{MULTIPLICATION SIGN}",
    "\N{HORIZONTAL ELLIPSIS}",
)
SPACE = "\N{NO-BREAK SPACE}"
MISSING = "missing"  # how a number that is not there is written

SEQUENTIAL = (
    "#46327e",
    "#365c8d",
    "#277f8e",
    "#1fa187",
    "#4ac16d",
    "#a0da39",
    "#fde725",
)  # viridis, its darkest end cut
MORE, LESS = "#1b9150", "#8f4fb0"  # of ColorBrewer's PRGn
WIDTH = 1040  # pixels of the page that a chart may fill
PLOT = 860  # of a chart before it is stretched to the page
CHARACTER = 6.4  # pixels of one, in a label


def text(value: object) -> str:
    """Words as markup."""
    return html.escape(str(value), quote=True)


def element(name: str, *content: str, **attributes: object) -> str:
    """A tag around markup. ``class_`` is class, ``stroke_width`` is stroke-width; None leaves an attribute out."""
    pairs = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = name + "".join(f' {key}="{text(_plain(value))}"' for key, value in pairs.items())
    return f"<{start}>{''.join(content)}</{name}>"


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def number(value: float | None, form: str = ".4g") -> str:
    """A number for reading, with a real minus sign."""
    if value is None or math.isnan(value):
        return MISSING
    return format(value, form).replace("-", MINUS)


def clipped(label: str, most: int = 26) -> str:
    return label if len(label) <= most else label[: most - 1] + ELLIPSIS


def svg(width: float, height: float, label: str, *content: str, class_: str | None = None) -> str:
    """A drawing; ``label`` is for readers who do not see it."""
    box = f"0 0 {_plain(float(width))} {_plain(float(height))}"
    size = {"width": width, "height": height, "viewBox": box}
    return element("svg", *content, **size, role="img", aria_label=label, class_=class_)


def words_at(x: float, y: float, words: str, anchor: str = "start", class_: str | None = None) -> str:
    return element("text", text(words), x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def line_at(x1: float, y1: float, x2: float, y2: float, class_: str = "line", width: float = 1.0) -> str:
    at = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", class_=class_, stroke_width=width, **at)


def _box(x: float, y: float, width: float, height: float, style: str | None = None, class_: str | None = None) -> str:
    size = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    return element("rect", style=style, class_=class_, **size)


class Paint(NamedTuple):
    """The look of a cell: a CSS colour over the paper, and a character or two on it."""

    fill: str
    opacity: float = 1.0
    label: str = ""

    def style(self) -> str:
        return f"fill:{self.fill};fill-opacity:{_plain(self.opacity)}"

    def label_class(self) -> str:
        """Which ink is read on it: the page's own where the paper shines through."""
        if self.opacity < 1 or not self.fill.startswith("#"):
            return "ink"
        red, green, blue = (int(self.fill[i : i + 2], 16) for i in (1, 3, 5))
        return "on-light" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "on-dark"


NO_DATA = Paint("var(--none)")


def sequential(fraction: float) -> str:
    """The colour at 0..1 of the sequential palette."""
    at = min(max(fraction, 0.0), 1.0) * (len(SEQUENTIAL) - 1)
    below = min(int(at), len(SEQUENTIAL) - 2)
    a, b = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in SEQUENTIAL[below : below + 2])
    return "#" + "".join(f"{round(x + (y - x) * (at - below)):02x}" for x, y in zip(a, b))


def diverging(value: float, limit: float) -> Paint:
    """Green for more and purple for less, stronger towards ``limit``; a sign says it again."""
    if not math.isfinite(value):
        return NO_DATA
    part = min(abs(value) / limit, 1.0) if limit > 0 else 0.0
    if part == 0:
        return Paint("var(--panel)")
    return Paint(MORE if value > 0 else LESS, 0.18 + 0.81 * part, "+" if value > 0 else MINUS)


class LogColours(NamedTuple):
    """Colours of positive numbers by their logarithm; zero, negative and missing ones have none."""

    low: float
    high: float

    def paint(self, value: float) -> Paint:
        if not (math.isfinite(value) and value > 0):
            return NO_DATA
        return Paint(sequential(math.log(value / self.low) / math.log(self.high / self.low)))

    def legend(self, unit: str) -> str:
        """A colour bar with numbers."""
        width, parts = 300, 60
        bars = [
            _box(24 + i * width / parts, 4, width / parts + 0.5, 12, f"fill:{sequential((i + 0.5) / parts)}")
            for i in range(parts)
        ]
        marks = []
        for tick in log_ticks(self.low, self.high):
            x = 24 + width * math.log(tick / self.low) / math.log(self.high / self.low)
            marks += [line_at(x, 16, x, 20, "zero"), words_at(x, 31, number(tick, ".2g"), "middle")]
        gray = _box(width + 144, 4, 12, 12, NO_DATA.style()) + words_at(width + 161, 14, "zero, or no tokens seen")
        return svg(width + 304, 36, f"colour scale, {unit}", *bars, *marks, words_at(width + 32, 14, unit), gray)


def log_colours(arrays: Sequence[np.ndarray], decades: float = 5.0) -> LogColours:
    """A scale over all positive numbers of the arrays, ``decades`` long at most, from the largest down."""
    every = np.concatenate([np.zeros(0), *(np.asarray(a, np.float64).ravel() for a in arrays)])
    every = every[np.isfinite(every) & (every > 0)]
    high = float(every.max()) if every.size else 1.0
    low = max(float(every.min()), high * 10**-decades) if every.size else 0.1
    return LogColours(low, high) if low < high else LogColours(high / 3, high * 3)


def log_ticks(low: float, high: float) -> list[float]:
    """Decades, or their steps of 1, 2, 5 where there are few."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [s * 10.0**p for p in powers for s in steps if low * 0.999 <= s * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 7)] if found else []


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about ``count`` of them."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low] if math.isfinite(low) else []
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= span / count * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def swatches(entries: Sequence[tuple[Paint, str]]) -> str:
    """A legend of cells and what each means."""
    parts, x = [], 0.0
    for paint, words in entries:
        parts.append(_box(x, 2, 16, 16, paint.style()))
        parts.append(element("g", words_at(x + 8, 14, paint.label, "middle", paint.label_class()), class_="cell"))
        parts.append(words_at(x + 21, 14, words))
        x += 39 + CHARACTER * len(words)
    return svg(max(x, 1.0), 20, "legend: " + ", ".join(words for _, words in entries), *parts)


def heat_map(
    values: Float[np.ndarray, "L E"],
    paint: Callable[[float], Paint],
    title: Callable[[int, int], str],
    label: str,
    notes: Sequence[str] = (),
) -> str:
    """Layers as rows, experts as columns; ``title`` is shown over a cell, ``notes`` to the right of rows."""
    layers, experts = values.shape
    left, top = 54, 18
    wide = max(3.0, min(22.0, (WIDTH - left - 90) / max(experts, 1)))
    high = max(8.0, min(16.0, wide))
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 10**9) if n * wide >= 40)
    parts = []
    for e in range(0, experts, every):
        parts.append(words_at(left + (e + 0.5) * wide, 12, f"expert {e}" if e == 0 else str(e), "middle"))
    down = 1 if high >= 11 else 2  # rows to a label
    for i in range(layers):
        y = top + i * high
        if i % down == 0:
            parts.append(words_at(left - 6, y + high / 2 + 4, f"layer {i}" if i == 0 else str(i), "end"))
            parts.extend(words_at(left + experts * wide + 8, y + high / 2 + 4, note) for note in notes[i : i + 1])
        for e in range(experts):
            look = paint(float(values[i, e]))
            gap = 1.0 if wide >= 9 else 0.0
            cell = _box(left + e * wide, y, wide - gap, high - gap, look.style())
            if look.label and wide >= 9:
                x = left + e * wide + (wide - gap) / 2
                cell += words_at(x, y + high / 2 + 3, look.label, "middle", look.label_class())
            parts.append(
                element("g", element("title", text(f"layer {i}, expert {e}: {title(i, e)}")), cell, class_="cell")
            )
    room = CHARACTER * max((len(n) for n in notes), default=0) + 12
    return svg(max(left + experts * wide + room, 160), top + layers * high + 2, label, *parts)


class Mark(NamedTuple):
    """A point of a chart. error: half the length of its bar, None for no bar; series: its class and shape."""

    value: float
    error: float | None
    series: str
    words: str
    title: str


def marker(series: str, x: float, y: float) -> str:
    """A square, a diamond or a circle, by series."""
    if series == "rtn":
        return _box(x - 4, y - 4, 8, 8, class_="mark")
    if series == "auto":
        points = f"{x:.2f},{y - 6:.2f} {x + 6:.2f},{y:.2f} {x:.2f},{y + 6:.2f} {x - 6:.2f},{y:.2f}"
        return element("polygon", points=points, class_="mark")
    return element("circle", cx=float(x), cy=float(y), r=4.5, class_="mark")


class _Axis(NamedTuple):
    """Numbers low..high on pixels left..right."""

    low: float
    high: float
    left: float
    right: float

    def at(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)

    def draw(self, top: float, bottom: float, caption: str) -> str:
        parts = []
        for tick in ticks(self.low, self.high):
            x = self.at(tick)
            parts.append(line_at(x, top, x, bottom))
            parts.append(words_at(x, bottom + 14, number(round(tick, 12) + 0.0, ".4g"), "middle"))
        parts.append(words_at((self.left + self.right) / 2, bottom + 30, caption, "middle"))
        return "".join(parts)


def _axis(values: Sequence[float], left: float, right: float) -> _Axis:
    """An axis with room for all of the finite values."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    pad = 0.05 * (high - low) if high > low else max(abs(high), 1e-3) * 0.5
    return _Axis(low - pad, high + pad, left, right)


def _left_margin(labels: Sequence[str]) -> float:
    return 16 + 7.2 * max((len(clipped(label)) for label in labels), default=0)


def _row_label(x: float, y: float, label: str) -> str:
    return element("g", element("title", text(label)), words_at(x, y + 4, clipped(label), "end", "label"))


def lollipop_chart(rows: Sequence[tuple[str, Sequence[Mark]]], caption: str, width: float = PLOT) -> str:
    """Marks at their distance from zero, with error bars, in one lane each; ``caption`` names the axis."""
    left, lane, top = _left_margin([name for name, _ in rows]), 17, 6
    every = [m for _, marks in rows for m in marks]
    ends = [m.value + side * (m.error or 0.0) for m in every for side in (-1, 1) if math.isfinite(m.error or 0.0)]
    room = 14 + CHARACTER * max((len(m.words) for m in every), default=0)
    axis = _axis([0.0, *(m.value for m in every), *ends], left, width - room)
    parts, y = [], float(top)
    for name, marks in rows:
        middle = y + 6 + lane * len(marks) / 2
        parts.append(_row_label(left - 8, middle, name))
        for i, mark in enumerate(marks):
            parts.append(_lollipop(mark, axis, y + 6 + lane * (i + 0.5)))
        y += 12 + lane * len(marks)
        parts.append(line_at(0, y, width, y))
    zero = line_at(axis.at(0), top, axis.at(0), y, "zero", 1.5)
    return svg(width, y + 36, caption, axis.draw(top, y, caption), zero, *parts, class_="fluid")


def _lollipop(mark: Mark, axis: _Axis, y: float) -> str:
    if not math.isfinite(mark.value):
        return words_at(axis.at(0) + 8, y + 4, f"{mark.words}, not drawn")
    x, end, parts = axis.at(mark.value), axis.at(mark.value), []
    parts.append(line_at(axis.at(0), y, x, y, "mark", 1.5))
    if mark.error is not None and math.isfinite(mark.error):
        start, end = axis.at(mark.value - mark.error), axis.at(mark.value + mark.error)
        parts.append(line_at(start, y, end, y, "mark", 3.0))
        parts += [line_at(at, y - 5, at, y + 5, "mark", 1.5) for at in (start, end)]
    parts += [marker(mark.series, x, y), words_at(max(x + 4, end, axis.at(0)) + 6, y + 4, mark.words, class_="ink")]
    return element("g", element("title", text(mark.title)), *parts, class_=mark.series)


def strip_chart(
    rows: Sequence[tuple[str, Sequence[Mark]]], shown: Sequence[float], caption: str, width: float = PLOT
) -> str:
    """All marks of a row on one lane; what is not finite is left out. ``shown``: numbers the axis shows in any case."""
    left, lane = _left_margin([name for name, _ in rows]), 22
    axis = _axis([*shown, *(m.value for _, marks in rows for m in marks)], left, width - 20)
    parts = []
    for i, (name, marks) in enumerate(rows):
        y = 6 + lane * (i + 0.5)
        finite = [m for m in marks if math.isfinite(m.value)]
        parts += [_row_label(left - 8, y, name), line_at(left, y, width - 20, y)]
        if not finite:
            parts.append(words_at(left + 6, y + 4, MISSING))
        for m in finite:
            title = element("title", text(f"{name}, {m.title}"))
            parts.append(element("g", title, marker(m.series, axis.at(m.value), y), class_=m.series))
    bottom = 6 + lane * len(rows)
    return svg(width, bottom + 36, caption, axis.draw(6, bottom, caption), *parts, class_="fluid")


def key(series: str, words: str) -> str:
    """A legend's entry: the mark of a series and what it means."""
    drawing = svg(16, 14, words, element("g", marker(series, 8, 7), class_=series))
    return element("span", drawing, text(words), class_="key")


def range_chart(rows: Sequence[tuple[str, Sequence[float]]], start: float, caption: str, width: float = PLOT) -> str:
    """Five quantiles a row: a line between the outer, a box between the inner ones, a dot in the middle.

    ``start``: a number that the axis shows in any case.
    """
    left, lane = _left_margin([name for name, _ in rows]), 26
    axis = _axis([start, *(v for _, quantiles in rows for v in quantiles)], left, width - 60)
    parts = []
    for i, (name, quantiles) in enumerate(rows):
        y = 6 + lane * (i + 0.5)
        parts.append(_row_label(left - 8, y, name))
        if not all(map(math.isfinite, quantiles)):
            parts.append(words_at(left + 6, y + 4, MISSING))
            continue
        a, b, c, d, e = map(axis.at, quantiles)
        words = [line_at(a, y, e, y, "zero", 1.5), _box(b, y - 6, d - b, 12, "fill:var(--rtn)")]
        words += [
            element("circle", cx=c, cy=y, r=4.5, class_="mark"),
            words_at(e + 8, y + 4, number(quantiles[2], ".3g")),
        ]
        title = "median {2:.3g}, quartiles {1:.3g} and {3:.3g}, 5% and 95% {0:.3g} and {4:.3g}".format(*quantiles)
        parts.append(element("g", element("title", text(f"{name}: {title}")), *words))
    bottom = 6 + lane * len(rows)
    return svg(width, bottom + 36, caption, axis.draw(6, bottom, caption), *parts, class_="fluid")


def bar_chart(rows: Sequence[tuple[str, float, str, str]], label: str, width: float = PLOT) -> str:
    """Bars (label, length, words at its end, CSS colour) from zero; the words give the numbers."""
    left, lane = _left_margin([name for name, *_ in rows]), 22
    room = 14 + CHARACTER * max((len(words) for _, _, words, _ in rows), default=0)
    most = max([v for _, v, _, _ in rows if math.isfinite(v)], default=0.0) or 1.0
    parts = []
    for i, (name, value, words, colour) in enumerate(rows):
        y, length = lane * i, max(value, 0.0) / most * (width - left - room) if math.isfinite(value) else 0.0
        parts.append(_row_label(left - 8, y + 10, name))
        parts += [
            _box(left, y + 2, length, 16, f"fill:{colour}"),
            words_at(left + length + 6, y + 14, words, class_="ink"),
        ]
    return svg(width, lane * len(rows) + 2, label, *parts, class_="fluid")


class Stretch(NamedTuple):
    """A piece of a timeline. end: where it ends; upper: what its dot shows; lower: a point of the line below it."""

    end: float
    upper: float
    lower: float
    series: str
    title: str
    shaded: bool


def timeline_chart(stretches: Sequence[Stretch], upper: str, lower: str, most: float, unit: str, caption: str) -> str:
    """Dots from 0 to ``most`` with a rule at 1, what lies above drawn at the edge, over a line with a rule at 0.

    upper, lower: titles of the two.
    """
    width, left, tall, top = 900, 64.0, 48, 18
    last, reach = stretches[-1].end, max([abs(s.lower) for s in stretches if math.isfinite(s.lower)], default=0.0)
    below, bottom = top + tall + 32, top + 2 * tall + 32

    def x(value: float) -> float:
        return left + value / last * (width - left - 12)

    def y(value: float) -> float:
        return top + tall * (1 - min(value, most) / most)

    def under(value: float) -> float:
        return below + tall * (0.5 - 0.5 * value / (reach or 1.0))

    shade, dots, points, start = [], [], [], 0.0
    for stretch in stretches:
        middle = x((start + stretch.end) / 2)
        if stretch.shaded:
            shade.append(_box(x(start), top, x(stretch.end) - x(start), bottom - top, "fill:var(--panel)"))
        if math.isfinite(stretch.upper):
            dot = marker(stretch.series, middle, y(stretch.upper))
            dots.append(element("g", element("title", text(stretch.title)), dot, class_=stretch.series))
        if math.isfinite(stretch.lower):
            points.append(f"{middle:.1f},{under(stretch.lower):.1f}")
        start = stretch.end
    rules = [line_at(left, level, width - 12, level, "zero") for level in (y(1.0), under(0.0))]
    words = [words_at(left, top - 6, upper, class_="ink"), words_at(left, below - 6, lower, class_="ink")]
    numbers = [(y(0.0), "0"), (y(1.0), "1"), (y(most), f"{most:g} or more"), (under(0.0), "0")]
    numbers += [(under(side * reach), number(side * reach, "+.2g")) for side in (-1, 1)] if reach else []
    words += [words_at(left - 6, level + 4, shown, "end") for level, shown in numbers]
    words += [words_at(left, bottom + 14, "0"), words_at(width - 12, bottom + 14, f"{last:,.0f} {unit}", "end")]
    line = element("polyline", points=" ".join(points), class_="trace")
    return svg(width, bottom + 20, caption, *shade, *rules, line, *dots, *words, class_="fluid")
