"""Quantized experts on TPUs that are not here: modelled time from the compiler's own schedule.

    python benchmarks/tpu_schedule.py [--chip v6e] [--shape olmoe-1b-7b] [--json PATH]
    python benchmarks/tpu_schedule.py --rows PATH      # the table of docs/kernels.md from rows that were written before
    python benchmarks/tpu_schedule.py --counted PATH ..  # cycles of the peers' kernels from there, and new ones into it
    python benchmarks/tpu_schedule.py --measured       # the model beside what others measured on a TPU7x
    python benchmarks/tpu_schedule.py --tiles          # how many experts have more than one tile of rows

Every kernel is compiled for the chip; cycles of a grid step are counted in its final schedule (``bundles.py``), bytes
from what the step copies. Modelled time is the sum over steps of max(cycles / clock, bytes / bandwidth). Kernels:

    ours 2, 3, 4       all experts at one width, whole layers: gate, up, activation and down
    ours mixed         a width of 2, 3 or 4 for each expert's gate and up, and for its down, a third each: 3.0 bits
    megablox bf16      gate with up in one product and down in another, the best of some tilings; what it does between
                       the two is not counted
    tokamax bf16, int8, int4   its ``ragged_dot``, in the same way, at 64 tokens; its weights have one scale a channel
    gmm_v2 bf16, int8, int4    its newer kernel, likewise, with as few rows a tile as most experts have; where weights
                       are quantized it quantizes rows as ours does; int4 for 128 to 512 tokens, too. Released in
                       tpu-inference (``pip install --no-deps tpu-inference==0.28.0``), of which one file is loaded; no
                       rows where that is missing

"bits" is with scales, one for each ``group`` of weights in ours, 0.0625 bits a weight of 256, one for each channel in
the peers'. Bytes are of weights, of scales, and of rows in and out as each kernel copies them: where a peer's next tile
of rows is the same expert's, it has its weights already, unless they are in parts along what is summed. ``form`` is
what the matrix unit multiplies: bfloat16, or activations quantized a row at a time, int8 on v5e, v5p and v6e and fp8 on
TPU7x; tiles of many rows (v6e, TPU7x) are always bfloat16. Tokens choose experts at random (seed 0); prefill is 2,048
of them. A step of a peer is what runs in each and its
longest ``pl.when``, the product; of ours all that it runs. Pages lie as a baseline's do, one after the other. What XLA
does around a kernel is counted by ``tpu_layer.py``.
``over_bandwidth_bound``: time over that of the kernel's own weight bytes at full bandwidth. ``speedup_vs_bf16``: over
megablox. ``with_calls_us`` (TPU7x): with what a call of gmm_v2 was measured to take beside its copies, for each call:
one of ours, two of a peer. Whether ours takes as much is not known.
"""

from __future__ import annotations

import bundles  # isort: skip  (before jax)

import argparse
import functools
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from layers import BATCHES, PREFILL, SHAPES, TOKENS, Layer, sizes_of

from dynamo_jax.kernels.layout import filled
from dynamo_jax.kernels.quantized_tpu import quantized_experts_tpu
from dynamo_jax.kernels.tiles import TILE, TiledBase, TiledResident, empty_pages
from dynamo_jax.kernels.tpu_rows import sublanes_of
from dynamo_jax.kernels.tpu_steps import FEW_ROWS, Shape, blocks_of_step, rows_of_tile
from dynamo_jax.models.experts import silu_gated

GROUP = 256  # weights that share a scale, as in the demo
LAYERS = 16  # in the arrays that the kernel reads: the compiler would keep those of one layer in fast memory
ROUNDED = {"v5e": "int8", "v5p": "int8", "v6e": "int8", "tpu7x": "fp8"}
# gmm_v2 on one core of a TPU7x (vllm-project/tpu-inference, issue 3520): seconds that a call takes beside its copies,
# and for each expert that the array holds; and of some calls the experts, those that have rows, rows of each, inner and
# outer size, weights, and microseconds
CALL, CALL_EXPERT = 35e-6, 0.02e-6
MEASURED = [
    (64, 30, 3, 4096, 2048, "fp8", 81.9),
    (64, 30, 3, 4096, 2048, "bf16", 159.8),
    (512, 72, 1, 4096, 256, "fp8", 57.5),
    (512, 72, 1, 4096, 256, "bf16", 71.8),
    (512, 72, 1, 512, 4096, "fp8", 70.4),
]


def arguments(layer: Layer, tokens: int, levels: tuple[int, ...], group: int) -> tuple[Any, ...]:
    """Shapes of what one layer's experts take, with slots for all pages of ``LAYERS``."""
    of = jax.ShapeDtypeStruct
    resident, table = tiled_shapes(LAYERS, layer, dict.fromkeys(levels, 1.0), group)
    rows = of((tokens * layer.chosen, filled(layer.hidden, group)), jnp.bfloat16)
    return rows, of((layer.experts,), jnp.int32), resident, (table,)


def tiled_shapes(layers: int, layer: Layer, shares: dict[int, float], group: int) -> tuple[TiledResident, Any]:
    """Shapes of the planes of some layers, with slots for a share of each level's pages (of one projection each), and
    of a page table."""
    of = jax.ShapeDtypeStruct
    blocks, hidden = layer.channels // TILE, filled(layer.hidden, group)
    tiles, groups = hidden // TILE, hidden // group
    lead = (layers, layer.experts, blocks, 3)
    base = TiledBase(of((*lead, tiles, 8, TILE), jnp.int32), of((*lead, groups, TILE), jnp.bfloat16))
    pages = {}
    for level, share in shares.items():
        slots = int(layers * layer.experts * blocks * 3 * share)
        pages[level] = jax.eval_shape(functools.partial(empty_pages, slots, 1, level, hidden, groups))
    table = {level: of((layers, layer.experts, 3 * blocks), jnp.int32) for level in shares}
    return TiledResident(base, pages), table


def tile_of(chip: str, layer: Layer, tokens: int) -> int:
    """Rows of a tile of ours."""
    return rows_of_tile(tokens * layer.chosen, layer.experts, bundles.CHIPS[chip].core)


@functools.cache
def our_loop(chip: str, layer: Layer, tokens: int, levels: tuple[int, ...], form: str, group: int) -> bundles.Loop:
    def experts(rows: Any, sizes: Any, resident: Any, tables: Any) -> Any:
        return quantized_experts_tpu(rows, sizes, resident, tables, 0, silu_gated, form=form)

    loops = bundles.compiled(bundles.CHIPS[chip], experts, *arguments(layer, tokens, levels, group))[1]
    return next(loop for name, loop in loops.items() if name.startswith("experts_"))


def ours(chip: str, layer: Layer, tokens: int, widths: np.ndarray, form: str, group: int) -> tuple[float, float]:
    """Seconds, and those of the weight bytes alone. widths: (E, 2) of gate and up, and of down."""
    at = bundles.CHIPS[chip]
    levels = (3, 4) if (widths > 2).any() else ()  # one program for all plans but the one that never reads more
    hidden = filled(layer.hidden, group)
    blocks, tiles_of_block = layer.channels // TILE, hidden // TILE
    rows = tile_of(chip, layer, tokens)
    per_step = blocks_of_step(tiles_of_block, blocks)
    shape = Shape(rows, tiles_of_block, 1, blocks, per_step, levels, 1, form)
    own_steps = shape.steps
    # programs differ in M only, so one is compiled for all numbers of tokens that have it
    like = min(t for t in TOKENS if tile_of(chip, layer, t) == rows)
    # pages lie one after the other: what holds loops, over pages that lie alone, runs in the very first step if at all;
    # without levels the first step's copies have no loops and are counted in all
    loop = our_loop(chip, layer, like, levels, form, group).without_holders()
    paths = (2, *levels)
    ends = (0, 0)
    regions = loop.regions
    if own_steps > 1:  # what only a tile's first and last step run
        begin = len(regions) - len(paths) - 2
        ends, regions = (regions[begin], regions[-1]), (*regions[:begin], *regions[begin + 1 : -1])
    always = loop.always + sum(regions[: -len(paths)])
    cycles = dict(zip(paths, regions[-len(paths) :]))
    assert min(cycles.values()) > always / 2, (loop, paths)
    total = weights = 0.0
    for expert, size in enumerate(sizes_of(layer, tokens)):
        tiles = -(-size // rows)
        inner, outer = widths[expert]
        bits = (2 * inner + outer) / 3 + 16 / group
        own_bytes = 3 * layer.channels * hidden * bits / 8
        weights += own_bytes if size else 0
        odd = tiles_of_block % 2 / tiles_of_block * (bits - 2 - 16 / group)  # pages have half a tile to spare
        of_block = (own_bytes + 3 * layer.channels * hidden * odd / 8) / blocks
        moved = 2 * size * sublanes_of(hidden) * TILE * 4 / max(tiles, 1)  # rows in and out, as words
        for step in range(own_steps):
            found = always + cycles[max(inner, outer)] + (step == 0) * ends[0] + (step == own_steps - 1) * ends[1]
            own = of_block * (per_step - shape.skipped * (step == own_steps - 1)) + moved * (step == 0)
            total += tiles * max(found / at.clock, own / at.bandwidth)
    return total, weights / at.bandwidth


def tilings(inner: int, outer: int, bits: float, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs of k, all of it or as much as divides it and fits, and n."""
    ks = [k for k in range(TILE, inner + 1, TILE) if inner % k == 0 and k <= 4096]
    return [(max(ks), n) for n in widths if max(ks) * n * bits <= 2**26]


def even(outer: int, most: int) -> int:
    """Columns of a tile, at most so many, of which tiles of one size have as few to spare as can be."""
    return filled(-(-outer // -(-outer // most)), TILE)


def grouped(chip: str, sizes: np.ndarray, inner: int, outer: int, kernel: str) -> tuple[float, float]:
    """A grouped product of a peer at its best tiling, for so many rows of each expert: seconds, bytes of weights."""
    at, best = bundles.CHIPS[chip], float("inf")
    bits = PEERS[kernel][0]
    rows, experts = int(sizes.sum()), len(sizes)
    used, scale = int((sizes > 0).sum()), 4 if bits < 16 else 0  # bytes of a channel's
    if newer := kernel.startswith("gmm_v2"):
        unit = 16 if chip == "tpu7x" else 8  # rows of bfloat16 that lie together, which it takes tiles of
        mean = rows / experts
        most = [min(256, filled(math.ceil(mean + spread * mean**0.5), 8)) for spread in (2, 3)]
        of_rows = {filled(own + unit - 1, unit) for own in most}
        some = tilings(inner, outer, bits, tuple(even(outer, most) for most in (1024, 2048, 4096)))[-1:]
    else:
        of_rows = {filled(min(rows, 128), 16)} if rows < 1024 else {128, 256}
        some = tilings(inner, outer, bits, (1024, 768, 512))
    fit: set[int] = set()
    for tile_rows, (k, n) in itertools.product(sorted(of_rows), some):
        if rows >= 1024 and tile_rows in fit:
            continue  # of many rows the widest that fits
        try:
            cycles = peer_cycles(kernel, chip, experts, inner, outer, (tile_rows, k, n))
        except Exception as error:
            if "memory" not in str(error).lower():
                raise
            continue
        fit.add(tile_rows)
        along, passes = inner // k, -(-outer // n)
        if newer:  # of rows those that its tiles hold, of outputs each once
            tiles = touched_from_group(sizes, tile_rows, unit)
            moved_rows = passes * unit * touched_from_group(sizes, unit, unit) * inner + rows * outer
        else:  # whole tiles, where another is next
            tiles, different = touched(sizes, tile_rows), -(-rows // tile_rows)
            times = tiles * passes if along > 1 else different * passes if different > 1 else 1
            moved_rows = tile_rows * (times * inner + different * outer)
        steps = tiles * along * passes
        copying = steps if along > 1 else used * passes  # an expert's next tile finds its weights there
        each = 2 * moved_rows / steps
        weights = (k * outer * bits / 8 + used * outer * scale * passes / copying) / passes
        time = lambda moved: max(cycles / at.clock, moved / at.bandwidth)  # noqa: B023, E731
        best = min(best, copying * time(weights + each) + (steps - copying) * time(each))
    assert best < float("inf"), (inner, outer)
    return best, used * outer * (inner * bits / 8 + scale)


def touched(sizes: np.ndarray, tile: int) -> int:
    """Pairs of an expert and a tile of rows that have a row in common."""
    end = np.cumsum(sizes)
    return sum(-(-int(e) // tile) - int(e - s) // tile for s, e in zip(sizes, end) if s)


def touched_from_group(sizes: np.ndarray, tile: int, unit: int) -> int:
    """Tiles of rows where those of each expert begin at its first row, or at most ``unit`` - 1 before."""
    begin = np.cumsum(sizes) - sizes
    return sum(-(-int(b % unit + s) // tile) for b, s in zip(begin, sizes) if s)


def peer_cycles(kernel: str, chip: str, experts: int, inner: int, outer: int, tiling: tuple[int, int, int]) -> int:
    """Cycles of a step, whose product is in one of its regions or in none."""
    name = f"{kernel}, {chip}, {experts} x {inner} x {outer}, {' x '.join(map(str, tiling))}"
    if name not in COUNTED:
        function, weights = PEERS[kernel][1](experts, inner, outer, tiling)
        of = jax.ShapeDtypeStruct
        rows = -(-128 // tiling[0]) * tiling[0]  # the loop is that of any number of rows; one peer wants 128
        own = (of((rows, inner), jnp.bfloat16), weights, of((experts,), jnp.int32))
        loops = bundles.compiled(bundles.CHIPS[chip], function, *own)[1]
        loop = next(loop for own_name, loop in loops.items() if own_name.startswith("gmm"))
        COUNTED[name] = loop.always + max(loop.regions, default=0)
    return COUNTED[name]


COUNTED: dict[str, int] = {}  # cycles of the peers' kernels


def megablox(experts: int, inner: int, outer: int, tiling: tuple[int, int, int]) -> tuple[Callable, Any]:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    run = functools.partial(gmm, preferred_element_type=jnp.bfloat16, tiling=tiling)
    return run, jax.ShapeDtypeStruct((experts, inner, outer), jnp.bfloat16)


def tokamax(dtype: Any) -> Callable:
    @functools.cache
    def make(experts: int, inner: int, outer: int, tiling: tuple[int, int, int]) -> tuple[Callable, Any]:
        import qwix
        from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu as theirs

        class Anywhere(theirs.PallasMosaicTpuRaggedDot):
            def supported_on(self, device: Any) -> bool:  # it asks for the chip that is here
                return True

        rows, k, n = tiling
        operation = Anywhere(config=theirs.Config(tile_m=rows, tile_k=k, tile_n=n))
        weights: Any = jax.ShapeDtypeStruct((experts, inner, outer), dtype)
        if dtype != jnp.bfloat16:
            weights = qwix.QArray(weights, jax.ShapeDtypeStruct((experts, 1, outer), jnp.float32))
        run = lambda x, w, sizes: operation(  # noqa: E731
            x, w, group_sizes=sizes, preferred_element_type=jnp.bfloat16
        )
        return run, weights

    return make


def gmm_v2(dtype: Any) -> Callable:
    @functools.cache
    def make(experts: int, inner: int, outer: int, tiling: tuple[int, int, int]) -> tuple[Callable, Any]:
        theirs = gmm_v2_module()
        rows, k, n = tiling
        tiles = theirs.TileSizes(tile_m=rows, tile_k=k, tile_n=n, bucket_base=rows)
        weights: Any = jax.ShapeDtypeStruct((experts, inner, outer), dtype), None
        if dtype != jnp.bfloat16:
            weights = weights[0], jax.ShapeDtypeStruct((experts, 1, 1, outer), jnp.float32)

        def run(x: Any, w: Any, sizes: Any) -> Any:
            return theirs.gmm_v2(x, w[0], sizes, w[1], tile_info=tiles, preferred_element_type=jnp.bfloat16)

        return run, weights

    return make


@functools.cache
def gmm_v2_module() -> Any:
    """Its file alone, since the package imports much more."""
    package = importlib.util.find_spec("tpu_inference")
    places = (package and package.submodule_search_locations) or ()
    for path in (Path(place) / "kernels/megablox/gmm_v2.py" for place in places):
        if path.exists():
            spec = importlib.util.spec_from_file_location("gmm_v2", path)
            assert spec and spec.loader
            module = sys.modules["gmm_v2"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError("no gmm_v2 here: pip install --no-deps tpu-inference==0.28.0")


PEERS = {
    "megablox bf16": (16, megablox),
    "tokamax bf16": (16, tokamax(jnp.bfloat16)),
    "tokamax int8": (8, tokamax(jnp.int8)),
    "tokamax int4": (4, tokamax(jnp.int4)),
    "gmm_v2 bf16": (16, gmm_v2(jnp.bfloat16)),
    "gmm_v2 fp8": (8, gmm_v2(jnp.float8_e4m3fn)),
    "gmm_v2 int8": (8, gmm_v2(jnp.int8)),
    "gmm_v2 int4": (4, gmm_v2(jnp.int4)),
}


def form_of(chip: str, kernel: str) -> str:
    """Of the activations that a peer multiplies."""
    rounds = kernel == "gmm_v2 int4" or (kernel == "gmm_v2 int8" and ROUNDED[chip] == "int8")
    return ROUNDED[chip] if rounds else "bf16"


def rows_for(chip: str, name: str, tokens: int, groups: tuple[int, ...]) -> list[dict[str, Any]]:
    layer, out = SHAPES[name], []
    sizes = sizes_of(layer, tokens)

    def add(kernel: str, bits: float, form: str, seconds: float, bound: float, **more: Any) -> None:
        row = {"chip": chip, "shape": name, "tokens": tokens, "kernel": kernel, "bits": bits, "form": form, **more}
        reference = out[0]["modelled_us"] if out else seconds * 1e6
        row |= {"modelled_us": seconds * 1e6, "speedup_vs_bf16": reference / (seconds * 1e6)}
        row |= {"over_bandwidth_bound": seconds / bound}
        if chip == "tpu7x":
            calls = 1 if kernel.startswith("ours") else 2
            row |= {"with_calls_us": 1e6 * (seconds + calls * (CALL + layer.experts * CALL_EXPERT))}
        out.append(row)
        print(
            f"{chip:6s} {name:17s} {tokens:5d}  {kernel:14s} {form:5s} {bits:6.3f} {row['modelled_us']:10.1f} "
            f"{row['speedup_vs_bf16']:7.2f} {row['over_bandwidth_bound']:7.2f}",
            flush=True,
        )

    used = sizes > 0
    reference, newest = "megablox bf16", "gmm_v2 int4"
    all_kernels = [kernel for kernel in PEERS if not kernel.endswith("fp8")]
    for kernel in all_kernels if tokens == 64 else (reference, newest) if tokens in BATCHES else (reference,):
        both = ((layer.hidden, 2 * layer.channels), (layer.channels, layer.hidden))
        try:
            parts = [grouped(chip, sizes, *shape, kernel) for shape in both]
        except ImportError as error:
            print(f"{chip:6s} {name:17s} {tokens:5d}  {kernel:14s} {error}")
            continue
        seconds, weights = (sum(values) for values in zip(*parts))
        bits = 8 * weights / (int(used.sum()) * 3 * layer.hidden * layer.channels)
        add(kernel, bits, form_of(chip, kernel), seconds, weights / bundles.CHIPS[chip].bandwidth)
    mixed = np.array([(i % 3 + 2, i // 3 % 3 + 2) for i in np.random.default_rng(1).permutation(layer.experts)])
    plans = {f"ours {w}": np.full((layer.experts, 2), w) for w in (2, 3, 4)} | {"ours mixed": mixed}
    forms = {
        ROUNDED[chip]: tokens != PREFILL or tile_of(chip, layer, tokens) <= FEW_ROWS,
        "bf16": tokens in (64, PREFILL),
    }
    for group, form in itertools.product(groups, [form for form, wanted in forms.items() if wanted]):
        for kernel, widths in plans.items():
            if kernel == "ours 2" and form == "bf16":
                continue
            bits = float((2 * widths[used, 0] + widths[used, 1]).mean() / 3 + 16 / group)
            add(kernel, bits, form, *ours(chip, layer, tokens, widths, form, group), group=group)
    return out


def print_measured() -> None:
    """The model of time beside what gmm_v2 was measured to take."""
    print("experts  with rows  rows  inner  outer  weights  measured us  modelled us  with the call")
    for experts, used, each, inner, outer, weights, microseconds in MEASURED:
        sizes = np.where(np.arange(experts) < used, each, 0)
        sizes[used - 1] += -int(sizes.sum()) % 16  # filled up to whole tiles
        seconds, _ = grouped("tpu7x", sizes, inner, outer, f"gmm_v2 {weights}")
        print(
            f"{experts:7d} {used:10d} {each:5d} {inner:6d} {outer:6d}  {weights:7s} {microseconds:12.1f} "
            f"{1e6 * seconds:12.1f} {1e6 * (seconds + CALL + experts * CALL_EXPERT):14.1f}"
        )


def print_tiles(chips: list[str], shapes: list[str], batches: list[int]) -> None:
    """Tiles of rows beside the experts that have rows: one tile more is one whose weights a tile before had, too."""
    print("chip   shape              tokens  rows of a tile  tiles  experts with rows")
    for chip, name, tokens in itertools.product(chips, shapes, batches):
        sizes, rows = sizes_of(SHAPES[name], tokens), tile_of(chip, SHAPES[name], tokens)
        tiles, used = int((-(-sizes // rows)).sum()), int((sizes > 0).sum())
        print(f"{chip:6s} {name:17s} {tokens:7d} {rows:15d} {tiles:6d} {used:18d}")


def found(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The first row that has these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def over_uniform(rows: list[dict[str, Any]], **of: Any) -> float | None:
    """Time of the mixed plan over that of a uniform one of the same bytes, between whole widths by interpolation."""
    uniform = [found(rows, kernel=f"ours {width}", **of) for width in (2, 3, 4)]
    mixed = found(rows, kernel="ours mixed", **of)
    if mixed is None or not all(uniform):
        return None
    bits, times = ([row[key] for row in uniform if row] for key in ("bits", "modelled_us"))
    return float(mixed["modelled_us"] / np.interp(mixed["bits"], bits, times))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Of each chip, layer and number of tokens: times as fast as megablox, and over the time of the bytes."""

    def cell(of: dict[str, Any], kernel: str, group: int | None, bound: bool = True) -> str:
        row = found(rows, kernel=kernel, group=group, **of)
        if row is None:
            return ""
        return f"{row['speedup_vs_bf16']:.2f}" + (f" ({row['over_bandwidth_bound']:.2f})" if bound else "")

    for chip, name, tokens in dict.fromkeys((row["chip"], row["shape"], row["tokens"]) for row in rows):
        at = {"chip": chip, "shape": name, "tokens": tokens}
        own, plain = at | {"form": ROUNDED[chip]}, at | {"form": "bf16"}
        if tokens == PREFILL:
            last = " / ".join(cell(plain, f"ours {plan}", GROUP, bound=False) for plan in ("4", "3", "mixed"))
            cells = ["", "", *(cell(own, f"ours {plan}", GROUP) for plan in ("4", "3", "mixed", "2")), last]
        else:
            each = [cell(own, f"ours {plan}", GROUP) for plan in ("4", "3", "mixed", "2")]
            peers = [cell(plain, "tokamax int4", None), cell(own, "gmm_v2 int4", None)]
            cells = [*peers, *each, cell(plain, "ours mixed", GROUP)]
        print(f"| {chip} | {name} | {tokens:,} | {' | '.join(cells)} |")
    print("\nmixed over uniform plans of the same bytes, least and most")
    for chip in dict.fromkeys(row["chip"] for row in rows):
        ratios = []
        for name, tokens in itertools.product(SHAPES, TOKENS):
            ratio = over_uniform(rows, chip=chip, shape=name, tokens=tokens, form=ROUNDED[chip], group=GROUP)
            ratios += [] if ratio is None else [(ratio, name, tokens)]
        for ratio, name, tokens in (min(ratios), max(ratios)) if ratios else ():
            print(f"{chip:6s} {ratio - 1:+.1%} ({name}, {tokens} tokens)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", action="append", choices=list(bundles.CHIPS), help="v5e, v6e and tpu7x by default")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="all by default")
    parser.add_argument("--tokens", action="append", type=int, choices=TOKENS, help="all by default")
    parser.add_argument("--group", action="append", type=int, help=f"weights that share a scale, {GROUP} by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=Path, help="print the table of these rows and compile nothing")
    parser.add_argument("--measured", action="store_true", help="the model beside what others measured")
    parser.add_argument("--tiles", action="store_true", help="tiles of rows, and experts that have rows; no compiling")
    parser.add_argument(
        "--counted", type=Path, help="cycles of the peers' kernels, kept here from one call to the next"
    )
    chosen = parser.parse_args()
    if chosen.rows:
        return print_table(json.loads(chosen.rows.read_text())["rows"])
    if any(group < TILE or group % TILE for group in chosen.group or ()):
        parser.error(f"groups are multiples of {TILE} weights, not {chosen.group}")
    sys.argv = sys.argv[:1]  # a peer reads flags of its own there
    if chosen.measured:
        return print_measured()
    chips, shapes = chosen.chip or ["v5e", "v6e", "tpu7x"], chosen.shape or list(SHAPES)
    batches = chosen.tokens or list(TOKENS)
    if chosen.tiles:
        return print_tiles(chips, shapes, batches)
    print(
        f"{'chip':6s} {'shape':17s} tokens  {'kernel':14s} form  {'bits':>6s} {'modelled us':>11s} "
        f"{'speedup':>7s} {'/ bound':>7s}"
    )
    if chosen.counted and chosen.counted.exists():
        of = json.loads(chosen.counted.read_text())
        if any(of[key] != value for key, value in bundles.versions().items()):
            parser.error(f"{chosen.counted} was counted with other versions than {bundles.versions()}")
        COUNTED.update(of["cycles"])
    rows: list[dict[str, Any]] = []
    for chip, name, tokens in itertools.product(chips, shapes, batches):
        rows += rows_for(chip, name, tokens, tuple(chosen.group or (GROUP,)))
        bundles.write(chosen.json, rows=rows)
        bundles.write(chosen.counted, cycles=COUNTED)


if __name__ == "__main__":
    main()
