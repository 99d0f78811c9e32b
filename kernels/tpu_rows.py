"""Rows of bfloat16 as a TPU copies them one by one: each in vector registers of its own, two numbers a word.

Rows of (R, D) share registers, so that one of them cannot be copied alone, and gathering some moves them sublane by
sublane. As words, (R, W, 128), a row is W / 8 whole registers, wherever it begins: XLA gathers those, and a kernel
copies from any row on. In the kernel a register of words of eight rows is read with a stride, at no cost. The lower
half of a word in sublane s is of column 128 s + lane, the upper one of column 128 (W + s) + lane.

Axes: R rows, M rows of a tile, D columns, a multiple of 128, W sublanes of a row, the least multiple of 8 with 256 W at
least D.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from dynamo_jax.kernels.layout import filled
from dynamo_jax.kernels.tiles import SUBLANES, TILE

UPPER = -(2**16)  # mask of a word's upper half


def sublanes_of(size: int) -> int:
    """W"""
    return filled(-(-size // (2 * TILE)), SUBLANES)


def words_of(rows: BFloat16[Array, "R D"]) -> Int32[Array, "R W 128"]:
    count, size = rows.shape
    sublanes = sublanes_of(size)
    wide = jnp.pad(rows, ((0, 0), (0, 2 * TILE * sublanes - size))).reshape(count, 2, sublanes, TILE)
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits[:, 0] | (bits[:, 1] << 16), jnp.int32)


def halves_of(words: Int32[Array, "*R W 128"]) -> tuple[Float32[Array, "*R W 128"], Float32[Array, "*R W 128"]]:
    """The lower and the upper numbers."""
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731
    return as_float(words << 16), as_float(words & jnp.int32(UPPER))


def rows_of_words(words: Int32[Array, "R W 128"], size: int) -> Float32[Array, "R D"]:
    return jnp.concatenate(halves_of(words), axis=1).reshape(words.shape[0], 2 * TILE * words.shape[1])[:, :size]


def read_rows(ref: Any, place: tuple[Any, ...], sublanes: int, size: int) -> Float32[Array, "M D"]:
    """Of a tile in fast memory, (.., M W, 128), for use in a kernel. place: the index of what stands for the dots."""
    count = ref.shape[-2] // sublanes
    each = [halves_of(ref[*place, pl.ds(s, count, stride=sublanes), :]) for s in range(sublanes)]
    return jnp.concatenate([half for which in (0, 1) for half in (pair[which] for pair in each)], axis=1)[:, :size]


def write_columns(
    ref: Any, sublanes: int, s: int, lower: Float[Array, "M 128"], upper: Float[Array, "M 128"] | None
) -> None:
    """Two tiles of columns, those of sublane ``s``, of a tile of rows in fast memory, (M W, 128), rounded to bfloat16,
    for use in a kernel. None: there are no such columns."""
    bits = lambda columns: jax.lax.bitcast_convert_type(  # noqa: E731
        columns.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32
    )
    words = jax.lax.shift_right_logical(bits(lower), 16)
    words = words if upper is None else words | bits(upper)
    ref[pl.ds(s, ref.shape[0] // sublanes, stride=sublanes), :] = words
