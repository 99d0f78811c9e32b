"""What a plan loses on text that nobody has seen, and what it costs the known texts to expect some. No switching.

    python benchmarks/unseen.py --corpus FOLDER [--deployment prose] [--budget 4.125] [--weight 0.25] [--json PATH]

FOLDER holds KIND.heldout.txt for each kind of text. A deployment is calibrated on the first windows of its known kinds,
quantized for each budget and ``novelty_weight`` (planes and plan), and evaluated on later windows of its known kinds
and on far kinds. Weight 0: the known kinds alone decide. "drawn" is what ``quantize`` does: a quarter of the text to
come is like text that the model draws itself, on which it is calibrated, too; at a weight in figures, what nobody has
seen is expected from the known kinds. "uniform" is GPTQ at one width on the known windows, of the grid whose bits are
nearest to the budget.

Excess loss is nats a token above bfloat16, "kl" the divergence from its predictions; "difference" and "kl_difference"
are those to weight 0 on the same windows, with standard errors by window. Marks: the mean divergence of far kinds over
that of uniform, and what known kinds lose more than by weight 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from deployments import Sweeps, at_widths, heldout_windows, kept, uniform_gptq, weights_of
from drawn import and_drawn
from float_changes import changes, predictions

from dynamo_jax.calibration import plans
from dynamo_jax.calibration.config import NOVELTY_WEIGHT, QuantizeConfig
from dynamo_jax.calibration.pipeline import analyze_layers
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.sources import DecoderSource
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.storage.bundles import stacked_planes

FAR = ("german", "french", "russian", "spanish", "drama", "scripture", "c", "rust", "latex", "sql")
DEPLOYMENTS = {  # known kinds, far kinds
    "prose": (("encyclopedic", "stories", "medical"), (*FAR, "python", "arithmetic")),
    "technical": (("python", "arithmetic", "encyclopedic"), FAR),
    "literature": (("wikitext", "c4", "warandpeace"), ("german", "shakespeare", "python", "gsm8k")),
}
BUDGETS = (4.125, 3.1, 2.5)
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, NOVELTY_WEIGHT, 0.6, 1.0)
DRAWN = "drawn"  # the method


class Bench(NamedTuple):
    """A deployment. calibration: windows of each known kind; windows: those to evaluate, of all kinds, and the kind of
    each; reference, exact: what bfloat16 does on them."""

    model: Decoder
    params: dict[str, Any]
    calibration: dict[str, np.ndarray]
    windows: np.ndarray
    kinds: np.ndarray
    reference: np.ndarray
    exact: np.ndarray

    def run(self, weights: np.ndarray) -> np.ndarray:
        """Loss, accuracy and divergence of each window (3, S)."""
        params = peers.with_experts(self.model, self.params, weights)
        return changes(self.model.config, params, self.windows, self.reference)


def bench_of(model: Decoder, tokenizer: Any, corpus: Path, name: str, settings: QuantizeConfig, limit: int) -> Bench:
    known, far = DEPLOYMENTS[name]
    count = settings.calibration_windows
    every = {kind: heldout_windows(corpus, kind, tokenizer, settings.window) for kind in (*known, *far)}
    parts = {kind: w[count:][:limit] for kind, w in every.items()}
    if short := [kind for kind, part in parts.items() if len(part) < 2]:
        raise SystemExit(f"{short[0]}: fewer than two windows after the first {count}")
    params = {n: jnp.asarray(np.asarray(a), jnp.float32) for n, a in parameters(model).items()}
    windows = np.concatenate(list(parts.values()))
    reference = predictions(model.config, params, windows)
    exact = changes(model.config, params, windows, reference)
    kinds = np.repeat(list(parts), [len(part) for part in parts.values()])
    return Bench(model, params, {kind: every[kind][:count] for kind in known}, windows, kinds, reference, exact)


def quantized(bench: Bench, sweeps: Sweeps, settings: QuantizeConfig) -> tuple[np.ndarray, float]:
    """What the model does when it is quantized with the settings, and its bits a weight."""
    work = sweeps.again()
    calibration = and_drawn(bench.model, bench.calibration, settings)
    analyses = analyze_layers(DecoderSource(bench.model), calibration, settings, work)
    sweeps.keep(work)
    plan = plans.plan(analyses, bench.model, settings)
    options = at_widths(bench.model.config, stacked_planes(work.get, bench.model.config))
    return bench.run(weights_of(options, plan)), plan.bits_per_weight()


def rows_of(bench: Bench, what: dict[str, Any], found: np.ndarray, base: np.ndarray | None) -> list[dict[str, Any]]:
    """A row for each kind, and one for the known and one for the far kinds: the mean of their kinds."""
    near = list(bench.calibration)
    far = [kind for kind in dict.fromkeys(bench.kinds) if kind not in near]
    excess, above = found[0] - bench.exact[0], None if base is None else found - base
    rows = []
    for kind, parts in {**{k: [k] for k in (*near, *far)}, "known": near, "far": far}.items():
        where = [bench.kinds == part for part in parts]

        def mean(values: np.ndarray, where: list = where) -> float:
            return float(np.mean([values[w].mean() for w in where]))

        def error(values: np.ndarray, where: list = where) -> float:
            each = [values[w].var(ddof=1) / w.sum() for w in where]
            return math.sqrt(sum(each)) / len(each)

        row = what | {"kind": kind, "far": kind == "far" or kind in far, "kinds": len(parts)}
        row |= {"excess_nll": mean(excess), "kl": mean(found[2]), "accuracy": mean(found[1])}
        if above is not None:
            row |= {"difference": mean(above[0]), "standard_error": error(above[0])}
            row |= {"kl_difference": mean(above[2]), "kl_standard_error": error(above[2])}
        rows.append(row)
        if len(parts) > 1:
            print(line_of(row), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    line = f"{row['deployment']:11s} {row['budget']:<6g} {row['method']:8s} {row['bits']:.3f}  {row['kind']:6s}"
    line += f"  {row['excess_nll']:+.4f}  {row['kl']:.4f}  {row['accuracy']:.2%}"
    if "kl_difference" in row:
        line += f"  {row['difference']:+.4f} ± {row['standard_error']:.4f}"
        line += f"  {row['kl_difference']:+.4f} ± {row['kl_standard_error']:.4f}"
    return line


def marks(rows: list[dict[str, Any]]) -> dict[str, float]:
    means = {
        (r["model"], r["deployment"], r["budget"], r["method"], r["kind"]): r
        for r in rows
        if r["kind"] in ("known", "far")
    }
    out = {}
    for (*where, method, kind), row in means.items():
        peer, base = (means.get((*where, other, kind)) for other in ("uniform", "0"))
        what = f"{', '.join(map(str, where))} bits, weight {method}"
        if kind == "far" and method != "uniform" and peer:
            out[f"{what}: divergence of far kinds over uniform's"] = row["kl"] / peer["kl"]
        if kind == "known" and method not in ("uniform", "0") and base:
            out[f"{what}: divergence of known kinds over weight 0's"] = row["kl"] / base["kl"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with KIND.heldout.txt")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint folder; the bundled model by default")
    parser.add_argument("--deployment", action="append", choices=list(DEPLOYMENTS), help="all by default")
    parser.add_argument("--budget", type=float, action="append", help=f"bits a weight; {BUDGETS} by default")
    parser.add_argument(
        "--weight", type=float, action="append", help=f"without drawn text, beside 0; {WEIGHTS} by default"
    )
    parser.add_argument("--limit", type=int, default=16, help="evaluated windows of each kind at most")
    parser.add_argument("--calibration-windows", type=int, default=32, help="of each known kind")
    parser.add_argument("--keep", type=Path, help="a folder for finished parts, from which a stopped run goes on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_decoder(arguments.model), load_tokenizer(arguments.model)
    base = QuantizeConfig(calibration_windows=arguments.calibration_windows, spare=0.0)  # nothing switches
    job = {"limit": arguments.limit, "calibration_windows": base.calibration_windows}
    weights = list(dict.fromkeys([0.0, *(arguments.weight or WEIGHTS)]))
    rows: list[dict[str, Any]] = []
    print("deployment  budget method   bits   kinds   excess  kl  accuracy  loss above weight 0  kl above weight 0")
    for name in arguments.deployment or DEPLOYMENTS:
        bench = bench_of(model, tokenizer, arguments.corpus, name, base, arguments.limit)
        sweeps, with_drawn = Sweeps(), Sweeps()
        uniform = uniform_gptq(model, bench.params, np.concatenate(list(bench.calibration.values())))
        for budget in arguments.budget or BUDGETS:

            def found_by(method: str, run: Callable, name: str = name, budget: float = budget) -> Any:
                path = arguments.keep and arguments.keep / f"{arguments.model.name}-{name}-{budget:g}-{method}.json"

                def plain() -> tuple[list, float]:
                    found, bits = run()
                    return found.tolist(), bits

                found, bits = kept(path, job, plain)
                return np.array(found), bits

            def uniform_run(uniform: Callable = uniform, bench: Bench = bench, budget: float = budget) -> Any:
                weights, bits = uniform(budget)
                return bench.run(weights), bits

            def settings_of(method: str, budget: float = budget) -> QuantizeConfig:
                if method == DRAWN:
                    return dataclasses.replace(base, bits=budget)
                return dataclasses.replace(base, bits=budget, novelty_weight=float(method), unseen_windows=0)

            what = {"model": arguments.model.name, "deployment": name, "budget": budget}
            found, bits = found_by("uniform", uniform_run)
            rows += rows_of(bench, what | {"method": "uniform", "bits": bits}, found, None)
            none = None
            for method in (*(f"{weight:g}" for weight in weights), DRAWN):
                kept_sweeps = with_drawn if method == DRAWN else sweeps
                run = functools.partial(quantized, bench, kept_sweeps, settings_of(method))
                found, bits = found_by(method, run)
                none = found if none is None else none
                rows += rows_of(bench, what | {"method": method, "bits": bits}, found, none)
            if arguments.json:  # a run that is stopped leaves what it ended
                write_json(arguments.json, {"results": rows, "marks": marks(rows), "jax": jax.__version__})
    for mark, value in marks(rows).items():
        print(f"{mark}: {value:.3f}")


if __name__ == "__main__":
    main()
