"""One layer at a time, apart from its routed experts: what is around them, and derivatives through it.

For sweeps over models that are larger than memory. ``like`` is a layer that runs the same program
(``ModelConfig.kinds``), so that a model compiles each of its few kinds of layers once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.models.attention import Places
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import filled, layer_with_parameters, positions_of
from dynamo_jax.models.experts import float_experts
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.norms import Norm
from dynamo_jax.models.rest import assembled
from dynamo_jax.models.rotary import angles
from dynamo_jax.models.routing import Routing


class Outer(NamedTuple):
    """A layer but its routed experts. residual: the stream with attention and shared experts added. beside: what shared
    experts give, where it is joined with what the routed ones give before both are added; else it has no axis D."""

    residual: Float[Array, "S T D"]
    normed: Float[Array, "N D"]
    experts: Int[Array, "N k"]
    gates: Float[Array, "N k"]
    beside: Float[Array, "S T D"] | Float[Array, "S T 0"]


def places_of(config: ModelConfig, x: Array) -> Places:
    positions, keys = positions_of(x.shape[:2], None)
    return Places(positions, keys, angles(config, positions))


def _outer_function(config: ModelConfig, like: int, rest: dict[str, Array], x: Array) -> Outer:
    layer = layer_with_parameters(config, like, rest)
    x, _ = layer.attend(x, places_of(config, x))
    flat = x.reshape(-1, x.shape[-1])
    normed = layer.experts_norm(flat)
    routing = layer.route(flat, normed)
    shape = (*x.shape[:2], -1)
    beside = jnp.broadcast_to(layer.beside(flat, normed), flat.shape).reshape(x.shape)
    if layer.spec.adds:
        x, beside = layer.add(x, beside), beside[..., :0]
    return Outer(x, normed.reshape(x.shape), routing.experts.reshape(shape), routing.gates.reshape(shape), beside)


def _joined_function(
    config: ModelConfig, like: int, rest: dict[str, Array], residual: Array, beside: Array, added: Array
) -> Array:
    """The output of a layer that does not just add; added: what its routed experts give, (S, T, D)."""
    flat = (a.reshape(-1, a.shape[-1]) for a in (added, beside))
    return layer_with_parameters(config, like, rest).joined(residual, *flat)


def _dense_function(config: ModelConfig, like: int, rest: dict[str, Array], x: Array) -> Array:
    def never(*_: Any) -> Any:
        raise AssertionError("a dense layer has no experts")

    return layer_with_parameters(config, like, rest)(x, never, places_of(config, x))[0]


@functools.partial(jax.jit, static_argnames=("config", "like"))
def whole_layer(
    config: ModelConfig, like: int, arrays: dict[str, Array], x: Float[Array, "S T D"]
) -> tuple[Float[Array, "S T D"], Routing | None]:
    """A layer with its experts' weights, and what its router did if it has one."""
    out, routing, _ = layer_with_parameters(config, like, arrays)(x, float_experts, places_of(config, x))
    return out, routing


outer_of = functools.partial(jax.jit, static_argnames=("config", "like"))(_outer_function)
joined = functools.partial(jax.jit, static_argnames=("config", "like"))(_joined_function)
dense = functools.partial(jax.jit, static_argnames=("config", "like"))(_dense_function)


@functools.partial(jax.jit, static_argnames=("config", "like"))
def outer_vjp(config, like, rest, x, d_residual, d_normed, d_gates, d_beside):
    def differentiable(x):
        outer = _outer_function(config, like, rest, x)
        return outer.residual, outer.normed, outer.gates, outer.beside

    return jax.vjp(differentiable, x)[1]((d_residual, d_normed, d_gates, d_beside))[0]


@functools.partial(jax.jit, static_argnames=("config", "like"))
def joined_vjp(config, like, rest, residual, beside, added, d_out):
    return jax.vjp(functools.partial(_joined_function, config, like, rest), residual, beside, added)[1](d_out)


@functools.partial(jax.jit, static_argnames=("config", "like"))
def dense_vjp(config, like, rest, x, d_out):
    return jax.vjp(lambda x: _dense_function(config, like, rest, x), x)[1](d_out)[0]


def loss_gradient_of(config: ModelConfig, top: dict[str, np.ndarray]) -> Callable[[Array, Array], Array]:
    """d loss / d x of (x (S, T, D), targets (S, T)), the loss summed over windows; top: head, norm, embedding."""
    unused = None if config.tie_word_embeddings else "embed"
    head = {name: jnp.asarray(a) for name, a in top.items() if name.split(".")[0] != unused}
    return lambda x, targets: _loss_gradient(config, head, x, targets)


@functools.partial(jax.jit, static_argnames="config")
def _loss_gradient(config, top, x, targets):
    """d loss / d x, the loss being each window's summed next-token negative log-likelihood."""
    head = assembled(top)["embed" if config.tie_word_embeddings else "head"]
    form = (top.get("head_bias"), config.final_logit_softcapping)
    return jax.grad(lambda x: next_token_nll(_finished(config, top, x), head, targets, *form).sum())(x)


def _finished(config, top, x):
    norm = {name.removeprefix("norm."): a for name, a in top.items() if name.startswith("norm.")}
    return filled(lambda: Norm(config), norm)(x) / config.logits_scaling


@functools.partial(jax.jit, static_argnames="config")
def embedded(config: ModelConfig, top: dict[str, Array], tokens: Int[Array, "S T"]) -> Float[Array, "S T D"]:
    """What the first layer takes."""
    return assembled(top)["embed"][tokens].astype(jnp.float32) * config.embedding_multiplier


finished = functools.partial(jax.jit, static_argnames="config")(_finished)  # what the head takes
