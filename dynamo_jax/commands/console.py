"""What commands show: results on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import rich.console
import rich.progress
import rich.table

if TYPE_CHECKING:
    from dynamo_jax.evaluation.divergence import Divergence
    from dynamo_jax.evaluation.perplexity import Row
    from dynamo_jax.progress import Progress
    from dynamo_jax.runtime.online import Event


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """One bar a stage on standard error."""
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description:28}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    bars = rich.progress.Progress(*columns, console=console)
    stages: dict[str, rich.progress.TaskID] = {}

    def progress(stage: str, done: float, of: int) -> None:
        if not stages:  # until there is work, a mistake in the input is one line
            bars.start()
        if stage not in stages:
            stages[stage] = bars.add_task(stage, total=of)
        bars.update(stages[stage], completed=done)

    try:
        yield progress
    finally:
        if stages:
            bars.stop()


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


def print_divergences(rows: list[Divergence]) -> None:
    caption = "baseline beside the unquantized model, without calibration windows; divergence: nats a token"
    table = rich.table.Table(caption=caption)
    for name in ("dataset", "tokens", "nll", "unquantized", "accuracy", "unquantized", "divergence"):
        table.add_column(name, justify="left" if name == "dataset" else "right", no_wrap=True)
    for row in rows:
        error = f" +- {row.standard_error:.4f}" if row.standard_error is not None else ""
        table.add_row(
            row.dataset,
            f"{row.tokens:,}",
            f"{row.nll:.4f}",
            f"{row.nll_unquantized:.4f}",
            f"{row.accuracy:.2%}",
            f"{row.accuracy_unquantized:.2%}",
            f"{row.divergence:.4f}{error}",
        )
    rich.console.Console(width=None if sys.stdout.isatty() else 140).print(table)


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
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        print(f"{name:23} {value}")


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
