"""The float reference of the grouped matmul: every expert times every row, then a choice.

Obvious and slow (rows times experts); every other implementation is tested against it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    x: Float[Array, "R K"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R N"]:
    """Row r of group e times w[e], in float32; rows past the last group are zero."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    member = (row[:, None] >= (ends - group_sizes)[None, :]) & (row[:, None] < ends[None, :])
    product = jnp.einsum("rk,ekn->ren", x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.where(member[:, :, None], product, 0.0).sum(axis=1)
