"""What ``dynamo-jax analyze`` reports: routing and significance of several datasets, and how far they move, between
and within them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dynamo_jax.analysis.dynamics import Agreement, Dynamics, Orders, Pair, Shift
from dynamo_jax.calibration.analyses import Analysis, dynamics_of
from dynamo_jax.calibration.knowledge import noticed
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.runtime.quantized import odd_words

MOST_BLOCKS = 100_000  # of a model whose blocks are written one by one


def analyses_json(analyses: dict[str, Analysis], window: int) -> dict[str, Any]:
    """What ``analyze`` found, JSON-ready; None is what cannot be said. window: tokens of one.

    For each dataset its number of windows, those (counted from 1) that are unlike the rest of it, routing counts
    (L, E) and predicted loss, nats a token, of an expert at each width (L, E, W) and of a channel block at the least
    width (L, E, N; left out of a model of more than ``MOST_BLOCKS``). dynamics: what moves between and within datasets,
    see ``dynamics_json``.
    """
    datasets: dict[str, dict[str, Any]] = {}
    _, odd = noticed(analyses, window)
    for name, run in analyses.items():
        datasets[name] = {
            "tokens": int(run.stats.tokens[0]),
            "windows": len(run.windows),
            "odd": list(odd.get(name, ())),
            "counts": plain(run.stats.counts),
            "expert_significance": plain(run.expert_significance()),
        }
        blocks = run.block_significance()[..., 0]
        if blocks.size <= MOST_BLOCKS:
            datasets[name]["block_significance"] = plain(blocks)
    return {
        "widths": list(WIDTHS),
        "datasets": datasets,
        "dynamics": dynamics_json(dynamics_of(analyses), window),
    }


def plain(values: Any) -> Any:
    """Nested lists of numbers; None where a number is not finite, which JSON cannot write."""
    if isinstance(values, list):
        return [plain(v) for v in values]
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    return plain(np.asarray(values).tolist()) if not isinstance(values, int) else values


def dynamics_json(moved: Dynamics, window: int) -> dict[str, Any]:
    """Lists with a number for each layer: what the names mean is said in ``analysis.dynamics``.

    between: of two datasets, all tokens. spans: routing of as many tokens within one dataset and between two. halves:
    significance of half of each dataset's windows, likewise. by_chance: overlaps of unrelated orders. window: tokens
    of one.
    """
    return {
        "busiest_share": {name: plain(share) for name, share in moved.busiest.items()},
        "between": {
            joined(pair): shift_json(shift) | orders_json(moved.significance[pair])
            for pair, shift in moved.routing.items()
        },
        "spans": {
            "tokens": moved.spans.windows * window,
            "within": {name: shift_json(s) for name, s in moved.spans.within.items()},
            "between": {joined(pair): shift_json(s) for pair, s in moved.spans.between.items()},
        },
        "halves": {
            "within": {name: orders_json(o) for name, o in moved.halves.within.items()},
            "between": {joined(pair): orders_json(o) for pair, o in moved.halves.between.items()},
        },
        "by_chance": {"experts": plain(moved.chance_experts), "blocks": plain(moved.chance_blocks)},
    }


def joined(pair: Pair) -> str:
    return " | ".join(pair)


def shift_json(shift: Shift) -> dict[str, Any]:
    return {"divergence": plain(shift.divergence), "use": agreement_json(shift.use)}


def orders_json(orders: Orders) -> dict[str, Any]:
    blocks = agreement_json(orders.blocks) | {"correlation_within_experts": plain(orders.within_experts)}
    return {"experts": agreement_json(orders.experts), "blocks": blocks}


def agreement_json(agreement: Agreement) -> dict[str, Any]:
    return {"correlation": plain(agreement.correlation), "overlap": plain(agreement.overlap)}


def summary(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines, moved = [], result["dynamics"]
    for name, data in result["datasets"].items():
        significance = np.asarray(data["expert_significance"], np.float64)
        lines.append(f"{name}: {data['tokens']} tokens")
        for layer, (busiest, loss) in enumerate(zip(moved["busiest_share"][name], significance)):
            widths = ", ".join(f"{w} bits {total:.4f}" for w, total in zip(result["widths"], loss.sum(axis=0)))
            top = ", ".join(map(str, np.argsort(-loss[:, 0])[:5]))
            share = "none" if busiest is None else f"x{busiest:.1f}"
            lines.append(f"  layer {layer}: busiest {share}; predicted loss, nats a token: {widths}; top experts {top}")
    data = result["datasets"]
    odd = odd_words({n: tuple(d["odd"]) for n, d in data.items()}, {n: d["windows"] for n, d in data.items()})
    return lines + odd + _dynamics_lines(moved)


def _dynamics_lines(moved: dict[str, Any]) -> list[str]:
    lines, spans, chance = [], moved["spans"], moved["by_chance"]
    for pair, data in moved["between"].items():
        experts, blocks = data["experts"], data["blocks"]
        lines += [
            f"{pair}, layer by layer:",
            f"  routing divergence, bits:          {_row(data['divergence'], '.3f')}",
            f"  rank correlation of use:           {_row(data['use']['correlation'])}",
            f"  rank correlation of significance:  {_row(experts['correlation'])}",
            f"  the same, blocks of one expert:    {_row(blocks['correlation_within_experts'])}",
            f"  top tenth of experts in common:    {_row(experts['overlap'])}  (by chance {chance['experts']:.2f})",
            f"  top tenth of blocks in common:     {_row(blocks['overlap'])}  (by chance {chance['blocks']:.2f})",
        ]
    lines.append(f"routing divergence of spans of {spans['tokens']} tokens, bits, layer by layer:")
    lines += [f"  within {name}: {_row(s['divergence'], '.3f')}" for name, s in spans["within"].items()]
    lines += [f"  between {pair}: {_row(s['divergence'], '.3f')}" for pair, s in spans["between"].items()]
    lines.append("rank correlation of expert significance in halves of the datasets, layer by layer:")
    lines += [
        f"  {place} {name}: {_row(o['experts']['correlation'])}"
        for place in ("within", "between")
        for name, o in moved["halves"][place].items()
    ]
    return lines


def _row(values: list[float | None], form: str = ".2f") -> str:
    return " ".join("none" if v is None else format(v, form) for v in values)
