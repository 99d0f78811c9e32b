"""The products of one grid step of the TPU kernel: rows through those blocks of an expert that are in fast memory.

Where rows are few, scales are never multiplied into weights: each group of hidden is one matrix product, scaled
after it in gate and up, and before it, in the few rows of hidden channels, in down. Where they are many, weights are
scaled, once for all of them.

Forms: "bf16" activations; "int8" and "fp8" (e4m3) activations with one scale a row, where the chip multiplies those.

Axes: M rows a tile, D hidden, W sublanes of a row as words, K groups of hidden with scales of their own, B blocks a
step, U parts of a block with pages of their own, N blocks of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from dynamo_jax.kernels.tiles import TILE
from dynamo_jax.kernels.tpu_planes import StepPlanes
from dynamo_jax.kernels.tpu_steps import Shape

FORMS = {"bf16": (jnp.bfloat16, 0.0), "int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
MAGIC = 1.5 * 2**23  # a small float32 that is added to it has its nearest whole number in the lowest bits
DOWN_BLOCKS = 2  # that one product with down sums over: the depth of a matrix unit of v6e and TPU7x


class Scratch(NamedTuple):
    """What lasts over the steps of a tile. came: (2, M W, 128) its rows as words, and those of the next tile;
    out: (M W, 128) its outputs, which leave while the next is multiplied; moved: a semaphore of each of the three; x:
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


def in_form(scaled: Float[Array, "M K"], form: str) -> Array:
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


def many_rows(
    shape: Shape,
    planes: StepPlanes,
    first: Any,
    step: Any,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    scratch: Scratch,
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


def few_rows(
    shape: Shape,
    planes_of: StepPlanes,
    first: Any,
    step: Any,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    scratch: Scratch,
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
                    scratch.total[:, lanes] += product(in_form(lhs, shape.form), rhs) * most

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
