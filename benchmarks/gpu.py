"""Quantized experts on the GPU at hand: are they right, and how fast, beside bfloat16 experts and copied bytes?

    python benchmarks/gpu.py [--part check --part layers --part model] [--limit 420] [--json PATH]

    check    both kernels against the XLA path with float32 operands, for widths, arrangements of pages, numbers of rows
             and variants, on new random inputs, in memory that held NaN before
    layers   microseconds of one layer's experts, gate, up, activation and down: ours with all experts at 2, 3 and 4
             bits and mixed (2, 3 or 4 for each expert's gate and up, and for its down, a third each), one program for
             all; ``jax.lax.ragged_dot`` in bfloat16, gate and up in one product; ``tokamax.ragged_dot`` in bfloat16,
             and with int4 weights, where it is installed
    model    a synthetic OLMoE-1B-7B, tokens a second of prefill and decoding: bfloat16 experts, 4 bits, 3 bits mixed,
             and the same with two variants and a monitor for each request; how often a switch compiled

A layer's weights are other ones in each turn, of several layers that together are larger than the cache of the GPU.
"us": the least of three runs of many turns, over their number. ``speedup_vs_bf16``: over ``jax.lax.ragged_dot``.
``share_of_bandwidth``: bytes of the weights that are read, scales counted, over time, as a share of what a plain copy
of 2 GiB reads and writes a second in the same run. Tokens choose experts at random (seed 0). The bundled model's
decode step, plain and switched, is measured by ``switch_overhead.py``, on a GPU as on a CPU.

``--limit``: seconds after which nothing new is begun; what was measured is written after each row.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from layers import MODELS, PREFILL, SHAPES, Layer, sizes_of

from dynamo_jax.kernels.fragments import BLOCK, FragmentBase, FragmentPages, FragmentResident, empty_pages
from dynamo_jax.kernels.quantized_gpu import quantized_experts_gpu
from dynamo_jax.kernels.quantized_xla import quantized_experts_xla
from dynamo_jax.models.decoder import Decoder, new_cache, parameters
from dynamo_jax.models.experts import silu_gated
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.generate import Sampling, decode, prefill
from dynamo_jax.runtime.monitor import Signatures, start

SCALE_BITS = 16 / BLOCK
PLANS = {"2": (2,), "3": (3,), "4": (4,), "mixed": (2, 3, 4)}
TOKENS = {"mixtral-8x7b": (1, 16, 64, PREFILL), "olmoe-1b-7b": (1, 16, 64, PREFILL)}
OTHER_TOKENS = (16, PREFILL)
CACHE_BYTES = 2**28  # of quantized weights that turns go through; no cache is as large
TOLERANCE = 0.01  # of the largest output: operands have eight bits


def layers_of(layer: Layer, tokens: int) -> int:
    """How many layers' weights turns go through, so that one turn finds nothing of an earlier one in the cache."""
    touched = int((sizes_of(layer, tokens) > 0).sum()) * 3 * layer.hidden * layer.channels * 2 // 8
    return max(2, min(8, -(-CACHE_BYTES // touched)))


def planes(layers: int, layer: Layer, key: Any) -> FragmentResident:
    """Random base planes, and pages of 3 and 4 bits for all blocks."""
    blocks = layer.channels // BLOCK
    lead, count = (layers, layer.experts, blocks, 3), layers * layer.experts * blocks * 3

    def bits(shape: tuple[int, ...], salt: int) -> Any:
        return jax.lax.bitcast_convert_type(
            jax.random.bits(jax.random.fold_in(key, salt), shape, jnp.uint32), jnp.int32
        )

    scales = jnp.full((*lead, layer.hidden), 0.002, jnp.bfloat16)
    pages = {}
    for level in (3, 4):
        empty = jax.eval_shape(functools.partial(empty_pages, count, 1, level, layer.hidden))
        pages[level] = FragmentPages(bits(empty.codes.shape, level), None)
    return FragmentResident(FragmentBase(bits((*lead, layer.hidden // 64, 512), 2), scales), pages)


def widths_of(layers: int, layer: Layer, choices: tuple[int, ...]) -> np.ndarray:
    """(layers, E, 2): of gate and up, and of down."""
    each = np.resize(np.repeat(choices, -(-layers * layer.experts * 2 // len(choices))), layers * layer.experts * 2)
    return np.random.default_rng(0).permutation(each).reshape(layers, layer.experts, 2)


def table(widths: np.ndarray, layer: Layer) -> dict[int, Any]:
    """Pages lie in the order of layers, experts, projections and blocks."""
    blocks = layer.channels // BLOCK
    each = np.repeat(widths[:, :, [0, 0, 1]], blocks, axis=2)
    slots = np.arange(each.size).reshape(each.shape)
    return {level: jnp.asarray(np.where(each >= level, slots, -1), jnp.int32) for level in (3, 4)}


def quantized_inputs(layer: Layer, tokens: int, layers: int = 1) -> tuple[Any, ...]:
    """Rows, rows of each expert and planes."""
    rows = jax.random.normal(jax.random.key(1), (tokens * layer.chosen, layer.hidden), jnp.bfloat16)
    sizes = jnp.asarray(sizes_of(layer, tokens), jnp.int32)
    return rows, sizes, planes(layers, layer, jax.random.key(0))


def bytes_read(layer: Layer, tokens: int, widths: np.ndarray) -> float:
    """Of a mean layer's weights, each used expert once."""
    used = sizes_of(layer, tokens) > 0
    bits = (2 * widths[:, used, 0] + widths[:, used, 1] + 3 * SCALE_BITS).sum() / len(widths)
    return float(bits * layer.hidden * layer.channels / 8)


def seconds(run: Callable[..., Any], *args: Any, once: float = 0.05) -> float:
    """The least of three means; ``run(turns, *args)`` takes its turns on the device."""
    jax.block_until_ready(run(2, *args))
    begin = time.perf_counter()
    jax.block_until_ready(run(4, *args))
    turns = int(np.clip(once / max((time.perf_counter() - begin) / 4, 1e-6), 8, 2000)) // 8 * 8
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(run(turns, *args))
        times.append((time.perf_counter() - begin) / turns)
    return min(times)


def chained(experts: Callable[..., Any], layers: int) -> Callable[..., Any]:
    """Turns one after the other, each of the next layer's weights; a turn's rows wait for the outputs before."""

    @jax.jit
    def run(turns: Any, rows: Any, *args: Any) -> Any:
        def turn(index: Any, x: Any) -> Any:
            out = experts(x, index % layers, *args)
            return rows + out * jnp.bfloat16(1e-30)

        return jax.lax.fori_loop(0, turns, turn, rows)

    return run


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    array = jnp.ones(2**29, jnp.float32)

    @jax.jit
    def run(turns: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, turns, lambda _, y: y * jnp.float32(1.0000001), x)

    return 2 * array.nbytes / seconds(run, array)


def bfloat16_experts(layer: Layer, tokens: int, product: Callable[..., Any]) -> float:
    """Seconds with ``product(rows, weights, sizes)``; two layers' weights take turns."""
    shapes = (layer.experts, layer.hidden, 2 * layer.channels), (layer.experts, layer.channels, layer.hidden)
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * 0.02, static_argnums=1)
    weights = [[make(jax.random.key(2 * i + j), shape) for j, shape in enumerate(shapes)] for i in range(2)]
    rows = jax.random.normal(jax.random.key(1), (tokens * layer.chosen, layer.hidden), jnp.bfloat16)
    sizes = jnp.asarray(sizes_of(layer, tokens), jnp.int32)

    @jax.jit
    def run(turns: Any, rows: Any, sizes: Any, weights: Any) -> Any:
        def turn(_: Any, x: Any) -> Any:
            for inner, outer in weights:
                both = product(x, inner, sizes)
                h = silu_gated(both[:, : layer.channels], both[:, layer.channels :])
                x = rows + product(h.astype(rows.dtype), outer, sizes) * jnp.bfloat16(1e-30)
            return x

        return jax.lax.fori_loop(0, turns // 2, turn, rows)

    return seconds(run, rows, sizes, weights)


def peers() -> dict[tuple[str, str], Callable[..., Any]]:
    """Products of rows and bfloat16 weights, by kernel and bits."""

    def ragged(rows: Any, weights: Any, sizes: Any) -> Any:
        return jax.lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.bfloat16)

    found: dict[tuple[str, str], Callable[..., Any]] = {("jax.lax.ragged_dot", "16"): ragged}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        found["tokamax.ragged_dot", "16"] = tokamax.ragged_dot
    return found


def measured_layer(layer: Layer, tokens: int) -> Iterator[tuple[str, str, float, float]]:
    """Kernel, bits, seconds and bytes of weights; a kernel that fails has its error in place of seconds."""

    def tried(measure: Callable[[], float]) -> Any:
        try:
            return measure()
        except Exception as error:  # the others' rows are wanted still
            return str(error)[:500]

    whole = 6.0 * layer.hidden * layer.channels * int((sizes_of(layer, tokens) > 0).sum())
    for (name, bits), product in peers().items():
        yield name, bits, tried(functools.partial(bfloat16_experts, layer, tokens, product)), whole
    layers = layers_of(layer, tokens)
    run = chained(in_turn, layers)
    inputs = jax.jit(functools.partial(quantized_inputs, layer, tokens, layers))()
    for bits, choices in PLANS.items():
        widths = widths_of(layers, layer, choices)
        own = functools.partial(seconds, run, *inputs, (table(widths, layer),))
        yield "ours", bits, tried(own), bytes_read(layer, tokens, widths)


def measure_layers(add: Callable[..., None], late: Callable[[], bool]) -> None:
    copied = copy_bandwidth()
    print(f"a copy reads and writes {copied / 1e12:.2f} TB a second")
    print(f"\n{'shape':17s} {'tokens':>6s} {'kernel':20s} {'bits':>6s} {'us':>9s}  over bf16  share of bandwidth")
    order = [(name, tokens) for name in ("olmoe-1b-7b", "mixtral-8x7b") for tokens in TOKENS[name]]
    order += [(name, tokens) for name in SHAPES if name not in TOKENS for tokens in OTHER_TOKENS]
    for name, tokens in order:
        if late():
            print(f"{name}, {tokens} tokens: not measured, the time was up")
            continue
        plain = 0.0
        for kernel, bits, found, size in measured_layer(SHAPES[name], tokens):
            row = {"shape": name, "tokens": tokens, "kernel": kernel, "bits": bits}
            if isinstance(found, str):
                add("layers", row | {"error": found})
                print(f"{name:17s} {tokens:6d} {kernel:20s} {bits:>6s} failed: {found[:200]}", flush=True)
                continue
            plain = found if kernel == "jax.lax.ragged_dot" else plain
            row |= {"us": found * 1e6, "speedup_vs_bf16": plain / found, "share_of_bandwidth": size / found / copied}
            add("layers", row)
            print(
                f"{name:17s} {tokens:6d} {kernel:20s} {bits:>6s} {row['us']:9.1f} {row['speedup_vs_bf16']:9.2f}x "
                f"{row['share_of_bandwidth']:12.2f}",
                flush=True,
            )


def in_turn(rows: Any, number: Any, sizes: Any, resident: Any, tables: Any) -> Any:
    return quantized_experts_gpu(rows, sizes, resident, tables, number, silu_gated)


def poisoned() -> None:
    """Leave NaN in memory that is free again afterwards."""
    jax.block_until_ready([jnp.full(2**26, jnp.nan) for _ in range(8)])


def check(add: Callable[..., None], late: Callable[[], bool]) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from kernel_cases import Case, biases_of, rows_and_sizes
    from kernel_cases import widths_of as random_widths

    print(f"{'widths':12s} {'rows':>6s} {'pages of':12s} {'variants':>8s}  largest error over largest output")
    cases = [((2, 3, 4, 8), [5, 0, 9, 1, 20, 0], True, 2), ((2, 3, 4, 8), [400, 0, 33], False, 1)]
    cases += [((bits,), [3, 1, 0, 17], bits % 2 == 0, 1) for bits in (2, 3, 4, 8)]
    cases += [
        ((2, 3, 4), [70, 90, 0, 120, 64, 1], True, 2),
        ((2, 3, 4), [40, 30], False, 1),
        ((2, 3, 4), [1, 0, 0], True, 1),
    ]
    seed = int(time.time())
    for number, (choices, sizes, apart, variants) in enumerate(cases):
        if late():
            print("the rest was not checked, the time was up")
            return
        experts = len(sizes) // variants
        widths = [random_widths(seed + v, experts, 512, apart, choices) for v in range(variants)]
        case = Case.of("fragments", seed + number, experts, 512, 768, apart, widths)
        rows, counts = rows_and_sizes(seed + number, sizes, 768)
        biases = biases_of(seed, experts, 512, 768) if number % 2 else None
        with jax.default_matmul_precision("highest"):
            run = jax.jit(functools.partial(quantized_experts_xla, activation=silu_gated), static_argnames="layer")
            wanted = run(rows, counts, case.resident, case.tables, layer=1, biases=biases)
        own = jax.jit(functools.partial(quantized_experts_gpu, activation=silu_gated))
        poisoned()
        args = (rows.astype(jnp.bfloat16), counts, case.arranged, case.tables)
        found = own(*args, layer=jnp.int32(1), biases=biases)
        wanted, found = (np.asarray(a, np.float32) for a in (wanted, found))
        error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        named = ", ".join(map(str, choices))
        row = {"bits": named, "rows": int(sum(sizes)), "together": 1 if apart else 3, "variants": variants}
        add("check", row | {"error": error, "right": error <= TOLERANCE})
        right = "" if error <= TOLERANCE else "   WRONG"
        print(f"{named:12s} {sum(sizes):6d} {row['together']:12d} {variants:8d}  {error:.5f}{right}", flush=True)


def state_of(layer: Layer, layers: int, requests: int, choices: tuple[int, ...], resident: Any) -> serving.State:
    """Two variants, other experts having other widths in the second, and a monitor that knows three datasets."""
    tables = tuple(table(widths_of(layers, layer, choices)[:, ::step], layer) for step in (1, -1))
    shares = jax.nn.softmax(jax.random.normal(jax.random.key(3), (3, layers, layer.experts)))
    signatures = Signatures(shares, jnp.zeros((3, 3)), jnp.broadcast_to(jnp.eye(3), (3, 3, 3)), jnp.full(3, 1e9))
    return serving.State(resident, tables, jnp.zeros(requests, jnp.int32), signatures, start(signatures, requests))


def measure_model(add: Callable[..., None], late: Callable[[], bool]) -> None:
    config = MODELS["olmoe-1b-7b"]
    layer, layers = SHAPES["olmoe-1b-7b"], config.num_hidden_layers

    def random_parameters(with_experts: bool) -> dict[str, Any]:
        build = functools.partial(Decoder, config, with_experts=with_experts)
        shapes = jax.eval_shape(lambda: parameters(build(rngs=nnx.Rngs(0))))
        make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * 0.02, static_argnums=1)
        return {n: make(jax.random.key(i), s.shape) for i, (n, s) in enumerate(sorted(shapes.items()))}

    sampling = Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1), jax.random.key(0))
    print(f"\n{'experts':32s} {'requests':>8s} {'prefill, tokens/s':>18s} {'decode, tokens/s':>18s}  ms a step")
    small = random_parameters(False)
    resident = jax.jit(functools.partial(planes, layers, layer))(jax.random.key(0))
    kinds: list[tuple[str, Any]] = [("bfloat16", None)]
    for bits in ("4", "mixed"):
        kinds += [(bits, "plain"), (bits, "switched and watched")]
    for requests in (1, 8):
        for bits, how in kinds:
            if late():
                print("the rest was not measured, the time was up")
                return
            state, arrays = None, small
            if how is None:
                arrays = random_parameters(True)
            else:
                state = state_of(layer, layers, requests, PLANS[bits], resident)
                if how == "plain":
                    state = state._replace(tables=state.tables[:1], watch=None)
                else:
                    state = serving.switch(state, np.arange(requests) % 2)
            fixed, length = (config, jnp.bfloat16, arrays, state), PREFILL // requests
            tokens = np.random.default_rng(0).integers(0, config.vocab_size, (requests, length))
            mask, times = np.ones((requests, length), bool), []
            for _ in range(3):
                cache = new_cache(config, requests, 2 * PREFILL, jnp.bfloat16)
                jax.block_until_ready(cache)
                begin = time.perf_counter()
                token, cache, _ = prefill(*fixed, tokens, mask, cache, sampling)
                token.block_until_ready()
                times.append(time.perf_counter() - begin)
            alive = np.ones(requests, bool)
            steps = []
            for _ in range(3):
                begin = time.perf_counter()
                for _ in range(32):
                    token, cache, _ = decode(*fixed, token, alive, cache, sampling)
                token.block_until_ready()
                steps.append((time.perf_counter() - begin) / 32)
            name = bits if how is None else f"{bits} bits, {how}"
            row = {"experts": name, "requests": requests, "prefill_tokens_a_second": requests * length / min(times)}
            row |= {"decode_tokens_a_second": requests / min(steps), "step_ms": 1e3 * min(steps)}
            add("model", row)
            print(
                f"{name:32s} {requests:8d} {row['prefill_tokens_a_second']:18,.0f} "
                f"{row['decode_tokens_a_second']:18,.0f} {row['step_ms']:10.3f}",
                flush=True,
            )
            del arrays, state, cache, fixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", action="append", choices=("check", "layers", "model"), help="all by default")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which nothing new is begun")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begin = time.monotonic()
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"JAX runs on {device.platform} here: this benchmark is for a GPU")
    print(f"{device.device_kind}, compute capability {device.compute_capability}, jax {jax.__version__}")
    found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    found |= {"date": datetime.date.today().isoformat(), "check": [], "layers": [], "model": []}

    def add(part: str, row: dict[str, Any]) -> None:
        found[part].append(row)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")

    parts = {"check": check, "layers": measure_layers, "model": measure_model}
    for name, run in parts.items():
        if name in (arguments.part or parts):
            run(add, lambda: time.monotonic() - begin > arguments.limit)
    print(f"{time.monotonic() - begin:.0f} s")
    if wrong := [row for row in found["check"] if not row["right"]]:
        raise SystemExit(f"{len(wrong)} of {len(found['check'])} checks failed")


if __name__ == "__main__":
    main()
