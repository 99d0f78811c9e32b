"""What noticing and switching cost: a decode step with monitor and variants, against one without.

    python benchmarks/switch_overhead.py [--batch 1 --batch 8] [--steps 200] [--json PATH]

The bundled model, rounded to 3 bits a weight. The same decode step (one token for each request, greedy) three ways:

    plain     one variant, nobody watches
    switched  two variants behind the index, nobody watches
    watched   two variants and a monitor for each request; what ``generate --adapt`` runs

1. Counted: floating-point operations and bytes of the compiled program (XLA's cost analysis; of branches it takes the
   dearest, so that a decision of the monitor, which comes every 128 tokens, counts in every step).
2. Measured: milliseconds a step, the three taking turns in one run, median and ratio to plain.
3. A switch: compilations over 100 of them, and over an adaptation; bytes that one page takes; bytes that the adaptation
   moved, of the bytes of all pages.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.files import write_json
from dynamo_jax.generation import quantized_language_model
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import new_cache
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.adapt import observe_windows
from dynamo_jax.runtime.generate import Sampling, decode
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.store import page_counts

CAPACITY = 1024  # slots of the cache
SETTINGS = QuantizeConfig(quantizer="rtn", window=128, calibration_windows=16)


class Compilations(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Compiling ")


def made_up_texts() -> dict[str, str]:
    """Two kinds, so that there is something to tell apart; their quality does not matter here."""
    sums = "\n".join(f"{i} + {7 * i} = {8 * i}, and {9 * i} - {i} = {8 * i}." for i in range(400))
    code = "\n".join(f"def f{i}(x, y={i}):\n    return [x * {i % 7} for _ in range(y)]" for i in range(400))
    return {"sums": sums, "code": code}


def states_of(model: QuantizedModel, batch: int) -> tuple[serving.Host, dict[str, serving.State]]:
    host, watched = serving.init(model, requests=batch)
    unwatched = watched._replace(watch=None)
    plain = unwatched._replace(tables=watched.tables[:1])
    return host, {"plain": plain, "switched": unwatched, "watched": watched}


def step_arguments(language: Any, batch: int) -> tuple[Any, ...]:
    sampling = Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1), jax.random.key(0))
    return jnp.full(batch, 7, jnp.int32), new_cache(language.config, batch, CAPACITY, language.dtype), sampling


def counted(language: Any, states: dict[str, serving.State], batch: int) -> dict[str, dict[str, float]]:
    out = {}
    token, cache, sampling = step_arguments(language, batch)
    for name, state in states.items():
        fixed = (language.config, language.dtype, language.parameters, state)
        found = decode.lower(*fixed, token, np.ones(batch, bool), cache, sampling).compile().cost_analysis()
        out[name] = {"flops": float(found["flops"]), "bytes": float(found["bytes accessed"])}
    return out


def measured(language: Any, states: dict[str, serving.State], batch: int, steps: int) -> dict[str, float]:
    """Median seconds of a step."""
    alive = np.ones(batch, bool)
    running = {name: step_arguments(language, batch) for name in states}
    times: dict[str, list[float]] = {name: [] for name in states}
    for step in range(min(steps, CAPACITY - 1)):
        for name, state in states.items():
            token, cache, sampling = running[name]
            start = time.perf_counter()
            fixed = (language.config, language.dtype, language.parameters)
            token, cache, watch = decode(*fixed, state, token, alive, cache, sampling)
            token.block_until_ready()
            if step >= 5:
                times[name].append(time.perf_counter() - start)
            running[name] = (token, cache, sampling)
            states[name] = state._replace(watch=watch)
    return {name: float(np.median(t)) for name, t in times.items()}


def moved(language: Any, model: QuantizedModel, host: serving.Host, state: serving.State, batch: int) -> dict[str, Any]:
    """Compilations and bytes of switches and of one adaptation between steps that run already."""
    token, cache, sampling = step_arguments(language, batch)
    alive = np.ones(batch, bool)
    fixed = (language.config, language.dtype, language.parameters)
    rng = np.random.default_rng(0)

    def text() -> np.ndarray:
        """Four windows that use a few tokens only, other ones each time."""
        return rng.choice(rng.integers(0, model.config.vocab_size, 50), (4, 129))

    host, state = serving.adapt(model, host, serving.switch(state, 0), text())  # whatever happens once
    token, cache, watch = decode(*fixed, state, token, alive, cache, sampling)
    handler, logger = Compilations(), logging.getLogger("jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with jax.log_compiles():
            for index in range(100):
                state = serving.switch(state, index % 2)
                token, cache, watch = decode(*fixed, state, token, alive, cache, sampling)
                state = state._replace(watch=watch)
            seen = observe_windows(model, text())
            move = serving.begin(host, state, serving.adapted(model, host, state, seen))
            host, state = serving.finish(host, state, move)
            token, cache, watch = decode(*fixed, serving.switch(state, 1), token, alive, cache, sampling)
            jax.block_until_ready(token)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True
    held = state.resident.pages.items()
    pages = {n: sum(a.nbytes for a in jax.tree.leaves(own)) // max(1, len(own.codes)) for n, own in held}
    counts = page_counts(model.plan)
    return {
        "compilations": handler.count,
        "page_bytes": pages,
        "pages_moved": move.staged.pages,
        "bytes_moved": move.staged.nbytes(),
        "bytes_of_pages": sum(counts[n] * pages[n] for n in pages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, action="append", help="requests that decode together; 1 and 8 by default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, _ = quantize(load_decoder(BUNDLED), load_tokenizer(BUNDLED), made_up_texts(), SETTINGS)
    language, _ = quantized_language_model(model, jnp.bfloat16)
    rows = []
    print(f"{'batch':>5s} {'step':10s} {'flops':>12s} {'':>7s} {'bytes':>14s} {'':>7s} {'ms':>8s} {'':>6s}")
    for batch in arguments.batch or [1, 8]:
        _, states = states_of(model, batch)
        count = counted(language, states, batch)
        seconds = measured(language, states, batch, arguments.steps)
        for name, found in count.items():
            row = {"batch": batch, "step": name, **found, "seconds": seconds[name]}
            row |= {f"{key}_above_plain": found[key] / count["plain"][key] - 1 for key in ("flops", "bytes")}
            row["time_of_plain"] = seconds[name] / seconds["plain"]
            rows.append(row)
            print(
                f"{batch:5d} {name:10s} {found['flops']:12,.0f} {row['flops_above_plain']:+7.2%} "
                f"{found['bytes']:14,.0f} {row['bytes_above_plain']:+7.2%} {1e3 * seconds[name]:8.3f} "
                f"{row['time_of_plain']:5.2f}x",
                flush=True,
            )
    host, states = states_of(model, 1)
    switches = moved(language, model, host, states["watched"], 1)
    print(f"compilations in 100 switches and an adaptation: {switches['compilations']}")
    print(f"bytes of a page, by level: {switches['page_bytes']}")
    share = switches["bytes_moved"] / switches["bytes_of_pages"]
    print(
        f"an adaptation moved {switches['pages_moved']:,} pages in {switches['bytes_moved']:,} bytes, chunks filled up,"
    )
    print(f"{share:.0%} of the bytes of the baseline's pages")
    if arguments.json:
        write_json(arguments.json, {"results": rows, "switches": switches, "jax": jax.__version__})


if __name__ == "__main__":
    main()
