"""The result of ``dynamo-jax demo`` as one HTML file: no scripts, nothing loaded from elsewhere.

The words are computed from the rows, good and bad news alike. A difference counts only past
``SIGNIFICANT`` standard errors of the paired per-window differences, else it is called noise. Every
part copes with what is missing: no novel data, one dataset, one expert, numbers that are not finite.

Axes: L layers, E experts, N channel blocks an expert.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from dynamo_jax import charts
from dynamo_jax.charts import MINUS, PLUS_MINUS, SPACE, TIMES, Mark, Paint, element, number, text
from dynamo_jax.kernels.layout import LEVELS, WIDTHS

SIGNIFICANT = 2.0  # standard errors
VARIANTS = {
    "bf16": "not quantized",
    "rtn4": "all experts rounded to nearest at 4 bits",
    "rtn3": "all experts rounded to nearest at 3 bits",
    "rtn2": "all experts rounded to nearest at 2 bits",
    "baseline": "one width an expert, chosen on the known datasets under the byte budget",
    "auto": "the baseline where the monitor knows the data, else the plan that was adapted to the data",
}
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

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportContent:
    """What a report shows.

    facts: of the model and the plan, in order. rows: the fields of ``evaluate.Row``. significance:
    nats a token predicted when that expert alone is at 2 bits. channel_significance: the same by
    channel block. baseline_bits: in {2, 3, 4, 8}. adapted_bits: of the datasets that were adapted to.
    verdicts: nearest known dataset, divergence in bits, novel or not. routing_divergence: by layer,
    mean over pairs of known datasets, bits.
    """

    model: str
    facts: dict[str, str]
    rows: list[Row]
    significance: dict[str, Float[np.ndarray, "L E"]]
    channel_significance: dict[str, Float[np.ndarray, "L E N"]]
    baseline_bits: Int[np.ndarray, "L E"]
    adapted_bits: dict[str, Int[np.ndarray, "L E N"]]
    verdicts: dict[str, tuple[str, float, bool]]
    threshold: float
    routing_divergence: list[float]
    command: str

    def __post_init__(self) -> None:
        shape = np.shape(self.baseline_bits)
        if len(shape) != 2:
            raise ValueError(f"baseline_bits has shape {shape}, expected (layers, experts)")
        maps = {"significance": 2, "channel_significance": 3, "adapted_bits": 3}
        for field, rank in maps.items():
            for name, array in getattr(self, field).items():
                if np.ndim(array) != rank or np.shape(array)[:2] != shape:
                    raise ValueError(
                        f"{field}[{name!r}] has shape {np.shape(array)}, expected {rank} axes that begin with the "
                        f"{shape} of baseline_bits"
                    )


class Finding(NamedTuple):
    """A sentence of the headline. mark: better | worse | noise | plain."""

    mark: str
    words: str


# What the rows say


def reading(row: Row) -> str:
    """A key of ``READINGS``: what the paired difference to the reference row shows."""
    difference, error = row.get("difference"), row.get("standard_error")
    if difference is None:
        return "none"
    if error is None or not (math.isfinite(difference) and math.isfinite(error)):
        return "unknown"
    if difference == 0 and error == 0:
        return "same"
    if abs(difference) <= SIGNIFICANT * error:
        return "noise"
    return "better" if difference < 0 else "worse"


def by_dataset(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """dataset -> variant -> row."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row["dataset"], {})[row["variant"]] = row
    return groups


def paired_auto(group: dict[str, Row]) -> Row | None:
    """The auto row, if its difference is to the baseline."""
    row = group.get("auto")
    return row if row and row.get("reference") == "baseline" and row.get("difference") is not None else None


def kinds(content: ReportContent) -> dict[str, str]:
    return {row["dataset"]: row["kind"] for row in content.rows}


def relative_cost(group: dict[str, Row], variant: str) -> float | None:
    """Share by which the perplexity is above that of bf16; None where a row is missing or not finite."""
    if variant not in group or "bf16" not in group:
        return None
    above = group[variant]["nll"] - group["bf16"]["nll"]
    return math.expm1(min(above, 700.0)) if math.isfinite(above) else None


def span(values: Sequence[float], form: str) -> str:
    """ "1.0% to 3.0%", or one number where both ends read the same."""
    low, high = number(min(values), form), number(max(values), form)
    return low if low == high else f"{low} to {high}"


def plus_minus(row: Row, form: str = "+.4f") -> str:
    """The paired difference with its standard error."""
    if row.get("difference") is None:
        return ""
    error = row.get("standard_error")
    return number(row["difference"], form) + ("" if error is None else f" {PLUS_MINUS} {number(error, form[1:])}")


def perplexity(row: Row) -> str:
    return number(row["perplexity"], ".3f" if row["perplexity"] < 1000 else ".4g")


def byte_text(value: float) -> str:
    if not math.isfinite(value):
        return number(value)
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size * 0.9995:
            return f"{number(value / size, '.3g')}{SPACE}{unit}"
    return f"{number(value, '.0f')}{SPACE}B"


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def headline(content: ReportContent) -> list[Finding]:
    """What happened, from the rows alone: the bytes, their price, and what adaptation did for each dataset."""
    groups = by_dataset(content.rows)
    found = [*_byte_findings(groups), *_cost_findings(groups, kinds(content)), *_adaptation_findings(content, groups)]
    return found or [Finding("plain", "No rows were evaluated, so there is nothing to compare.")]


def _byte_findings(groups: dict[str, dict[str, Row]]) -> list[Finding]:
    pairs = [(g["baseline"], g["bf16"]) for g in groups.values() if "baseline" in g and "bf16" in g]
    pairs = [(a, b) for a, b in pairs if math.isfinite(a["bytes_per_token"]) and b["bytes_per_token"] > 0]
    if not pairs:
        return []
    shares = [a["bytes_per_token"] / b["bytes_per_token"] for a, b in pairs]
    read = max(a["bytes_per_token"] for a, _ in pairs)
    words = (
        f"Bytes: for each token the baseline reads {span(shares, '.1%')} of the expert bytes that bf16 reads, at most "
        f"{byte_text(read)} instead of {byte_text(pairs[0][1]['bytes_per_token'])}."
    )
    return [Finding("plain", words)]


def _cost_findings(groups: dict[str, dict[str, Row]], kind: dict[str, str]) -> list[Finding]:
    costs = {name: relative_cost(group, "baseline") for name, group in groups.items()}
    known = [c for n, c in costs.items() if c is not None and kind[n] == "known"]
    novel = [c for n, c in costs.items() if c is not None and kind[n] != "known"]
    if not known and not novel:
        return [Finding("plain", "Price: unknown, for no dataset has both a bf16 and a baseline row.")]
    parts = [f"{span(c, '+.1%')} on {k} data" for k, c in (("known", known), ("novel", novel)) if c]
    words = f"Price: against bf16 the baseline changes perplexity by {' and '.join(parts)}."
    noisy = [n for n, g in groups.items() if "baseline" in g and _is_noise(g["baseline"], "bf16")]
    if noisy:
        words += f" On {listed(noisy)} that is within {SIGNIFICANT:g} standard errors, noise."
    return [Finding("plain", words), *_rounding_finding(groups)]


def _is_noise(row: Row, reference: str) -> bool:
    return row.get("reference") == reference and reading(row) == "noise"


def _rounding_finding(groups: dict[str, dict[str, Row]]) -> list[Finding]:
    """The baseline against the uniform rounding that is nearest to it in bits."""
    both = [g for g in groups.values() if "baseline" in g and any(v.startswith("rtn") for v in g)]
    if not both:
        return []
    near = min(
        (r for v, r in both[0].items() if v.startswith("rtn")),
        key=lambda r: abs(r["bits_per_weight"] - both[0]["baseline"]["bits_per_weight"]),
    )
    name = near["variant"]
    costs = [c for c in (relative_cost(g, name) for g in both) if c is not None]
    pairs = [(d, g["baseline"]["nll"], g[name]["nll"]) for d, g in groups.items() if "baseline" in g and name in g]
    beaten = [d for d, ours, theirs in pairs if not ours < theirs]
    words = (
        f"Compared with plain rounding: {name} stores {near['bits_per_weight']:.2f} bits a weight, the baseline "
        f"{both[0]['baseline']['bits_per_weight']:.2f}."
    )
    if costs:
        words += f" Against bf16 {name} changes perplexity by {span(costs, '+.1%')}."
    words += f" By nll the baseline is better than {name} on {len(pairs) - len(beaten)} of {len(pairs)} datasets"
    words += f", but not on {listed(beaten)}." if beaten else "."
    return [Finding("worse" if beaten else "plain", words)]


def _adaptation_findings(content: ReportContent, groups: dict[str, dict[str, Row]]) -> list[Finding]:
    kind, steps = kinds(content), {name: paired_auto(group) for name, group in groups.items()}
    changed = dict.fromkeys([*content.adapted_bits, *(n for n, row in steps.items() if row and row["difference"] != 0)])
    found = [_adapted_finding(name, kind.get(name, ""), groups.get(name, {})) for name in changed]
    missed = [n for n in groups if kind[n] != "known" and n not in changed]
    kept = [n for n in groups if kind[n] == "known" and n not in changed and "auto" in groups[n]]
    if missed:
        found.append(Finding("noise", f"No adaptation on {listed(missed)}, though novel: the baseline was kept."))
    if kept:
        found.append(Finding("plain", f"On known data ({listed(kept)}) the baseline was kept, so nothing changed."))
    if content.rows and not any(k != "known" for k in kind.values()):
        found.append(Finding("plain", "No novel dataset was evaluated, so this report says nothing of novel data."))
    return found


def _adapted_finding(name: str, kind: str, group: dict[str, Row]) -> Finding:
    row = paired_auto(group)
    alarm = " (a false alarm: the dataset is a known one)" if kind == "known" else ""
    if row is None:
        return Finding("noise", f"{name}{alarm}: adapted, but not compared with the baseline.")
    step = f"{plus_minus(row)} nats a token"
    if "baseline" in group:
        step += f", perplexity {perplexity(group['baseline'])} to {perplexity(row)}"
        read, before = row["bytes_per_token"], group["baseline"]["bytes_per_token"]
        step += f", {number(read / before - 1, '+.1%')} bytes" if before else ""
    mark = reading(row)
    words = {
        "better": f"Adaptation helped on {name}{alarm}: {step}.",
        "worse": f"Adaptation made {name} worse{alarm}: {step}.",
        "noise": f"Adaptation on {name}{alarm} is within {SIGNIFICANT:g} standard errors, noise: {step}.",
        "same": f"Adaptation on {name}{alarm} changed nothing.",
        "unknown": f"Adaptation on {name}{alarm}: {step}; without a finite standard error that shows nothing.",
    }[mark]
    return Finding(mark if mark in ("better", "worse") else "noise", words)


def lead(content: ReportContent) -> str:
    """One sentence."""
    groups = by_dataset(content.rows)
    marks = [reading(paired_auto(groups.get(name, {})) or {}) for name in content.adapted_bits]
    bits = [g["baseline"]["bits_per_weight"] for g in groups.values() if "baseline" in g]
    start = f"The baseline keeps the experts at {bits[0]:.2f} bits a weight." if bits else "There is no baseline row."
    if not marks:
        return f"{start} No dataset was adapted to."
    tally = [f"better on {marks.count('better')}", f"worse on {marks.count('worse')}"]
    rest = len(marks) - marks.count("better") - marks.count("worse")
    one = "1 dataset" if len(marks) == 1 else f"{len(marks)} datasets"
    return f"{start} Adapted to {one}, it got {', '.join(tally)}, and on {rest} there is no sure difference."


# What the arrays say


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's, over the pairs that are finite; nan where there are fewer than two or one side is constant."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 2:
        return math.nan
    x, y = (rankdata(v[both]) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else math.nan


def rank_correlations(
    maps: Sequence[Float[np.ndarray, "L E"]],
) -> tuple[Float[np.ndarray, "K K"], Float[np.ndarray, "K K"]]:
    """Between K maps: over all experts, and within a layer, mean over the layers where it exists."""
    whole, within = np.full((2, len(maps), len(maps)), math.nan)
    for i, a in enumerate(maps):
        for j, b in enumerate(maps):
            whole[i, j] = rank_correlation(np.ravel(a), np.ravel(b))
            layers = [r for r in (rank_correlation(x, y) for x, y in zip(a, b)) if math.isfinite(r)]
            within[i, j] = np.mean(layers) if layers else math.nan
    return whole, within


def moved_pages(baseline: Int[np.ndarray, "L E"], adapted: Int[np.ndarray, "L E N"]) -> dict[int, tuple[int, int]]:
    """For each level, the refinement pages that the adapted plan has and the baseline has not, and the other way."""
    before = np.broadcast_to(np.asarray(baseline)[:, :, None], np.shape(adapted))
    after = np.asarray(adapted)
    return {
        level: (int(((after >= level) & (before < level)).sum()), int(((after < level) & (before >= level)).sum()))
        for level in LEVELS
    }


def block_concentration(significance: Float[np.ndarray, "L E N"]) -> list[float]:
    """Largest channel block over the mean block, 1 to N: quantiles 5, 25, 50, 75, 95% over experts."""
    values = np.asarray(significance, np.float64)
    values = values.reshape(-1, values.shape[-1])
    values = values[np.isfinite(values).all(axis=1) & (values.sum(axis=1) > 0)] if values.shape[-1] else values[:0]
    if not len(values):
        return [math.nan] * 5
    return [float(q) for q in np.quantile(values.max(axis=1) / values.mean(axis=1), [0.05, 0.25, 0.5, 0.75, 0.95])]


# The sections


def figure(caption: str, *content: str, whole: bool = True) -> str:
    """Content with the words on how to read it; ``whole``: not to be broken over printed pages."""
    plots = element("div", *content, class_="plot")
    return element("figure", plots, element("figcaption", text(caption)), class_="whole" if whole else None)


def cells(tag: str, values: Sequence[str], words: Sequence[int], **attributes: object) -> str:
    """A line of a table; the columns in ``words`` are aligned left. Values are words, not markup."""
    line = [element(tag, text(v), class_="word" if i in words else None) for i, v in enumerate(values)]
    return element("tr", *line, **attributes)


def table(head: Sequence[str], body: Sequence[Sequence[str]], words: int = 1, class_: str | None = None) -> str:
    lines = [cells("td", line, range(words)) for line in body]
    head_line = element("thead", cells("th", head, range(words)))
    return element("table", head_line, element("tbody", *lines), class_=class_)


def nothing(words: str) -> str:
    return element("p", text(words), class_="soft")


WORD_COLUMNS = (0, 8, 9)  # of the table of results


def results_section(content: ReportContent) -> str:
    if not content.rows:
        return nothing("No rows were evaluated.")
    difference = f"difference {PLUS_MINUS} standard error"
    head = [
        "variant",
        "bits a weight",
        "bytes a token",
        "of bf16",
        "tokens",
        "nll",
        "perplexity",
        difference,
        "from",
        "reading",
    ]
    groups = by_dataset(content.rows)
    bodies = []
    for dataset, group in groups.items():
        rows = [r for r in content.rows if r["dataset"] == dataset]
        title = element("th", text(f"{dataset} ({rows[0]['kind']})"), colspan=len(head), scope="rowgroup")
        lines = [_row_line(row, group.get("bf16")) for row in rows]
        bodies.append(element("tbody", element("tr", title, class_="group"), *lines))
    used = [v for v in VARIANTS if any(r["variant"] == v for r in content.rows)]
    caption = (
        "nll: mean negative log-likelihood, nats a token, and perplexity is exp(nll); lower is better. Bytes: expert "
        "weights, scales included, that one token reads. Difference: nll minus that of the row under from, paired by "
        f"window. Reading: better or worse past {SIGNIFICANT:g} standard errors, else noise; about one in twenty "
        "differences that are only noise passes this mark. Variants: "
        + "; ".join(f"{v}, {VARIANTS[v]}" for v in used)
        + "."
    )
    whole = element("table", element("thead", cells("th", head, WORD_COLUMNS)), *bodies, class_="wide")
    return figure(caption, whole, whole=False)


def _row_line(row: Row, bf16: Row | None) -> str:
    share = row["bytes_per_token"] / bf16["bytes_per_token"] if bf16 and bf16["bytes_per_token"] else math.nan
    mark = reading(row)
    values = [
        row["variant"],
        number(row["bits_per_weight"], ".2f"),
        byte_text(row["bytes_per_token"]),
        number(share, ".1%"),
        f"{row['tokens']:,}",
        number(row["nll"], ".4f"),
        perplexity(row),
        plus_minus(row),
        row.get("reference") or "",
        READINGS[mark],
    ]
    return cells("td", values, WORD_COLUMNS, class_=f"{row['variant']} {mark}")


def adaptation_section(content: ReportContent) -> str:
    """nll above bf16 of the plans, and the step from the baseline to the adapted plan on an axis of its own."""
    kind = kinds(content)
    groups = {n: g for n, g in by_dataset(content.rows).items() if kind[n] != "known" or n in content.adapted_bits}
    if not groups:
        return nothing("No novel dataset was evaluated and none was adapted to.")
    above = [(name, _marks_above(group)) for name, group in groups.items() if "bf16" in group]
    steps = [(name, [_step_mark(row)]) for name, g in groups.items() if (row := paired_auto(g))]
    parts = []
    if any(marks for _, marks in above):
        chart = charts.lollipop_chart(above, "nll above bf16, nats a token")
        legend = element("p", *(_series_key(series, variant) for variant, series in DRAWN.items()))
        caption = (
            "What quantization costs: nll above the unquantized model, nats a token; zero is bf16, shorter is better. "
            f"Bars are {PLUS_MINUS}{SIGNIFICANT:g} standard errors, drawn where the row is paired with bf16."
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


def _series_key(series: str, words: str) -> str:
    drawing = charts.svg(16, 14, words, element("g", charts.marker(series, 8, 7), class_=series))
    return element("span", drawing, text(words), class_="key")


def _marks_above(group: dict[str, Row]) -> list[Mark]:
    marks = []
    for variant, series in DRAWN.items():
        if row := group.get(variant):
            value = row["nll"] - group["bf16"]["nll"]
            error = row.get("standard_error") if row.get("reference") == "bf16" else None
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
    if not any(np.size(m) for m in maps.values()):
        return nothing("No significance was measured.")
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
        return nothing("One dataset only: there is no agreement between datasets to show.")
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
    bits = np.asarray(content.baseline_bits)
    if not bits.size:
        return nothing("The plan has no experts.")
    notes = [f"mean {row.mean():.2f}" for row in bits]
    legend = charts.swatches([(BITS[w], f"{w} bits") for w in WIDTHS])
    grid = charts.heat_map(
        bits, lambda v: BITS.get(int(v), charts.NO_DATA), lambda i, e: f"{bits[i, e]} bits", "baseline bits", notes
    )
    counts = {w: int((bits == w).sum()) for w in WIDTHS}
    bars = [(f"{w} bits", float(n), f"{n} ({n / bits.size:.0%})", BITS[w].fill) for w, n in counts.items()]
    return figure(
        "The baseline's width of each expert in bits; a row is a layer, a column an expert. The number to the right is "
        "the layer's mean width, scales not counted.",
        legend,
        grid,
    ) + figure(f"Experts of each width, of {bits.size} in all layers.", charts.bar_chart(bars, "experts by width"))


def adapted_section(content: ReportContent) -> str:
    return _change_maps(content) + _concentration(content.channel_significance)


def _change_maps(content: ReportContent) -> str:
    base = np.asarray(content.baseline_bits, np.float64)
    adapted = {n: np.asarray(a) for n, a in content.adapted_bits.items() if np.size(a)}
    if not adapted:
        return nothing("No dataset was adapted to.")
    changes = {n: a.mean(axis=2) - base for n, a in adapted.items()}
    limit = max(float(np.abs(c).max()) for c in changes.values())
    ends = (
        [(charts.diverging(s * limit, limit), f"{number(s * limit, '+.2f')} bits") for s in (-1, -0.5, 0.5, 1)]
        if limit
        else []
    )
    parts = [charts.swatches([*ends[:2], (charts.diverging(0.0, 1.0), "unchanged"), *ends[2:]])]
    for name, change in changes.items():

        def title(i: int, e: int, change: np.ndarray = change, after: np.ndarray = adapted[name]) -> str:
            counts = [f"{n} of {w} bits" for w in WIDTHS if (n := int((after[i, e] == w).sum()))]
            return f"{number(float(change[i, e]), '+.2f')} bits, from {base[i, e]:.0f} to blocks: {', '.join(counts)}"

        notes = [f"{number(float(row.mean()), '+.2f')}" for row in change]
        grid = charts.heat_map(change, lambda v: charts.diverging(v, limit), title, f"change of bits on {name}", notes)
        parts += [element("h3", text(name)), grid]
    caption = (
        "Change of each expert's mean bits, adapted plan minus baseline: green with a plus has gained pages, purple "
        "with a minus has lost some. The number to the right is the layer's mean change. One colour scale serves all."
    )
    return figure(caption, *parts, whole=False) + _moved_table(base, adapted)


def _moved_table(base: np.ndarray, adapted: dict[str, np.ndarray]) -> str:
    lines = []
    for name, bits in adapted.items():
        moved = moved_pages(base, bits)
        touched = int((bits != base[:, :, None]).any(axis=2).sum())
        pages = [f"+{a} {MINUS}{d} of {int((base >= level).sum()) * bits.shape[2]}" for level, (a, d) in moved.items()]
        width = f"{base.mean():.3f} to {bits.mean():.3f}"
        lines.append([name, *pages, f"{touched} of {base.size}", width])
    head = ["dataset", *(f"pages of the {level}-bit level" for level in LEVELS), "experts touched", "mean width"]
    caption = (
        "Pages moved: a page is the refinement of one channel block to the next width. For each level, pages that the "
        "adapted plan reads and the baseline does not (+), the other way ("
        + MINUS
        + "), and how many the baseline has."
    )
    return figure(caption, table(head, lines))


def _concentration(significance: dict[str, np.ndarray]) -> str:
    blocks = max((np.shape(s)[2] for s in significance.values()), default=0)
    if blocks < 2:
        return nothing("Experts are not divided into channel blocks, so there is no spread over channels to show.")
    rows = [(name, block_concentration(s)) for name, s in significance.items()]
    caption = (
        f"Do an expert's channel blocks differ? Significance of the largest of its {blocks} blocks over their mean: 1 "
        f"is all alike, {blocks} is all in one block; the further right, the more widths by block can gain. Dot and "
        "number: median over experts; box: quartiles; line: 5% to 95%."
    )
    return figure(caption, charts.range_chart(rows, 1.0, f"largest block {TIMES} the mean block"))


def monitor_section(content: ReportContent) -> str:
    kind, parts = kinds(content), []
    if content.verdicts:
        lines = []
        for name, (nearest, divergence, novel) in content.verdicts.items():
            share = divergence / content.threshold if content.threshold else math.nan
            right = {("known", True): "false alarm", ("novel", False): "missed"}.get(
                (kind.get(name, ""), novel), "right"
            )
            line = [name, kind.get(name, "not stated"), nearest, "novel" if novel else "known", right]
            lines.append([*line, number(divergence, ".4f"), number(share, ".2f")])
        head = [
            "dataset",
            "it is",
            "nearest known",
            "verdict",
            "verdict is",
            "divergence, bits",
            "divergence / threshold",
        ]
        caption = (
            "What the monitor said after the first windows of each dataset: Jensen-Shannon divergence of its routing "
            "from that of the nearest known dataset, bits, mean over layers. Past the threshold of "
            f"{number(content.threshold)} bits (1 in the last column) the data counts as novel and is adapted to."
        )
        parts.append(figure(caption, table(head, lines, words=5)))
    else:
        parts.append(nothing("The monitor was not asked."))
    if content.routing_divergence:
        bars = [(f"layer {i}", float(v), number(v), "var(--rtn)") for i, v in enumerate(content.routing_divergence)]
        caption = (
            "Where known datasets are told apart: Jensen-Shannon divergence between their routing by layer, bits, mean "
            "over pairs. 0 is the same routing, 1 is no expert in common."
        )
        parts.append(figure(caption, charts.bar_chart(bars, "routing divergence by layer")))
    return "".join(parts)


def facts_section(content: ReportContent) -> str:
    facts = [[name, str(value)] for name, value in content.facts.items()]
    command = element("pre", element("code", text(content.command)))
    return (table(["fact", "value"], facts, 2, "facts") if facts else "") + element("p", "Made by:") + command


SECTIONS = (
    ("results", "Results", results_section),
    ("adaptation", "Before and after adaptation", adaptation_section),
    ("significance", "Which experts matter", significance_section),
    ("bits", "Bits chosen for the baseline", bits_section),
    ("adapted", "Bits moved by adaptation", adapted_section),
    ("monitor", "What the monitor saw", monitor_section),
    ("facts", "Facts", facts_section),
)


def render(content: ReportContent) -> str:
    """The whole page."""
    title = f"{content.model}: dynamic mixed precision"
    findings = [element("li", text(f.words), class_=f.mark) for f in headline(content)]
    links = [element("a", text(name), href=f"#{key}") for key, name, _ in SECTIONS]
    body = [
        element("h1", text(title)),
        element("p", text(lead(content)), class_="lead"),
        element("ul", *findings, class_="findings"),
        element("nav", *links),
        *(element("section", element("h2", text(name)), make(content), id=key) for key, name, make in SECTIONS),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{charts.STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{element("main", *body)}</body></html>\n'


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page; an interrupted write leaves neither a part of it nor the old page changed."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(render(content), encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
