"""The README's picture, of rows of benchmarks/adaptation.py: loss over memory, switched and not.

    python benchmarks/picture.py [--rows benchmarks/results/adaptation.json] [--out docs/drawings/loss.svg]

A panel for each deployment; a line for each method, a point for each budget: the mean of the far kinds of text that
were met at every budget. Right: bits a weight that the device holds. Up: nats a token lost against bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adaptation import grouped, mean_of

from dynamo_jax.files import write_text
from dynamo_jax.report.charts import ticks

HERE = Path(__file__).parent
METHODS = {  # in the order of the key; the class of a line says how it is drawn
    "uniform": "all experts alike (GPTQ)",
    "static-known": "a plan for known text",
    "static": "dynamo_jax, not switched",
    "adapted": "switched, no more bytes a token",
    "adapted-reads1.3": "switched, 1.3 times the bytes a token",
}
PEER = "uniform"  # its line may leave the panel: at few bits it loses several times as much
DEPLOYMENTS = {"prose": "calibrated on English prose", "technical": "calibrated on code, sums and prose"}
WIDTH, HEIGHT, GAP = 330, 250, 40  # of a panel, and between two
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 40, 44  # margins inside a panel
STYLE = """
    svg.drawing { --ink: #24292f; --soft: #6e7781; --paper: #ffffff; --grid: #d0d7de; }
    svg.drawing { --own: #0550ae; --more: #1a7f37; --peer: #bc4c00; }
    @media (prefers-color-scheme: dark) {
      svg.drawing { --ink: #e6edf3; --soft: #9aa4ae; --paper: #0d1117; --grid: #30363d; }
      svg.drawing { --own: #79c0ff; --more: #7ee787; --peer: #ffa657; }
    }
    .drawing text { fill: var(--ink); font: 13px system-ui, sans-serif; }
    .drawing .name { font-weight: 700; font-size: 14px; }
    .drawing .soft { fill: var(--soft); }
    .drawing .grid { stroke: var(--grid); stroke-width: 1; }
    .drawing path { fill: none; stroke-width: 2.5; }
    .drawing circle { fill: var(--paper); stroke-width: 2.5; }
    .drawing .uniform { stroke: var(--peer); }
    .drawing path.uniform { stroke-dasharray: 2 4; }
    .drawing .static-known { stroke: var(--soft); }
    .drawing path.static-known { stroke-dasharray: 7 4; }
    .drawing .static { stroke: var(--ink); }
    .drawing .adapted { stroke: var(--own); }
    .drawing .adapted-reads1-3 { stroke: var(--more); }
    .drawing path.adapted-reads1-3 { stroke-dasharray: 10 3; }
"""


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Deployment -> method -> (device bits, excess loss) of each budget, means of far kinds that all have."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    groups = {(name, budget): own for (_, name, budget, far), own in grouped(rows).items() if far}
    for (name, _), own in groups.items():
        met = [{r["novel"] for r in others} for (other, _), others in groups.items() if other == name]
        if kinds := set.intersection(*met):
            own = [r for r in own if r["novel"] in kinds]
            for method in [m for m in METHODS if any(r["method"] == m for r in own)]:
                point = mean_of(own, method, "device_bits"), mean_of(own, method, "excess_nll")
                found.setdefault(name, {}).setdefault(method, []).append(point)
    return {name: {method: sorted(points) for method, points in lines.items()} for name, lines in found.items()}


def panel(
    name: str, lines: dict[str, list[tuple[float, float]]], loss: tuple[float, float], bits: tuple[float, float]
) -> str:
    """One deployment. loss, bits: the least and the most of all panels."""

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - bits[0]) / (bits[1] - bits[0])

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - loss[0]) / (loss[1] - loss[0])

    parts = [f'<text class="name" x="{LEFT}" y="20">{DEPLOYMENTS[name]}</text>']
    parts.append(f'<text class="soft" x="{LEFT}" y="{TOP - 2}">nats a token lost</text>')
    for tick in ticks(*loss):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(*bits):
        parts.append(
            f'<text class="soft" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(f'<text class="soft" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">bits a weight</text>')
    for method in [m for m in METHODS if m in lines]:
        points = lines[method]
        way = " L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        title = "; ".join(f"{a:.2f} bits: {b:+.4f}" for a, b in points)
        drawn = f'class="{_class(method)}" clip-path="url(#panel)"'
        parts.append(f'<path {drawn} d="M{way}"><title>{METHODS[method]}: {title}</title></path>')
        parts += [f'<circle {drawn} cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in points]
    return "\n".join(parts)


def _class(method: str) -> str:
    return method.replace(".", "-")


def picture(rows: list[dict[str, Any]]) -> str:
    """The SVG. ValueError: no rows of far kinds."""
    found = means(rows)
    points = [point for lines in found.values() for line in lines.values() for point in line]
    if not points:
        raise ValueError("no rows of far kinds to draw")
    bits = min(x for x, _ in points), max(x for x, _ in points)
    bits = (bits[0] - 0.05, bits[1] + 0.05)
    ours = [point for lines in found.values() for method, line in lines.items() if method != PEER for point in line]
    loss = min(0.0, *(y for _, y in points)), 1.15 * max(y for _, y in ours or points)
    names = [name for name in DEPLOYMENTS if name in found]
    shown = [m for m in METHODS if any(m in lines for lines in found.values())]
    width, below = len(names) * (WIDTH + GAP) - GAP, HEIGHT + 16
    height = below + 22 * len(shown)
    said = "; ".join(
        f"{DEPLOYMENTS[name]}, {METHODS[m]}: " + ", ".join(f"{b:+.3f} at {a:.2f} bits" for a, b in found[name][m])
        for name in names
        for m in shown
        if m in found[name]
    )
    parts = [
        f'<svg class="drawing" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Loss over memory">',
        "<title>Loss over memory</title>",
        f"<desc>Nats a token lost against bfloat16, on text far from what was calibrated. {said}.</desc>",
        f"<style>{STYLE}</style>",
        f'<clipPath id="panel"><rect x="{LEFT}" y="{TOP - 6}" width="{WIDTH - LEFT}" '
        f'height="{HEIGHT - TOP - BOTTOM + 12}"/></clipPath>',
    ]
    for index, name in enumerate(names):
        parts.append(f'<g transform="translate({index * (WIDTH + GAP)} 0)">{panel(name, found[name], loss, bits)}</g>')
    for index, method in enumerate(shown):
        at = below + 22 * index
        parts.append(f'<path class="{_class(method)}" d="M{LEFT} {at} L{LEFT + 40} {at}"/>')
        parts.append(f'<text x="{LEFT + 50}" y="{at + 5}">{METHODS[method]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "adaptation.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "drawings" / "loss.svg")
    arguments = parser.parse_args()
    write_text(arguments.out, picture(json.loads(arguments.rows.read_text())["results"]))
    print(arguments.out)


if __name__ == "__main__":
    main()
