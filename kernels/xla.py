"""Grouped matmul in plain XLA for CPUs, with work in proportion to the rows.

Forward: a loop over experts slices each expert's weights once; an inner loop multiplies its rows in
blocks of fixed size. Rows are sorted, so a block is a slice, and what a block computes outside its
expert's rows is dropped. No row is gathered or padded, and an expert without rows costs one slice.
Backward: all blocks at once in batched products, since there each weight gradient sums over blocks; the
gradient is written out, because the derived one scatters.

Axes: R rows, K contraction, N output, E experts, B blocks, M rows a block.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.products import transpose_by_product


class BlockLayout(NamedTuple):
    """Which rows and which expert each block holds.

    row: (B, M) index of the row in each place; R where the place is empty.
    place: (R,) flat place of each row; B*M for a row past the last group.
    expert: (B,) expert of each block; any valid index for an empty block.
    """

    row: Int[Array, "B M"]
    place: Int[Array, " R"]
    expert: Int[Array, " B"]


def rows_per_block(rows: int, num_experts: int) -> int:
    """A quarter more than the mean group, so that most groups are one block; between 8 and 128, by steps of 8."""
    mean = rows / max(1, num_experts)
    return min(128, max(8, 8 * math.ceil(mean * 1.25 / 8)))


def block_layout(group_sizes: Int[Array, " E"], rows: int, block: int) -> BlockLayout:
    num_experts = group_sizes.shape[0]
    num_blocks = -(-rows // block) + num_experts
    blocks = -(-group_sizes // block)
    block_end = jnp.cumsum(blocks)
    expert = jnp.searchsorted(block_end, jnp.arange(num_blocks), side="right")
    valid = expert < num_experts
    expert = jnp.minimum(expert, num_experts - 1)
    row_end = jnp.cumsum(group_sizes)
    first_row = (row_end - group_sizes)[expert] + (jnp.arange(num_blocks) - (block_end - blocks)[expert]) * block
    row = first_row[:, None] + jnp.arange(block)[None, :]
    row = jnp.where(valid[:, None] & (row < row_end[expert][:, None]), row, rows)

    r = jnp.arange(rows)
    owner = jnp.minimum(jnp.searchsorted(row_end, r, side="right"), num_experts - 1)
    place = (block_end - blocks)[owner] * block + r - (row_end - group_sizes)[owner]
    place = jnp.where(r < row_end[-1], place, num_blocks * block)
    return BlockLayout(row.astype(jnp.int32), place.astype(jnp.int32), expert.astype(jnp.int32))


def to_blocks(x: Float[Array, "R K"], layout: BlockLayout) -> Float[Array, "B M K"]:
    return x.at[layout.row].get(mode="fill", fill_value=0)


def from_blocks(blocks: Float[Array, "B M N"], layout: BlockLayout) -> Float[Array, "R N"]:
    flat = blocks.reshape(-1, blocks.shape[-1])
    return flat.at[layout.place].get(mode="fill", fill_value=0)


def _multiply_groups(
    x: Float[Array, "R K"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"], block: int
) -> Float[Array, "R N"]:
    rows = x.shape[0]
    block = min(block, rows)
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes

    def expert_rows(expert: Array, out: Array) -> Array:
        weights = w[expert]

        def one_block(index: Array, out: Array) -> Array:
            first = start[expert] + index * block
            at = jnp.minimum(first, rows - block)  # a block at the end of the rows begins earlier instead
            row = at + jnp.arange(block)[:, None]
            product = jax.lax.dynamic_slice_in_dim(x, at, block) @ weights
            before = jax.lax.dynamic_slice_in_dim(out, at, block)
            kept = jnp.where((row >= first) & (row < end[expert]), product, before)
            return jax.lax.dynamic_update_slice_in_dim(out, kept, at, axis=0)

        return jax.lax.fori_loop(0, -(-group_sizes[expert] // block), one_block, out)

    return jax.lax.fori_loop(0, w.shape[0], expert_rows, jnp.zeros((rows, w.shape[2]), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x, w, group_sizes, block):
    return _multiply_groups(x, w, group_sizes, block)


def _grouped_fwd(x, w, group_sizes, block):
    return _grouped(x, w, group_sizes, block), (x, w, group_sizes)


def _grouped_bwd(block, residual, d_out):
    x, w, group_sizes = residual
    layout = block_layout(group_sizes, x.shape[0], block)
    x_blocks, d_blocks = to_blocks(x, layout), to_blocks(d_out.astype(x.dtype), layout)
    d_x = from_blocks(jnp.einsum("bmn,bkn->bmk", d_blocks, w[layout.expert]), layout)
    member = jax.nn.one_hot(layout.expert, w.shape[0], axis=0, dtype=w.dtype)
    if x.shape[1] <= w.shape[2]:
        d_w = jnp.einsum("bkm,bmn->bkn", transpose_by_product(x_blocks), d_blocks)
        d_w = (member @ d_w.reshape(d_w.shape[0], -1)).reshape(w.shape)
    else:
        d_w = jnp.einsum("bnm,bmk->bnk", transpose_by_product(d_blocks), x_blocks)
        d_w = (member @ d_w.reshape(d_w.shape[0], -1)).reshape(-1, w.shape[2], w.shape[1]).swapaxes(1, 2)
    return d_x, d_w, np.zeros(group_sizes.shape, jax.dtypes.float0)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def grouped_matmul_xla(
    x: Float[Array, "R K"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"], block: int | None = None
) -> Float[Array, "R N"]:
    """Row r of group e times w[e], in x's dtype; rows past the last group are zero."""
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[2]), x.dtype)
    return _grouped(x, w, group_sizes, block or rows_per_block(x.shape[0], w.shape[0]))
