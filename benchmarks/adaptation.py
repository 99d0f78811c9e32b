"""What switching wins on text that a deployment was not calibrated for, at equal memory.

    python benchmarks/adaptation.py --corpus FOLDER [--budget 3.0] [--deployment prose] [--keep FOLDER] [--json PATH]
    python benchmarks/adaptation.py --rows benchmarks/results/adaptation.json    # the tables of docs/method.md

FOLDER holds KIND.heldout.txt for each kind of text: docs/training.md says how it is built. The model has seen all kinds
in training, other documents of them. A deployment is calibrated on three kinds and meets the others. A kind is "far"
where its routing is more than FAR_BITS from the nearest calibrated one.

Every method holds as many bits a weight on the device as its budget says (static-more-memory: 15 % more), slots and
page tables counted. What a method sees of the novel text are its first tokens; all are evaluated on later windows.

    uniform             GPTQ at one width, of the grid whose bits are nearest to the budget
    static              the product's baseline: with spare slots, calibrated on text that the model draws too
    static-known        a baseline that looks at the known texts only, without slots
    static-more-memory  the same with 15 % more memory
    static-channel      pages placed by channel block, from the known texts, without slots
    hotness             whole experts by routing frequency, 4 bits or 2 (DynaExq, arXiv 2511.15015)
    paper               four widths by fuzzy c-means, 1 % of the channels at the highest (after a description of DynaMo)
    adapted             the product: ``runtime.adapt`` on what was seen, a token reads no more bytes than by static
    adapted-batch16     the same where 16 requests are served together, so that a step reads no more
    adapted-reads1.15   adapted, but 1.15 times as many bytes may be read; adapted-reads1.3 likewise
    oracle-..           hotness, paper or adapted with the errors and the routing of the evaluated text itself

An adapted plan whose predictions of what was seen are no nearer to 8 bits than the baseline's is not taken. Excess
loss is nats a token above bfloat16, "kl" the divergence from its predictions, "difference" the loss above that of
static-known, with its standard error by window. "over_the_limit" is the share by which an adapted plan reads more on
the evaluated text than it may; "over_the_limit_followed" the same where another plan is made when it reads too much, as
``runtime.standing`` has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from deployments import Sweeps, at_widths, heldout_windows, kept, quantized_model, uniform_gptq, weights_of
from float_changes import changes, predictions
from placements import clustered_experts, hot_experts
from quality import groups_of

from dynamo_jax.analysis.dynamics import routing_divergence
from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.knowledge import without_unseen
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.precision.plan import Plan, touched_share
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.adapt import Observation, adapted_plan, observe_windows, placed_anew, saved_by
from dynamo_jax.runtime.memory import device_bits
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.standing import MOST, Limit, Standing
from dynamo_jax.storage.work import MemoryWork

DEPLOYMENTS = {
    "prose": ("encyclopedic", "stories", "medical"),
    "technical": ("python", "arithmetic", "encyclopedic"),
}
KINDS = (
    *("german", "french", "spanish", "italian", "polish", "russian", "swedish", "drama", "scripture", "dialogue"),
    *("python", "java", "c", "javascript", "rust", "sql", "latex", "arithmetic", "medical", "stories", "news"),
    *("science", "encyclopedic"),
)
BUDGETS = (3.0, 2.5, 2.25)
FAR_BITS = 0.1
MORE_MEMORY = 1.15
READS = (1.15, 1.3)
BATCH = 16
MEANS = ("device_bits", "bytes_per_token", "bytes_per_step", "excess_nll", "kl", "accuracy")


class Text(NamedTuple):
    """A kind of text. first: windows that adaptation may see; rest: those that are evaluated, and what bfloat16 does on
    them."""

    first: np.ndarray
    rest: np.ndarray
    reference: np.ndarray
    exact: np.ndarray


class Model(NamedTuple):
    name: str
    decoder: Decoder
    tokenizer: Any
    params: dict[str, Any]

    def with_weights(self, weights: np.ndarray) -> dict[str, Any]:
        return peers.with_experts(self.decoder, self.params, weights)


class Quantized(NamedTuple):
    """Planes and the plan that they favour. options: weights (L, E, P, F, D) at each width; analyses: of the known
    kinds."""

    model: QuantizedModel
    options: list[np.ndarray]
    analyses: dict[str, Analysis]

    def weights(self, plan: Plan) -> np.ndarray:
        return weights_of(self.options, plan)


@dataclasses.dataclass
class Deployment:
    """A model calibrated on some kinds. uniform: weights and bits of uniform GPTQ."""

    baseline: Quantized  # the product's
    only_known: Quantized  # of the same budget, without slots and without a thought of other text
    more_memory: Quantized
    uniform: tuple[np.ndarray, float]
    significance: np.ndarray  # (A, L, E): of the experts on each known dataset, at 2 bits


def quantized_on(model: Model, known: dict[str, np.ndarray], settings: QuantizeConfig, work: MemoryWork) -> Quantized:
    found, analyses = quantized_model(model.decoder, model.tokenizer, known, settings, work)
    return Quantized(found, at_widths(found.config, found.store), analyses)


def calibrated(
    model: Model,
    known: dict[str, np.ndarray],
    uniform: Callable[[float], tuple[np.ndarray, float]],
    settings: QuantizeConfig,
    work: Sweeps,
    work_alone: Sweeps,
    keep: Callable[[str, QuantizeConfig], tuple[Any, ...]],
) -> Deployment:
    """All that is calibrated on the known windows, at the budget of ``settings``; ``work`` keeps the sweeps with text
    that the model draws, ``work_alone`` those without. keep: where a quantization of this name is kept, and its job."""
    bits = settings.bits
    assert bits is not None
    own = work.again(*keep("static", settings))
    baseline = quantized_on(model, known, settings, own)
    work.keep(own)
    alone = dataclasses.replace(settings, spare=0.0, novelty_weight=0.0)
    own = work_alone.again(*keep("static-known", alone))
    only_known = quantized_on(model, known, alone, own)
    work_alone.keep(own)
    larger = dataclasses.replace(alone, bits=MORE_MEMORY * bits)
    more = quantized_on(model, known, larger, work_alone.again(*keep("static-more-memory", larger)))
    each = without_unseen(baseline.analyses).values()
    significance = np.stack([a.expert_significance()[..., 0] for a in each])
    return Deployment(baseline, only_known, more, uniform(bits), significance)


class Method(NamedTuple):
    """bits: that the device holds; read: bytes that a token of the text reads, and a step of BATCH tokens."""

    name: str
    weights: np.ndarray
    bits: float
    read: tuple[float, float]
    more: dict[str, Any] = {}  # noqa: RUF012


def read_bytes(plan: Plan, use: np.ndarray) -> tuple[float, float]:
    return plan.bytes_per_step(use, 1), plan.bytes_per_step(use, BATCH)


def methods_of(model: Model, own: Deployment, text: Text, truth: Observation) -> Iterator[Method]:
    """All methods on one text. truth: what the windows that are evaluated show."""
    quantized, plan, known = own.baseline.model, own.baseline.model.plan, own.baseline.model.knowledge
    share = quantized.spare
    seen = observe_windows(quantized, text.first)
    use = truth.counts.sum(axis=0) / truth.tokens.sum()

    def of(name: str, among: Quantized, plan: Plan, share: float, **more: Any) -> Method:
        return Method(name, among.weights(plan), device_bits(plan, share), read_bytes(plan, use), more)

    only = own.only_known.model
    yield of("static-known", own.only_known, only.plan, 0)
    yield of("static", own.baseline, plan, share)
    yield of("static-more-memory", own.more_memory, own.more_memory.model.plan, 0)
    weights, bits = own.uniform
    config = model.decoder.config
    whole = bits / 8 * config.num_expert_weights / use.size  # bytes of an expert
    uniform_read = tuple(whole * touched_share(use, batch).sum() for batch in (1, BATCH))
    yield Method("uniform", weights, bits, uniform_read)
    errors, often = only.knowledge.block_errors, only.knowledge.counts.sum(axis=0) / only.knowledge.tokens
    yield of("static-channel", own.only_known, placed_anew(only.plan, errors, often), 0)

    stored = only.plan.stored_bytes()
    for prefix, found in (("", seen), ("oracle-", truth)):
        counts, tokens = found.counts.sum(axis=0), float(found.tokens.sum())
        yield of(f"{prefix}hotness", own.only_known, hot_experts(only.plan, counts, tokens, stored), 0)
        moved = found.errors[..., 0] / tokens
        significance = np.concatenate(
            [own.significance, known.losses(found.errors)[..., 0].sum(axis=-1)[None] / tokens]
        )
        yield of(f"{prefix}paper", own.only_known, clustered_experts(only.plan, significance, moved, stored), 0)

    slots, held = memory.slots(plan, share), device_bits(plan, share)
    nearly = predictions(config, model.with_weights(own.baseline.options[-1]), text.first)

    def apart(plan: Plan) -> float:
        """From the predictions of 8 bits, on what was seen."""
        return float(changes(config, model.with_weights(own.baseline.weights(plan)), text.first, nearly)[2].mean())

    before = apart(plan)
    ways = [("adapted", 1, 1.0), (f"adapted-batch{BATCH}", BATCH, 1.0)]
    ways += [(f"adapted-reads{reads:g}", 1, reads) for reads in READS]
    for name, batch, reads in ways:
        new = adapted_plan(plan, known, seen, None, batch, reads, slots)
        best = placed_anew(plan, known.losses(truth.errors) / truth.tokens.sum(), use, None, batch, reads, slots)
        gain = before - apart(new)
        limit = reads * plan.bytes_per_step(use, batch)
        more = {"gain_on_seen": gain, "moved": float((new.widths != plan.widths).mean())}
        more["over_the_limit"] = new.bytes_per_step(use, batch) / limit - 1
        anew = functools.partial(adapted_plan, plan, known, spare=None, batch=batch, reads=reads, slots=slots)
        most = Limit(new.expert_bytes(), reads * plan.expert_bytes(), batch)
        more |= followed(quantized, text, (new, seen), truth, most, anew)
        for prefix, found in (("", new if gain > 0 else plan), ("oracle-", best)):
            taken = own.baseline.weights(found)
            yield Method(prefix + name, taken, held, read_bytes(found, use), {} if prefix else more)


def followed(
    model: QuantizedModel,
    text: Text,
    begun: tuple[Plan, Observation],
    truth: Observation,
    limit: Limit,
    anew: Callable[..., Plan],
) -> dict[str, float]:
    """Bytes read above the limit on the evaluated windows, one after the other, where a plan is made anew of the last
    ``MOST`` tokens when the one that serves reads too much; and how often. begun: the first plan and what it was made
    from; anew: makes the others."""
    piece = text.rest.shape[1] - 1
    windows, standing = np.concatenate([text.first, text.rest]), Standing(piece)

    def begins(plan: Plan, seen: Observation) -> None:
        saves = saved_by(plan, model.plan, model.knowledge, seen)
        standing.begins(True, saves, seen.counts, seen.tokens, limit._replace(variant=plan.expert_bytes()))

    begins(*begun)
    read, allowed, plans = 0.0, 0.0, 0
    for end, (counts, tokens) in enumerate(zip(truth.counts, truth.tokens), len(text.first) + 1):
        assert standing.limit is not None
        touched = touched_share(counts / tokens, limit.batch)
        read += float((touched * standing.limit.variant).sum())
        allowed += float((touched * limit.allowed).sum())
        if standing.overreads(counts[None], tokens[None]):
            seen = observe_windows(model, windows[max(end - MOST // piece, 0) : end])
            begins(anew(seen=seen), seen)
            plans += 1
    return {"over_the_limit_followed": read / allowed - 1, "plans_made_anew": plans}


def rows_of(
    model: Model, once: Callable[[], Deployment], text_of: Callable[[str], Text], what: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each method on a text. once: calibrates, the first time; what: entries of all rows."""
    own, text, config = once(), text_of(what["novel"]), model.decoder.config
    counts = own.baseline.model.knowledge.counts
    truth = observe_windows(own.baseline.model, text.rest)
    where = truth.counts.sum(axis=0)
    apart = min(float(routing_divergence(where, signature).mean()) for signature in counts)
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    for method in methods_of(model, own, text, truth):
        found = changes(config, model.with_weights(method.weights), text.rest, text.reference)
        excess = found[0] - text.exact[0]
        reference = excess if reference is None else reference
        above = excess - reference
        row = dict(what) | {"far": apart > FAR_BITS, "routing_bits": apart, "tokens": text.first[:, 1:].size}
        row |= {"method": method.name, "device_bits": method.bits}
        row |= dict(zip(("bytes_per_token", "bytes_per_step"), method.read))
        row |= {"nll": found[0].mean(), "excess_nll": excess.mean(), "kl": found[2].mean(), "accuracy": found[1].mean()}
        row |= {"difference": above.mean(), "standard_error": above.std(ddof=1) / math.sqrt(len(above))}
        rows.append({k: v.item() if isinstance(v, np.generic) else v for k, v in (row | method.more).items()})
        print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['deployment']:10s} {row['novel']:13s} {'far ' if row['far'] else 'near'} {row['budget']:g} "
        f"{row['method']:24s} {row['device_bits']:.3f}  {row['bytes_per_token']:9,.0f} {row['bytes_per_step']:11,.0f}  "
        f"{row['excess_nll']:+.4f}  {row['difference']:+.4f} ± {row['standard_error']:.4f}  {row['kl']:.4f}"
    )


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table of means for the far and the near kinds of each deployment and budget, in Markdown."""
    for (model, name, budget, far), own in grouped(rows).items():
        kinds = list(dict.fromkeys(r["novel"] for r in own))
        yield f"\n{model} calibrated on {name}, {budget:g} bits, {'far' if far else 'near'}: {', '.join(kinds)}\n"
        yield "| method | bits | kB a token | MB a step | excess loss | removed | divergence | removed | accuracy |"
        yield f"| --- |{' ---: |' * 8}"
        base = means(own, "static-known")
        for method in dict.fromkeys(r["method"] for r in own):
            mean = means(own, method)
            line = f"| {method} | {mean['device_bits']:.2f} | {mean['bytes_per_token'] / 1e3:.0f} "
            line += f"| {mean['bytes_per_step'] / 1e6:.2f} | {mean['excess_nll']:+.4f} "
            line += f"| {1 - mean['excess_nll'] / base['excess_nll']:z.0%} | {mean['kl']:.4f} "
            yield line + f"| {1 - mean['kl'] / base['kl']:z.0%} | {mean['accuracy']:.2%} |"


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, float, bool], list[dict[str, Any]]]:
    """The rows of each model, deployment, budget, and of far or of near kinds; the far ones first."""
    found: dict[tuple[str, str, float, bool], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["deployment"], row["budget"], row["far"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (*item[0][:2], -item[0][2], not item[0][3])))


def mean_of(rows: list[dict[str, Any]], method: str, key: str) -> float:
    """Of a method's rows, over their kinds."""
    return float(np.mean([r[key] for r in rows if r["method"] == method]))


def means(rows: list[dict[str, Any]], method: str) -> dict[str, float]:
    return {key: mean_of(rows, method, key) for key in MEANS}


def marks(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the divergence and of the excess loss of static-known that each method removes, on the mean of the
    kinds, and what fares worst."""
    out = {}
    for (model, deployment, budget, far), own in grouped(rows).items():
        kinds = sorted({r["novel"] for r in own})
        by = {(r["method"], r["novel"]): r for r in own}
        what = f"{model}, {deployment}, {budget:g} bits, {'far' if far else 'near'} ({len(kinds)} kinds)"
        base = means(own, "static-known")
        for method in dict.fromkeys(r["method"] for r in own):
            mean = means(own, method)
            for key in ("kl", "excess_nll"):
                out[f"{what}: {method} removes of {key}"] = 1 - mean[key] / base[key]
        for method in [m for m in dict.fromkeys(r["method"] for r in own) if m.startswith("adapted")]:
            worst = max(by[method, kind]["nll"] - by["static-known", kind]["nll"] for kind in kinds)
            out[f"{what}: most that {method} adds to a kind's perplexity"] = math.expm1(worst)
            over = [by[method, kind]["over_the_limit"] for kind in kinds]
            out[f"{what}: {method} reads above its limit, mean"] = float(np.mean(over))
            out[f"{what}: {method} reads above its limit, most"] = max(over)
            over = [by[method, kind]["over_the_limit_followed"] for kind in kinds]
            out[f"{what}: {method} reads above its limit when followed, mean"] = float(np.mean(over))
            out[f"{what}: {method} reads above its limit when followed, most"] = max(over)
            ahead = [kind for kind in kinds if by[method, kind]["kl"] < by["static-more-memory", kind]["kl"]]
            share = len(ahead) / len(kinds)
            out[f"{what}: share of kinds on which {method} is nearer to bfloat16 than static-more-memory"] = share
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, help="folder with KIND.heldout.txt: docs/training.md")
    parser.add_argument("--rows", type=Path, help="print the tables of an earlier run's JSON, and do nothing else")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint folder; the bundled model by default")
    parser.add_argument("--deployment", action="append", choices=list(DEPLOYMENTS), help="both by default")
    parser.add_argument("--budget", type=float, action="append", help=f"bits a weight; {BUDGETS} by default")
    parser.add_argument("--novel", action="append", help="kinds to meet; all by default")
    parser.add_argument("--seen", type=int, default=8, help="windows of a text that adaptation may see")
    parser.add_argument("--limit", type=int, default=32, help="evaluated windows of each kind at most")
    parser.add_argument("--calibration-windows", type=int, default=32, help="of each known kind")
    parser.add_argument("--keep", type=Path, help="a folder for what is finished, from which a stopped run goes on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rows:
        print("\n".join(tables(json.loads(arguments.rows.read_text())["results"])))
        return
    if not arguments.corpus:
        parser.error("--corpus FOLDER or --rows PATH")
    decoder, tokenizer = load_decoder(arguments.model), load_tokenizer(arguments.model)
    params = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in parameters(decoder).items()}
    model = Model("tiny-moe" if arguments.model == BUNDLED else arguments.model.name, decoder, tokenizer, params)
    settings = QuantizeConfig(
        calibration_windows=arguments.calibration_windows, group_size=groups_of(decoder.config)[-1]
    )

    def windows_of(kind: str) -> np.ndarray:
        return heldout_windows(arguments.corpus, kind, tokenizer, settings.window)

    @functools.cache
    def text_of(kind: str) -> Text:
        first, rest = np.split(windows_of(kind), [arguments.seen])
        rest = rest[: arguments.limit]
        reference = predictions(decoder.config, params, rest)
        return Text(first, rest, reference, changes(decoder.config, params, rest, reference))

    job = {"limit": arguments.limit, "seen": arguments.seen, "calibration_windows": settings.calibration_windows}
    rows: list[dict[str, Any]] = []
    for name in arguments.deployment or DEPLOYMENTS:
        known = {kind: windows_of(kind)[: settings.calibration_windows] for kind in DEPLOYMENTS[name]}
        novel = arguments.novel or [kind for kind in KINDS if kind not in known]
        work, work_alone = Sweeps(), Sweeps()
        uniform = uniform_gptq(decoder, params, np.concatenate(list(known.values())))
        for budget in arguments.budget or BUDGETS:
            what = {"model": model.name, "deployment": name, "budget": budget}
            at = dataclasses.replace(settings, bits=budget)

            def keep(method: str, settings: QuantizeConfig, name: str = name) -> tuple[Any, ...]:
                if not arguments.keep:
                    return ()
                own = f"{model.name}-{name}-{settings.bits:g}-{method}"
                return arguments.keep / own, json.loads(json.dumps(dataclasses.asdict(settings)))

            once = functools.cache(functools.partial(calibrated, model, known, uniform, at, work, work_alone, keep))
            for kind in novel:
                path = arguments.keep and arguments.keep / f"{model.name}-{name}-{budget:g}-{kind}.json"
                run = functools.partial(rows_of, model, once, text_of, what | {"novel": kind})
                rows += kept(path, job, run)
                if arguments.json:  # a run that is stopped leaves the kinds that it ended
                    write_json(arguments.json, {"results": rows, "marks": marks(rows), "jax": jax.__version__})
    print("\n".join(tables(rows)))
    for what, value in marks(rows).items():
        print(f"{what}: {value:+.1%}")


if __name__ == "__main__":
    main()
