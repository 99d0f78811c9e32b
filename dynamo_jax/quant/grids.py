"""Uniform grids a group: the plain storage of other tools, one scale and, if asymmetric, one zero point a group.

w = (q - z) s with q in 0 .. 2^b - 1; s is bfloat16. Symmetric: z = 2^(b-1), a constant, and nothing is stored for it.
Asymmetric: z is one of the codes, a byte. The grid of a group spans its smallest to its largest weight (zero included),
or, with clipping search, the share of that span which leaves the least squared error.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamo_jax.quant.planes import over, rounded_scale

CLIP_SHARES = tuple(np.linspace(1.0, 0.4, 25).tolist())  # of a group's span, tried in this order
BITS = tuple(range(2, 9))


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """How weights become codes. group_size: neighbouring weights of one scale; one that is larger than the axis is
    the axis. clip: search for the span; else smallest to largest weight."""

    bits: int
    group_size: int = 64
    symmetric: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits: known are {BITS[0]} to {BITS[-1]}")
        if self.group_size < 1:
            raise ValueError(f"group_size {self.group_size} is not positive")

    def group_of(self, size: int) -> int:
        """The size of a group along an axis of ``size`` weights."""
        group = min(self.group_size, size)
        if size % group:
            raise ValueError(f"last axis {size} is not a multiple of group_size {group}")
        return group

    def bits_per_weight(self, size: int) -> float:
        """Codes, a bfloat16 scale and, if asymmetric, a zero point of one byte a group, for an axis of ``size``."""
        return self.bits + (16 if self.symmetric else 24) / self.group_of(size)


class Grid(NamedTuple):
    """Scale and zero point of each group, float32; both may have the axes of the groups or broadcast to them."""

    scale: Float[Array, "*S"]
    zero: Float[Array, "*S"]


def grid_of(groups: Float[Array, "*S g"], spec: GridSpec) -> Grid:
    """The grid of each group. A group of zeros has scale 0."""
    low = jnp.minimum(groups.min(axis=-1), 0.0)
    high = jnp.maximum(groups.max(axis=-1), 0.0)
    best: tuple[Array, Grid] | None = None
    for share in CLIP_SHARES if spec.clip else CLIP_SHARES[:1]:
        grid = _spanning(low * share, high * share, spec)
        left = groups - on_grid(groups, Grid(grid.scale[..., None], grid.zero[..., None]), spec.bits)
        error = jnp.sum(left**2, axis=-1)
        if best is None:
            best = error, grid
        else:
            take = error < best[0]
            best = jnp.where(take, error, best[0]), Grid(*(jnp.where(take, a, b) for a, b in zip(grid, best[1])))
    assert best is not None
    return best[1]


def _spanning(low: Array, high: Array, spec: GridSpec) -> Grid:
    top = 2**spec.bits - 1
    if spec.symmetric:
        half = 2 ** (spec.bits - 1)  # one code more below zero than above it: the upper end is half a step short
        scale = rounded_scale(2 * jnp.maximum(high, -low) / top)
        return Grid(scale, jnp.full_like(scale, half))
    scale = rounded_scale((high - low) / top)
    zero = jnp.clip(jnp.round(over(-low, scale)), 0, top)  # a scale rounded down would put it past the grid
    return Grid(scale, zero)


def on_grid(w: Float[Array, "*S"], grid: Grid, bits: int) -> Float[Array, "*S"]:
    """The nearest grid values of weights; the grid's axes broadcast against them."""
    q = jnp.clip(jnp.round(over(w, grid.scale)) + grid.zero, 0, 2**bits - 1)
    return (q - grid.zero) * grid.scale
