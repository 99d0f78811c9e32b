"""Mixed-precision experts in plain XLA: a loop that unpacks one expert at a time and multiplies its rows.

Never more than one expert is unpacked, so memory is that of the planes; an expert without rows is
skipped. Rows of one call may run at different variants: they are in the order of variants, then of experts.
Forward only.

Axes: R rows in order, V variants, E experts, D hidden, F channels, P projections, M rows a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.layout import PageTable, Resident, dequantize_layer
from dynamo_jax.kernels.xla import rows_per_block


def quantized_experts_xla(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " VE"],
    resident: Resident,
    tables: tuple[PageTable, ...],
    layer: int,
    activation: Callable[[Array, Array], Array],
    biases: Any = None,
    expected: int = 0,
) -> Float[Array, "R D"]:
    """Each row through its expert: down(activation(gate(row), up(row))), at its variant's precision.

    ``group_sizes``: rows of each expert at the first of ``tables``, then at the second, ..; they sum to
    R or less. ``biases``:
    those of gate (E, F), up (E, F) and down (E, D), or None. ``expected``: rows that the groups are likely to have
    together, 0 for all.
    """
    num_experts = resident.base.codes.shape[1]
    if group_sizes.shape[0] != num_experts * len(tables):
        raise ValueError(f"{group_sizes.shape[0]} groups are not {len(tables)} variants of {num_experts} experts")
    count = rows.shape[0]
    if count == 0:
        return rows
    block = min(rows_per_block(expected or count, group_sizes.shape[0]), count)
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes

    def with_bias(value: Array, index: int, expert: Array) -> Array:
        return value if biases is None else value + biases[index][expert].astype(value.dtype)

    def one_group(table: PageTable, group: Array, out: Array) -> Array:
        expert = group % num_experts
        weights = dequantize_layer(resident, table, layer, expert[None])[:, 0].astype(rows.dtype)

        def one_block(index: Array, out: Array) -> Array:
            first = start[group] + index * block
            at = jnp.minimum(first, count - block)  # a block at the end of the rows begins earlier instead
            x = jax.lax.dynamic_slice_in_dim(rows, at, block)
            hidden = activation(with_bias(x @ weights[0].T, 0, expert), with_bias(x @ weights[1].T, 1, expert))
            value = with_bias(hidden @ weights[2], 2, expert)
            row = at + jnp.arange(block)[:, None]
            before = jax.lax.dynamic_slice_in_dim(out, at, block)
            kept = jnp.where((row >= first) & (row < end[group]), value, before)
            return jax.lax.dynamic_update_slice_in_dim(out, kept, at, axis=0)

        return jax.lax.fori_loop(0, -(-group_sizes[group] // block), one_block, out)

    def used(table: PageTable, group: Array, out: Array) -> Array:
        return jax.lax.cond(group_sizes[group] > 0, functools.partial(one_group, table), lambda _, out: out, group, out)

    out = jnp.zeros_like(rows)
    for number, table in enumerate(tables):
        first = number * num_experts
        out = jax.lax.fori_loop(first, first + num_experts, functools.partial(used, table), out)
    return out
