"""The tables of quality.py: means over seeds, paired differences to ours, and the marks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from texts import KNOWN

KINDS = ("known", "novel")


def mean_of(rows: list[dict], key: str = "excess_nll", **where: Any) -> float:
    """The mean over datasets (and calibration sets), by seed, then over seeds; nan without rows."""
    own = [r[key] for r in rows if all(r.get(k) == v for k, v in where.items())]
    return float(np.mean(own)) if own else math.nan


def spread_of(rows: list[dict], key: str = "excess_nll", **where: Any) -> float:
    seeds = sorted({r["seed"] for r in rows})
    means = [mean_of(rows, key, seed=seed, **where) for seed in seeds]
    return float(np.std(means, ddof=1)) if len(means) > 1 else math.nan


def summary(bench: Any, budgets: list[float]) -> dict[str, Any]:
    """Means with the spread over seeds, paired differences to ours, and the marks: ratios of ours to the peers'."""
    rows = bench.rows
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "bf16"))
    table, marks = [], {}
    for budget in budgets:
        for method in methods:
            own = [r for r in rows if r["method"] == method and r["budget"] == budget]
            if not own:
                continue
            line: dict[str, Any] = {"method": method, "budget": budget}
            line["bits_per_weight"] = float(np.mean([r["bits_per_weight"] for r in own]))
            for kind in KINDS:
                for key in ("excess_nll", "kl", "accuracy"):
                    line[f"{kind}_{key}"] = mean_of(own, key, kind=kind)
                line[f"{kind}_excess_nll_spread"] = spread_of(own, kind=kind)
                if method != "dynamo" and any(r["method"] == "dynamo" for r in rows):
                    line[f"{kind}_above_dynamo"], line[f"{kind}_above_dynamo_error"] = bench.above(method, budget, kind)
            table.append(line)
        ours = mean_of(rows, method="dynamo", budget=budget, kind="known")
        for peer in [m for m in methods if not m.startswith("dynamo")]:
            marks[f"known excess loss over {peer}, {budget:g} bits"] = ours / mean_of(
                rows, method=peer, budget=budget, kind="known"
            )
        for kind in KINDS if "dynamo-distil" in methods else ():
            kl = [mean_of(rows, "kl", method=f"dynamo-{m}", budget=budget, kind=kind) for m in ("distil", "before")]
            marks[f"{kind} divergence of dynamo-distil over dynamo-before, {budget:g} bits"] = kl[0] / kl[1]
        worst = max(mean_of(rows, method="dynamo", budget=budget, dataset=name) for name in KNOWN)
        unseen = [r for r in rows if r["method"] == "mc" and r["budget"] == budget and r["kind"] == "known"]
        unseen = [r for r in unseen if r["dataset"] != r["calibration"]]
        if unseen:
            marks[f"worst known over mc on sets it was not calibrated on, {budget:g} bits"] = worst / mean_of(unseen)
    return {"table": table, "marks": marks}


def show(found: dict[str, Any]) -> None:
    head = [f"{kind}, {what}" for kind in KINDS for what in ("excess", "above dynamo", "divergence", "accuracy")]
    print("\n| method | budget | bits | " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (2 + len(head)))
    for r in found["table"]:
        cells = [f"{r['budget']:g}", f"{r['bits_per_weight']:.3f}"]
        for kind in KINDS:
            cells.append(f"{r[f'{kind}_excess_nll']:+.4f} ± {r[f'{kind}_excess_nll_spread']:.4f}")
            above = f"{kind}_above_dynamo"
            cells.append(f"{r[above]:+.4f} ± {r[f'{above}_error']:.4f}" if above in r else "")
            cells += [f"{r[f'{kind}_kl']:.4f}", f"{r[f'{kind}_accuracy']:.2%}"]
        print(f"| {r['method']} | " + " | ".join(cells) + " |")
    print()
    for name, ratio in found["marks"].items():
        print(f"{name}: {ratio:.2f}")
