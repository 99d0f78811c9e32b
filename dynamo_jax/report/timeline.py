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
        verdict = content.verdicts.get(name)
        words = _words(line, verdict[2] if verdict else None)
        parts += [element("h3", text(name)), element("p", text(words), class_="soft"), _chart(name, line)]
    caption = (
        "Each text from its first token on, in stretches of what the monitor looks at. Score (dots): how far the "
        "routing lies beyond the nearest known dataset's own windows, over what chance allows; above 1 twice in a row "
        f"it counts as novel; scores past {MOST_SCORE:g} are drawn at the edge. Loss (line): nll of the variant in use "
        f"{MINUS} nll of the baseline, nats a token; below its rule is better. Shaded: at an adapted plan, which the "
        "first windows decide, by verdict or by a sure gain, not later stretches. The loss of one stretch is noisy; "
        "the table of results has the means."
    )
    lead = (
        "Two questions: what does the monitor say at the end of the first windows (one verdict, which decides what is "
        "shaded), and what does it say of each stretch (a dot for each)? A text changes, so the two may differ."
    )
    return element("p", text(lead)) + figure(caption, *parts, whole=False)


def _words(line: Line, novel: bool | None) -> str:
    """The verdict at the end of the first windows beside what single stretches look like."""
    count = sum(nearest == "novel" for nearest in line.nearest)
    alone = f"{count} of {len(line.nearest)} stretches are taken for novel"
    if novel is None:
        return f"{alone}."
    what = "novel, so that auto adapts if it gains" if novel else "known, so that auto adapts only if the gain is sure"
    ran = " It ran adapted after them." if any(line.adapted) else " It ran at the baseline."
    return f"At the end of the first windows: {what}.{ran} {alone}."


def _chart(name: str, line: Line) -> str:
    stretches = []
    for end, score, nearest, gained, adapted in zip(*line):
        series = "auto" if nearest == "novel" else "baseline"
        values = f"score {number(float(score), '.2f')}, loss {number(float(gained), '+.4f')}"
        title = f"to token {end:,.0f}: {nearest}, {values}"
        stretches.append(Stretch(float(end), float(score), float(gained), series, title, bool(adapted)))
    words = ("score of each stretch: above 1 it looks novel", "auto minus baseline, nats a token: below 0 is better")
    return charts.timeline_chart(
        stretches, *words, most=MOST_SCORE, unit="tokens", caption=f"score and loss over the tokens of {name}"
    )
