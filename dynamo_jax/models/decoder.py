"""The OLMoE decoder in Flax NNX: the whole forward pass in reading order.

Pre-norm residual blocks: grouped-query attention with rotary positions and RMS norms over the
whole query and key vectors, then a top-k mixture of SwiGLU experts (arXiv 2409.02060, section 2).
How the experts are multiplied is an argument (``ExpertsFn``), so float, quantized and observing
runs share this one pass. Expert weights are channel-major, (E, F, D) for gate, up and down:
index f on axis 1 is one channel, and permuting channels changes nothing.

Axes: B batch, T tokens, N = B*T, D hidden, H query heads, J key/value heads, C head size,
E experts, k experts a token, F channels of an expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.grouped_matmul import grouped_matmul
from dynamo_jax.kernels.products import matmul
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.models.attention import attend
from dynamo_jax.models.config import ModelConfig


class Routing(NamedTuple):
    """What the router decided. logits: (N, E) float32; experts, gates: (N, k)."""

    logits: Float[Array, "N E"]
    experts: Int[Array, "N k"]
    gates: Float[Array, "N k"]


class ExpertWeights(NamedTuple):
    """Channel-major weights of one layer's experts, each (E, F, D)."""

    gate: Float[Array, "E F D"]
    up: Float[Array, "E F D"]
    down: Float[Array, "E F D"]


# (layer index, inputs (N, D), routing, that layer's float weights) -> (outputs (N, D), anything).
# The weights are None in a model whose experts are stored elsewhere, quantized.
ExpertsFn = Callable[[int, Array, Routing, ExpertWeights | None], tuple[Array, Any]]


def expert_outputs(x: Float[Array, "N D"], routing: Routing, weights: ExpertWeights) -> Float[Array, "N D"]:
    """The gate-weighted sum of each token's experts."""
    order = sort_by_expert(routing.experts, weights.gate.shape[0])
    rows = gather_rows(x, order)
    gate, up, down = (w.astype(x.dtype) for w in weights)
    hidden = jax.nn.silu(grouped_matmul(rows, gate.swapaxes(1, 2), order.group_sizes))
    hidden = hidden * grouped_matmul(rows, up.swapaxes(1, 2), order.group_sizes)
    return combine_rows(grouped_matmul(hidden, down, order.group_sizes), routing.gates, order).astype(x.dtype)


def float_experts(layer: int, x: Array, routing: Routing, weights: ExpertWeights | None) -> tuple[Array, Routing]:
    """The model's own float experts; what it returns beside the outputs is the routing."""
    if weights is None:
        raise ValueError(f"layer {layer} has no float experts: pass experts= from dynamo_jax.runtime.switch")
    return expert_outputs(x, routing, weights), routing


def routing_counts(routings: list[Routing], batch: int, num_experts: int) -> Float[Array, "B L E"]:
    """Tokens of each sequence that went to each expert."""
    per_layer = [
        jax.vmap(lambda e: jnp.bincount(e.reshape(-1), length=num_experts))(r.experts.reshape(batch, -1))
        for r in routings
    ]
    return jnp.stack(per_layer, axis=1)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def rotate(x: Float[Array, "B T H C"], theta: float) -> Float[Array, "B T H C"]:
    """Rotary positions 0..T-1, the two halves of a head rotated against each other."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def route(x: Float[Array, "N D"], router: Float[Array, "D E"], config: ModelConfig) -> Routing:
    """Softmax over all experts in float32, then the k largest; renormalized where the config says so."""
    logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
    gates, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_experts_per_tok)
    if config.norm_topk_prob:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return Routing(logits, experts.astype(jnp.int32), gates)


class Attention(nnx.Module):
    """Causal grouped-query attention, projections (in, out)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        kv_size = config.num_key_value_heads * config.head_dim
        self.config = config
        self.q = _normal(rngs, (config.hidden_size, config.hidden_size), config)
        self.k = _normal(rngs, (config.hidden_size, kv_size), config)
        self.v = _normal(rngs, (config.hidden_size, kv_size), config)
        self.o = _normal(rngs, (config.hidden_size, config.hidden_size), config)
        if config.use_qk_norm:
            self.q_norm = nnx.Param(jnp.ones(config.hidden_size))
            self.k_norm = nnx.Param(jnp.ones(kv_size))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        flat = x.reshape(-1, x.shape[-1])
        q, k, v = (matmul(flat, w[...].astype(x.dtype)) for w in (self.q, self.k, self.v))
        if c.use_qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -c.clip_qkv, c.clip_qkv) for a in (q, k, v))
        q, k, v = (a.reshape(*x.shape[:2], -1, c.head_dim) for a in (q, k, v))
        out = attend(rotate(q, c.rope_theta), rotate(k, c.rope_theta), v)
        return matmul(out.reshape(flat.shape), self.o[...].astype(x.dtype)).reshape(x.shape)


class Layer(nnx.Module):
    """One residual block: attention, then the mixture of experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, with_experts: bool = True):
        shape = (config.num_experts, config.intermediate_size, config.hidden_size)
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones(config.hidden_size))
        self.attention = Attention(config, rngs=rngs)
        self.experts_norm = nnx.Param(jnp.ones(config.hidden_size))
        self.router = _normal(rngs, (config.hidden_size, config.num_experts), config)
        self.with_experts = with_experts
        if with_experts:
            self.gate = _normal(rngs, shape, config)
            self.up = _normal(rngs, shape, config)
            self.down = _normal(rngs, shape, config)

    def __call__(self, x: Float[Array, "B T D"], index: int, experts: ExpertsFn) -> tuple[Array, Any]:
        eps = self.config.rms_norm_eps
        x = x + self.attention(rms_norm(x, self.attention_norm[...], eps))
        flat = rms_norm(x, self.experts_norm[...], eps).reshape(-1, x.shape[-1])
        routing = route(flat, self.router[...], self.config)
        out, aux = experts(index, flat, routing, self.expert_weights())
        return x + out.reshape(x.shape), aux

    def expert_weights(self) -> ExpertWeights | None:
        if not self.with_experts:
            return None
        return ExpertWeights(self.gate[...], self.up[...], self.down[...])


class Decoder(nnx.Module):
    """Token ids to next-token logits. Parameters are float32 or bfloat16; ``with_experts=False`` leaves
    the expert weights out, for a model whose experts are quantized."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, with_experts: bool = True):
        self.config = config
        self.embed = _normal(rngs, (config.vocab_size, config.hidden_size), config)
        self.layers = nnx.List(
            [Layer(config, rngs=rngs, with_experts=with_experts) for _ in range(config.num_hidden_layers)]
        )
        self.norm = nnx.Param(jnp.ones(config.hidden_size))
        if not config.tie_word_embeddings:
            self.head = _normal(rngs, (config.vocab_size, config.hidden_size), config)

    def __call__(
        self, tokens: Int[Array, "B T"], *, experts: ExpertsFn = float_experts, dtype: Any = jnp.float32
    ) -> tuple[Float[Array, "B T V"], list[Any]]:
        """Logits in float32 and what ``experts`` returned for each layer; ``dtype`` computes the rest."""
        x, extras = self.hidden_states(tokens, experts=experts, dtype=dtype)
        head = self.head_weights().astype(dtype)
        return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32), extras

    def hidden_states(
        self, tokens: Int[Array, "B T"], *, experts: ExpertsFn = float_experts, dtype: Any = jnp.float32
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """The last layer's normed output, before the head; for losses that need not hold all logits."""
        x = self.embed[...][tokens].astype(dtype)
        extras = []
        for index, layer in enumerate(self.layers):
            x, extra = layer(x, index, experts)
            extras.append(extra)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), extras

    def head_weights(self) -> Float[Array, "V D"]:
        return (self.embed if self.config.tie_word_embeddings else self.head)[...]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: ModelConfig) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape) * config.initializer_range)


def parameters(model: Decoder) -> dict[str, Array]:
    """All parameters by dotted name, such as ``layers.0.router``: a plain pytree for jit, optax and files."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable[...] for path, variable in state}


def with_parameters(config: ModelConfig, arrays: dict[str, Array]) -> Decoder:
    """The decoder that has exactly these parameters; usable under jit. Without any expert weight among
    them it is a decoder whose experts come from elsewhere."""
    with_experts = any(name in arrays for name in expert_parameter_names(config))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), with_experts=with_experts))
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    expected = {".".join(map(str, path)): variable.shape for path, variable in flat}
    found = {name: a.shape for name, a in arrays.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError("parameters do not fit the configuration: " + ", ".join(f"{n} {s}" for n, s in wrong[:6]))
    filled = [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def expert_parameter_names(config: ModelConfig) -> list[str]:
    return [f"layers.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ExpertWeights._fields]
