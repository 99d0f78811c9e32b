"""The report as one HTML file: no scripts, nothing loaded from elsewhere.

The words are computed from the rows, good and bad news alike.
"""

from __future__ import annotations

from pathlib import Path

from dynamo_jax.files import write_text
from dynamo_jax.report.charts import element, text
from dynamo_jax.report.content import ReportContent
from dynamo_jax.report.dynamics import dynamics_section
from dynamo_jax.report.findings import headline
from dynamo_jax.report.gains import switching_words
from dynamo_jax.report.picture import picture
from dynamo_jax.report.sections import (
    adaptation_section,
    adapted_section,
    bits_section,
    channels_section,
    facts_section,
    monitor_section,
    next_section,
    results_section,
    significance_section,
)
from dynamo_jax.report.style import STYLE
from dynamo_jax.report.timeline import timeline_section

SECTIONS = (
    ("adaptation", "Before and after adaptation, kind by kind", adaptation_section),
    ("results", "All results", results_section),
    ("significance", "Which experts matter", significance_section),
    ("channels", "Do an expert's channel blocks differ?", channels_section),
    ("dynamics", "How significance moves between datasets", dynamics_section),
    ("bits", "Bits chosen for the baseline", bits_section),
    ("adapted", "Bits moved by adaptation", adapted_section),
    ("monitor", "What the monitor saw", monitor_section),
    ("timeline", "Over the text", timeline_section),
    ("facts", "How this was made", facts_section),
    ("next", "What next", next_section),
)


def render(content: ReportContent) -> str:
    """The whole page."""
    title = f"{content.model}: dynamic mixed precision"
    findings = [element("li", text(f.words), class_=f.mark) for f in headline(content)]
    links = [element("a", text(name), href=f"#{key}") for key, name, _ in SECTIONS]
    body = [
        element("h1", text(title)),
        element("p", text(switching_words(content)), class_="lead"),
        picture(content),
        element("ul", *findings, class_="findings"),
        element("nav", *links),
        *(element("section", element("h2", text(name)), make(content), id=key) for key, name, make in SECTIONS),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{element("main", *body)}</body></html>\n'


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page; an interrupted write leaves neither a part of it nor the old page changed."""
    write_text(Path(path), render(content), errors="replace")
