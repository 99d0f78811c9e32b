"""What every section of the report is made of: figures with captions, tables, words on what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_jax.report.charts import element, text

HINT = element("p", text("Scroll sideways where it goes on to the right."), class_="hint")


def figure(caption: str, *content: str, whole: bool = True) -> str:
    """Content with the words on how to read it; ``whole``: not to be broken over printed pages."""
    plots = HINT + element("div", *content, class_="plot")
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
