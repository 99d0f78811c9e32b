"""The mixture-of-experts decoder in Flax NNX: the whole forward pass in reading order.

Pre-norm residual blocks: attention or another mixer, then a mixture of experts with an optional
shared expert, or a dense MLP. The layers' specifications say which parts there are; no part asks for
the family's name.

Axes: B batch, T tokens, N = B*T, S cached tokens, D hidden, E experts, k experts a token,
F channels of an expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.attention import Attends, Places, Spread
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.experts import (
    Activation,
    ExpertBiases,
    ExpertForm,
    ExpertsFn,
    ExpertWeights,
    activation_of,
    float_experts,
)
from dynamo_jax.models.loss import capped
from dynamo_jax.models.mixers import SOFTMAX, LayerCache, empty_cache, mixer
from dynamo_jax.models.norms import Norm, norm_scale, norm_weight, normal, rms_norm
from dynamo_jax.models.rest import Packed, assembled, taken_apart
from dynamo_jax.models.rotary import angles
from dynamo_jax.models.routing import Routing, route
from dynamo_jax.models.specs import Dense


class Cache(NamedTuple):
    """What the layers keep of the tokens before, for sequences of one batch. key_positions: position of the token in
    each slot, -1 for none; used: slots that are filled, one number for the batch."""

    layers: tuple[LayerCache, ...]
    key_positions: Int[Array, "B S"]
    used: Int[Array, ""]


def new_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for ``batch`` requests of up to ``capacity`` tokens each, for ``Decoder.cached_states``."""
    layers = tuple(empty_cache(layer.mixer, batch, capacity, dtype) for layer in config.layers)
    return Cache(layers, jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((), jnp.int32))


class Mlp(nnx.Module):
    """A gated MLP that every token goes through; channel-major weights (F, D), as an expert's."""

    def __init__(self, config: ModelConfig, channels: int, gated: Activation, *, rngs: nnx.Rngs):
        self.gated = gated
        self.gate, self.up, self.down = (normal(rngs, (channels, config.hidden_size), config) for _ in range(3))

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        return matmul(self.gated(matmul(x, gate.T), matmul(x, up.T)), down)


class Layer(nnx.Module):
    """One residual block: a mixer, then experts or a dense MLP. ``index`` counts all layers, ``expert_index``
    those with experts (None in a dense layer)."""

    def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs, with_experts: bool = True):
        c, spec = config, config.layers[index]
        self.config, self.spec = c, spec
        self.expert_index = c.moe_layers.index(index) if index in c.moe_layers else None
        self.with_experts = with_experts and self.expert_index is not None
        self.attention_norm = Norm(c)
        self.attention = mixer(c, spec.mixer, rngs)
        self.experts_norm = Norm(c)
        if spec.norms == "both":
            self.attention_post_norm, self.experts_post_norm = Norm(c), Norm(c)
        if spec.layer_scalar:
            self.layer_scalar = nnx.Param(jnp.ones(1))
        m = spec.channel
        if isinstance(m, Dense):
            self.dense = Mlp(c, m.dense_intermediate_size, activation_of(m), rngs=rngs)
            return
        self.mixture = m
        self.router = normal(rngs, (c.hidden_size, m.num_experts), c)
        if m.router.router_bias:
            self.router_bias = nnx.Param(jnp.zeros(m.num_experts))
        if m.router.choice_bias:
            self.router_correction = nnx.Param(jnp.zeros(m.num_experts))
        if m.router.own_norm:
            self.router_norm = norm_weight(c, c.hidden_size)
        if m.router.expert_scale:
            self.router_scale = nnx.Param(jnp.ones(m.num_experts))
        shape = (m.num_experts, m.intermediate_size, c.hidden_size)
        if with_experts:
            self.gate, self.up, self.down = (normal(rngs, shape, c) for _ in range(3))
        if m.expert_bias:
            self.gate_bias, self.up_bias = nnx.Param(jnp.zeros(shape[:2])), nnx.Param(jnp.zeros(shape[:2]))
            self.down_bias = nnx.Param(jnp.zeros((m.num_experts, c.hidden_size)))
        if m.shared_intermediate_size:
            self.shared = Mlp(c, m.shared_intermediate_size, activation_of(m.shared), rngs=rngs)
        if m.own_norms:
            self.shared_norm, self.shared_post_norm, self.routed_post_norm = Norm(c), Norm(c), Norm(c)
        if m.shared_gate:
            self.shared_gate = normal(rngs, (c.hidden_size, 1), c)

    def __call__(
        self, x: Float[Array, "B T D"], experts: ExpertsFn, places: Places, cache: LayerCache | None = None
    ) -> tuple[Array, Any, LayerCache | None]:
        """The block's output, what ``experts`` returned beside it (None in a dense layer), and the cache."""
        x, cache = self.attend(x, places, cache)
        flat = x.reshape(-1, x.shape[-1])
        normed = self.experts_norm(flat)
        if self.expert_index is None:
            return self.joined(x, self.dense(normed)), None, cache
        out, aux = experts(self.expert_index, normed, self.route(flat, normed), self.expert_weights(), self.form())
        return self.joined(x, out, self.beside(flat, normed)), aux, cache

    def attend(
        self, x: Float[Array, "B T D"], places: Places, cache: LayerCache | None = None
    ) -> tuple[Array, LayerCache | None]:
        """The residual stream after the mixer."""
        out, cache = self.attention(self.attention_norm(x), places, cache)
        return self.add(x, self.attention_post_norm(out) if self.spec.norms == "both" else out), cache

    def joined(self, x: Float[Array, "B T D"], out: Array, beside: Array | None = None) -> Float[Array, "B T D"]:
        """The residual stream ``x`` after the channel part. out: of routed experts, or of a dense part; beside: of the
        shared expert."""
        if beside is not None:
            out = (self.routed_post_norm(out) if self.mixture.own_norms else out) + beside
        x = self.add(x, self.experts_post_norm(out) if self.spec.norms == "both" else out)
        return x * self.layer_scalar[...].astype(x.dtype) if self.spec.layer_scalar else x

    def add(self, x: Float[Array, "B T D"], out: Array) -> Float[Array, "B T D"]:
        scale = self.config.residual_multiplier
        return x + (out if scale == 1.0 else out * jnp.asarray(scale, out.dtype)).reshape(x.shape)

    def route(self, x: Float[Array, "N D"], normed: Float[Array, "N D"]) -> Routing:
        """Of the tokens in the stream ``x``, which the experts take ``normed``."""
        c, router = self.config, self.mixture.router
        if router.own_norm:
            scale = norm_scale(c, self.router_norm).astype(jnp.float32) * c.hidden_size**-0.5
            normed = rms_norm(x, scale, c.rms_norm_eps)
        scale = self.router_scale[...].astype(jnp.float32) if router.expert_scale else None
        bias = self.router_bias[...] if router.router_bias else None
        correction = self.router_correction[...] if router.choice_bias else None
        return route(normed, self.router[...], self.mixture, bias, correction, scale)

    def beside(self, x: Float[Array, "N D"], normed: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """What the shared expert adds to the routed ones, from the stream and from what these take: zero where there is
        none."""
        if not self.mixture.shared_intermediate_size:
            return jnp.zeros((), x.dtype)
        if self.mixture.own_norms:
            return self.shared_post_norm(self.shared(self.shared_norm(x)))
        out = self.shared(normed)
        if self.mixture.shared_gate:
            out = out * jax.nn.sigmoid(normed @ self.shared_gate[...].astype(x.dtype))
        return out

    def expert_weights(self) -> ExpertWeights | None:
        return ExpertWeights(self.gate[...], self.up[...], self.down[...]) if self.with_experts else None

    def form(self) -> ExpertForm:
        biases = None
        if self.mixture.expert_bias:
            biases = ExpertBiases(self.gate_bias[...], self.up_bias[...], self.down_bias[...])
        return ExpertForm(activation_of(self.mixture), biases)


class ForwardPass:
    """The forward pass, by itself and behind a cache, of a decoder that has ``embedded`` and ``run``."""

    config: ModelConfig
    embedded: Callable[..., Float[Array, "B T D"]]
    run: Callable[..., tuple[Float[Array, "B T D"], list[Any], tuple[LayerCache, ...]]]

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        experts: ExpertsFn = float_experts,
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """The stream (B, T, D) after the last norm, which ``logits`` takes, and what ``experts`` returned in each layer
        with experts: the router's choices, by default.

        tokens: (B, T), ids. mask: (B, T), False where a token is padding. experts: how a layer's experts are
        multiplied, such as ``dj.experts(state)``. dtype: of the computation.
        """
        positions, keys = positions_of(tokens.shape, mask)
        places = Places(positions, keys, angles(self.config, positions), mask=mask)
        x, extras, _ = self.run(self.embedded(tokens, dtype), experts, places, None)
        return x, extras

    def cached_states(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        cache: Cache,
        *,
        experts: ExpertsFn = float_experts,
        dtype: Any = jnp.float32,
        spread: Spread | None = None,
    ) -> tuple[Float[Array, "B T D"], list[Any], Cache]:
        """``hidden_states`` of tokens that follow those in the cache, and the cache with them in it.

        tokens: (B, T); a prompt at first, then T = 1. mask: (B, T), False where a token is padding. cache: as
        ``new_cache`` makes it, of B requests. spread: of attention over devices (``Placement.spread``).

        The caller sees to it that the cache has room: slots past its capacity would overwrite its last ones.
        """
        places, keys = next_places(self.config, mask, cache)
        places = places._replace(spread=spread)
        x, extras, layers = self.run(self.embedded(tokens, dtype), experts, places, cache.layers)
        return x, extras, Cache(layers, keys, cache.used + tokens.shape[1])


class Decoder(nnx.Module, ForwardPass):
    """Token ids to next-token logits. Parameters are float32 or bfloat16; ``with_experts=False`` leaves
    the expert weights out, for a model whose experts are quantized."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, with_experts: bool = True):
        self.config = config
        self.embed = normal(rngs, (config.vocab_size, config.hidden_size), config)
        self.layers = nnx.List(
            [Layer(config, i, rngs=rngs, with_experts=with_experts) for i in range(config.num_hidden_layers)]
        )
        self.norm = Norm(config)
        if not config.tie_word_embeddings:
            self.head = normal(rngs, (config.vocab_size, config.hidden_size), config)
        if config.head_bias:
            self.head_bias = nnx.Param(jnp.zeros(config.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        experts: ExpertsFn = float_experts,
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "B T V"], list[Any]]:
        """Logits (B, T, V) of the next token at each place, float32, and what ``experts`` returned for each layer with
        experts: the router's choices, by default.

        tokens: (B, T), ids. mask: (B, T), False where a token is padding. experts: how a layer's experts are
        multiplied, such as ``dj.experts(state)``; by default in float. dtype: of the computation.
        """
        x, extras = self.hidden_states(tokens, mask, experts=experts, dtype=dtype)
        return self.logits(x), extras

    def ragged_states(
        self,
        tokens: Int[Array, " N"],
        positions: Int[Array, " N"],
        caches: Sequence[Attends],
        *,
        experts: ExpertsFn = float_experts,
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "N D"], list[Any], tuple[Any, ...]]:
        """``hidden_states`` (N, D) of tokens of any requests, one after the other, as an engine has them in a batch.

        positions: of each token in its request. caches: of each layer, what attends there: it is called with queries,
        keys and values of one sequence of N tokens, (1, N, heads, size), and knows which tokens see each other. Beside
        the states: what ``experts`` returned in each layer with experts, and what each cache gave back. ValueError: not
        one cache for each layer, or a layer whose mixer is no softmax attention.
        """
        if len(caches) != len(self.layers):
            raise ValueError(f"{len(caches)} caches for {len(self.layers)} layers")
        for index, layer in enumerate(self.config.layers):
            if not isinstance(layer.mixer, SOFTMAX):
                raise ValueError(
                    f"layer {index} is {type(layer.mixer).__name__}: of ragged requests only softmax attention "
                    f"({', '.join(kind.__name__ for kind in SOFTMAX)}) can run"
                )
        at = positions[None]
        places = Places(at, at, angles(self.config, at))
        x, extras, after = self.run(self.embedded(tokens[None], dtype), experts, places, tuple(caches))
        return x[0], extras, after

    def run(
        self, x: Float[Array, "B T D"], experts: ExpertsFn, places: Places, caches: tuple[Any, ...] | None
    ) -> tuple[Float[Array, "B T D"], list[Any], tuple[Any, ...]]:
        """All layers and the last norm; what ``experts`` returned in each layer that has some, and the caches."""
        extras: list[Any] = []
        after: list[Any] = []
        for index, layer in enumerate(self.layers):
            x, extra, cache = layer(x, experts, places, caches[index] if caches else None)
            after.append(cache)
            if layer.expert_index is not None:
                extras.append(extra)
        return self.finish(x), extras, tuple(after)

    def embedded(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        x = self.embed[...][tokens].astype(dtype)
        scale = self.config.embedding_multiplier
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The last norm, with the scale of the logits taken in."""
        x = self.norm(x)
        return x if self.config.logits_scaling == 1.0 else x / jnp.asarray(self.config.logits_scaling, x.dtype)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits (B, T, V), float32, of what ``hidden_states`` or ``cached_states`` gave, (B, T, D)."""
        out = jnp.einsum("btd,vd->btv", x, self.head_weights().astype(x.dtype), preferred_element_type=jnp.float32)
        bias, cap = self.logit_form()
        return capped(out if bias is None else out + bias.astype(jnp.float32), cap)

    def head_weights(self) -> Float[Array, "V D"] | Packed:
        return (self.embed if self.config.tie_word_embeddings else self.head)[...]

    def logit_form(self) -> tuple[Float[Array, " V"] | None, float]:
        """What is added to logits, and what they stay within, as the losses take both."""
        return self.head_bias[...] if self.config.head_bias else None, self.config.final_logit_softcapping

    def moe_layers(self) -> list[Layer]:
        """The layers that have experts, in order."""
        return [self.layers[i] for i in self.config.moe_layers]


def positions_of(
    shape: tuple[int, ...], mask: Bool[Array, "B T"] | None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Positions of tokens as queries and as keys; padding is a query at position 0 and no key."""
    if mask is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return positions, positions
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    return positions, jnp.where(mask, positions, -1)


def next_places(config: ModelConfig, mask: Bool[Array, "B T"], cache: Cache) -> tuple[Places, Int[Array, "B S"]]:
    """Where tokens stand that follow those in the cache, and the cache's key positions with them."""
    before = cache.key_positions.max(axis=1, keepdims=True) + 1
    positions = before + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    new = jnp.where(mask, positions, -1)
    keys = jax.lax.dynamic_update_slice(cache.key_positions, new, (0, cache.used))
    return Places(positions, keys, angles(config, positions), cache.used, mask), keys


def parameters(model: nnx.Module) -> dict[str, Array]:
    """All parameters by dotted name, such as ``layers.0.router``: a plain pytree for jit, optax and files."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return taken_apart({".".join(map(str, path)): variable[...] for path, variable in state})


def with_parameters(config: ModelConfig, arrays: dict[str, Array]) -> Decoder:
    """The decoder that has exactly these parameters, some of them quantized or none (``models.rest``); usable under
    jit. Without any expert weight among them it is a decoder whose experts come from elsewhere."""
    with_experts = any(name in arrays for name in expert_parameter_names(config))
    return filled(lambda: Decoder(config, rngs=nnx.Rngs(0), with_experts=with_experts), arrays)


def layer_with_parameters(config: ModelConfig, index: int, arrays: dict[str, Array]) -> Layer:
    """One layer from its own parameters, names without the ``layers.N.`` before them."""
    return filled(lambda: Layer(config, index, rngs=nnx.Rngs(0), with_experts="gate" in arrays), arrays)


def filled(make: Any, arrays: dict[str, Array]) -> Any:
    """The module that ``make`` describes, with ``arrays`` for its parameters; no array is made for it."""
    arrays = assembled(arrays)
    graph, state = nnx.split(nnx.eval_shape(make))
    flat = nnx.to_flat_state(state)
    expected = {".".join(map(str, path)): variable.shape for path, variable in flat}
    found = {name: a.shape for name, a in arrays.items()}
    if wrong := sorted({name for name, _ in set(expected.items()) ^ set(found.items())}):
        raise ValueError(
            "parameters do not fit the configuration: "
            + ", ".join(f"{n} is {found.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in wrong[:6])
        )
    full = [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(full))


def expert_parameter_names(config: ModelConfig) -> list[str]:
    return [f"layers.{layer}.{part}" for layer in config.moe_layers for part in ExpertWeights._fields]


def without_experts(config: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's parameters all but its routed experts' weights."""
    experts = set(expert_parameter_names(config))
    return {name: array for name, array in arrays.items() if name not in experts}
