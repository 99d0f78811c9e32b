"""The picture that the report begins with: loss over the bytes that the device holds, of known and of novel text.

Where nothing was evaluated, it is the loss that calibration predicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dynamo_jax.report import charts
from dynamo_jax.report.charts import CHARACTER, PLUS_MINUS, element, number, text
from dynamo_jax.report.content import PLAN, ReportContent
from dynamo_jax.report.findings import ORIGINALS, SIGNIFICANT, by_dataset, byte_text, kinds, original, original_words
from dynamo_jax.report.gains import Step, mean_step

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 500.0, 300.0, 58.0, 12.0, 10.0, 44.0
LINE = 13.0  # pixels between two labels
SERIES = {
    "bf16": "noise",
    "reference": "noise",
    PLAN: "baseline",
    "baseline": "baseline",
    "auto": "auto",
}  # of a variant; of others: rtn


class Point(NamedTuple):
    """A variant. held: bytes of experts on the device; lost: nats a token above the original, mean over kinds."""

    variant: str
    held: float
    lost: Step
    kinds: int


class Frame(NamedTuple):
    """Where numbers lie in a panel: bytes by their logarithm, losses by their square root with their sign."""

    held: tuple[float, float]
    lost: tuple[float, float]

    def x(self, held: float) -> float:
        low, high = map(math.log, self.held)
        return LEFT + (math.log(held) - low) / (high - low) * (WIDE - LEFT - RIGHT)

    def y(self, lost: float) -> float:
        low, high = map(_root, self.lost)
        return TOP + (high - _root(lost)) / (high - low) * (HIGH - TOP - BOTTOM)


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def points(content: ReportContent, known: bool) -> list[Point]:
    """Of each variant, over the known or the novel kinds of text that have the original's row; finite numbers only."""
    kind, rows = kinds(content), by_dataset(content.rows)
    groups = [(zero, g) for n, g in rows.items() if (kind[n] == "known") == known and (zero := original(g))]
    found = []
    for variant in dict.fromkeys(v for _, g in groups for v in g):
        there = [(zero, g[variant]) for zero, g in groups if variant in g]
        steps = [Step(row["nll"] - zero["nll"], _error(row)) for zero, row in there]
        held = [row["device_bits"] / 8 * content.expert_weights for _, row in there]
        point = Point(variant, sum(held) / len(held), mean_step(steps), len(there))
        if math.isfinite(point.held) and point.held > 0 and math.isfinite(point.lost.value):
            found.append(point)
    return found


def _error(row: dict) -> float | None:
    """Of the original none; of auto, that of its difference to the baseline, which is what the eye compares it with."""
    error = row.get("standard_error")
    return 0.0 if row["variant"] in ORIGINALS else error if error is not None and math.isfinite(error) else None


def picture(content: ReportContent) -> str:
    """Panels of known and of novel text on the same axes, or of what is predicted; nothing where neither is there."""
    panels = {name: points(content, name == "known") for name in ("known", "novel")} if content.rows else {}
    if not content.rows:
        panels = {"known": [Point(p.variant, p.held, Step(p.lost, None), 1) for p in content.predicted]}
    zero = original_words(content.rows)
    every = [p for panel in panels.values() for p in panel]
    if not every:
        return ""
    held = [p.held for p in every]
    ends = [p.lost.value + side * SIGNIFICANT * (p.lost.error or 0.0) for p in every for side in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.08 * (high - low) or 0.01
    frame = Frame((min(held) / 1.6, max(held) * 1.25), (low - room * (low < 0) - 1e-4 * room, high + room))
    drawn = [
        element("div", element("h3", text(_title(name, panel, zero))), _panel(panel, frame, name, zero))
        for name, panel in panels.items()
        if panel
    ]
    about = (
        f"nats a token above {zero if zero != 'bf16' else 'the unquantized model (bf16)'}, mean over kinds of text"
        if content.rows
        else "nats a token above the unquantized model (bf16) on the known texts, predicted: the sum of what each "
        "expert's width was measured to cost"
    )
    caption = (
        f"Loss over memory: {about}; lower is better. "
        "Across: bytes of experts that the device holds, scales, spare slots and page tables included, on a "
        "logarithmic scale. Upwards the scale is that of square roots, so that small losses can be told apart."
    )
    there = {p.variant for p in every}
    if any(variant.startswith("rtn") for variant in there):
        caption += " rtn: all experts rounded to nearest at 4, 3 or 2 bits."
    if "auto" in there:
        caption += (
            " baseline and auto hold the same bytes: auto is the baseline where the text is known, and else switches "
            f"precision to where the text needs it. Bars: {PLUS_MINUS}{SIGNIFICANT:g} standard errors, of auto those "
            "of its difference to the baseline."
        )
    return element(
        "figure", element("div", *drawn, class_="panels"), element("figcaption", text(caption)), class_="whole first"
    )


def _title(name: str, panel: Sequence[Point], zero: str) -> str:
    count = max(p.kinds for p in panel)
    of = f", mean of {count} kinds" if count > 1 else ""
    return f"{name.capitalize()} text: nats a token above {zero}{of}"


def _panel(panel: Sequence[Point], frame: Frame, name: str, zero: str) -> str:
    bottom = HIGH - BOTTOM
    parts = []
    for tick in charts.log_ticks(*frame.held):
        x = frame.x(tick)
        parts += [charts.line_at(x, TOP, x, bottom), charts.words_at(x, bottom + 15, byte_text(tick), "middle")]
    for tick in _loss_ticks(frame):
        y = frame.y(tick)
        look = "zero" if tick == 0 else "line"
        parts += [charts.line_at(LEFT, y, WIDE - RIGHT, y, look)]
        parts += [charts.words_at(LEFT - 6, y + 4, number(tick, "+.4g") if tick else "0", "end")]
    middle = (LEFT + WIDE - RIGHT) / 2
    parts.append(charts.words_at(middle, HIGH - 8, "expert bytes on the device", "middle"))
    places = _label_places(panel, frame)
    parts += [_drawn(point, frame, place) for point, place in zip(panel, places)]
    label = f"nats a token above {zero} over bytes on the device, {name} text"
    return charts.svg(WIDE, HIGH, label, *parts, class_="panel")


def _loss_ticks(frame: Frame) -> list[float]:
    """Round numbers that stand apart from each other, zero first, then the large ones."""
    low, high = frame.lost
    steps = [s * 10.0**p for p in range(-5, 4) for s in (1, 2, 5)]
    kept = [0.0]
    for size in reversed(steps):
        for tick in (size, -size):
            if low < tick < high and all(abs(frame.y(tick) - frame.y(k)) > 24 for k in kept):
                kept.append(tick)
    return kept


def _words(point: Point) -> str:
    return point.variant if point.variant in ORIGINALS else f"{point.variant} {number(point.lost.value, '+.4f')}"


def _label_places(panel: Sequence[Point], frame: Frame) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of each label: left of the baseline and auto, right of the others, none over another."""
    taken: list[tuple[float, float, float]] = []
    places = {}
    for index in sorted(range(len(panel)), key=lambda i: panel[i].lost.value, reverse=True):
        point, length = panel[index], CHARACTER * len(_words(panel[index]))
        x, y = frame.x(point.held), frame.y(point.lost.value) + 4
        y -= 12 * (point.variant in ORIGINALS)  # off the line at zero
        left = point.variant in ("baseline", "auto", PLAN) or x + 10 + length > WIDE
        left = left and x - 10 - length > LEFT
        start = x - 10 - length if left else x + 10
        while any(a < start + length and start < b and abs(y - at) < LINE for a, b, at in taken):
            y += 2
        taken.append((start, start + length, y))
        places[index] = (x - 10, y, "end") if left else (x + 10, y, "start")
    return [places[i] for i in range(len(panel))]


def _drawn(point: Point, frame: Frame, place: tuple[float, float, str]) -> str:
    series = SERIES.get(point.variant, "rtn")
    x, y = frame.x(point.held), frame.y(point.lost.value)
    parts = []
    if point.lost.error:
        ends = [frame.y(point.lost.value + side * SIGNIFICANT * point.lost.error) for side in (-1, 1)]
        parts.append(charts.line_at(x, ends[0], x, ends[1], "mark", 2.0))
    parts += [charts.marker(series, x, y), charts.words_at(*place[:2], _words(point), place[2], "ink")]
    title = f"{point.variant}: {byte_text(point.held)} of experts, {point.lost} nats a token above the original"
    return element("g", element("title", text(title)), *parts, class_=series)
