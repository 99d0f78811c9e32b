"""A whole decode step of a published model at 3 bits, compiled for one TPU core that is not here: does it fit?

    python benchmarks/tpu_decode.py [--chip v6e] [--model qwen3-30b-a3b] [--layers N] [--json PATH]

Everything but the experts is bfloat16. Experts: a third of them each at 2, 3 and 4 bits in the baseline, half as many
slots again for other variants, two variants, 8 requests with a cache of 4,096 tokens each. Only shapes are needed.
Layers are stacked and run in a loop (``dynamo_jax.models.stacked``), so that the experts' kernel is compiled once.
"resident" is what the program is given and "temporary" what it needs beside it, from the compiler's memory analysis;
"memory" is that of the core.
"""

from __future__ import annotations

import bundles  # isort: skip  (before jax)

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from layers import MODELS, Layer
from tpu_schedule import GROUP, tiled_shapes

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.stacked import new_stacked_cache, stacked, stacked_decoder
from dynamo_jax.runtime.memory import SPARE
from dynamo_jax.runtime.monitor import start
from dynamo_jax.runtime.serving import State, experts, observe
from dynamo_jax.runtime.signatures import DIRECTIONS, Signatures

MEMORY = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}  # GiB of a core
REQUESTS, CAPACITY, VARIANTS, KNOWN = 8, 4096, 2, 3


def state_of(config: ModelConfig) -> Any:
    """The shapes of the run time's state."""
    of = jax.ShapeDtypeStruct
    layers, count = config.num_moe_layers, config.num_experts
    layer = Layer(count, config.hidden_size, config.intermediate_size, config.num_experts_per_tok)
    resident, table = tiled_shapes(layers, layer, {3: 2 / 3 * (1 + SPARE), 4: 1 / 3 * (1 + SPARE)}, GROUP)
    each = (layers, count)
    shapes = ((KNOWN, *each), each, (DIRECTIONS, *each), (DIRECTIONS,), (KNOWN,), (KNOWN,))
    signatures = Signatures(*(of(shape, jnp.float32) for shape in shapes))
    watch = jax.eval_shape(functools.partial(start, requests=REQUESTS), signatures)
    return State(resident, (table,) * VARIANTS, of((REQUESTS,), jnp.int32), signatures, watch)


def decode(config: ModelConfig, arrays: Any, state: State, cache: Any, tokens: Any) -> Any:
    """The next token of each request, the cache and the monitors after it."""
    model = stacked_decoder(config, arrays)
    mask = jnp.ones(tokens.shape, bool)
    hidden, routings, cache = model.cached_states(tokens, mask, cache, experts=experts(state), dtype=jnp.bfloat16)
    return jnp.argmax(model.logits(hidden)[:, -1], axis=-1), cache, observe(state, routings).watch


def weights_and_cache(config: ModelConfig) -> tuple[dict[str, Any], Any]:
    """All parameters but those of experts, and a cache, with layers stacked."""
    arrays = parameters(Decoder(config, with_experts=False, rngs=nnx.Rngs(0)))
    return stacked(config, arrays), new_stacked_cache(config, REQUESTS, CAPACITY, jnp.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", action="append", choices=list(bundles.CHIPS), help="v6e and tpu7x by default")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="the two largest by default")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try it out")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    print(f"{'chip':6s} {'model':15s} layers  resident  temporary  memory (GiB)   fits  seconds to compile")
    for chip in chosen.chip or ("v6e", "tpu7x"):
        for name in chosen.model or ("mixtral-8x7b", "qwen3-30b-a3b"):
            config = MODELS[name]
            if chosen.layers:
                config = dataclasses.replace(config, layers=config.layers[: chosen.layers])
            arrays, cache = jax.eval_shape(functools.partial(weights_and_cache, config))
            arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), arrays)
            tokens = jax.ShapeDtypeStruct((REQUESTS, 1), jnp.int32)
            begin = time.perf_counter()
            step = functools.partial(decode, config)
            analysis = bundles.compiled(bundles.CHIPS[chip], step, arrays, state_of(config), cache, tokens)[0]
            memory = analysis.memory_analysis()
            seconds = time.perf_counter() - begin
            resident, temporary = (size / 2**30 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
            fits = resident + temporary + memory.output_size_in_bytes / 2**30 < MEMORY[chip]
            row = {"chip": chip, "model": name, "layers": config.num_hidden_layers, "resident_gib": resident}
            rows.append(row | {"temporary_gib": temporary, "memory_gib": MEMORY[chip], "fits": fits})
            print(
                f"{chip:6s} {name:15s} {config.num_hidden_layers:6d} {resident:9.2f} {temporary:10.2f} "
                f"{MEMORY[chip]:7d} {fits!s:>12s} {seconds:10.0f}",
                flush=True,
            )
            bundles.write(chosen.json, rows=rows)


if __name__ == "__main__":
    main()
