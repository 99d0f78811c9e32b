"""Softmax attention with windows and sinks, where tokens stand, and the keys and values of a layer.

The scores' gradient is written out: one sequence at a time, so that its score matrix stays in cache;
the gradient recomputes the scores (as FlashAttention does, arXiv 2205.14135, appendix B) and uses
only products in fast CPU layouts. The query heads that share a key/value head are folded into the
query axis, so keys and values are never repeated.

Axes: B batch, T query tokens, S key tokens, H query heads, J key/value heads, G = H/J, C key size, V value size,
D hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.kernels.products import transpose_by_product
from dynamo_jax.models.rotary import Angles

MASKED = -1e30  # finite, so that a query that sees no key at all gets no NaN


class KeyValues(NamedTuple):
    """Cached keys and values of one layer. Latent attention keeps its latent vectors as keys, and no values."""

    keys: Float[Array, "B S J C"]
    values: Float[Array, "B S J V"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Spread:
    """How attention is spread over a mesh of devices: the axis that splits sequences, and the one that splits heads."""

    mesh: Mesh | AbstractMesh
    sequences: str | None
    heads: str | None


# A cache that attends itself, such as an engine's: (q, k, v, scale, window, sinks), as ``attend`` takes them, to the
# output and to whatever the caller is to have of it afterwards.
Attends = Callable[[Array, Array, Array, float, int, Array | None], tuple[Array, Any]]


class Places(NamedTuple):
    """Where tokens stand. positions: of the queries; key_positions: of the keys, -1 for none; angles: of each of
    ``config.ropes``; slot: where in the cache the queries' own keys go, None without a cache; mask: False where a query
    is padding, None where none is; spread: over devices, None for one."""

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    angles: tuple[Angles, ...]
    slot: Int[Array, ""] | None = None
    mask: Bool[Array, "B T"] | None = None
    spread: Spread | None = None


def attend(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S J C"],
    v: Float[Array, "B S J V"],
    places: Places,
    scale: float,
    window: int = 0,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention to positions not after the query's, the newest ``window`` of them if not 0.

    Query head h reads key/value head h*J//H. A sink is a logit that takes part in the softmax without a value.
    """
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    sinks = jnp.full(heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sinks = jnp.repeat(sinks.reshape(kv_heads, group), tokens, axis=1)  # (J, G*T)
    query, key = places.positions[:, :, None], places.key_positions[:, None, :]
    allowed = (key >= 0) & (key <= query)
    if window:
        allowed &= key > query - window
    allowed = jnp.tile(allowed, (1, group, 1))  # (B, G*T, S)
    q = (
        q.reshape(batch, tokens, kv_heads, group, -1)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, group * tokens, -1)
    )
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def one(part: tuple[Array, ...], sinks: Array) -> Array:
        return _attend_one(scale, *part[:3], sinks, part[3])

    sequences = (q, k, v, allowed)
    if tokens == 1:
        out = jax.vmap(lambda *part: one(part, sinks))(*sequences)
    elif places.spread is None:
        out = jax.lax.map(lambda part: one(part, sinks), sequences)
    else:
        out = _spread(places.spread, one, sequences, sinks)
    out = out.reshape(batch, kv_heads, group, tokens, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads, -1)


def _spread(
    over: Spread, one: Callable[..., Array], sequences: tuple[Array, ...], sinks: Float[Array, "J Q"]
) -> Float[Array, "B J Q V"]:
    """Each device goes through its own sequences, one after the other, with its own heads of keys, or where all share
    those with its own queries."""
    _, heads, queries, _ = sequences[0].shape
    size = 1 if over.heads is None else over.mesh.shape[over.heads]
    keys = over.heads if heads % size == 0 else None
    asked = over.heads if keys is None and queries % size == 0 else None
    first = over.sequences
    specs = (P(first, keys, asked), P(first, keys), P(first, keys), P(first, asked)), P(keys, asked)

    def local(sequences: tuple[Array, ...], sinks: Array) -> Array:
        return jax.lax.map(lambda part: one(part, sinks), sequences)

    out = P(first, keys, asked)
    return jax.shard_map(local, mesh=over.mesh, in_specs=specs, out_specs=out, check_vma=False)(sequences, sinks)


def _weights(
    scale: float, q: Float[Array, "J Q C"], k: Float[Array, "J S C"], sinks: Float[Array, "J Q"], allowed: Array
) -> tuple[Float[Array, "J Q S"], Float[Array, "J Q"]]:
    """The softmax over keys, and the sink's share."""
    scores = jnp.einsum("jqc,jsc->jqs", q, k).astype(jnp.float32) * scale
    scores = jnp.where(allowed, scores, MASKED)
    top = jnp.maximum(scores.max(axis=-1), sinks)
    weights, sink = jnp.exp(scores - top[..., None]), jnp.exp(sinks - top)
    total = weights.sum(axis=-1) + sink
    return weights / total[..., None], sink / total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_one(scale, q, k, v, sinks, allowed):
    return jnp.einsum("jqs,jsv->jqv", _weights(scale, q, k, sinks, allowed)[0].astype(v.dtype), v)


def _forward(scale, q, k, v, sinks, allowed):
    out = _attend_one(scale, q, k, v, sinks, allowed)
    return out, (q, k, v, sinks, allowed, out)


def _backward(scale, residual, d_out):
    q, k, v, sinks, allowed, out = residual
    d_out = d_out.astype(v.dtype)
    p, sink = _weights(scale, q, k, sinks, allowed)
    d_v = jnp.einsum("jvq,jqs->jvs", transpose_by_product(d_out), p.astype(v.dtype))
    d_p = jnp.einsum("jqv,jsv->jqs", d_out, v).astype(jnp.float32)
    row = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    d_scores = (p * (d_p - row[..., None]) * scale).astype(q.dtype)
    d_q = jnp.einsum("jqs,jsc->jqc", d_scores, k)
    d_k = jnp.einsum("jcq,jqs->jcs", transpose_by_product(q), d_scores)
    d_k, d_v = jax.lax.optimization_barrier((d_k, d_v))  # else XLA folds the transposes back into the products
    return d_q, d_k.swapaxes(1, 2), d_v.swapaxes(1, 2), -sink * row, None


_attend_one.defvjp(_forward, _backward)


def attended(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T J C"],
    v: Float[Array, "B T J V"],
    places: Places,
    cache: KeyValues | Attends | None,
    scale: float,
    window: int = 0,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B T H V"], Any]:
    """``attend`` to the new keys and to those in the cache, and the cache with the new ones in it.

    A cache that can be called attends itself. One without values has them at the beginning of its keys.
    """
    if callable(cache):
        return cache(q, k, v, scale, window, sinks)
    after = write(cache, k, v, places)
    if after is not None:
        k, v = after.keys, after.values if after.values.shape[-1] else after.keys[..., : v.shape[-1]]
    return attend(q, k, v, places, scale, window, sinks), after


def write(cache: KeyValues | None, k: Array, v: Array, places: Places) -> KeyValues | None:
    """The cache with the new keys and values at ``places.slot``; no values, where it has none."""
    if cache is None or places.slot is None:
        return None
    at = (0, places.slot, 0, 0)
    v = v if cache.values.shape[-1] else v[..., :0]
    return KeyValues(
        jax.lax.dynamic_update_slice(cache.keys, k.astype(cache.keys.dtype), at),
        jax.lax.dynamic_update_slice(cache.values, v.astype(cache.values.dtype), at),
    )
