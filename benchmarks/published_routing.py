"""What published routing counts of real models say: how far the use of experts moves between datasets.

    python benchmarks/published_routing.py --counts FILE.npz [--json PATH]

FILE holds arrays MODEL__expert_counts__DATASET (layers, experts): how often each expert was chosen, as published
with OLMoE (arXiv 2409.02060; allenai/OLMoE, folder analysis) for OLMoE-1B-7B and Mixtral 8x7B ("mistral") at layers
0, 7 and 15. Counts hold no windows, so movement within a dataset is not known here. noise_bits: the divergence that
two samples of n independent choices from one distribution would show, (E - 1) / (4 n ln 2) bits, a lower bound of
the real noise, for neighbouring tokens are not independent.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_jax.analysis.dynamics import Shift, busiest_share, by_pair, chance_overlap, routing_shift
from dynamo_jax.calibration.summary import joined, plain, shift_json
from dynamo_jax.files import write_json

NAME = re.compile(r"(.+)__expert_counts__(.+)")


def published(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """model -> dataset -> counts (L, E)."""
    models: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            if match := NAME.fullmatch(key):
                models.setdefault(match[1], {})[match[2]] = file[key]
    if not models:
        raise SystemExit(f"{path}: no arrays named MODEL__expert_counts__DATASET")
    return models


def figures(counts: dict[str, np.ndarray]) -> dict[str, Any]:
    shifts = by_pair(counts, routing_shift)
    experts = next(iter(counts.values())).shape[1]
    choices = min(c.sum(axis=1).min() for c in counts.values())
    return {
        "experts": experts,
        "choices": int(choices),
        "overlap_by_chance": chance_overlap(experts),
        "noise_bits": (experts - 1) / (4 * float(choices) * math.log(2)),
        "pairs": {joined(pair): shift_json(s) for pair, s in shifts.items()},
        "mean": summary(list(shifts.values())),
        "busiest_share": {n: plain(busiest_share(c)) for n, c in counts.items()},
        "coldest_share": {n: plain(c.min(axis=1) / c.mean(axis=1)) for n, c in counts.items()},
    }


def summary(shifts: list[Shift]) -> dict[str, Any]:
    """Over pairs: means by layer; the largest divergence and the least and largest correlation of any layer."""
    divergence = np.array([s.divergence for s in shifts])
    correlation, overlap = (np.array([getattr(s.use, f) for s in shifts]) for f in ("correlation", "overlap"))
    return {
        "divergence": plain(divergence.mean(axis=0)),
        "divergence_most": float(divergence.max()),
        "correlation": plain(correlation.mean(axis=0)),
        "correlation_span": [float(correlation.min()), float(correlation.max())],
        "overlap": plain(overlap.mean(axis=0)),
    }


def table(model: str, found: dict[str, Any]) -> str:
    def row(values: list[float], form: str) -> str:
        return " ".join(format(v, form) for v in values)

    lines = [
        f"{model}: {found['experts']} experts, at least {found['choices']:,} choices a dataset and layer; as many "
        f"independent choices from one distribution diverge by {found['noise_bits']:.6f} bits",
        f"  {'pair':24} {'divergence, bits, by layer':28} {'rank correlation':20} top tenth in common "
        f"(by chance {found['overlap_by_chance']:.2f})",
    ]
    means = {"divergence": found["mean"]["divergence"], "use": found["mean"]}
    for pair, shift in {**found["pairs"], "mean of pairs": means}.items():
        divergence, use = row(shift["divergence"], ".4f"), shift["use"]
        lines.append(f"  {pair:24} {divergence:28} {row(use['correlation'], '+.2f'):20} {row(use['overlap'], '.2f')}")
    least, most = found["mean"]["correlation_span"]
    lines.append(
        f"  over pairs and layers: divergence {found['mean']['divergence_most']:.3f} bits at most, rank correlation "
        f"{least:+.2f} to {most:+.2f}"
    )
    for dataset, busiest in found["busiest_share"].items():
        coldest = row(found["coldest_share"][dataset], ".3f")
        lines.append(f"  {dataset}: busiest expert x {row(busiest, '.2f')}, coldest x {coldest}, by layer")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = {m: figures(counts) for m, counts in published(args.counts).items() if len(counts) > 1}
    print("\n\n".join(table(m, found) for m, found in models.items()))
    if args.json:
        write_json(args.json, models)


if __name__ == "__main__":
    main()
