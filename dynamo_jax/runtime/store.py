"""All planes of all experts in host memory, and variants: the pages that one plan reads.

Axes: L layers, E experts, P projections, F channels, N channel blocks of C channels, D hidden, G groups,
U = 3 where a page holds one projection, else 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dynamo_jax.kernels.layout import LEVELS, BasePlanes, PagePool, Variant
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes, quantize


def quantize_experts(layers: list[ExpertWeights], group_size: int) -> Planes:
    """Planes of all layers' experts, arrays with axes (L, E, P, F, ..)."""
    parts = []
    for index, weights in enumerate(layers):
        try:
            parts.append(quantize(jnp.stack(weights, axis=1), group_size))
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
    return jax.tree.map(lambda *a: np.stack(a), *parts)


def base_planes(store: Planes) -> BasePlanes:
    """The planes that every variant reads, on the device."""
    return BasePlanes(jnp.asarray(store.codes[2]), jnp.asarray(store.scales))


def variant_of(store: Planes, plan: Plan, capacity: dict[int, int] | None = None) -> Variant:
    """The pages that ``plan`` reads, copied from the store, with their tables.

    ``capacity``: pages of each level to make room for, so that another plan with no more pages has
    arrays of the same shapes (and needs no new program); the plan's own counts by default.
    """
    return {level: _pool(store, plan, level, capacity) for level in LEVELS}


def page_counts(plan: Plan) -> dict[int, int]:
    """Pages of each refinement level that the plan reads."""
    return {level: int((plan.page_widths() >= level).sum()) for level in LEVELS}


def page_tables(plan: Plan) -> dict[int, Int[np.ndarray, "L E UN"]]:
    """For each refinement level, the page of each block, counted in (layer, expert, block) order; -1: none."""
    tables = {}
    for level in LEVELS:
        has = plan.page_widths() >= level
        tables[level] = np.where(has, np.cumsum(has).reshape(has.shape) - 1, -1).astype(np.int32)
    return tables


def _pool(store: Planes, plan: Plan, level: int, capacity: dict[int, int] | None) -> PagePool:
    widths = plan.page_widths()
    units = widths.shape[-1] // plan.blocks
    where = np.argwhere(widths.reshape(*widths.shape[:2], units, plan.blocks) >= level)
    room = len(where) if capacity is None else capacity[level]
    if len(where) > room:
        raise ValueError(f"the plan has {len(where)} pages of {level} bits, more than the capacity of {room}")

    def gather(planes: np.ndarray) -> Array:
        layers, experts, projections, _, last = planes.shape
        blocks = planes.reshape(layers, experts, units, projections // units, -1, plan.channel_block, last)
        out = np.zeros((room, projections // units, plan.channel_block, last), planes.dtype)
        out[: len(where)] = blocks[where[:, 0], where[:, 1], where[:, 2], :, where[:, 3]]
        return jnp.asarray(out)

    ratios = gather(store.ratios) if level == 8 else None
    return PagePool(gather(store.codes[level]), ratios, jnp.asarray(page_tables(plan)[level]))
