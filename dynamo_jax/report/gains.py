"""What switching gained on novel text, in words and numbers, from the rows alone.

The baseline loses something against the unquantized model on a kind of text, or nothing that is sure; the run time then
changes that loss. Shares are stated only of a loss that is sure, which is one past ``SIGNIFICANT`` standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dynamo_jax.report.charts import PLUS_MINUS, number
from dynamo_jax.report.content import PLAN, ReportContent
from dynamo_jax.report.findings import (
    ORIGINALS,
    SIGNIFICANT,
    by_dataset,
    byte_text,
    kinds,
    listed,
    original,
    original_words,
    paired_auto,
)


class Step(NamedTuple):
    """Nats a token with a standard error; None where it is not known."""

    value: float
    error: float | None

    @property
    def sure(self) -> bool:
        return self.error is not None and math.isfinite(self.error) and abs(self.value) > SIGNIFICANT * self.error

    def __str__(self) -> str:
        known = self.error is not None and math.isfinite(self.error)
        return number(self.value, "+.4f") + (f" {PLUS_MINUS} {number(self.error, '.4f')}" if known else "")


class Gain(NamedTuple):
    """Of a kind of text. lost: nll of the baseline minus the original's; change: of auto minus that of the baseline."""

    name: str
    lost: Step
    change: Step

    @property
    def share(self) -> float:
        """Of the loss, that switching removed; below 0 where it added to it."""
        return -self.change.value / self.lost.value

    @property
    def loses(self) -> bool:
        return self.lost.sure and self.lost.value > 0


def gains(content: ReportContent) -> list[Gain]:
    """Of each novel kind that has rows of the original, the baseline and auto, with finite losses."""
    kind, found = kinds(content), []
    for name, group in by_dataset(content.rows).items():
        auto, zero, baseline = paired_auto(group), original(group), group.get("baseline")
        if kind[name] == "known" or auto is None or zero is None or baseline is None:
            continue
        paired = baseline.get("reference") in ORIGINALS
        lost = Step(baseline["nll"] - zero["nll"], baseline["standard_error"] if paired else None)
        gain = Gain(name, lost, Step(auto["difference"], auto["standard_error"]))
        if math.isfinite(gain.lost.value) and math.isfinite(gain.change.value):
            found.append(gain)
    return found


def mean_step(steps: Sequence[Step]) -> Step:
    """Mean over kinds of text, whose errors are independent."""
    errors = [s.error for s in steps if s.error is not None]
    error = math.sqrt(sum(e * e for e in errors)) / len(steps) if len(errors) == len(steps) else None
    return Step(sum(s.value for s in steps) / len(steps), error)


def switching_words(content: ReportContent) -> str:
    """The share of the loss that switching removed on novel kinds, where most, where least, and where none was lost."""
    found = gains(content)
    if not found:
        return "No novel text was evaluated with and without switching, so this report does not say what it gains."
    whole = Gain("", mean_step([g.lost for g in found]), mean_step([g.change for g in found]))
    on = f"on {found[0].name}" if len(found) == 1 else f"on the mean of {len(found)} novel kinds of text"
    zero = original_words(content.rows)
    return " ".join(filter(None, [_whole_words(whole, on, zero), _extreme_words(found), _exception_words(found)]))


def lead_words(content: ReportContent) -> str:
    """The report's first sentences: what switching gained where that was tried, else what is predicted to be lost."""
    if any(row["variant"] == "auto" for row in content.rows):
        return switching_words(content)
    predicted = {point.variant: point for point in content.predicted if point.lost}
    if content.rows or not predicted:
        return ""
    plan = predicted.pop(PLAN, None)
    uniform = [f"{number(p.lost, '.4f')} with {p.variant}, {byte_text(p.held)}" for p in predicted.values()]
    if plan is None:
        return f"Predicted for the known texts, nats a token more than unquantized: {listed(uniform)} of experts."
    return (
        f"On the known texts the plan is predicted to lose {number(plan.lost, '.4f')} nats a token against the "
        f"unquantized model, its experts taking {byte_text(plan.held)} on the device; it would be {listed(uniform)}."
    )


def _whole_words(whole: Gain, on: str, zero: str) -> str:
    if not whole.loses:
        return (
            f"The baseline shows no sure loss against {zero} {on} ({whole.lost} nats a token), so there is none for "
            f"switching to remove; it changed that by {whole.change}."
        )
    numbers = f"{whole.change} of {whole.lost} nats a token"
    if not whole.change.sure:
        return f"Switching made no sure difference to what the baseline loses against {zero} {on}: {numbers}."
    did = "added" if whole.change.value > 0 else "removed"
    share = number(abs(whole.share), ".0%") + (" to" if whole.change.value > 0 else " of")
    return f"Switching {did} {share} what the baseline loses against {zero} {on}: {numbers}."


def _extreme_words(found: Sequence[Gain]) -> str:
    """The best and the worst of the kinds where the baseline loses something."""
    losing = sorted((g for g in found if g.loses), key=lambda g: -g.share)
    if not losing or losing[0].share <= 0 or len(found) < 2:
        return ""
    start = "It removed" if len(losing) == len(found) else "Where there is a loss, switching removed"
    if len(losing) == 1:
        return f"{start} on {_share_words(losing[0])}."
    return f"{start} most on {_share_words(losing[0])}, least on {_share_words(losing[-1])}."


def _share_words(gain: Gain) -> str:
    remark = "" if gain.change.sure else ", which may be noise"
    remark = ", more than was lost" if gain.share > 1 else remark
    return f"{gain.name} ({number(gain.share, '.0%')}{remark}: {gain.change} of {gain.lost})"


def _exception_words(found: Sequence[Gain]) -> str:
    """Kinds where nothing was lost, and kinds that switching made worse."""
    free = [f"{g.name} ({g.lost})" for g in found if not g.loses]
    worse = [f"{g.name} ({g.change})" for g in found if g.change.sure and g.change.value > 0]
    parts = []
    if free and len(found) > 1:
        parts.append(f"On {listed(free)} the baseline shows no sure loss.")
    if worse:
        parts.append(f"Switching made {listed(worse)} worse.")
    return " ".join(parts)
