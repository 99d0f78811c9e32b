"""Row order for grouped matmuls: tokens to expert-sorted rows and back, by gathers only.

A router sends each of T tokens to k experts: T*k assignments. ``sort_by_expert`` puts the
assignments in expert order; ``gather_rows`` and ``combine_rows`` move activations there and
back. Both are permutations with repetition, so their gradients are gathers as well; XLA would
derive scatters, which run one element at a time on a CPU.

Axes: T tokens (of ``rows_in_tiles``: tiles), k experts a token, R = T*k rows, D hidden, E experts, V variants, M rows a
tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RowOrder(NamedTuple):
    """The expert order of the T*k assignments of a batch.

    token: (R,) the token that each sorted row comes from.
    position: (T, k) the sorted row of each assignment.
    group_sizes: (E,) rows of each expert; they sum to R.
    """

    token: Int[Array, " R"]
    position: Int[Array, "T k"]
    group_sizes: Int[Array, " E"]


def sort_by_expert(experts: Int[Array, "T k"], num_experts: int) -> RowOrder:
    """Stable order of the assignments by expert index (values in 0..num_experts-1)."""
    tokens, top_k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    position = jnp.argsort(order, stable=True).reshape(tokens, top_k)
    return RowOrder((order // top_k).astype(jnp.int32), position.astype(jnp.int32), _counted(flat, num_experts))


def _counted(values: Int[Array, " R"], length: int) -> Int[Array, " E"]:
    """How often each of 0 .. length - 1 is there. On a TPU by comparing: a count by index is a loop there, or is left
    to another core. Elsewhere comparing takes longer."""

    def compared(values: Array) -> Array:
        return (values[:, None] == jnp.arange(length)).sum(axis=0, dtype=jnp.int32)

    def indexed(values: Array) -> Array:
        return jnp.bincount(values, length=length).astype(jnp.int32)

    return jax.lax.platform_dependent(values, tpu=compared, default=indexed)


def _each_place(rows: Float[Array, "R D"], order: RowOrder) -> list[Float[Array, "T D"]]:
    """The row of each token's first expert, of its second, ..., in float32. A CPU adds up k such arrays faster than
    it sums one (T, k, D) over its middle axis."""
    return [rows[order.position[:, j]].astype(jnp.float32) for j in range(order.position.shape[1])]


@jax.custom_vjp
def gather_rows(x: Float[Array, "T D"], order: RowOrder) -> Float[Array, "R D"]:
    """Each token's activation, once for each expert that it goes to, in expert order."""
    return x[order.token]


def _gather_fwd(x, order):
    return x[order.token], order


def _gather_bwd(order, d_rows):
    return functools.reduce(jnp.add, _each_place(d_rows, order)).astype(d_rows.dtype), _no_gradient(order)


gather_rows.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def combine_rows(rows: Float[Array, "R D"], weights: Float[Array, "T k"], order: RowOrder) -> Float[Array, "T D"]:
    """The weighted sum of each token's k expert outputs, in float32."""
    return functools.reduce(jnp.add, [own * weights[:, j, None] for j, own in enumerate(_each_place(rows, order))])


def _combine_fwd(rows, weights, order):
    return combine_rows(rows, weights, order), (rows, weights, order)


def _combine_bwd(residual, d_out):
    rows, weights, order = residual
    d_weights = jnp.stack([(own * d_out).sum(axis=-1) for own in _each_place(rows, order)], axis=1)
    row_weight = jnp.zeros(rows.shape[0], weights.dtype).at[order.position.reshape(-1)].set(weights.reshape(-1))
    d_rows = (d_out[order.token] * row_weight[:, None]).astype(rows.dtype)
    return d_rows, d_weights.astype(weights.dtype), _no_gradient(order)


combine_rows.defvjp(_combine_fwd, _combine_bwd)


def _no_gradient(order: RowOrder) -> RowOrder:
    return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), order)


class TiledRows(NamedTuple):
    """Rows in tiles of M. A tile holds rows of one group, and each group begins a new tile.

    place: (R,) where each row lies. source: (TM,) the row in each place of tiles of M, R where there is none. group:
    (T,) of each tile. used: tiles that hold rows.
    """

    place: Int[Array, " R"]
    source: Int[Array, " TM"]
    group: Int[Array, " T"]
    used: Int[Array, ""]


def spans(
    group_sizes: Int[Array, " VE"], count: int, tile: int
) -> tuple[tuple[Array, Array], tuple[Array, Array], int]:
    """Where each group's rows begin and end, and its tiles of up to ``tile`` rows, and T, the most tiles that ``count``
    rows can have."""
    each = -(-group_sizes // tile)
    row_end, tile_end = jnp.cumsum(group_sizes), jnp.cumsum(each)
    most = count // tile + min(group_sizes.shape[0], count)
    return (row_end - group_sizes, row_end), (tile_end - each, tile_end), most


def rows_in_tiles(group_sizes: Int[Array, " VE"], count: int, tile: int) -> TiledRows:
    """R = ``count`` rows, in the order of their groups, in tiles of up to ``tile`` rows."""
    (row_begin, row_end), (tile_begin, tile_end), most = spans(group_sizes, count, tile)
    tiles, rows = jnp.arange(most), jnp.arange(count)
    group, of_row = _owner(tile_end, tiles), _owner(row_end, rows)
    row = (row_begin[group] + (tiles - tile_begin[group]) * tile)[:, None] + jnp.arange(tile)
    real = (row < row_end[group][:, None]) & (tiles < tile_end[-1])[:, None]
    return TiledRows(
        place=jnp.clip(tile_begin[of_row] * tile + rows - row_begin[of_row], 0, row.size - 1),
        source=jnp.where(real, row, count).reshape(-1),
        group=group.astype(jnp.int32),
        used=tile_end[-1],
    )


def _owner(end: Int[Array, " VE"], number: Int[Array, " N"]) -> Int[Array, " N"]:
    """The group of each of N parts, given where each group's end; past them the last group. Each is compared with all:
    a search by halves would be a loop of small programs on an accelerator."""
    return jnp.minimum(jnp.searchsorted(end, number, side="right", method="compare_all"), end.shape[0] - 1)
