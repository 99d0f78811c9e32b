"""Attention: grouped-query and latent, with windows, sinks and a key/value cache.

The scores' gradient is written out: one sequence at a time, so that its score matrix stays in cache;
the gradient recomputes the scores (as FlashAttention does, arXiv 2205.14135, appendix B) and uses
only products in fast CPU layouts. The query heads that share a key/value head are folded into the
query axis, so keys and values are never repeated.

Axes: B batch, T query tokens, S key tokens, H query heads, J key/value heads, G = H/J, C key size, V value size,
D hidden.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.products import matmul, transpose_by_product
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.norms import normal, rms_norm
from dynamo_jax.models.rotary import Angles, rotate, yarn_mscale

MASKED = -1e30  # finite, so that a query that sees no key at all gets no NaN


class LayerCache(NamedTuple):
    """Keys and values of one layer. Latent attention keeps its latent vectors as keys, and no values."""

    keys: Float[Array, "B S J C"]
    values: Float[Array, "B S J V"]


class Places(NamedTuple):
    """Where tokens stand. positions: of the queries; key_positions: of the keys, -1 for none; slot: where in
    the cache the queries' own keys go, None without a cache."""

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    angles: Angles
    slot: Int[Array, ""] | None = None


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

    def one(part: tuple[Array, ...]) -> Array:
        return _attend_one(scale, *part[:3], sinks, part[3])

    sequences = (q, k, v, allowed)
    out = jax.vmap(lambda *part: one(part))(*sequences) if tokens == 1 else jax.lax.map(one, sequences)
    out = out.reshape(batch, kv_heads, group, tokens, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads, -1)


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


class GroupedAttention(nnx.Module):
    """Causal grouped-query attention, projections (in, out)."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        c = config
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.config, self.window = c, c.window(layer)
        self.q = normal(rngs, (c.hidden_size, query), c)
        self.k = normal(rngs, (c.hidden_size, kv), c)
        self.v = normal(rngs, (c.hidden_size, kv), c)
        self.o = normal(rngs, (query, c.hidden_size), c)
        if c.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (nnx.Param(jnp.zeros(n)) for n in (query, kv, kv))
        if c.output_bias:
            self.o_bias = nnx.Param(jnp.zeros(c.hidden_size))
        if c.qk_norm != "none":
            sizes = (query, kv) if c.qk_norm == "vector" else (c.head_dim, c.head_dim)
            self.q_norm, self.k_norm = (nnx.Param(jnp.ones(n)) for n in sizes)
        if c.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros(c.num_attention_heads))

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        flat = x.reshape(-1, x.shape[-1])
        q, k, v = (matmul(flat, w[...].astype(x.dtype)) for w in (self.q, self.k, self.v))
        if c.qkv_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (a + b[...].astype(x.dtype) for a, b in zip((q, k, v), biases))
        if c.qk_norm == "vector":
            q, k = (rms_norm(a, s[...], c.rms_norm_eps) for a, s in ((q, self.q_norm), (k, self.k_norm)))
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -c.clip_qkv, c.clip_qkv) for a in (q, k, v))
        q, k, v = (a.reshape(*x.shape[:2], -1, c.head_dim) for a in (q, k, v))
        if c.qk_norm == "head":
            q, k = (rms_norm(a, s[...], c.rms_norm_eps) for a, s in ((q, self.q_norm), (k, self.k_norm)))
        q, k = (rotate(a, places.angles, c.rope_interleave) for a in (q, k))
        cache = write(cache, k, v, places)
        if cache is not None:
            k, v = cache
        sinks = self.sinks[...] if c.attention_sinks else None
        out = attend(q, k, v, places, c.attention_scale or c.head_dim**-0.5, self.window, sinks)
        out = matmul(out.reshape(flat.shape[0], -1), self.o[...].astype(x.dtype))
        if c.output_bias:
            out = out + self.o_bias[...].astype(x.dtype)
        return out.reshape(x.shape), cache


class LatentAttention(nnx.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) in its absorbed form.

    Keys and values are linear in one vector of kv_lora_rank numbers a token. The key matrix is multiplied
    into the query and the value matrix into the output, so all heads share that vector as their only key
    and value: the cache holds it and the rotary key, and nothing is expanded for each head.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        c = config
        heads, key = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        self.config, self.window = c, c.window(layer)
        if c.q_lora_rank:
            self.q_down = normal(rngs, (c.hidden_size, c.q_lora_rank), c)
            self.q_norm = nnx.Param(jnp.ones(c.q_lora_rank))
            if c.qkv_bias:
                self.q_down_bias = nnx.Param(jnp.zeros(c.q_lora_rank))
        self.q = normal(rngs, (c.q_lora_rank or c.hidden_size, heads * key), c)
        self.kv_down = normal(rngs, (c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim), c)
        if c.qkv_bias:
            self.kv_down_bias = nnx.Param(jnp.zeros(c.kv_lora_rank + c.qk_rope_head_dim))
        self.kv_norm = nnx.Param(jnp.ones(c.kv_lora_rank))
        self.kv_up = normal(rngs, (c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)), c)
        self.o = normal(rngs, (heads * c.v_head_dim, c.hidden_size), c)
        if c.output_bias:
            self.o_bias = nnx.Param(jnp.zeros(c.hidden_size))

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        flat = x.reshape(-1, x.shape[-1])
        shape = (*x.shape[:2], c.num_attention_heads, -1)
        rank, nope = c.kv_lora_rank, c.qk_nope_head_dim
        up = self.kv_up[...].astype(x.dtype).reshape(rank, c.num_attention_heads, -1)

        query = flat
        if c.q_lora_rank:
            query = matmul(flat, self.q_down[...].astype(x.dtype))
            if c.qkv_bias:
                query = query + self.q_down_bias[...].astype(x.dtype)
            query = rms_norm(query, self.q_norm[...], 1e-6)
        q = matmul(query, self.q[...].astype(x.dtype)).reshape(shape)
        q_latent = jnp.einsum("bthc,rhc->bthr", q[..., :nope], up[..., :nope])
        q_rotary = rotate(q[..., nope:], places.angles, c.rope_interleave)
        q = jnp.concatenate([q_latent, q_rotary], axis=-1)

        latent = matmul(flat, self.kv_down[...].astype(x.dtype))
        if c.qkv_bias:
            latent = latent + self.kv_down_bias[...].astype(x.dtype)
        latent = latent.reshape(*x.shape[:2], 1, -1)
        k_rotary = rotate(latent[..., rank:], places.angles, c.rope_interleave)
        k = jnp.concatenate([rms_norm(latent[..., :rank], self.kv_norm[...], 1e-6), k_rotary], axis=-1)
        cache = write(cache, k, k[..., :0], places)
        if cache is not None:
            k = cache.keys
        out = attend(q, k, k[..., :rank], places, self.scale(), self.window)
        out = jnp.einsum("bthr,rhv->bthv", out, up[..., nope:])
        out = matmul(out.reshape(flat.shape[0], -1), self.o[...].astype(x.dtype))
        if c.output_bias:
            out = out + self.o_bias[...].astype(x.dtype)
        return out.reshape(x.shape), cache

    def scale(self) -> float:
        """1/sqrt(key size), times YaRN's temperature squared where the checkpoint has one."""
        c, scaling = self.config, self.config.rope_scaling
        scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
        if scaling.rope_type != "default" and scaling.mscale_all_dim:
            scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale


def write(cache: LayerCache | None, k: Array, v: Array, places: Places) -> LayerCache | None:
    """The cache with the new keys and values at ``places.slot``."""
    if cache is None or places.slot is None:
        return None
    at = (0, places.slot, 0, 0)
    return LayerCache(
        jax.lax.dynamic_update_slice(cache.keys, k.astype(cache.keys.dtype), at),
        jax.lax.dynamic_update_slice(cache.values, v.astype(cache.values.dtype), at),
    )


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
    """One layer's cache of ``capacity`` tokens a sequence."""
    c = config
    if c.kv_lora_rank:
        key, heads, value = c.kv_lora_rank + c.qk_rope_head_dim, 1, 0
    else:
        key, heads, value = c.head_dim, c.num_key_value_heads, c.head_dim
    shape = (batch, capacity, heads)
    return LayerCache(jnp.zeros((*shape, key), dtype), jnp.zeros((*shape, value), dtype))
