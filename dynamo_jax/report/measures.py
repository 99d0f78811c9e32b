"""The report's sections on what is measured beside loss: divergence from a reference, and zero-shot tasks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dynamo_jax.report import charts
from dynamo_jax.report.charts import PLUS_MINUS, Mark, element, number, text
from dynamo_jax.report.content import ReportContent, Row
from dynamo_jax.report.findings import SIGNIFICANT, plus_minus, reading
from dynamo_jax.report.pieces import cells, figure


def divergence_section(content: ReportContent) -> str:
    """How far predictions are from the reference's; "" where there is none."""
    rows = [row for row in content.rows if row.get("divergence")]
    if not rows:
        return ""
    head = ["variant", "divergence", "median", "90%", "99%", "99.9%", "largest", "same likeliest token", "ratio"]
    caption = (
        "How far predictions are from the reference's: Kullback-Leibler divergence, nats a token, its mean "
        f"({PLUS_MINUS} standard error by window) and quantiles over tokens. Same likeliest token: share of tokens "
        "where both would write the same. Ratio: of the perplexities. Lower divergence is better; it needs no labels, "
        "and sees a token that got worse where another got better."
    )
    return figure(caption, _grouped(rows, "dataset", head, _divergence_line), whole=False)


def _divergence_line(row: Row) -> list[str]:
    found = row["divergence"]
    quantiles = [number(found[name], ".4f") for name in ("median", "p90", "p99", "p999", "largest")]
    mean = _with_error(found["mean"], found["standard_error"], ".5f")
    agreement = _with_error(found["agreement"], found["agreement_error"], ".2%")
    return [row["variant"], mean, *quantiles, agreement, _with_error(found["ratio"], found["ratio_error"], ".4f")]


def tasks_section(content: ReportContent) -> str:
    """Accuracy of each variant on each task, what switching did to the margin, and what the run time did."""
    head = ["variant", "documents", "accuracy", "difference", "a character", "difference", "margin", "difference"]
    caption = (
        f"Zero-shot tasks ({PLUS_MINUS} standard error). Accuracy: documents whose right continuation is the "
        "likeliest; a character: the likeliest by log-likelihood a character. Margin: nats a character by which the "
        "right continuation is ahead of the best of the others, which moves where accuracy does not yet. Differences "
        "are to the row above, paired by document."
    )
    parts = [figure(caption, _grouped(content.tasks, "task", [*head, "cut"], _task_line), whole=False)]
    moved = [(row["task"], [_margin_mark(row)]) for row in content.tasks if _switched(row)]
    if moved:
        caption = (
            "What switching did: margin of auto minus that of the baseline, nats a character, paired by document, "
            f"{PLUS_MINUS}{SIGNIFICANT:g} standard errors. Right of zero is better; a bar that touches zero is noise."
        )
        parts.append(figure(caption, charts.lollipop_chart(moved, "margin of auto minus margin of baseline")))
    for name, words in content.events.items():
        lines = [element("li", text(line)) for line in words]
        parts += [element("h3", text(f"What the run time did on {name}"))]
        parts += [element("ul", *lines) if lines else element("p", "It stayed at the baseline.", class_="soft")]
    return "".join(parts)


def _switched(row: Row) -> bool:
    return row["variant"] == "auto" and row.get("reference") == "baseline" and row["difference_margin"] is not None


def _margin_mark(row: Row) -> Mark:
    value, error = row["difference_margin"], row["difference_margin_error"]
    mark = reading({"difference": -value, "standard_error": error})  # a larger margin is better
    words = plus_minus({"difference": value, "standard_error": error})
    return Mark(value, None if error is None else SIGNIFICANT * error, mark, words, f"{row['task']}: {words}")


def _task_line(row: Row) -> list[str]:
    return [
        row["variant"],
        f"{row['documents']:,}",
        _with_error(row["accuracy"], row["standard_error"], ".2%"),
        _with_error(row["difference"], row["difference_error"], "+.2%"),
        _with_error(row["accuracy_norm"], row["standard_error_norm"], ".2%"),
        _with_error(row["difference_norm"], row["difference_norm_error"], "+.2%"),
        "" if row["margin"] is None else number(row["margin"], "+.4f"),
        _with_error(row["difference_margin"], row["difference_margin_error"], "+.4f"),
        f"{row['cut']:,}",
    ]


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return ""
    return number(value, form) + ("" if error is None else f" {PLUS_MINUS} {number(error, form.removeprefix('+'))}")


def _grouped(rows: Sequence[Row], by: str, head: list[str], line: object) -> str:
    """A table with a heading for each of what rows are ``by``."""
    bodies = []
    for name, group in itertools.groupby(rows, key=lambda row: row[by]):
        title = element("th", text(name), colspan=len(head), scope="rowgroup")
        lines = [cells("td", line(row), [0], class_=row["variant"]) for row in group]  # type: ignore[operator]
        bodies.append(element("tbody", element("tr", title, class_="group"), *lines))
    return element("table", element("thead", cells("th", head, [0])), *bodies, class_="wide")
