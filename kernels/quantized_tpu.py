"""Mixed-precision experts on a TPU: one Pallas kernel from rows to rows, all widths in one pass.

A grid step takes one tile of rows of one expert and some of its channel blocks: gate and up are multiplied, the
activation is applied, and what the blocks' channels add to the outputs is summed in fast memory. The planes come packed
(``tiles.py``); whole words are merged into signed nibbles, which the core itself widens to what its matrix unit
multiplies. A block whose variant reads fewer planes has zeros in place of the others, so blocks of different widths
share one straight run of instructions; only whether a step reads 3, 4 or 8 bits at all chooses between programs.
``tpu_products.py`` has the products. Planes are copied a step ahead, of pages those that are read; those of all blocks
of a step in one piece where they lie one after the other.

Axes: A tokens, k experts a token, R rows in order, V variants, E experts, N blocks, D hidden, K groups of hidden with
scales of their own, M rows a tile, T tiles of rows, B blocks a step, U parts of a block with pages of their own, L
layers, X numbers that a layer's steps read. Rows as words: W sublanes of a row (``tpu_rows.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from dynamo_jax.kernels.layout import LEVELS, PROJECTIONS, PageTable
from dynamo_jax.kernels.rows import RowOrder
from dynamo_jax.kernels.tiles import TILE, TiledResident
from dynamo_jax.kernels.tpu_copies import StepAt, copies_of, copy, rows_of
from dynamo_jax.kernels.tpu_planes import StepPlanes, no_pages
from dynamo_jax.kernels.tpu_products import DOWN_BLOCKS, FORMS, Scratch, few_rows, in_form, many_rows
from dynamo_jax.kernels.tpu_rows import halves_of, read_rows, rows_of_words, words_of, write_columns
from dynamo_jax.kernels.tpu_steps import (
    FEW_ROWS,
    ROWS_UNIT,
    Shape,
    Steps,
    Tiles,
    blocks_of_step,
    core,
    in_one,
    parts_of,
    reads_of,
    rows_of_tile,
    sizes_of_reads,
    tiles_of,
)

FAST_MEMORY = 48 * 2**20  # bytes that the kernel may have, of the 64 and more of every chip


@jax.tree_util.register_pytree_node_class
class PagesRead:
    """What the grid steps of each layer read, which page tables alone decide: made once for all layers of a step of the
    model. packed: ``tpu_steps.Reads`` of each layer in one array; levels: those that any variant reads; units: parts of
    a block with pages of their own, 1 or 3; blocks: of a grid step."""

    def __init__(self, packed: Int[Array, "L X"], variants: int, levels: tuple[int, ...], units: int, blocks: int):
        self.packed, self.variants, self.levels, self.units, self.blocks = packed, variants, levels, units, blocks

    def tree_flatten(self) -> tuple[tuple[Array], tuple[Any, ...]]:
        return (self.packed,), (self.variants, self.levels, self.units, self.blocks)

    @classmethod
    def tree_unflatten(cls, fixed: tuple[Any, ...], leaves: tuple[Array]) -> PagesRead:
        return cls(*leaves, *fixed)


def pages_read(
    resident: TiledResident, tables: tuple[PageTable, ...], blocks: int | None = None, layers: int | None = None
) -> PagesRead:
    """``blocks`` of a grid step: by rule if None; ``layers``: that the tables are of, those of the planes if None. A
    block that reads a plane reads those below it too, as plans have it; which slots page tables name is not checked on
    the device."""
    num_experts, all_blocks, _, tiles = resident.base.codes.shape[1:5]
    there = [level for level, pages in resident.pages.items() if pages.codes.shape[0]]
    levels = tuple(level for level in LEVELS if level in there and any(level in t for t in tables))
    if levels != LEVELS[: len(levels)]:
        raise ValueError(f"planes of {levels} bits are read, but those of {LEVELS} refine each other in turn")
    units = max([PROJECTIONS // resident.pages[level].codes.shape[1] for level in levels], default=1)
    blocks = min(blocks or blocks_of_step(tiles, all_blocks), all_blocks)

    def of_layer(tables: tuple[PageTable, ...]) -> Array:
        return in_one(reads_of(tables, levels, num_experts, units, all_blocks, blocks))

    read = tuple({level: rows for level, rows in table.items() if level in levels} for table in tables)
    packed = jax.vmap(of_layer, axis_size=layers or resident.base.codes.shape[0])(read)
    return PagesRead(packed, len(tables), levels, units, blocks)


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
    reads: PagesRead | None = None,
    blocks: int | None = None,
    **how: Any,
) -> Float[Array, "R D"]:
    """Each row through its expert, as ``quantized_experts_xla`` does it, in bfloat16. reads: what ``pages_read`` made
    of the tables; if None it is made for this layer alone, with so many ``blocks`` of a step; ``how``: as
    ``tokens_through_experts`` takes it."""
    of_reads = layer
    if reads is None:
        own = tuple({level: of_layers[layer][None] for level, of_layers in table.items()} for table in tables)
        reads, of_reads = pages_read(resident, own, blocks, layers=1), 0
    words = words_of(rows.astype(jnp.bfloat16))
    given = words, group_sizes, resident, reads, of_reads, layer
    out = _experts(*given, activation, biases, expected, **how)
    there = jnp.arange(rows.shape[0]) < group_sizes.sum()
    return jnp.where(there[:, None], rows_of_words(out, rows.shape[1]), 0).astype(rows.dtype)


def tokens_through_experts(
    x: Float[Array, "A D"],
    gates: Float[Array, "A k"],
    order: RowOrder,
    group_sizes: Int[Array, " VE"],
    resident: TiledResident,
    reads: PagesRead,
    layer: int,
    activation: Callable[[Array, Array], Array],
    biases: Any = None,
    expected: int = 0,
    **how: Any,
) -> Float32[Array, "A D"]:
    """The weighted sum of each token's experts, without those of its rows that are past the last group.

    how: ``form`` of activations, "bf16" if it is not said; ``tile_rows``: by rule if None; where tiles have more than
    ``FEW_ROWS`` the form is always "bf16": the products are then the work, and their operands are made once for many
    rows; ``interpret``: for ``pallas_call``.
    """
    rows = words_of(x.astype(jnp.bfloat16))[order.token]
    out = _experts(rows, group_sizes, resident, reads, layer, layer, activation, biases, expected, **how)
    out, weights = out[order.position], gates.astype(jnp.float32)[:, :, None, None]
    there = (order.position < group_sizes.sum())[:, :, None, None]
    both = jnp.stack([jnp.where(there, half * weights, 0).sum(axis=1) for half in halves_of(out)], axis=1)
    return both.reshape(x.shape[0], 2 * TILE * out.shape[2])[:, : x.shape[1]]


def _experts(
    rows: Int32[Array, "R W 128"],
    group_sizes: Int[Array, " VE"],
    resident: TiledResident,
    reads: PagesRead,
    of_reads: int,
    layer: int,
    activation: Callable[[Array, Array], Array],
    biases: Any,
    expected: int = 0,
    *,
    form: str = "bf16",
    tile_rows: int | None = None,
    interpret: Any = False,
) -> Int32[Array, "R W 128"]:
    """Each row's output, both as words; what is past the last group is not written. of_reads: the layer in ``reads``,
    and layer: in the planes."""
    num_experts, all_blocks, _, tiles = resident.base.codes.shape[1:5]
    if group_sizes.shape[0] != num_experts * reads.variants:
        raise ValueError(f"{group_sizes.shape[0]} groups are not {reads.variants} variants of {num_experts} experts")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    count = rows.shape[0]
    if tile_rows and tile_rows % ROWS_UNIT:
        raise ValueError(f"tiles of {tile_rows} rows: they are multiples of {ROWS_UNIT}")
    if count == 0:
        return rows
    tile_rows = tile_rows or rows_of_tile(expected or count, num_experts, core())
    form = "bf16" if tile_rows > FEW_ROWS else form
    alike = tiles // resident.base.scales.shape[4]
    shape = Shape(tile_rows, tiles, alike, all_blocks, reads.blocks, reads.levels, reads.units, form)
    places = tiles_of(group_sizes, count, tile_rows)
    own = reads.packed[of_reads]
    return _call(shape, len(group_sizes), places, own, layer, rows, resident, activation, biases, interpret)


def _call(
    shape: Shape,
    groups: int,
    places: Tiles,
    reads: Int[Array, " X"],
    layer: int,
    rows: Int32[Array, "R W 128"],
    resident: TiledResident,
    activation: Callable[[Array, Array], Array],
    biases: Any,
    interpret: Any,
) -> Int32[Array, "R W 128"]:
    size, sublanes = shape.tiles * TILE, rows.shape[1]
    num_experts = resident.base.codes.shape[1]
    prefetched = (in_one((jnp.asarray(layer), places)), reads)

    def of(scalars: tuple[Any, ...]) -> Steps:
        now, always = scalars
        layer, tiles = parts_of(now, (1, jax.tree.map(jnp.size, places)))
        return Steps(layer, tiles, parts_of(always, sizes_of_reads(shape, groups)))

    def of_expert(array: Array) -> tuple[Array, pl.BlockSpec]:
        index = lambda tile, step, *s: (of(s).tiles.group[tile] % num_experts, *[0] * (array.ndim - 1))  # noqa: E731
        return array, pl.BlockSpec((None, *array.shape[1:]), index)

    def by_hand(array: Array) -> tuple[Array, pl.BlockSpec]:
        return array, pl.BlockSpec(memory_space=pltpu.HBM)

    rows = rows.reshape(-1, TILE)
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
    dtype, tile = FORMS[shape.form][0], (shape.rows * sublanes, TILE)

    def kernel(*refs: Any) -> None:
        scalars, rest = refs[: len(prefetched)], refs[len(prefetched) :]
        named = jax.tree.unflatten(inputs_tree, rest[: len(pairs)])
        out, *scratch = rest[len(pairs) :]
        _body(shape, num_experts, of(scalars), named, activation, out, Scratch(*scratch))

    return pl.pallas_call(
        kernel,
        name=f"experts_{shape.form}",
        out_shape=pltpu.MemorySpace.HBM(rows.shape, rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(places.used[0], shape.steps),
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
    )(*prefetched, *[array for array, _ in pairs]).reshape(-1, sublanes, TILE)


def _body(
    shape: Shape,
    num_experts: int,
    steps: Steps,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    out: Any,
    scratch: Scratch,
) -> None:
    """One grid step."""
    tile, step = pl.program_id(0), pl.program_id(1)
    sublanes = scratch.out.shape[0] // shape.rows
    turn = (tile * shape.steps + step) % 2

    def step_of(tile: Any, step: Any) -> StepAt:
        group = steps.tiles.group[tile]
        number = group * shape.steps + step
        first = jnp.minimum(step * shape.blocks, shape.all_blocks - shape.blocks)
        runs = {
            n: [f.run[number * shape.units + u] for u in range(shape.units)] for n, f in steps.reads.fetches.items()
        }
        skipped = jnp.where(step == shape.steps - 1, shape.skipped, 0) if shape.skipped else 0
        return StepAt(number, group % num_experts, first, skipped, runs)

    begins, ends = (tile == 0) & (step == 0), step == shape.steps - 1
    last_tile = tile == steps.tiles.used[0] - 1
    last, next_tile = ends & last_tile, jnp.where(last_tile, tile, tile + 1)
    own, later = step_of(tile, step), step_of(jnp.where(ends, next_tile, tile), jnp.where(ends, 0, step + 1))
    in_pieces, alone = copies_of(shape, steps, inputs, scratch.planes, scratch.copied)
    start, wait = (lambda each: each.start()), (lambda each: each.wait())
    scattered = bool(shape.levels) and shape.blocks > 1

    def rows_in(tile: Any, when: Any, run: Callable[[Any], None]) -> None:
        from_, into = rows_of(steps, tile, sublanes, inputs["x"], scratch.came.at[tile % 2])
        copy(from_, into, scratch.moved.at[tile % 2], when, run)

    def rows_out(tile: Any, when: Any, run: Callable[[Any], None]) -> None:
        into, from_ = rows_of(steps, tile, sublanes, out, scratch.out)
        copy(from_, into, scratch.moved.at[2], when, run)

    def begin() -> None:
        rows_in(tile, None, wait)
        rows_in(next_tile, ~last_tile, start)
        rows = read_rows(scratch.came, (tile % 2,), sublanes, shape.tiles * TILE)
        if shape.form == "bf16":
            own = rows.astype(jnp.bfloat16)
        else:
            largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
            scale = jnp.where(largest == 0, 1.0, largest) * (1 / FORMS[shape.form][1])
            own = in_form(rows * (1 / scale), shape.form)
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

        def columns(t: int) -> Float[Array, "M 128"]:
            lanes, g = slice(t * TILE, (t + 1) * TILE), t // shape.alike
            found = scratch.total[:, lanes] if sums is None else scratch.total[:, lanes] + sums[:, g : g + 1]
            return found + inputs["biases"][-1][:, lanes] if inputs["biases"] else found

        for s in range(min(sublanes, shape.tiles)):
            upper = columns(sublanes + s) if sublanes + s < shape.tiles else None
            write_columns(scratch.out, sublanes, s, columns(s), upper)

    def leave() -> None:
        rows_out(tile, None, start)
        rows_out(tile, last_tile, wait)

    @pl.when((begins | (steps.reads.alone[later.number] > 0)) if scattered else begins)
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
        pl.when(steps.reads.alone[own.number] > 0)(lambda: alone(own, turn, None, wait))

    if shape.steps > 1:
        pl.when(step == 0)(begin)
    for width in (2, *shape.levels):

        @pl.when(steps.reads.path[own.number] == width)
        def _run(width: int = width) -> None:
            planes = StepPlanes(shape, width, steps, own.number, scratch.planes, turn)
            (many_rows if shape.many else few_rows)(shape, planes, own.first, step, inputs, activation, scratch)
            if shape.steps == 1:
                end()

    if shape.steps == 1:
        return leave()

    @pl.when(ends)
    def _end() -> None:
        rows_out(jnp.maximum(tile - 1, 0), tile > 0, wait)
        end()
        leave()
