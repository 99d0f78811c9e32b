"""Row order for grouped matmuls: tokens to expert-sorted rows and back, by gathers only.

A router sends each of T tokens to k experts: T*k assignments. ``sort_by_expert`` puts the
assignments in expert order; ``gather_rows`` and ``combine_rows`` move activations there and
back. Both are permutations with repetition, so their gradients are gathers as well; XLA would
derive scatters, which run one element at a time on a CPU.

Axes: T tokens (of ``rows_in_tiles``: tiles), k experts a token, R = T*k rows, D hidden, E experts, V variants, M rows a
tile.
"""

from __future__ import annotations

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
    group_sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    return RowOrder((order // top_k).astype(jnp.int32), position.astype(jnp.int32), group_sizes)


@jax.custom_vjp
def gather_rows(x: Float[Array, "T D"], order: RowOrder) -> Float[Array, "R D"]:
    """Each token's activation, once for each expert that it goes to, in expert order."""
    return x[order.token]


def _gather_fwd(x, order):
    return x[order.token], order


def _gather_bwd(order, d_rows):
    return d_rows[order.position].sum(axis=1).astype(d_rows.dtype), _no_gradient(order)


gather_rows.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def combine_rows(rows: Float[Array, "R D"], weights: Float[Array, "T k"], order: RowOrder) -> Float[Array, "T D"]:
    """The weighted sum of each token's k expert outputs, in float32."""
    return (rows[order.position].astype(jnp.float32) * weights[:, :, None]).sum(axis=1)


def _combine_fwd(rows, weights, order):
    return combine_rows(rows, weights, order), (rows, weights, order)


def _combine_bwd(residual, d_out):
    rows, weights, order = residual
    d_weights = (rows[order.position].astype(jnp.float32) * d_out[:, None, :]).sum(axis=-1)
    row_weight = jnp.zeros(rows.shape[0], weights.dtype).at[order.position.reshape(-1)].set(weights.reshape(-1))
    d_rows = (d_out[order.token] * row_weight[:, None]).astype(rows.dtype)
    return d_rows, d_weights.astype(weights.dtype), _no_gradient(order)


combine_rows.defvjp(_combine_fwd, _combine_bwd)


def _no_gradient(order: RowOrder) -> RowOrder:
    return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), order)


def rows_in_tiles(
    group_sizes: Int[Array, " VE"], count: int, tile: int
) -> tuple[Int[Array, " R"], Int[Array, " TM"], Int[Array, " T"], Int[Array, ""]]:
    """Rows in tiles of one group each: where each row lies in them, the row in each of their places (R where there is
    none), the group of each tile, and how many tiles hold rows. Searches compare with all groups, since a search by
    halves would be a loop of small programs on an accelerator."""
    each = -(-group_sizes // tile)
    tile_end, row_end = jnp.cumsum(each), jnp.cumsum(group_sizes)
    most = count // tile + min(group_sizes.shape[0], count)
    last = group_sizes.shape[0] - 1
    group = jnp.minimum(jnp.searchsorted(tile_end, jnp.arange(most), side="right", method="compare_all"), last)
    first = (row_end - group_sizes)[group] + (jnp.arange(most) - (tile_end - each)[group]) * tile
    row = first[:, None] + jnp.arange(tile)
    real = (row < row_end[group][:, None]) & (jnp.arange(most) < tile_end[-1])[:, None]
    owner = jnp.minimum(jnp.searchsorted(row_end, jnp.arange(count), side="right", method="compare_all"), last)
    place = (tile_end - each)[owner] * tile + jnp.arange(count) - (row_end - group_sizes)[owner]
    place = jnp.clip(place, 0, most * tile - 1)
    return place, jnp.where(real, row, count).reshape(-1), group.astype(jnp.int32), tile_end[-1]
