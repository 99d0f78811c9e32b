"""What commands show of their results, on standard output."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table

if TYPE_CHECKING:
    from dynamo_jax.evaluation.perplexity import Row
    from dynamo_jax.evaluation.tasks import TaskRow
    from dynamo_jax.runtime.online import Event

FEW, LONGEST_FACT = re.compile("fewer than .* calibration tokens"), 1000
FACTS = {"known": "windows of known texts", "positions": "longest text, tokens"}  # names that need more words


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr)


def print_rows(rows: list[Row]) -> None:
    batch = rows[0].batch if rows else 1
    step = "bytes/token" if batch == 1 else f"bytes/step of {batch}"
    table = rich.table.Table(caption="difference: nats a token, +- its standard error paired by window")
    for name in ("dataset", "kind", "variant", "device bits", step, "tokens", "nll", "perplexity", "difference"):
        table.add_column(name, justify="left" if name in ("dataset", "kind", "variant") else "right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(
            row.dataset,
            row.kind,
            row.variant,
            f"{row.device_bits:.3f}",
            f"{row.bytes_per_step:,.0f}",
            f"{row.tokens:,}",
            f"{row.nll:.4f}",
            f"{row.perplexity:.3f}",
            describe_difference(row),
            end_section=index + 1 == len(rows) or rows[index + 1].dataset != row.dataset,
        )
    rich.console.Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_divergences(rows: list[Row]) -> None:
    """How far the rows' predictions are from a reference's, if there was one."""
    table = rich.table.Table(
        caption="divergence from the reference, nats a token: mean and quantiles; agreement: same likeliest token; "
        "ratio: of perplexities; +-: by window"
    )
    left = ("dataset", "variant")
    for name in (*left, "divergence", "median", "90 %", "99 %", "99.9 %", "largest", "agreement", "ratio"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in (row for row in rows if row.divergence):
        found = row.divergence
        assert found is not None
        table.add_row(
            row.dataset,
            row.variant,
            _change(found.mean, found.standard_error, " .5f"),
            *(f"{value:.5f}" for value in (found.median, found.p90, found.p99, found.p999, found.largest)),
            _share(found.agreement, found.agreement_error),
            _change(found.ratio, found.ratio_error, " .5f"),
        )
    if table.row_count:
        rich.console.Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_tasks(rows: list[TaskRow]) -> None:
    caption = "norm: by log-likelihood a character; margin: nats a character that the right answer is ahead; +-: paired"
    table = rich.table.Table(caption=caption)
    left = ("task", "variant")
    for name in (*left, "documents", "accuracy", "difference", "norm", "difference", "margin", "difference", "cut"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(
            row.task,
            row.variant,
            f"{row.documents:,}",
            _share(row.accuracy, row.standard_error),
            _change(row.difference, row.difference_error, "+.2%"),
            _share(row.accuracy_norm, row.standard_error_norm),
            _change(row.difference_norm, row.difference_norm_error, "+.2%"),
            "" if row.margin is None else f"{row.margin:+.4f}",
            _change(row.difference_margin, row.difference_margin_error, "+.4f"),
            f"{row.cut:,}",
            end_section=index + 1 == len(rows) or rows[index + 1].task != row.task,
        )
    rich.console.Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_published(figures: list[dict[str, Any]]) -> None:
    """Figures of others beside ours."""
    table = rich.table.Table(caption="published by others, and ours beside it")
    left = ("on", "measure", "method", "source", "ours is")
    for name in ("on", "measure", "method", "bits", "published", "ours", "ours is", "source"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for figure in figures:
        ours = figure["variant"] if figure["budget"] is None else f"{figure['variant']} {figure['budget']:g}"
        form = ".2%" if figure["measure"] == "accuracy" else ".2f"
        words = (figure["on"], figure["measure"], figure["method"], f"{figure['bits']:g}", f"{figure['value']:{form}}")
        table.add_row(*words, f"{figure['ours']:{form}}", ours, figure["source"])
    if table.row_count:
        rich.console.Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_thresholds(thresholds: list[dict[str, Any]]) -> None:
    """What was asked for and what was found."""
    table = rich.table.Table()
    for name in ("threshold", "on", "variant", "asked", "found", ""):
        table.add_column(name, justify="right" if name in ("asked", "found") else "left", no_wrap=True)
    for one in thresholds:
        variant = one["variant"] if one["budget"] is None else f"{one['variant']} {one['budget']:g}"
        asked = f">= {one['least']:g}" if one["least"] is not None else f"<= {one['most']:g}"
        verdict = "passed" if one["passed"] else "failed"
        table.add_row(one["measure"], one["on"], variant, asked, f"{one['value']:.4f}", verdict)
    if table.row_count:
        rich.console.Console(width=None if sys.stdout.isatty() else 140).print(table)


def _share(value: float, error: float | None) -> str:
    return f"{value:.2%}" + (f" +- {error:.2%}" if error is not None else "")


def _change(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value:{form}}".strip() + (f" +- {error:{form[1:]}}" if error is not None else "")


def describe_difference(row: Row) -> str:
    if row.difference is None:
        return ""
    error = f" +- {row.standard_error:.4f}" if row.standard_error is not None else ""
    return f"{row.difference:+.4f}{error} to {row.reference}"


def describe_verdict(found: Any) -> str:
    """One line: what the monitor said of a text, whether it was adapted to, and which of the two was the reason."""
    novel, score = found.verdict.novel, found.verdict.score
    what = ("baseline kept" if found.gain <= 0 else "adapted") if novel else "baseline kept, for no gain is sure"
    if not novel and found.sure:
        what = "adapted all the same, for the gain is sure"
    where = f"nearest {found.verdict.nearest}, score {score:.2f}"
    gained = f"adapted, the first windows are {found.gain:+.4f} nats a token nearer to 8 bits"
    return f"{'novel' if novel else 'known'}, {what} ({where}; {gained})"


def plain_signs(words: str) -> str:
    """Words of a report for any terminal."""
    return words.replace("\N{MINUS SIGN}", "-").replace("\N{PLUS-MINUS SIGN}", "+-")


def print_facts(facts: dict[str, Any]) -> None:
    """What a folder holds, a line each: names in plain words, numbers with separators, bytes in larger units too."""
    named = {FACTS.get(name, name.replace("_", " ")): fact_words(name, value) for name, value in facts.items()}
    width = max(map(len, named), default=0)
    for name, words in named.items():
        print(f"{name:{width}}  {words}")


def fact_words(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={fact_words('', v)}" for k, v in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    words = f"{value} bytes" if name == "bytes" else str(value)
    words = re.sub(
        r"\b(\d[\d,]{6,}) bytes( \()?",
        lambda found: f"{found[1]} bytes ({size_words(found[1])}" + ("; " if found[2] else ")"),
        words,
    )
    words = words if len(words) <= LONGEST_FACT else f"{words[:LONGEST_FACT]} .."
    return f"{words}; more --windows reach more" if FEW.match(name) and not words.startswith("0 of") else words


def size_words(number: str) -> str:
    size, unit = int(number.replace(",", "")) / 2**20, "MiB"
    for larger in ("GiB", "TiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"


def describe_event(event: Event) -> str:
    """One line of what the follower did."""
    text = {
        "known": f"the text is like {event.name}: baseline",
        "novel": "the text is novel",
        "adapted": f"switched to a variant adapted to it, {event.moved} pages moved",
        "not better": f"adapted, but no better on what was seen, {event.moved} pages moved: baseline",
        "gains": f"it is like {event.name}, but the gain is sure: switched to a variant adapted to it, "
        f"{event.moved} pages moved",
        "not sure": f"it is like {event.name}; adapted to it all the same, no gain is sure, {event.moved} pages moved: "
        "baseline",
        "reads too much": "the text has changed and the variant reads more bytes than it may: it is adapted anew",
        "left": "the variant no longer suits the text: baseline",
        "failed": f"adapting failed, no switch: {event.name}",
    }[event.what]
    more = "" if event.gain is None else f", {event.gain:+.4f} nats a token nearer to 8 bits on what was seen"
    return f"text {event.text}, token {event.token}: {text} (score {event.score:.2f}{more})"
