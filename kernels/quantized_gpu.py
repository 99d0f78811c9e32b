"""Mixed-precision experts on a Hopper GPU: two Pallas kernels that multiply planes at the width of each block.

The first takes rows through gate, up and the activation, the second through down; ``gpu_jobs.py`` has what they do.
Both are persistent: as many blocks of threads as the GPU runs at once take items of work in turn. An item of the first
is half a channel block of one tile of rows; of the second a few tiles of hidden and, where those alone are too few for
the GPU, a part of the channels, whose sums are added up outside. Forward only.

Axes: R rows in order, V variants, E experts, D hidden, F channels, N blocks of 128, M rows a tile, T tiles of rows,
S parts of the channels, X tiles of 64 x 128 of a block, Q pages, U parts of a block with pages of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int

from dynamo_jax.kernels.fragments import BLOCK, INNER, ROWS, FragmentResident
from dynamo_jax.kernels.gpu_jobs import Down, Inner, Inputs, Shape, Staged
from dynamo_jax.kernels.gpu_ring import run_items
from dynamo_jax.kernels.gpu_unpack import words_shape
from dynamo_jax.kernels.layout import LEVELS, PROJECTIONS, PageTable
from dynamo_jax.kernels.rows import rows_in_tiles

PROCESSORS = 132  # of an H100 or H200; each runs TOGETHER blocks of threads at once
TOGETHER = 2
SHARED_BYTES = 112 * 1024  # of one block of threads, barriers and what the GPU keeps not counted
ALIGNED = 1024  # bytes, of what lies in shared memory
MOST_STAGES = 4


def quantized_experts_gpu(
    rows: BFloat16[Array, "R D"],
    group_sizes: Int[Array, " VE"],
    resident: FragmentResident,
    tables: tuple[PageTable, ...],
    layer: int | Int[Array, ""],
    activation: Callable[[Array, Array], Array],
    biases: Any = None,
    expected: int = 0,
    interpret: Any = None,
    blocks: int = PROCESSORS * TOGETHER,
) -> BFloat16[Array, "R D"]:
    """Each row through its expert at its variant's precision; arguments as of ``quantized_experts_xla``, planes in
    fragments. interpret: parameters of Pallas' interpreter of GPU kernels. ``blocks`` of threads run at once."""
    num_experts = resident.base.codes.shape[1]
    if group_sizes.shape[0] != num_experts * len(tables):
        raise ValueError(f"{group_sizes.shape[0]} groups are not {len(tables)} variants of {num_experts} experts")
    if rows.dtype != jnp.bfloat16:
        raise ValueError(f"rows are {rows.dtype}: the GPU kernels take bfloat16")
    if rows.shape[0] == 0:
        return rows
    how = {"activation": activation, "expected": expected, "interpret": interpret, "blocks": blocks}
    run = _experts_compiled if interpret is None else _experts
    return run(rows, group_sizes, resident, tables, jnp.asarray(layer, jnp.int32), biases, **how)


def _experts(
    rows: BFloat16[Array, "R D"],
    group_sizes: Int[Array, " VE"],
    resident: FragmentResident,
    tables: tuple[PageTable, ...],
    layer: Int[Array, ""],
    biases: Any,
    activation: Callable[[Array, Array], Array],
    expected: int,
    interpret: Any,
    blocks: int,
) -> BFloat16[Array, "R D"]:
    _, num_experts, all_blocks = resident.base.codes.shape[:3]
    hidden = rows.shape[1]
    levels = tuple(level for level in LEVELS if any(level in t for t in tables) and len(resident.pages[level].codes))
    together = resident.pages[levels[0]].codes.shape[1] if levels else PROJECTIONS
    tile = rows_of_tile(expected or rows.shape[0], num_experts)
    lie = rows_in_tiles(group_sizes, rows.shape[0], tile)
    shape = Shape(
        rows=tile,
        tiles=lie.group.shape[0],
        hidden=hidden,
        layers=resident.base.codes.shape[0],
        all_blocks=all_blocks,
        num_experts=num_experts,
        levels=levels,
        units=PROJECTIONS // together,
        split=1,
        blocks=blocks,
        interpret=interpret is not None,
    )
    shape = shape._replace(split=_split(shape, min(rows.shape[0], lie.group.shape[0])))
    x = jnp.take(rows, lie.source, axis=0, mode="fill", fill_value=0).reshape(-1, tile, hidden)
    work, group, page = _scalars(shape, tables, layer, lie.group, lie.used)

    def inputs(inner: bool, x: Array, own_biases: Any) -> Inputs:
        codes, scales, pools, ratios = _planes(shape, resident, inner)
        sums = _sums(x) if inner and not shape.many else None
        return Inputs(work, group, page, x, sums, codes, scales, pools, ratios, own_biases)

    own = None if biases is None else _biases(biases[:2], all_blocks)
    h = _run(shape, True, inputs(True, x, own), activation, interpret)
    out = _run(shape, False, inputs(False, h, None), activation, interpret)
    found = out.astype(jnp.float32).sum(axis=1).swapaxes(1, 2).reshape(-1, hidden)[lie.place]
    if biases is not None:
        found = found + biases[2][lie.group[lie.place // tile] % num_experts]
    return jnp.where((jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None], found, 0).astype(rows.dtype)


# Traced once for all layers of a program.
_experts_compiled = jax.jit(_experts, static_argnames=("activation", "expected", "interpret", "blocks"))


def rows_of_tile(count: int, num_experts: int) -> int:
    """M: enough for the rows of most experts, so that their planes are read and unpacked once."""
    mean = count / num_experts
    wanted = mean + 2 * mean**0.5
    return next((rows for rows in (16, 32, 64) if wanted <= rows), 128)


def _split(shape: Shape, tiles: int) -> int:
    """S: the least divisor of the blocks that gives every block of threads two items, if any does."""
    items = tiles * shape.hidden // (ROWS * shape.down_tiles)
    divisors = [s for s in range(1, shape.all_blocks + 1) if shape.all_blocks % s == 0 and shape.all_blocks // s >= 2]
    return next((s for s in divisors if items * s >= 2 * shape.blocks), divisors[-1] if divisors else 1)


def _scalars(
    shape: Shape, tables: tuple[PageTable, ...], layer: Any, group: Array, tiles: Array
) -> tuple[Array, Array, dict[int, Array]]:
    work = jnp.stack([tiles.astype(jnp.int32), jnp.asarray(layer, jnp.int32)])
    page = {}
    for level in shape.levels:
        missing = jnp.full((shape.layers, shape.num_experts, shape.units * shape.all_blocks), -1, jnp.int32)
        each = [(t[level] if level in t else missing).reshape(-1) for t in tables]  # of all layers: the same in each
        page[level] = each[0] if len(each) == 1 else jnp.concatenate(each)
    return work, group, page


def _planes(
    shape: Shape, resident: FragmentResident, inner: bool
) -> tuple[Array, Array, dict[int, Array], Array | None]:
    """Codes, scales, pages and ratios in shapes of at most five dimensions of at most 256 each, to be copied."""
    codes, scales = resident.base
    tiles = codes.shape[4]
    of_scales = (PROJECTIONS, tiles, ROWS) if inner else (PROJECTIONS, tiles // 2, INNER)

    def cut(array: Array, level: int) -> Array:
        return array.reshape(*array.shape[:-1], *words_shape(level))

    pools = {level: cut(resident.pages[level].codes, level) for level in shape.levels}
    ratios = None
    if 8 in shape.levels:
        own: Any = resident.pages[8].ratios
        ratios = own.reshape(own.shape[0], own.shape[1], *of_scales[1:])
    codes = cut(codes, 2).reshape(-1, PROJECTIONS, tiles, *words_shape(2))
    return codes, scales.reshape(-1, *of_scales), pools, ratios


def _sums(x: BFloat16[Array, "T M D"]) -> Float[Array, "T G M"]:
    """Of each row over G = D / 128 groups of hidden."""
    each = x.astype(jnp.float32).reshape(*x.shape[:2], -1, INNER)
    return each.sum(axis=-1).swapaxes(1, 2)


def _biases(biases: Any, all_blocks: int) -> Float[Array, "EN 2 2 64"]:
    gate, up = (b.astype(jnp.float32).reshape(-1, all_blocks, 2, ROWS) for b in biases)
    return jnp.stack([gate, up], axis=2).reshape(-1, 2, 2, ROWS)


def _run(shape: Shape, inner: bool, inputs: Inputs, activation: Any, interpret: Any) -> Array:
    dtype = jnp.float32 if shape.split > 1 and not inner else jnp.bfloat16
    if inner:
        out_shape: tuple[int, ...] = (shape.tiles, shape.all_blocks * BLOCK, shape.rows)
    else:
        out_shape = (shape.tiles, shape.split, shape.hidden, shape.rows)
    flat, tree = jax.tree.flatten(inputs)
    stages = _stages(shape, inner, dtype)
    scratch: Any = {"staged": _staged(shape, inner, dtype, stages)}

    def body(*refs: Any, staged: Staged) -> None:
        job = (Inner if inner else Down)(shape, stages, jax.tree.unflatten(tree, refs[:-1]), staged, refs[-1])
        run_items(job, activation)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out_shape, dtype),
        grid=(shape.blocks,),
        grid_names=("block",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*flat)


def _stages(shape: Shape, inner: bool, out_dtype: Any) -> int:
    """How many steps the ring has: as many as fit."""

    def size(buffer: Any) -> int:
        return -(-math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize // ALIGNED) * ALIGNED

    for stages in range(MOST_STAGES, 2, -1):
        staged = _staged(shape, inner, out_dtype, stages)._replace(barrier=None)
        if sum(map(size, jax.tree.leaves(staged))) <= SHARED_BYTES:
            return stages
    return 2


def _staged(shape: Shape, inner: bool, out_dtype: Any, stages: int) -> Staged:
    """The shapes of all that is in shared memory."""
    tiles = (2, shape.step_tiles) if inner else (shape.down_tiles,)
    x_shape = (shape.rows, INNER * shape.step_tiles) if inner else (INNER, shape.rows)
    scales = (*tiles, ROWS) if inner else (shape.down_tiles // 2, INNER)
    last = 8 in shape.levels
    groups = 0 if inner or shape.many else shape.down_tiles // 2 * (2 if last else 1)

    def swizzled(size: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
        return plgpu.SMEM(size, dtype, transforms=_swizzled(size[-1], dtype))

    def planes(level: int) -> Any:
        return plgpu.SMEM((stages, *tiles, *words_shape(level)), jnp.int32)

    parts = 2 if inner and shape.units > 1 else 1  # pages of one level that a step reads
    return Staged(
        x=swizzled((stages, *x_shape)),
        scaled=swizzled((groups, INNER, shape.rows)) if groups else None,
        less=swizzled((3, ROWS, shape.rows)) if groups else None,
        codes=planes(2),
        scales=plgpu.SMEM((stages, *scales), jnp.bfloat16),
        pages={level: planes(level) for level in shape.levels},
        ratios=plgpu.SMEM((stages, *scales), jnp.bfloat16) if last else None,
        out=swizzled((ROWS, shape.rows), out_dtype),
        barrier=plgpu.Barrier(num_arrivals=3 + parts * (len(shape.levels) + last), num_barriers=stages),
    )


def _swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How the tensor cores, and copies, want a matrix of so many columns to lie."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)
