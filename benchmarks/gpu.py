"""Quantized experts on the GPU at hand: are they right, and how fast, beside bfloat16 experts and copied bytes?

    python benchmarks/gpu.py [--part check --part layers --part model] [--limit 400] [--json PATH]

    check    both kernels against the XLA path with float32 operands, for widths, arrangements of pages, numbers of rows
             and variants, on new random inputs, in memory that held NaN before
    layers   microseconds of one layer's experts, gate, up, activation and down: ours with all experts at 2, 3 and 4
             bits and mixed (2, 3 or 4 for each expert's gate and up, and for its down, a third each), one program for
             all; ``jax.lax.ragged_dot`` in bfloat16, gate and up in one product; ``tokamax.ragged_dot`` in bfloat16
             and with int4 weights where it is installed, a scale for each channel and 256 inputs (128 where 256 do
             not divide them)
    model    a synthetic OLMoE-1B-7B, tokens a second of prefill and decoding: experts in bfloat16 by ragged_dot, at 4
             bits, 3 bits mixed, and the same with two variants and a monitor for each request; programs that a switch
             compiled

A layer's weights are other ones in each turn, of several layers that together are larger than the cache of the GPU.
"us": the least of three runs of many turns, over their number. ``speedup_vs_bf16``: over ``jax.lax.ragged_dot``.
``share_of_bandwidth``: bytes of the weights that are read, our scales counted, over time, as a share of what a plain
copy of 2 GiB reads and writes a second in the same run. Tokens choose experts at random (seed 0). The bundled model's
decode step, plain and switched, is measured by ``switch_overhead.py``, on a GPU as on a CPU.

Parts run in processes of their own. ``--limit``: seconds after which nothing new is begun; what was measured is written
after each row.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from layers import MODELS, PREFILL, SHAPES, Layer, sizes_of
from random_model import batch_of, model_arrays

from dynamo_jax.kernels.fragments import BLOCK, FragmentBase, FragmentPages, FragmentResident, empty_pages
from dynamo_jax.kernels.quantized_gpu import quantized_experts_gpu
from dynamo_jax.kernels.quantized_xla import quantized_experts_xla
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.experts import silu_gated
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.monitor import start
from dynamo_jax.runtime.signatures import DIRECTIONS, Signatures

SCALE_BITS = 16 / BLOCK
PARTS = ("check", "layers", "model")
PLANS = {"2": (2,), "3": (3,), "4": (4,), "mixed": (2, 3, 4)}
TOKENS = {"mixtral-8x7b": (1, 16, 64, PREFILL), "olmoe-1b-7b": (1, 16, 64, PREFILL)}
OTHER_TOKENS = (16, PREFILL)
CACHE_BYTES = 2**28  # of quantized weights that turns go through; no cache is as large
TURNS = 64  # in one program
TOLERANCE = 0.01  # of the largest output: operands have eight bits


def layers_of(layer: Layer, tokens: int) -> int:
    """How many layers' weights turns go through, so that one turn finds nothing of an earlier one in the cache."""
    touched = int((sizes_of(layer, tokens) > 0).sum()) * 3 * layer.hidden * layer.channels * 2 // 8
    return max(2, min(24, -(-CACHE_BYTES // touched)))


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


def seconds(run: Callable[..., Any], rows: Any, *args: Any, turns: int = TURNS, once: float = 0.1) -> float:
    """Of one turn, the least of three means. ``run(rows, *args)`` takes ``turns`` of them on the device, one after the
    other, and returns rows for the next call."""
    rows = jax.block_until_ready(run(rows, *args))
    begin = time.perf_counter()
    rows = jax.block_until_ready(run(rows, *args))
    calls = int(np.clip(once / (time.perf_counter() - begin), 1, 20))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            rows = run(rows, *args)
        jax.block_until_ready(rows)
        times.append((time.perf_counter() - begin) / (calls * turns))
    return min(times)


def after(sizes: Any, x: Any) -> Any:
    """Rows of each expert, known no sooner than the rows, as in a model."""
    return sizes + (x[0, 0] != x[0, 0]).astype(jnp.int32)


def chained(layers: int) -> Callable[..., Any]:
    """Turns of ours, each of the next layer's weights."""

    @jax.jit
    def run(rows: Any, sizes: Any, resident: Any, tables: Any) -> Any:
        def turn(index: Any, x: Any) -> Any:
            out = quantized_experts_gpu(x, after(sizes, x), resident, tables, index % layers, silu_gated)
            return rows + out * jnp.bfloat16(1e-30)

        return jax.lax.fori_loop(0, TURNS, turn, rows)

    return run


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    run = jax.jit(lambda x: jax.lax.fori_loop(0, TURNS, lambda _, y: y * jnp.float32(1.0000001), x), donate_argnums=0)
    array = jnp.ones(2**29, jnp.float32)
    size = 2 * array.nbytes
    return size / seconds(run, array)


def peer_experts(layer: Layer, tokens: int, make: Callable[..., Any], product: Callable[..., Any]) -> float:
    """Seconds with ``product(rows, weights, sizes)`` of the weights ``make(layer, number)``; two layers take turns."""
    weights = [make(layer, number) for number in range(2)]
    rows = jax.random.normal(jax.random.key(1), (tokens * layer.chosen, layer.hidden), jnp.bfloat16)
    sizes = jnp.asarray(sizes_of(layer, tokens), jnp.int32)

    @jax.jit
    def run(rows: Any, sizes: Any, weights: Any) -> Any:
        def turn(_: Any, x: Any) -> Any:
            for own in weights:
                x = rows + multiplied(x, after(sizes, x), own, product) * jnp.bfloat16(1e-30)
            return x

        return jax.lax.fori_loop(0, TURNS // 2, turn, rows)

    return seconds(run, rows, sizes, weights)


def both_weights(layer: Layer, number: int, make: Callable[..., Any]) -> tuple[Any, Any]:
    """Gate and up side by side, and down, of ``make(key, shape)``."""
    shapes = (layer.experts, layer.hidden, 2 * layer.channels), (layer.experts, layer.channels, layer.hidden)
    inner, outer = (make(jax.random.key(2 * number + i), shape) for i, shape in enumerate(shapes))
    return inner, outer


def bfloat16_weights(layer: Layer, number: int) -> tuple[Any, Any]:
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * 0.02, static_argnums=1)
    return both_weights(layer, number, make)


def int4_weights(layer: Layer, number: int) -> tuple[Any, Any]:
    """As tokamax takes them."""
    import qwix

    @functools.partial(jax.jit, static_argnums=1)
    def make(key: Any, shape: tuple[int, int, int]) -> Any:
        experts, inputs, outputs = shape
        groups = inputs // (256 if inputs % 256 == 0 else 128)
        codes = jax.random.randint(key, shape, -8, 8, jnp.int8).astype(jnp.int4)
        return qwix.QArray(codes, jnp.full((experts, groups, outputs), 0.002, jnp.bfloat16))

    return both_weights(layer, number, make)


def multiplied(rows: Any, sizes: Any, weights: tuple[Any, Any], product: Callable[..., Any]) -> Any:
    both = product(rows, weights[0], sizes)
    channels = weights[1].shape[1]
    return product(silu_gated(both[:, :channels], both[:, channels:]).astype(rows.dtype), weights[1], sizes)


def ragged(rows: Any, weights: Any, sizes: Any) -> Any:
    return jax.lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.bfloat16)


class Peer(NamedTuple):
    """bits: a weight, scales not counted; weights: of (layer, number); product: of rows, weights and sizes."""

    name: str
    bits: int
    weights: Callable[..., tuple[Any, Any]]
    product: Callable[..., Any]


def peers() -> list[Peer]:
    found = [Peer("jax.lax.ragged_dot", 16, bfloat16_weights, ragged)]
    if importlib.util.find_spec("tokamax"):

        def tokamax_ragged(rows: Any, weights: Any, sizes: Any) -> Any:
            import tokamax

            # its own kernel or an error, not another one in silence
            how = {"preferred_element_type": jnp.bfloat16, "implementation": "mosaic"}
            return tokamax.ragged_dot(rows, weights, sizes, **how)

        found += [Peer("tokamax.ragged_dot", 16, bfloat16_weights, tokamax_ragged)]
        found += [Peer("tokamax.ragged_dot", 4, int4_weights, tokamax_ragged)]
    return found


def measured_layer(layer: Layer, tokens: int) -> Iterator[tuple[str, str, float, float]]:
    """Kernel, bits, seconds and bytes of weights; a kernel that fails has its error in place of seconds."""

    def tried(measure: Callable[[], float]) -> Any:
        try:
            return measure()
        except Exception as error:  # the others' rows are wanted still
            return str(error)[:500]

    weights = 3.0 * layer.hidden * layer.channels * int((sizes_of(layer, tokens) > 0).sum())
    for peer in peers():
        own = functools.partial(peer_experts, layer, tokens, peer.weights, peer.product)
        yield peer.name, str(peer.bits), tried(own), weights * peer.bits / 8
    layers = layers_of(layer, tokens)
    run = chained(layers)
    inputs = jax.jit(functools.partial(quantized_inputs, layer, tokens, layers))()
    for bits, choices in PLANS.items():
        widths = widths_of(layers, layer, choices)
        ours = functools.partial(seconds, run, *inputs, (table(widths, layer),))
        yield "ours", bits, tried(ours), bytes_read(layer, tokens, widths)


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


def poisoned() -> None:
    """Leave NaN in memory that is free again afterwards."""
    jax.block_until_ready([jnp.full(2**26, jnp.nan) for _ in range(8)])


CASES: list[tuple[tuple[int, ...], list[int], bool, int]] = [  # widths, rows of experts, pages apart, variants
    ((2, 3, 4), [1, 0, 0], True, 1),
    ((2, 3, 4, 8), [5, 0, 9, 1, 20, 0], True, 2),
    ((2, 3, 4, 8), [400, 0, 33], False, 1),
    ((2,), [3, 1, 0, 17], True, 1),
    ((3,), [3, 1, 0, 17], False, 1),
    ((4,), [3, 1, 0, 17], True, 1),
    ((8,), [3, 1, 0, 17], False, 1),
    ((2, 3, 4), [70, 90, 0, 120, 64, 1], True, 2),
    ((2, 3, 4), [40, 30], False, 1),
]


def case_of(number: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Random planes, float32 rows, rows of each group, and biases in every second case."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests/kernels"))
    from kernel_cases import Case, biases_of, rows_and_sizes
    from kernel_cases import widths_of as random_widths

    choices, sizes, apart, variants = CASES[number]
    experts = len(sizes) // variants
    widths = [random_widths(seed + v, experts, 512, apart, choices) for v in range(variants)]
    case = Case.of("fragments", seed, experts, 512, 768, apart, widths)
    rows, counts = rows_and_sizes(seed, sizes, 768)
    return case, rows, counts, biases_of(seed, experts, 512, 768) if number % 2 else None


def error_of(number: int, seed: int) -> float:
    """The largest error over the largest output."""
    case, rows, counts, biases = case_of(number, seed)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(functools.partial(quantized_experts_xla, activation=silu_gated), static_argnames="layer")
        wanted = run(rows, counts, case.resident, case.tables, layer=1, biases=biases)
    poisoned()
    args = (rows.astype(jnp.bfloat16), counts, case.arranged, case.tables, 1, silu_gated, biases)
    wanted, found = (np.asarray(a, np.float32) for a in (wanted, quantized_experts_gpu(*args)))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def check(add: Callable[..., None], late: Callable[[], bool]) -> None:
    print(f"{'widths':12s} {'rows':>6s} {'together':>8s} {'variants':>8s}  largest error over largest output")
    for number, (choices, sizes, apart, variants) in enumerate(CASES):
        if late():
            print("the rest was not checked, the time was up")
            return
        row = {"bits": ", ".join(map(str, choices)), "rows": sum(sizes), "together": 1 if apart else 3}
        row |= {"variants": variants}
        try:
            row["error"] = error_of(number, int(time.time()))
            row["right"] = bool(row["error"] <= TOLERANCE)
        except Exception as error:  # the other cases are wanted still
            row |= {"error": str(error)[:500], "right": False}
        add("check", row)
        said = f"{row['error']:.5f}" if isinstance(row["error"], float) else row["error"][:200]
        right = "" if row["right"] else "   WRONG"
        print(f"{row['bits']:12s} {row['rows']:6d} {row['together']:8d} {variants:8d}  {said}{right}", flush=True)


def state_of(layer: Layer, layers: int, requests: int, choices: tuple[int, ...], resident: Any) -> serving.State:
    """Two variants, other experts having other widths in the second, and a monitor that knows three datasets."""
    tables = tuple(table(widths_of(layers, layer, choices)[:, ::step], layer) for step in (1, -1))
    shares = jax.nn.softmax(jax.random.normal(jax.random.key(3), (3, layers, layer.experts)))
    directions = jax.random.normal(jax.random.key(4), (DIRECTIONS, layers, layer.experts))
    damping = jnp.zeros(DIRECTIONS)
    signatures = Signatures(shares, jnp.ones_like(shares[0]), directions, damping, jnp.zeros(3), jnp.full(3, 1e9))
    return serving.State(resident, tables, jnp.zeros(requests, jnp.int32), signatures, start(signatures, requests))


def plain_experts(weights: list[tuple[Any, Any]]) -> Any:
    """bfloat16 experts of all layers, gate and up in one product."""

    def experts(layer: int, x: Any, routing: Any, _: Any, __: Any) -> tuple[Any, Any]:
        order = sort_by_expert(routing.experts, weights[layer][1].shape[0])
        out = multiplied(gather_rows(x, order), order.group_sizes, weights[layer], ragged)
        return combine_rows(out, routing.gates, order).astype(x.dtype), routing

    return experts


@functools.partial(jax.jit, static_argnames=("config", "watched"), donate_argnames="cache")
def step(config: Any, watched: bool, arrays: Any, experts: Any, tokens: Any, mask: Any, cache: Any) -> Any:
    """The next token of each request, the cache, and the state after it. experts: bfloat16 weights, or a state."""
    model = with_parameters(config, arrays)
    run = serving.experts(experts) if isinstance(experts, serving.State) else plain_experts(experts)
    hidden, routings, cache = model.cached_states(tokens, mask, cache, experts=run, dtype=jnp.bfloat16)
    token = jnp.argmax(model.logits(hidden[:, -1:])[:, 0], axis=-1)
    return token, cache, serving.observe(experts, routings).watch if watched else None


def measure_model(add: Callable[..., None], late: Callable[[], bool]) -> None:
    config = MODELS["olmoe-1b-7b"]
    layer, layers = SHAPES["olmoe-1b-7b"], config.num_hidden_layers
    arrays = model_arrays(config)
    resident = jax.jit(functools.partial(planes, layers, layer))(jax.random.key(0))
    weights = [bfloat16_weights(layer, number) for number in range(layers)]

    def state(requests: int, bits: str, switched: bool) -> serving.State:
        own = state_of(layer, layers, requests, PLANS[bits], resident)
        if not switched:
            return own._replace(tables=own.tables[:1], watch=None)
        return serving.switch(own, np.arange(requests) % 2)

    kinds: dict[str, Callable[[int], Any]] = {"bfloat16": lambda requests: weights}
    for bits in ("4", "mixed"):
        kinds[f"{bits} bits, plain"] = functools.partial(state, bits=bits, switched=False)
        kinds[f"{bits} bits, switched and watched"] = functools.partial(state, bits=bits, switched=True)
    print(
        f"\n{'experts':32s} {'requests':>8s} {'prefill, tokens/s':>18s} {'decode, tokens/s':>17s}  ms a step  compiled"
    )
    for requests in (1, 8):
        for name, experts_of in kinds.items():
            if late():
                print("the rest was not measured, the time was up")
                return
            experts, length = experts_of(requests), PREFILL // requests
            fixed = (config, "watched" in name, arrays, experts)
            times = []
            for _ in range(3):
                tokens, mask, cache = jax.block_until_ready(batch_of(config, requests, length))
                begin = time.perf_counter()
                token, cache, _ = step(*fixed, tokens, mask, cache)
                token.block_until_ready()
                times.append(time.perf_counter() - begin)
            steps, one = [], np.ones((requests, 1), bool)
            for _ in range(3):
                begin = time.perf_counter()
                for _ in range(32):
                    token, cache, _ = step(*fixed, token[:, None], one, cache)
                token.block_until_ready()
                steps.append((time.perf_counter() - begin) / 32)
            programs = step._cache_size()
            if isinstance(experts, serving.State):  # to the other variant
                other = serving.switch(experts, 1 - experts.number)
                step(*fixed[:3], other, token[:, None], one, cache)[0].block_until_ready()
            row = {"experts": name, "requests": requests, "prefill_tokens_a_second": requests * length / min(times)}
            row |= {"decode_tokens_a_second": requests / min(steps), "step_ms": 1e3 * min(steps)}
            row["compiled_at_a_switch"] = step._cache_size() - programs
            add("model", row)
            print(
                f"{name:32s} {requests:8d} {row['prefill_tokens_a_second']:18,.0f} "
                f"{row['decode_tokens_a_second']:17,.0f} {row['step_ms']:10.3f} {row['compiled_at_a_switch']:9d}",
                flush=True,
            )
            del experts, cache, fixed


def apart(limit: float, path: Path | None) -> int:
    """Each part in a process of its own, so that one that dies leaves the others; their rows in one file."""
    begin, found, failed = time.monotonic(), dict[str, Any](), 0
    for name in PARTS:
        left = limit - (time.monotonic() - begin)
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--part", name, "--limit", str(left), "--json", str(own)]
            try:
                failed |= subprocess.run(command, timeout=left + 60).returncode
            except subprocess.TimeoutExpired:
                print(f"{name}: stopped, it did not end in time")
                failed = 1
            if own.exists():
                rows = json.loads(own.read_text())
                found = found | {key: value for key, value in rows.items() if value or key not in found}
        if path:
            path.write_text(json.dumps(found, indent=1) + "\n")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="all, each in its own process, by default")
    parser.add_argument("--limit", type=float, default=400, help="seconds after which nothing new is begun")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.part:
        raise SystemExit(apart(arguments.limit, arguments.json))
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

    for name in arguments.part:
        run = {"check": check, "layers": measure_layers, "model": measure_model}[name]
        run(add, lambda: time.monotonic() - begin > arguments.limit)
    print(f"{time.monotonic() - begin:.0f} s")
    if wrong := [row for row in found["check"] if not row["right"]]:
        raise SystemExit(f"{len(wrong)} of {len(found['check'])} checks failed")


if __name__ == "__main__":
    main()
