"""What a result says, computed from its rows and arrays: words and numbers, no markup.

Good and bad news alike: a difference counts only past ``SIGNIFICANT`` standard errors of the paired
per-window differences, else it is called noise.

Axes: L layers, E experts, N channel blocks an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.analysis.dynamics import rank_correlation
from dynamo_jax.kernels.layout import LEVELS
from dynamo_jax.report.charts import PLUS_MINUS, SPACE, number
from dynamo_jax.report.content import ReportContent, Row

SIGNIFICANT = 2.0  # standard errors
ORIGINALS = {"bf16": "bf16", "reference": "the reference"}  # variants that are not quantized, and what words call them


class Finding(NamedTuple):
    """A sentence of the headline. mark: better | worse | noise | plain."""

    mark: str
    words: str


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


def original(group: dict[str, Row]) -> Row | None:
    """The row that losses are measured from: of the model that is not quantized."""
    return next((group[variant] for variant in ORIGINALS if variant in group), None)


def original_words(rows: Sequence[Row]) -> str:
    """What words call the model that losses are measured from."""
    there = {row["variant"] for row in rows}
    return next((words for variant, words in ORIGINALS.items() if variant in there), ORIGINALS["bf16"])


def paired_auto(group: dict[str, Row]) -> Row | None:
    """The auto row, if its difference is to the baseline."""
    row = group.get("auto")
    return row if row and row.get("reference") == "baseline" and row.get("difference") is not None else None


def kinds(content: ReportContent) -> dict[str, str]:
    return {row["dataset"]: row["kind"] for row in content.rows}


def relative_cost(group: dict[str, Row], variant: str) -> float | None:
    """Share by which the perplexity is above the original's; None where a row is missing or not finite."""
    zero = original(group)
    if variant not in group or zero is None:
        return None
    above = group[variant]["nll"] - zero["nll"]
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
    """What happened, from the rows alone: the bytes, their price, and what adaptation did for each text and task."""
    groups = by_dataset(content.rows)
    found = [*_byte_findings(groups), *_cost_findings(groups, kinds(content)), *_adaptation_findings(content, groups)]
    return found + _task_findings(content)


def _task_findings(content: ReportContent) -> list[Finding]:
    """What switching did on each task, by the margin, which is the finest measure."""
    found = []
    for row in content.tasks:
        if row["variant"] != "auto" or row.get("difference_margin") is None:
            continue
        step = {"difference": row["difference_margin"], "standard_error": row["difference_margin_error"]}
        mark = {"better": "worse", "worse": "better"}.get(reading(step), reading(step))  # a larger margin is better
        what = {
            "better": "Switching helped",
            "worse": "Switching did harm",
            "same": "Switching changed nothing",
            "noise": "Switching made no sure difference",
        }.get(mark, "Switching shows nothing")
        words = (
            f"{what} on the task {row['task']}: the right answer is {plus_minus(step)} nats a character further ahead, "
            f"accuracy {number(row['difference'], '+.1%')}, against {row['reference']}."
        )
        found.append(Finding(mark if mark in ("better", "worse") else "noise", words))
    return found


def _byte_findings(groups: dict[str, dict[str, Row]]) -> list[Finding]:
    both = [(g["baseline"], zero) for g in groups.values() if "baseline" in g and (zero := original(g))]
    pairs = [(a, b) for a, b in both if math.isfinite(a["bytes_per_token"]) and b["bytes_per_token"] > 0]
    if not pairs:
        return []
    shares = [a["bytes_per_token"] / b["bytes_per_token"] for a, b in pairs]
    read = max(a["bytes_per_token"] for a, _ in pairs)
    reader = original_words([b for _, b in pairs])
    words = (
        f"Bytes: for each token the baseline reads {span(shares, '.1%')} of the expert bytes that {reader} reads, at "
        f"most {byte_text(read)} instead of {byte_text(pairs[0][1]['bytes_per_token'])}."
    )
    return [Finding("plain", words)]


def _cost_findings(groups: dict[str, dict[str, Row]], kind: dict[str, str]) -> list[Finding]:
    costs = {name: relative_cost(group, "baseline") for name, group in groups.items()}
    known = [c for n, c in costs.items() if c is not None and kind[n] == "known"]
    novel = [c for n, c in costs.items() if c is not None and kind[n] != "known"]
    if not any("baseline" in group for group in groups.values()):
        return []
    if not known and not novel:
        return [Finding("plain", "Price: unknown, for no dataset has rows of the unquantized model and the baseline.")]
    zero = original_words([row for group in groups.values() for row in group.values()])
    parts = [f"{span(c, '+.1%')} on {k} data" for k, c in (("known", known), ("novel", novel)) if c]
    words = f"Price: against {zero} the baseline changes perplexity by {' and '.join(parts)}."
    noisy = [n for n, g in groups.items() if "baseline" in g and _is_noise(g["baseline"])]
    if noisy:
        words += f" On {listed(noisy)} that is within {SIGNIFICANT:g} standard errors, noise."
    return [Finding("plain", words), *_rounding_finding(groups)]


def _is_noise(row: Row) -> bool:
    return row.get("reference") in ORIGINALS and reading(row) == "noise"


def _rounding_finding(groups: dict[str, dict[str, Row]]) -> list[Finding]:
    """The baseline against the uniform rounding that is nearest to it in bits."""
    both = [g for g in groups.values() if "baseline" in g and any(v.startswith("rtn") for v in g)]
    if not both:
        return []
    near = min(
        (r for v, r in both[0].items() if v.startswith("rtn")),
        key=lambda r: abs(r["device_bits"] - both[0]["baseline"]["device_bits"]),
    )
    name = near["variant"]
    costs = [c for c in (relative_cost(g, name) for g in both) if c is not None]
    pairs = [(d, g["baseline"]["nll"], g[name]["nll"]) for d, g in groups.items() if "baseline" in g and name in g]
    beaten = [d for d, ours, theirs in pairs if not ours < theirs]
    words = (
        f"Compared with plain rounding: {name} holds {near['device_bits']:.2f} bits a weight, the baseline "
        f"{both[0]['baseline']['device_bits']:.2f}."
    )
    reads = [
        [r["bytes_per_token"] for r in (g["baseline"], g[name])]
        for g in both
        if name in g and g[name]["bytes_per_token"]
    ]
    if reads:
        words += f" Bytes read a token: {span([a / b - 1 for a, b in reads], '+z.1%')} against {name}."
    if costs:
        zero = original_words([row for g in both for row in g.values()])
        words += f" Against {zero} {name} changes perplexity by {span(costs, '+.1%')}."
    words += f" By nll the baseline is better than {name} on {len(pairs) - len(beaten)} of {len(pairs)} datasets"
    words += f", but not on {listed(beaten)}." if beaten else "."
    return [Finding("worse" if beaten else "plain", words)]


def _adaptation_findings(content: ReportContent, groups: dict[str, dict[str, Row]]) -> list[Finding]:
    kind, steps = kinds(content), {name: paired_auto(group) for name, group in groups.items()}
    changed = dict.fromkeys([*content.adapted_bits, *(n for n, row in steps.items() if row and row["difference"] != 0)])
    found = [_tally(content, groups)] if content.adapted_bits else []
    found += [_adapted_finding(name, _why_odd(content, name), groups.get(name, {})) for name in changed]
    missed = [n for n in groups if kind[n] != "known" and n not in changed and "auto" in groups[n]]
    kept = [n for n in groups if kind[n] == "known" and n not in changed and "auto" in groups[n]]
    if missed:
        found.append(Finding("noise", f"No adaptation on {listed(missed)}, though novel: the baseline was kept."))
    if kept:
        words = f"On known data ({listed(kept)}) no gain was sure and the baseline was kept, so nothing changed."
        found.append(Finding("plain", words))
    if any("auto" in g for g in groups.values()) and not any(k != "known" for k in kind.values()):
        found.append(Finding("plain", "No novel dataset was evaluated, so this report says nothing of novel data."))
    return found


def _why_odd(content: ReportContent, name: str) -> str:
    """In brackets, why a dataset was adapted to that is known or was taken for known; "" where that is no surprise."""
    nearest, _, novel = content.verdicts.get(name, ("", 0.0, True))
    if not novel:
        return f" (taken for {nearest}, but the gain was sure)"
    return " (a false alarm: the dataset is a known one)" if kinds(content).get(name) == "known" else ""


def _tally(content: ReportContent, groups: dict[str, dict[str, Row]]) -> Finding:
    marks = [reading(paired_auto(groups.get(name, {})) or {}) for name in content.adapted_bits]
    rest = len(marks) - marks.count("better") - marks.count("worse")
    one = "1 dataset" if len(marks) == 1 else f"{len(marks)} datasets"
    words = f"Adapted to {one}: better on {marks.count('better')}, worse on {marks.count('worse')}"
    return Finding("plain", f"{words}, and on {rest} there is no sure difference.")


def _adapted_finding(name: str, alarm: str, group: dict[str, Row]) -> Finding:
    row = paired_auto(group)
    if row is None:
        return Finding("noise", f"{name}{alarm}: adapted, but not compared with the baseline.")
    step = f"{plus_minus(row)} nats a token"
    if "baseline" in group:
        step += f", perplexity {perplexity(group['baseline'])} to {perplexity(row)}"
        read, before = row["bytes_per_token"], group["baseline"]["bytes_per_token"]
        step += f", {number(read / before - 1, '+z.1%')} bytes read a token" if before else ""
    mark = reading(row)
    words = {
        "better": f"Adaptation helped on {name}{alarm}: {step}.",
        "worse": f"Adaptation made {name} worse{alarm}: {step}.",
        "noise": f"Adaptation on {name}{alarm} is within {SIGNIFICANT:g} standard errors, noise: {step}.",
        "same": f"Adaptation on {name}{alarm} changed nothing.",
        "unknown": f"Adaptation on {name}{alarm}: {step}; without a finite standard error that shows nothing.",
    }[mark]
    return Finding(mark if mark in ("better", "worse") else "noise", words)


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


def moved_pages(baseline: Int[np.ndarray, "L E M"], adapted: Int[np.ndarray, "L E M"]) -> dict[int, tuple[int, int]]:
    """For each level, the refinement pages that the adapted plan has and the baseline has not, and the other way."""
    before, after = np.asarray(baseline), np.asarray(adapted)
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
