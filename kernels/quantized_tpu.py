"""Mixed-precision experts on a TPU: one Pallas kernel from rows to rows, all widths in one pass.

A grid step takes one tile of rows of one expert and some of its channel blocks: gate and up are multiplied, the
activation is applied, and what the blocks' channels add to the outputs is summed in fast memory. The planes come packed
(``tiles.py``); whole words are merged into signed nibbles, which the core itself widens to what its matrix unit
multiplies. A block whose variant reads fewer planes has zeros in place of the others, so blocks of different widths
share one straight run of instructions; only whether a step reads 3, 4 or 8 bits at all chooses between programs.
Where rows are few, scales are never multiplied into weights: each group of hidden is one matrix product, scaled
after it in gate and up, and before it, in the few rows of hidden channels, in down. Planes are copied a step ahead, of
pages those that are read; those of all blocks of a step in one piece where they lie one after the other.

Forms: "bf16" activations; "int8" and "fp8" (e4m3) activations with one scale a row, where the chip multiplies those.

Axes: R rows in order, V variants, E experts, N blocks, D hidden, K groups of hidden with scales of their own, M rows a
tile, T tiles of rows, C chunks of X rows, S steps of a tile, B blocks a step, U parts of a block with pages of their
own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int

from dynamo_jax.kernels.layout import LEVELS, PROJECTIONS, PageTable
from dynamo_jax.kernels.rows import rows_in_tiles
from dynamo_jax.kernels.tiles import TILE, TiledResident
from dynamo_jax.kernels.tpu_copies import StepAt, copies_of, copy, rows_of
from dynamo_jax.kernels.tpu_planes import StepPlanes, no_pages
from dynamo_jax.kernels.tpu_steps import (
    CHUNK,
    FEW_ROWS,
    Shape,
    Steps,
    blocks_of_step,
    core,
    rows_of_tile,
    steps_of,
)

FORMS = {"bf16": (jnp.bfloat16, 0.0), "int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
FAST_MEMORY = 48 * 2**20  # bytes that the kernel may have, of the 64 and more of every chip
MAGIC = 1.5 * 2**23  # a small float32 that is added to it has its nearest whole number in the lowest bits
DOWN_BLOCKS = 2  # that one product with down sums over: the depth of a matrix unit of v6e and TPU7x


def quantized_experts_tpu(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " VE"],
    resident: TiledResident,
    tables: tuple[PageTable, ...],
    layer: int,
    activation: Callable[[Array, Array], Array],
    biases: Any = None,
    expected: int = 0,
    *,
    form: str = "bf16",
    blocks: int | None = None,
    tile_rows: int | None = None,
    interpret: Any = False,
) -> Float[Array, "R D"]:
    """Each row through its expert, as ``quantized_experts_xla`` does it; activations in the given form.

    ``blocks`` of a grid step and ``tile_rows``: by rule where None. Where tiles have more than ``FEW_ROWS`` the form
    is always "bf16": the products are then the work, and their operands are made once for many rows. ``interpret``:
    for ``pallas_call``. A block that reads a plane reads those below it too, as plans have it; which slots page tables
    name is not checked on the device.
    """
    num_experts = resident.base.codes.shape[1]
    if group_sizes.shape[0] != num_experts * len(tables):
        raise ValueError(f"{group_sizes.shape[0]} groups are not {len(tables)} variants of {num_experts} experts")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    count = rows.shape[0]
    if tile_rows and tile_rows % CHUNK:
        raise ValueError(f"tiles of {tile_rows} rows: they are multiples of {CHUNK}")
    if count == 0:
        return rows
    all_blocks, tiles = resident.base.codes.shape[2], resident.base.codes.shape[4]
    there = [level for level, pages in resident.pages.items() if pages.codes.shape[0]]
    levels = tuple(level for level in LEVELS if level in there and any(level in t for t in tables))
    if levels != LEVELS[: len(levels)]:
        raise ValueError(f"planes of {levels} bits are read, but those of {LEVELS} refine each other in turn")
    units = max([PROJECTIONS // resident.pages[level].codes.shape[1] for level in levels], default=1)
    tile_rows = tile_rows or rows_of_tile(expected or count, num_experts, core())
    blocks = min(blocks or blocks_of_step(tiles, all_blocks), all_blocks)
    form = "bf16" if tile_rows > FEW_ROWS else form
    alike = tiles // resident.base.scales.shape[4]
    shape = Shape(tile_rows, tiles, alike, all_blocks, blocks, levels, units, form)
    lie = rows_in_tiles(group_sizes, count, tile_rows, shape.chunk)
    steps = steps_of(shape, lie, num_experts, tables, layer)
    filled = jnp.pad(rows, ((0, 1), (0, 0)))[lie.source]  # the last row is empty
    chunks = filled.reshape(-1, shape.chunk, filled.shape[1])
    out = _call(shape, steps, chunks, resident, activation, biases, interpret).reshape(filled.shape)
    return jnp.where((jnp.arange(count) < group_sizes.sum())[:, None], out[lie.place], 0).astype(rows.dtype)


def _call(
    shape: Shape,
    steps: Steps,
    rows: Float[Array, "C X D"],
    resident: TiledResident,
    activation: Callable[[Array, Array], Array],
    biases: Any,
    interpret: Any,
) -> Float[Array, "C X D"]:
    size = shape.tiles * TILE
    num_experts = resident.base.codes.shape[1]
    prefetched, tree = jax.tree.flatten(steps)

    def of(scalars: tuple[Any, ...]) -> Steps:
        return jax.tree.unflatten(tree, scalars)

    def of_expert(array: Array) -> tuple[Array, pl.BlockSpec]:
        index = lambda tile, step, *s: (of(s).group[tile] % num_experts, *[0] * (array.ndim - 1))  # noqa: E731
        return array, pl.BlockSpec((None, *array.shape[1:]), index)

    def by_hand(array: Array) -> tuple[Array, pl.BlockSpec]:
        return array, pl.BlockSpec(memory_space=pltpu.HBM)

    inputs: dict[str, Any] = {
        "x": by_hand(rows if interpret else pltpu.with_memory_space_constraint(rows, pltpu.HBM)),
        "base": [by_hand(array) for array in resident.base],
        "pages": {},
        "biases": [],
    }
    buffers: Any = {2: [pltpu.VMEM((2, shape.blocks, *a.shape[3:]), a.dtype) for a in resident.base]}
    for level in shape.levels:
        own = [a for a in resident.pages[level] if a is not None]
        inputs["pages"][level] = [by_hand(a) for a in own]
        buffers[level] = [pltpu.VMEM((shape.places + (level != 8), *a.shape[1:]), a.dtype) for a in own]
    if biases is not None:
        inner = jnp.stack([b.astype(jnp.float32) for b in biases[:2]], axis=1)
        inner = jnp.moveaxis(inner.reshape(inner.shape[0], 2, -1, TILE), 2, 1)  # (E, N, 2, 128)
        inputs["biases"] = [of_expert(inner), of_expert(biases[2].astype(jnp.float32)[:, None])]
    is_pair = lambda leaf: isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[1], pl.BlockSpec)  # noqa: E731
    pairs, inputs_tree = jax.tree.flatten(inputs, is_leaf=is_pair)
    dtype, tile = FORMS[shape.form][0], (shape.rows // shape.chunk, shape.chunk, size)

    def kernel(*refs: Any) -> None:
        scalars, rest = refs[: len(prefetched)], refs[len(prefetched) :]
        named = jax.tree.unflatten(inputs_tree, rest[: len(pairs)])
        out, *scratch = rest[len(pairs) :]
        _body(shape, num_experts, of(scalars), named, activation, out, _Scratch(*scratch))

    return pl.pallas_call(
        kernel,
        name=f"experts_{shape.form}",
        out_shape=pltpu.MemorySpace.HBM(rows.shape, rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(steps.tiles[0], shape.steps),
            in_specs=[spec for _, spec in pairs],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((2, *tile), rows.dtype),
                pltpu.VMEM(tile, rows.dtype),
                pltpu.SemaphoreType.DMA((3,)),
                pltpu.VMEM((shape.rows, size), dtype),
                pltpu.VMEM((shape.rows, TILE), jnp.float32),
                pltpu.VMEM((shape.rows, 2 * shape.groups), jnp.bfloat16),
                pltpu.VMEM((shape.rows, TILE), jnp.float32),
                pltpu.VMEM((shape.blocks, 2, 2, shape.groups, TILE), jnp.float32),
                pltpu.VMEM((2, -(-shape.blocks // DOWN_BLOCKS), shape.groups, DOWN_BLOCKS * TILE), jnp.float32),
                pltpu.VMEM((shape.rows, size), jnp.float32),
                buffers,
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=FAST_MEMORY, disable_bounds_checks=True),
        interpret=interpret,
    )(*prefetched, *[array for array, _ in pairs])


class _Scratch(NamedTuple):
    """What lasts over the steps of a tile. came: (2, M / X, X, D) its rows in chunks, and those of the next tile; out:
    (M / X, X, D) its outputs, which leave while the next is multiplied; moved: a semaphore of each of the three; x:
    (M, D) its rows as they are multiplied; x_scale: (M, 128) what they were divided by, in all lanes; x_sums:
    (M, 2 K) lane g is the sum of group g, in units of x, lane K + g what bfloat16 left of it; h_sums: (M, 128) lane g
    is what the offsets z of down add to all outputs of group g; scales: of the step's gate and up, (B, 2, 2, K, 128),
    and down_scales of its down, (2, .., K, 128 blocks), those of the last plane behind those of the others; rows of
    them are read from memory, which spreads them over registers at no cost; total: (M, D) the outputs; planes: by
    level, of this step and of the next, codes and scales of the base, (2, B, ..) each, and codes and ratios of the
    pages, (2*B*U, ..) each, of 3 and 4 bits with zeros behind them, which are read in place of pages that a block does
    not read; copied: a semaphore for each of the two."""

    came: Any
    out: Any
    moved: Any
    x: Any
    x_scale: Any
    x_sums: Any
    h_sums: Any
    scales: Any
    down_scales: Any
    total: Any
    planes: dict[int, list[Any]]
    copied: Any


def _body(
    shape: Shape,
    num_experts: int,
    steps: Steps,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    out: Any,
    scratch: _Scratch,
) -> None:
    """One grid step."""
    tile, step = pl.program_id(0), pl.program_id(1)
    turn = (tile * shape.steps + step) % 2

    def step_of(tile: Any, step: Any) -> StepAt:
        group = steps.group[tile]
        number = group * shape.steps + step
        first = jnp.minimum(step * shape.blocks, shape.all_blocks - shape.blocks)
        runs = {n: [f.run[number * shape.units + u] for u in range(shape.units)] for n, f in steps.fetches.items()}
        skipped = jnp.where(step == shape.steps - 1, shape.skipped, 0) if shape.skipped else 0
        return StepAt(number, group % num_experts, first, skipped, runs)

    begins, ends = (tile == 0) & (step == 0), step == shape.steps - 1
    last_tile = tile == steps.tiles[0] - 1
    last, next_tile = ends & last_tile, jnp.where(last_tile, tile, tile + 1)
    own, later = step_of(tile, step), step_of(jnp.where(ends, next_tile, tile), jnp.where(ends, 0, step + 1))
    in_pieces, alone = copies_of(shape, steps, inputs, scratch.planes, scratch.copied)
    start, wait = (lambda each: each.start()), (lambda each: each.wait())
    scattered = bool(shape.levels) and shape.blocks > 1

    def rows_in(tile: Any, when: Any, run: Callable[[Any], None]) -> None:
        from_, into = rows_of(steps, tile, inputs["x"], scratch.came.at[tile % 2])
        copy(from_, into, scratch.moved.at[tile % 2], when, run)

    def rows_out(tile: Any, when: Any, run: Callable[[Any], None]) -> None:
        into, from_ = rows_of(steps, tile, out, scratch.out)
        copy(from_, into, scratch.moved.at[2], when, run)

    def begin() -> None:
        rows_in(tile, None, wait)
        rows_in(next_tile, ~last_tile, start)
        rows = scratch.came[tile % 2].astype(jnp.float32).reshape(shape.rows, -1)
        if shape.form == "bf16":
            own = rows.astype(jnp.bfloat16)
        else:
            largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
            scale = jnp.where(largest == 0, 1.0, largest) * (1 / FORMS[shape.form][1])
            own = _in_form(rows * (1 / scale), shape.form)
            scratch.x_scale[...] = jnp.broadcast_to(scale, scratch.x_scale.shape)
        scratch.x[...] = own
        scratch.total[...] = jnp.zeros(scratch.total.shape, jnp.float32)
        if shape.many:
            return
        scratch.h_sums[...] = jnp.zeros(scratch.h_sums.shape, jnp.float32)
        lane = jax.lax.broadcasted_iota(jnp.int32, (shape.rows, TILE), 1)
        sums = jnp.zeros((shape.rows, TILE), jnp.float32)
        for g in range(shape.groups):
            one = own[:, shape.lanes(g)].astype(jnp.float32).sum(axis=1, keepdims=True)
            sums = jnp.where(lane == g, one, sums)
        high = sums.astype(jnp.bfloat16)
        low = (sums - high.astype(jnp.float32)).astype(jnp.bfloat16)
        scratch.x_sums[...] = jnp.concatenate([high[:, : shape.groups], low[:, : shape.groups]], axis=1)

    def end() -> None:
        sums = None if shape.many else scratch.h_sums[...]
        for g in range(shape.groups):
            lanes = shape.lanes(g)
            found = scratch.total[:, lanes] if sums is None else scratch.total[:, lanes] + sums[:, g : g + 1]
            if inputs["biases"]:
                found = found + inputs["biases"][-1][:, lanes]
            scratch.out[:, :, lanes] = found.reshape(-1, shape.chunk, found.shape[1]).astype(out.dtype)

    def leave() -> None:
        rows_out(tile, None, start)
        rows_out(tile, last_tile, wait)

    @pl.when((begins | (steps.alone[later.number] > 0)) if scattered else begins)
    def _seldom() -> None:
        in_pieces(own, turn, begins, start)
        rows_in(tile, begins, start)
        if shape.levels:
            pl.when(begins)(lambda: no_pages(shape, scratch.planes))
        if scattered:
            alone(own, turn, begins, start)
            alone(later, 1 - turn, ~last, start)

    in_pieces(later, 1 - turn, ~last, start)
    if shape.steps == 1:
        begin()  # behind the scalar work of starting copies
        rows_out(jnp.maximum(tile - 1, 0), tile > 0, wait)
    in_pieces(own, turn, None, wait)
    if scattered:
        pl.when(steps.alone[own.number] > 0)(lambda: alone(own, turn, None, wait))

    if shape.steps > 1:
        pl.when(step == 0)(begin)
    for width in (2, *shape.levels):

        @pl.when(steps.path[own.number] == width)
        def _run(width: int = width) -> None:
            planes = StepPlanes(shape, width, steps, own.number, scratch.planes, turn)
            (_many_rows if shape.many else _few_rows)(shape, planes, own.first, step, inputs, activation, scratch)
            if shape.steps == 1:
                end()

    if shape.steps == 1:
        return leave()

    @pl.when(ends)
    def _end() -> None:
        rows_out(jnp.maximum(tile - 1, 0), tile > 0, wait)
        end()
        leave()


def _in_form(scaled: Float[Array, "M K"], form: str) -> Array:
    """Numbers within the form's limit as it has them, the nearest ones."""
    if form != "int8":
        return scaled.astype(FORMS[form][0])
    return jax.lax.bitcast_convert_type(scaled + jnp.float32(MAGIC), jnp.int32).astype(jnp.int8)


def _activated(
    shape: Shape, found: Float[Array, "M 256"], at: Any, step: Any, inputs: dict[str, Any], activation: Callable
) -> Float[Array, "M 128"]:
    """Hidden channels of block ``at`` from its gate and up; zero where the step before had the block."""
    if inputs["biases"]:
        bias = inputs["biases"][0][at]
        found = found + jnp.concatenate([bias[0:1], bias[1:2]], axis=1)
    own = activation(found[:, :TILE], found[:, TILE:])
    return own if shape.all_blocks % shape.blocks == 0 else jnp.where(at >= step * shape.blocks, own, 0.0)


def _many_rows(
    shape: Shape,
    planes: StepPlanes,
    first: Any,
    step: Any,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    scratch: _Scratch,
) -> None:
    """The blocks of one step where rows are so many that scaling the weights is less work than scaling sums."""

    def weights(k: int, projection: int, g: int, scale: Any, last_scale: Any) -> BFloat16[Array, "128 128"]:
        """scale: of the tile's rows (128, 1) or of its lanes (1, 128)."""
        offset = planes.offset(k, projection)
        out = (planes.tile(k, projection, g).astype(jnp.bfloat16) + jnp.asarray(offset, jnp.bfloat16)) * scale
        if last_scale is not None:
            out = out + (planes.last_tile(k, projection, g).astype(jnp.bfloat16) + jnp.bfloat16(0.5)) * last_scale
        return out.astype(jnp.bfloat16)

    def scales_of(k: int, projection: int) -> list[Array | None]:
        own = [planes.scales(k, projection), planes.last_scales(k, projection) if planes.path == 8 else None]
        return [None if s is None else s.astype(jnp.bfloat16) for s in own]

    def row_of(scales: Array | None, g: int) -> Any:
        return None if scales is None else scales[g // shape.alike : g // shape.alike + 1]

    def column_of(scales: Array | None, g: int) -> Any:
        return None if scales is None else scales[:, g // shape.alike : g // shape.alike + 1]

    hidden = []
    for k in range(shape.blocks):
        both = []
        for projection in (0, 1):
            own, last = scales_of(k, projection)
            tiles = [weights(k, projection, g, row_of(own, g), row_of(last, g)) for g in range(shape.tiles)]
            both.append(jnp.concatenate(tiles, axis=0))
        found = jnp.dot(scratch.x[...], jnp.concatenate(both, axis=1), preferred_element_type=jnp.float32)
        hidden.append(_activated(shape, found, first + k, step, inputs, activation).astype(jnp.bfloat16))
    lhs = jnp.concatenate(hidden, axis=1)
    columns = [[None if s is None else s.T for s in scales_of(k, 2)] for k in range(shape.blocks)]
    for first_tile in range(0, shape.tiles, 2):  # two fill the width of a matrix unit of v6e and TPU7x
        end, tiles = min(first_tile + 2, shape.tiles), []
        for k in range(shape.blocks):
            own, last = columns[k]
            each = [weights(k, 2, g, column_of(own, g), column_of(last, g)) for g in range(first_tile, end)]
            tiles.append(jnp.concatenate(each, axis=1))
        lanes = slice(first_tile * TILE, end * TILE)
        scratch.total[:, lanes] += jnp.dot(lhs, jnp.concatenate(tiles, axis=0), preferred_element_type=jnp.float32)


def _few_rows(
    shape: Shape,
    planes_of: StepPlanes,
    first: Any,
    step: Any,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    scratch: _Scratch,
) -> None:
    """The blocks of one step, scaling sums and never weights."""
    blocks, groups = range(shape.blocks), shape.groups
    dtype, limit = FORMS[shape.form]
    sum_dtype = jnp.int32 if shape.form == "int8" else jnp.float32
    path, scales_of, last_scales_of = planes_of.path, planes_of.scales, planes_of.last_scales

    def weights(k: int, projection: int, g: int, last: bool) -> Array:
        """n of a group, along the rows of gate and up and along the lanes of down."""
        of = planes_of.last_tile if last else planes_of.tile
        tiles = [of(k, projection, g * shape.alike + i).astype(dtype) for i in range(shape.alike)]
        return jnp.concatenate(tiles, axis=projection // 2)

    def product(lhs: Array, rhs: Array) -> Array:
        return jnp.dot(lhs, rhs, preferred_element_type=sum_dtype).astype(jnp.float32)

    planes = [False, True] if path == 8 else [False]  # whether it is the last plane, which has scales of its own
    parts = [list(blocks[k : k + DOWN_BLOCKS]) for k in range(0, shape.blocks, DOWN_BLOCKS)]
    hidden: dict[int, Float[Array, "M 128"]] = {}
    offsets: list[Float[Array, "M 256"]] = []  # what z adds to gate and up of each block
    largest: dict[tuple[int, bool], Float[Array, "K 1"]] = {}  # scale of down in each part

    def begin() -> None:
        """All that needs no hidden channel: scales to where rows of them are read, and offsets."""
        for k in blocks:
            found = jnp.zeros((shape.rows, 2 * TILE), jnp.float32)
            for plane in planes:
                scales = [(last_scales_of if plane else scales_of)(k, projection) for projection in (0, 1)]
                for projection in (0, 1):
                    scratch.scales[k, int(plane), projection] = scales[projection]
                twice = jnp.concatenate([jnp.concatenate(scales, axis=1)] * 2, axis=0)
                found = found + (0.5 if plane else planes_of.offset(k, 0)) * _dot(scratch.x_sums[...], twice)
            offsets.append(found)
        for part, own in enumerate(parts):
            for plane in planes:
                every = jnp.concatenate([(last_scales_of if plane else scales_of)(k, 2) for k in own], axis=1)
                if shape.form != "bf16":
                    most = jnp.max(every, axis=1, keepdims=True)
                    every, largest[part, plane] = every / jnp.where(most == 0, 1.0, most), most
                scratch.down_scales[int(plane), part, :, : len(own) * TILE] = every

    def inner(k: int) -> None:
        """Gate and up of block k into ``hidden``."""
        found = offsets[k]
        for plane in planes:
            for g in range(groups):
                lanes = shape.lanes(g)
                rhs = jnp.concatenate([weights(k, p, g, plane) for p in (0, 1)], axis=1)
                row = jnp.concatenate([scratch.scales[k, int(plane), p, g : g + 1] for p in (0, 1)], axis=1)
                found = found + product(scratch.x[:, lanes], rhs) * row
        if shape.form != "bf16":
            found = found * jnp.concatenate([scratch.x_scale[...]] * 2, axis=1)
        hidden[k] = _activated(shape, found, first + k, step, inputs, activation)

    def down(part: int, own: list[int]) -> None:
        """What the channels of some blocks add to the outputs."""
        rows, width = jnp.concatenate([hidden[k] for k in own], axis=1), len(own) * TILE
        if shape.form != "bf16":  # |rows * scales| is at most the product of the largest of each
            rows_most = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
            rows = rows * (limit / jnp.where(rows_most == 0, 1.0, rows_most))
            rows_most = rows_most * (1 / limit)
        for plane in planes:
            for g in range(groups):
                lanes = shape.lanes(g)
                lhs = rows * scratch.down_scales[int(plane), part, g : g + 1, :width]
                rhs = jnp.concatenate([weights(k, 2, g, plane) for k in own], axis=0)
                if shape.form == "bf16":
                    scratch.total[:, lanes] += product(lhs.astype(jnp.bfloat16), rhs)
                else:
                    most = rows_most * largest[part, plane][g : g + 1]
                    scratch.total[:, lanes] += product(_in_form(lhs, shape.form), rhs) * most

    def end() -> None:
        """What z adds to the outputs."""
        for plane in planes:
            own = [hidden[k] * (0.5 if plane else planes_of.offset(k, 2)) for k in blocks]
            scales = [(last_scales_of if plane else scales_of)(k, 2) for k in blocks]
            both = (jnp.concatenate(own, axis=1), jnp.concatenate(scales, axis=1))
            scratch.h_sums[:, :groups] += _dot(*both, transposed=True)

    begin()
    for k in blocks:  # all before the first down, so that the matrix unit never waits for hidden channels
        inner(k)
    for part, own in enumerate(parts):
        if part == len(parts) - 1:
            end()  # of the last products these would be the slowest to come back
        down(part, own)


def _dot(a: Float[Array, "M K"], b: Float[Array, "K N"], transposed: bool = False) -> Float[Array, "M N"]:
    """One pass in bfloat16, of ``b`` (N, K) where it is transposed; a sum in float32 where the product has one
    column, which Pallas does not multiply."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    if transposed and b.shape[0] == 1:
        return (a * b).sum(axis=1, keepdims=True)
    operands = (a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    return jax.lax.dot_general(*operands, dims, preferred_element_type=jnp.float32)
