"""Batched matrix products whose gradients keep to the layouts that XLA's CPU backend is fast at.

On a CPU, XLA multiplies (m, k) by (k, n) or by (n, k) transposed at full speed, but a left operand
whose contracted axis comes first ran 5 to 17 times slower (bfloat16, jax 0.12; docs/log.md). The
derived gradient of every matmul has one such product. Here it is replaced by a transpose that
is itself a fast product, with the identity matrix, and hence exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def transpose_by_product(a: Float[Array, "*B M K"]) -> Float[Array, "*B K M"]:
    """The transpose of the last two axes; costs K multiply-adds an element, so K should be small."""
    identity = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), (*a.shape[:-2], a.shape[-1], a.shape[-1]))
    return jnp.einsum("...qk,...mk->...qm", identity, a)


@jax.custom_vjp
def matmul(a: Float[Array, "*B M K"], b: Float[Array, "*B K N"]) -> Float[Array, "*B M N"]:
    """a @ b, equal leading axes."""
    return jnp.einsum("...mk,...kn->...mn", a, b)


def _matmul_bwd(residual, d):
    a, b = residual
    d = d.astype(a.dtype)
    return jnp.einsum("...mn,...kn->...mk", d, b), jnp.einsum("...km,...mn->...kn", transpose_by_product(a), d)


matmul.defvjp(lambda a, b: (matmul(a, b), (a, b)), _matmul_bwd)
