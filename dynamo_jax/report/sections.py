"""The sections of a report: each a function from its content to HTML.

The words are computed from the rows, good and bad news alike. A difference counts only past
``SIGNIFICANT`` standard errors of the paired per-window differences, else it is called noise. Every
part copes with what is missing: no novel data, one dataset, one expert, numbers that are not finite.

Axes: L layers, E experts, N channel blocks an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.kernels.layout import LEVELS, WIDTHS
from dynamo_jax.report import charts
from dynamo_jax.report.charts import MINUS, PLUS_MINUS, TIMES, Mark, Paint, element, number, text
from dynamo_jax.report.content import ReportContent, Row
from dynamo_jax.report.findings import (
    ORIGINALS,
    SIGNIFICANT,
    block_concentration,
    by_dataset,
    byte_text,
    kinds,
    moved_pages,
    original,
    original_words,
    paired_auto,
    perplexity,
    plus_minus,
    rank_correlations,
    reading,
)
from dynamo_jax.report.pieces import cells, figure, nothing, table

VARIANTS = {
    "bf16": "not quantized",
    "reference": "the model that others are measured against",
    "rtn4": "all experts rounded to nearest at 4 bits",
    "rtn3": "all experts rounded to nearest at 3 bits",
    "rtn2": "all experts rounded to nearest at 2 bits",
    "baseline": "{widths}, chosen on the known datasets under the byte budget",
    "auto": "the baseline where the monitor knows the data, else the plan that was adapted to the data",
}
WIDTHS_OF = {False: "one width an expert", True: "two widths an expert, one of gate with up and one of down"}  # apart
READINGS = {
    "better": "\N{BLACK DOWN-POINTING TRIANGLE} better",
    "worse": "\N{BLACK UP-POINTING TRIANGLE} worse",
    "noise": "\N{ALMOST EQUAL TO} noise",
    "same": "= same",
    "unknown": "? no error known",
    "none": "",
}
DRAWN = {"rtn3": "rtn", "baseline": "baseline", "auto": "auto"}  # variant -> series of a chart
BITS = {
    2: Paint("#46327e", 1.0, "2"),
    3: Paint("#277f8e", 1.0, "3"),
    4: Paint("#4ac16d", 1.0, "4"),
    8: Paint("#fde725", 1.0, "8"),
}


def results_section(content: ReportContent) -> str:
    batch = max(row.get("batch", 1) for row in content.rows)
    zero = original_words(content.rows)
    head = ["variant", "device bits", "bytes a token", f"of {zero}"]
    head += [f"bytes a step of {batch}"] if batch > 1 else []
    head += ["tokens", "nll", "perplexity", f"difference {PLUS_MINUS} standard error", "from", "reading"]
    words = (0, len(head) - 2, len(head) - 1)
    bodies = []
    for name, group in by_dataset(content.rows).items():
        kind = next(iter(group.values()))["kind"]
        title = element("th", text(f"{name} ({kind})"), colspan=len(head), scope="rowgroup")
        lines = [
            cells("td", _row_line(row, original(group), batch), words, class_=_look(row)) for row in group.values()
        ]
        bodies.append(element("tbody", element("tr", title, class_="group"), *lines))
    used = [v for v in VARIANTS if any(row["variant"] == v for row in content.rows)]
    about = {v: VARIANTS[v].format(widths=WIDTHS_OF[content.apart]) for v in used}
    caption = (
        "nll: mean negative log-likelihood, nats a token, and perplexity is exp(nll); lower is better. Device bits: "
        "what the device holds for a weight of the experts, scales included, and spare slots and page tables of a "
        f"model that switches. Bytes a token: of experts, that one request alone reads; of {zero}: as a share of "
        "what that reads. "
        + (f"Bytes a step: that a step of {batch} requests reads. " if batch > 1 else "")
        + "Difference: nll minus that of the row under from, paired by window. Reading: better or worse past "
        f"{SIGNIFICANT:g} standard errors, else noise; about one in twenty differences that are only noise passes this "
        "mark. Variants: " + "; ".join(f"{variant}, {what}" for variant, what in about.items()) + "."
    )
    whole = element("table", element("thead", cells("th", head, words)), *bodies, class_="wide")
    return figure(caption, whole, whole=False)


def _look(row: Row) -> str:
    return f"{row['variant']} {reading(row)}"


def _row_line(row: Row, zero: Row | None, batch: int) -> list[str]:
    share = row["bytes_per_token"] / zero["bytes_per_token"] if zero and zero["bytes_per_token"] else math.nan
    return [
        row["variant"],
        number(row["device_bits"], ".2f"),
        byte_text(row["bytes_per_token"]),
        number(share, ".1%"),
        *([byte_text(row["bytes_per_step"])] if batch > 1 else []),
        f"{row['tokens']:,}",
        number(row["nll"], ".4f"),
        perplexity(row),
        plus_minus(row),
        row.get("reference") or "",
        READINGS[reading(row)],
    ]


def adaptation_section(content: ReportContent) -> str:
    """nll of the plans above the original, and the step from the baseline to the adapted plan on an axis of its own."""
    kind = kinds(content)
    groups = {n: g for n, g in by_dataset(content.rows).items() if kind[n] != "known" or n in content.adapted_bits}
    if not groups:
        return nothing("No novel dataset was evaluated and none was adapted to.")
    zero = original_words(content.rows)
    above = [(name, _marks_above(group, own)) for name, group in groups.items() if (own := original(group))]
    steps = [(name, [_step_mark(row)]) for name, g in groups.items() if (row := paired_auto(g))]
    parts = []
    if any(marks for _, marks in above):
        chart = charts.lollipop_chart(above, f"nll above {zero}, nats a token")
        drawn = {mark.series for _, marks in above for mark in marks}
        keys = [charts.key(series, variant) for variant, series in DRAWN.items() if series in drawn]
        legend = element("p", *keys)
        caption = (
            f"What quantization costs: nll above the unquantized model, nats a token; zero is {zero}, shorter is "
            f"better. Bars are {PLUS_MINUS}{SIGNIFICANT:g} standard errors, drawn where the row is paired with it."
        )
        parts.append(figure(caption, legend, chart))
    if steps:
        caption = (
            "What adaptation changed: nll of auto minus nll of the baseline, paired by window, nats a token, "
            f"{PLUS_MINUS}{SIGNIFICANT:g} standard errors. Left of zero is better; a bar that touches zero is noise. "
            "The axis is not that of the figure above."
        )
        parts.append(figure(caption, charts.lollipop_chart(steps, "nll of auto minus nll of baseline, nats a token")))
    return "".join(parts) or nothing("The rows hold no pair to compare.")


def _marks_above(group: dict[str, Row], zero: Row) -> list[Mark]:
    marks = []
    for variant, series in DRAWN.items():
        if row := group.get(variant):
            value = row["nll"] - zero["nll"]
            error = row.get("standard_error") if row.get("reference") in ORIGINALS else None
            half = None if error is None else SIGNIFICANT * error
            words = number(value, "+.4f")
            title = f"{variant}: {words} nats a token, perplexity {perplexity(row)}"
            marks.append(Mark(value, half, series, words, title))
    return marks


def _step_mark(row: Row) -> Mark:
    error, mark = row.get("standard_error"), reading(row)
    half = None if error is None else SIGNIFICANT * error
    title = f"{plus_minus(row)} nats a token: {READINGS[mark]}"
    return Mark(row["difference"], half, mark, f"{number(row['difference'], '+.4f')} {READINGS[mark]}", title)


def significance_section(content: ReportContent) -> str:
    maps = content.significance
    colours = charts.log_colours(list(maps.values()))
    parts = [colours.legend("nats a token")]
    for name, values in maps.items():

        def title(i: int, e: int, values: np.ndarray = values) -> str:
            return f"{number(float(values[i, e]), '.3g')} nats a token"

        grid = charts.heat_map(values, colours.paint, title, f"significance of experts on {name}")
        parts += [element("h3", text(name)), grid]
    caption = (
        "Significance of each expert: predicted loss, nats a token, when that expert alone is rounded to 2 bits. A row "
        "is a layer, a column an expert, brighter is more significant. The colour scale is logarithmic and serves all "
        "datasets; what lies below it takes its darkest colour."
    )
    return figure(caption, *parts, whole=False) + _agreement(maps)


def _agreement(maps: dict[str, np.ndarray]) -> str:
    if len(maps) < 2:
        return nothing("One map only: there is no agreement between datasets to show.")
    names = list(maps)
    whole, within = rank_correlations(list(maps.values()))
    tables = [
        element("div", element("h3", text(title)), _matrix(names, values))
        for title, values in (("over all experts", whole), ("within a layer (mean over layers)", within))
    ]
    caption = (
        "Do datasets agree on which experts matter? Spearman's rank correlation of the maps above: 1, the same order; "
        "0, no relation. Over all experts, differences between layers count too; within a layer they do not."
    )
    return figure(caption, element("div", *tables, class_="beside"))


def _matrix(names: Sequence[str], values: Float[np.ndarray, "K K"]) -> str:
    head = element("tr", element("th"), *(element("th", text(n)) for n in names))
    lines = []
    for name, row in zip(names, values):
        line = []
        for value in map(float, row):
            colour, known = ("0,114,178" if value >= 0 else "213,94,0"), math.isfinite(value)
            style = f"background:rgba({colour},{0.5 * abs(value):.2f})" if known else None
            line.append(element("td", text(number(value, ".2f") if known else "-"), style=style))
        lines.append(element("tr", element("th", text(name), class_="word"), *line))
    return element("table", element("thead", head), element("tbody", *lines), class_="matrix")


def bits_section(content: ReportContent) -> str:
    pages = np.asarray(content.baseline_bits)
    if not content.apart:
        return _widths_of("each expert", pages[:, :, 0])
    return _widths_of("each expert's gate and up", pages[:, :, 0]) + _widths_of("each expert's down", pages[:, :, -1])


def _widths_of(what: str, bits: Int[np.ndarray, "L E"]) -> str:
    notes = [f"mean {row.mean():.2f}" for row in bits]
    legend = charts.swatches([(BITS[w], f"{w} bits") for w in WIDTHS])
    grid = charts.heat_map(
        bits, lambda v: BITS.get(int(v), charts.NO_DATA), lambda i, e: f"{bits[i, e]} bits", f"bits of {what}", notes
    )
    counts = {w: int((bits == w).sum()) for w in WIDTHS}
    bars = [(f"{w} bits", float(n), f"{n} ({n / bits.size:.0%})", BITS[w].fill) for w, n in counts.items()]
    title = element("h3", text(f"Width of {what}"))
    return figure(
        f"The baseline's width of {what} in bits; a row is a layer, a column an expert. The number to the right is "
        "the layer's mean width, scales not counted.",
        title,
        legend,
        grid,
    ) + figure(
        f"{what.capitalize()}: how many of each width, of {bits.size} experts in all layers.",
        charts.bar_chart(bars, f"{what} by width"),
    )


def adapted_section(content: ReportContent) -> str:
    base = np.asarray(content.baseline_bits, np.float64)
    adapted = {n: np.asarray(a) for n, a in content.adapted_bits.items() if np.size(a)}
    if not adapted:
        return nothing("No dataset was adapted to.")
    means = base.mean(axis=2)
    changes = {n: a.mean(axis=2) - means for n, a in adapted.items()}
    limit = _round_up(max(float(np.abs(c).max()) for c in changes.values()))
    ends = [(charts.diverging(s * limit, limit), f"{number(s * limit, '+g')} bits") for s in (-1, -0.5, 0.5, 1)]
    parts = [charts.swatches([*ends[:2], (charts.diverging(0.0, 1.0), "unchanged"), *ends[2:]])]
    for name, change in changes.items():

        def title(i: int, e: int, change: np.ndarray = change, after: np.ndarray = adapted[name]) -> str:
            counts = [f"{n} of {w} bits" for w in WIDTHS if (n := int((after[i, e] == w).sum()))]
            return f"{number(float(change[i, e]), '+.2f')} bits, from {means[i, e]:.3g} to blocks: {', '.join(counts)}"

        notes = [f"{number(float(row.mean()), '+.2f')}" for row in change]
        grid = charts.heat_map(change, lambda v: charts.diverging(v, limit), title, f"change of bits on {name}", notes)
        parts += [element("h3", text(name)), grid]
    caption = (
        "Change of each expert's mean bits, adapted plan minus baseline: green with a plus has gained pages, purple "
        "with a minus has lost some. The number to the right is the layer's mean change. One colour scale serves all."
    )
    return figure(caption, *parts, whole=False) + _moved_table(base, adapted)


def _round_up(value: float) -> float:
    """The next round number of bits that ends a scale."""
    return next((end for end in (0.1, 0.2, 0.5, 1.0, 2.0, 4.0) if value <= end), 6.0)


def _moved_table(base: np.ndarray, adapted: dict[str, np.ndarray]) -> str:
    lines = []
    for name, bits in adapted.items():
        moved = moved_pages(base, bits)
        changed = (bits != base).any(axis=2)
        pages = [f"+{a} {MINUS}{d} of {int((base >= level).sum())}" for level, (a, d) in moved.items()]
        width = f"{base.mean():.3f} to {bits.mean():.3f}"
        lines.append([name, *pages, f"{int(changed.sum())} of {changed.size}", width])
    head = ["dataset", *(f"pages of the {level}-bit level" for level in LEVELS), "experts touched", "mean width"]
    caption = (
        "Pages moved: a page is the refinement of one channel block to the next width, or of one projection of it if "
        "down has a width of its own. For each level, pages that the adapted plan reads and the baseline does not (+), "
        "the other way (" + MINUS + "), and how many the baseline has."
    )
    return figure(caption, table(head, lines))


def channels_section(content: ReportContent) -> str:
    """How unevenly significance is spread over the channel blocks of an expert."""
    significance = content.block_significance
    blocks = max((np.shape(s)[2] for s in significance.values()), default=0)
    if blocks < 2:
        return nothing("Experts are not divided into channel blocks, so there is no spread over channels to show.")
    rows = [(name, block_concentration(s)) for name, s in significance.items()]
    caption = (
        "Significance of a channel block: predicted loss when that block alone is rounded to 2 bits. Here that of the "
        f"largest of an expert's {blocks} blocks over their mean: 1 is all alike, {blocks} is all in one block; the "
        "further right, the more widths by block can gain. Dot and number: median over experts; box: quartiles; line: "
        "5% to 95%."
    )
    return figure(caption, charts.range_chart(rows, 1.0, f"largest block {TIMES} the mean block"))


def monitor_section(content: ReportContent) -> str:
    kind, lines = kinds(content), []
    for name, (nearest, score, novel) in content.verdicts.items():
        right = {("known", True): "false alarm", ("novel", False): "missed"}.get((kind.get(name, ""), novel), "right")
        line = [name, kind.get(name, "not stated"), nearest, "novel" if novel else "known", right]
        lines.append([*line, number(score, ".2f")])
    head = ["dataset", "it is", "nearest known", "verdict", "verdict is", "score"]
    caption = (
        "What the monitor said at the end of the first windows of each dataset. Score: how far the routing of the "
        "last tokens lies beyond that of the nearest known dataset's own windows, over what chance allows: 0 is no "
        "farther than they are on the mean. Data is novel that was above 1 twice in a row. It is adapted to, and "
        "so is data whose gain on the first windows is sure, whatever the verdict. Single stretches, which the "
        "next section shows, can look otherwise."
    )
    return figure(caption, table(head, lines, words=5))


def facts_section(content: ReportContent) -> str:
    facts = [[name, str(value)] for name, value in content.facts.items()]
    command = element("pre", element("code", text(content.command)))
    parts = [table(["fact", "value"], facts, 2, "facts") if facts else "", element("p", "Made by:"), command]
    if content.stages:
        lines = [
            [name, number(spent.seconds, ".1f"), byte_text(spent.memory if spent.memory is not None else math.nan)]
            for name, spent in content.stages.items()
        ]
        caption = "Time of each stage, and the most memory that the process had until its end."
        parts.append(figure(caption, table(["stage", "seconds", "peak memory"], lines)))
    return "".join(parts)


def next_section(content: ReportContent) -> str:
    """Commands that go on from here."""
    steps = [
        element("p", text(f"{words}:")) + element("pre", element("code", text(command)))
        for words, command in content.next_steps.items()
    ]
    return "".join(steps)
