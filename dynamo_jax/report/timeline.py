"""The report's section on time: what the monitor saw, and what the variant in use gained, token by token."""

from __future__ import annotations

from dynamo_jax.report import charts
from dynamo_jax.report.charts import MINUS, Stretch, element, number, text
from dynamo_jax.report.content import Line, ReportContent
from dynamo_jax.report.pieces import figure, nothing

MOST_SCORE = 2.0  # above, a score is drawn at the edge


def timeline_section(content: ReportContent) -> str:
    """A chart for each text: the monitor's score over the loss of auto minus that of the baseline."""
    lines = {name: line for name, line in content.timelines.items() if len(line.tokens)}
    if not lines:
        return nothing("No text was followed over its tokens.")
    parts = [element("p", charts.key("baseline", "taken for known"), charts.key("auto", "taken for novel"))]
    for name, line in lines.items():
        parts += [element("h3", text(name)), _chart(name, line)]
    caption = (
        "Each text from its first token on, in stretches of what the monitor looks at. Score (dots): how far the "
        "routing lies beyond the nearest known dataset's own windows, over what chance allows; above 1 twice in a row "
        f"it counts as novel; scores past {MOST_SCORE:g} are drawn at the edge. Loss (line): nll of the variant in use "
        f"{MINUS} nll of the baseline, nats a token; below its rule is better. Shaded: at an adapted plan, which the "
        "first windows decide, by verdict or by a sure gain, not later stretches. The loss of one stretch is noisy; "
        "the table of results has the means."
    )
    return figure(caption, *parts, whole=False)


def _chart(name: str, line: Line) -> str:
    stretches = []
    for end, score, nearest, gained, adapted in zip(*line):
        series = "auto" if nearest == "novel" else "baseline"
        values = f"score {number(float(score), '.2f')}, loss {number(float(gained), '+.4f')}"
        title = f"to token {end:,.0f}: {nearest}, {values}"
        stretches.append(Stretch(float(end), float(score), float(gained), series, title, bool(adapted)))
    words = ("score, rule at 1", "loss, rule at 0")
    return charts.timeline_chart(
        stretches, *words, most=MOST_SCORE, unit="tokens", caption=f"score and loss over the tokens of {name}"
    )
