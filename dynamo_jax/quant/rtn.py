"""Round to nearest on a uniform grid a group: the field's plain baseline, without calibration.

With ``clip``, the search over the span of each group that most tools make; without it, the "RTN" rows of GPTQ
(arXiv 2210.17323).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamo_jax.quant.grids import Grid, GridSpec, grid_of, on_grid


@functools.partial(jax.jit, static_argnames="spec")
def round_to_nearest(w: Float[Array, "*S D"], spec: GridSpec) -> Float[Array, "*S D"]:
    """The dequantized float32 weights; groups lie along the last axis."""
    groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, spec.group_of(w.shape[-1]))
    grid = grid_of(groups, spec)
    return on_grid(groups, Grid(grid.scale[..., None], grid.zero[..., None]), spec.bits).reshape(w.shape)
