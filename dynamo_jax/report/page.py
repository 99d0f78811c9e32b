"""The report as one HTML file: no scripts, nothing loaded from elsewhere.

The words are computed from the rows, good and bad news alike.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dynamo_jax.files import write_text
from dynamo_jax.report.charts import element, text
from dynamo_jax.report.content import ReportContent
from dynamo_jax.report.dynamics import dynamics_section
from dynamo_jax.report.findings import headline
from dynamo_jax.report.gains import lead_words
from dynamo_jax.report.measures import divergence_section, tasks_section
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

SECTIONS = (  # id, title, function, and the field of the content without which there is no section
    ("adaptation", "What quantization costs and adaptation wins back, kind by kind", adaptation_section, "rows"),
    ("results", "All results", results_section, "rows"),
    ("divergence", "How far predictions are from the reference's", divergence_section, "rows"),
    ("tasks", "Tasks", tasks_section, "tasks"),
    ("significance", "Which experts matter", significance_section, "significance"),
    ("channels", "Do an expert's channel blocks differ?", channels_section, "block_significance"),
    ("dynamics", "How significance moves between datasets", dynamics_section, "dynamics"),
    ("bits", "Bits chosen for the baseline", bits_section, "baseline_bits"),
    ("adapted", "Bits moved by adaptation", adapted_section, "verdicts"),
    ("monitor", "What the monitor saw", monitor_section, "verdicts"),
    ("timeline", "Over the text", timeline_section, "timelines"),
    ("facts", "How this was made", facts_section, "command"),
    ("next", "What next", next_section, "next_steps"),
)


def render(content: ReportContent) -> str:
    """The whole page."""
    title = f"{content.model}: dynamic mixed precision"
    findings = [element("li", text(f.words), class_=f.mark) for f in headline(content)]
    made = [(key, name, make(content)) for key, name, make, field in SECTIONS if _is_there(getattr(content, field))]
    there = [(key, name, section) for key, name, section in made if section]
    links = [element("a", text(name), href=f"#{key}") for key, name, _ in there]
    lead = lead_words(content)
    body = [
        element("h1", text(title)),
        element("p", text(lead), class_="lead") if lead else "",
        picture(content),
        element("ul", *findings, class_="findings"),
        element("nav", *links),
        *(element("section", element("h2", text(name)), section, id=key) for key, name, section in there),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{element("main", *body)}</body></html>\n'


def _is_there(value: object) -> bool:
    return bool(np.size(value)) if isinstance(value, np.ndarray) else bool(value)


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page; an interrupted write leaves neither a part of it nor the old page changed."""
    write_text(Path(path), render(content), errors="replace")
