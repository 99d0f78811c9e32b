"""Causal attention with grouped key/value heads and a written-out gradient.

One sequence at a time, so that its score matrix stays in cache; the gradient recomputes the scores
(as FlashAttention does, arXiv 2205.14135, appendix B) and uses only products in fast CPU layouts.

Axes: B batch, T tokens, H query heads, J key/value heads, C head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamo_jax.kernels.products import transpose_by_product


def attend(
    q: Float[Array, "B T H C"], k: Float[Array, "B T J C"], v: Float[Array, "B T J C"]
) -> Float[Array, "B T H C"]:
    """Softmax attention, each token to itself and those before; query head h reads key/value head h*J//H."""
    heads = q.shape[2]
    k, v = (jnp.repeat(a, heads // a.shape[2], axis=2) for a in (k, v))
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return jax.lax.map(lambda part: _attend_one(*part), (q, k, v)).swapaxes(1, 2)


def _weights(q: Float[Array, "H T C"], k: Float[Array, "H T C"]) -> Float[Array, "H T T"]:
    scores = jnp.einsum("hqc,hkc->hqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
    return jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)


@jax.custom_vjp
def _attend_one(q, k, v):
    return jnp.einsum("hqk,hkc->hqc", _weights(q, k).astype(v.dtype), v)


def _forward(q, k, v):
    out = _attend_one(q, k, v)
    return out, (q, k, v, out)


def _backward(residual, d_out):
    q, k, v, out = residual
    d_out = d_out.astype(v.dtype)
    p = _weights(q, k)
    d_v = jnp.einsum("hcq,hqk->hck", transpose_by_product(d_out), p.astype(v.dtype))
    d_p = jnp.einsum("hqc,hkc->hqk", d_out, v).astype(jnp.float32)
    row = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_scores = (p * (d_p - row) * q.shape[-1] ** -0.5).astype(q.dtype)
    d_q = jnp.einsum("hqk,hkc->hqc", d_scores, k)
    d_k = jnp.einsum("hcq,hqk->hck", transpose_by_product(q), d_scores)
    d_k, d_v = jax.lax.optimization_barrier((d_k, d_v))  # else XLA folds the transposes back into the products
    return d_q, d_k.swapaxes(1, 2), d_v.swapaxes(1, 2)


_attend_one.defvjp(_forward, _backward)
