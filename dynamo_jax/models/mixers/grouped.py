"""Causal grouped-query attention: query heads that share keys and values (arXiv 2305.13245).

Axes: B batch, T tokens, S cached tokens, J key/value heads, C head size, D hidden.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.attention import Attends, KeyValues, Places, attended
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.norms import norm_scale, norm_weight, normal, rms_norm
from dynamo_jax.models.rotary import rotate
from dynamo_jax.models.specs import Grouped

GATES = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}


class GroupedAttention(nnx.Module):
    """Causal grouped-query attention, projections (in, out)."""

    def __init__(self, config: ModelConfig, spec: Grouped, *, rngs: nnx.Rngs):
        c, s = config, spec
        size = s.v_head_dim or s.head_dim
        query, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        value, out = s.num_key_value_heads * size, s.num_attention_heads * size
        asked = 2 * query if s.output_gate else query
        self.config, self.spec = c, s
        if s.fused_projections:
            self.qkv = normal(rngs, (c.hidden_size, query + kv + value), c)
        else:
            self.q = normal(rngs, (c.hidden_size, asked), c)
            self.k = normal(rngs, (c.hidden_size, kv), c)
            if not s.attention_k_eq_v:
                self.v = normal(rngs, (c.hidden_size, value), c)
        self.o = normal(rngs, (out, c.hidden_size), c)
        if s.gating != "none":
            gates = s.num_attention_heads if s.gating == "per-head" else out
            self.gate = normal(rngs, (c.hidden_size, gates), c)
        if s.qkv_bias and s.fused_projections:
            self.qkv_bias = nnx.Param(jnp.zeros(query + kv + value))
        elif s.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (nnx.Param(jnp.zeros(n)) for n in (asked, kv, value))
        if s.output_bias:
            self.o_bias = nnx.Param(jnp.zeros(c.hidden_size))
        if s.qk_norm != "none":
            sizes = (query, kv) if s.qk_norm == "vector" else (s.head_dim, s.head_dim)
            self.q_norm, self.k_norm = (norm_weight(c, n) for n in sizes)
        if s.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros(s.num_attention_heads))

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: KeyValues | Attends | None
    ) -> tuple[Float[Array, "B T D"], Any]:
        s = self.spec
        flat = x.reshape(-1, x.shape[-1])
        q, k, v = self.projected(flat)
        if s.output_gate:  # head by head, a query and a gate
            q, gate = (a.reshape(len(flat), -1) for a in jnp.split(q.reshape(-1, 2 * s.head_dim), 2, axis=1))
        if s.qk_norm == "vector":
            q, k = self.normed(q, k)
        if s.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -s.clip_qkv, s.clip_qkv) for a in (q, k, v))
        q, k, v = (a.reshape(*x.shape[:2], heads, -1) for a, heads in zip((q, k, v), self.heads()))
        if s.qk_norm == "head":
            q, k = self.normed(q, k)
        if s.rope is not None:
            turns = places.angles[self.config.ropes.index(s.rope)]
            q, k = (rotate(a, turns, s.rope.rope_interleave) for a in (q, k))
        if s.qk_norm == "turned":
            q, k = self.normed(q, k)
        if s.v_norm:
            v = rms_norm(v, jnp.ones(v.shape[-1]), self.config.rms_norm_eps)
        if s.attention_value_scale != 1.0:
            v = v * jnp.asarray(s.attention_value_scale, v.dtype)
        sinks = self.sinks[...] if s.attention_sinks else None
        scale = s.attention_scale or s.head_dim**-0.5
        out, after = attended(q, k, v, places, cache, scale, s.window, sinks)
        if s.gating != "none":
            out = out * self.gates(flat).reshape(*x.shape[:2], s.num_attention_heads, -1)
        out = out.reshape(flat.shape[0], -1)
        if s.output_gate:
            out = out * jax.nn.sigmoid(gate)
        out = matmul(out, self.o[...].astype(x.dtype))
        if s.output_bias:
            out = out + self.o_bias[...].astype(x.dtype)
        return out.reshape(x.shape), after

    def projected(self, x: Float[Array, "N D"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, all heads side by side."""
        s = self.spec
        if s.fused_projections:
            both = matmul(x, self.qkv[...].astype(x.dtype))
            if s.qkv_bias:
                both = both + self.qkv_bias[...].astype(x.dtype)
            query, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
            return both[:, :query], both[:, query : query + kv], both[:, query + kv :]
        weights = (self.q, self.k) if s.attention_k_eq_v else (self.q, self.k, self.v)
        q, k, *own = (matmul(x, w[...].astype(x.dtype)) for w in weights)
        v = own[0] if own else k
        if s.qkv_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (a + b[...].astype(x.dtype) for a, b in zip((q, k, v), biases))
        return q, k, v

    def normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        c = self.config
        q, k = (rms_norm(a, norm_scale(c, w), c.rms_norm_eps) for a, w in ((q, self.q_norm), (k, self.k_norm)))
        return q, k

    def heads(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        s = self.spec
        return s.num_attention_heads, s.num_key_value_heads, s.num_key_value_heads

    def gates(self, x: Float[Array, "N D"]) -> Float[Array, "N G"]:
        """What outputs are multiplied by: a number a head or a number each."""
        gates = matmul(x, self.gate[...].astype(x.dtype)).astype(jnp.float32)
        return GATES[self.spec.gate_function](gates).astype(x.dtype)


def empty_cache(spec: Grouped, batch: int, capacity: int, dtype: Any) -> KeyValues:
    """One layer's cache of ``capacity`` tokens a sequence."""
    shape = (batch, capacity, spec.num_key_value_heads)
    keys = jnp.zeros((*shape, spec.head_dim), dtype)
    return KeyValues(keys, jnp.zeros((*shape, spec.v_head_dim or spec.head_dim), dtype))
