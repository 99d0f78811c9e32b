"""A mixture's experts in float: their weights, their nonlinearity, and the plain way to multiply them.

Weights are channel-major, (E, F, D) for gate, up and down: index f on axis 1 is one channel, and
permuting channels changes nothing. How experts are multiplied is an argument of the decoder
(``ExpertsFn``), so float, quantized and observing runs share one forward pass.

Axes: N tokens, D hidden, E experts, F channels of an expert, R rows (tokens times experts a token).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.kernels.grouped_matmul import grouped_matmul
from dynamo_jax.kernels.rows import RowOrder, combine_rows, gather_rows, sort_by_expert
from dynamo_jax.models.routing import Routing
from dynamo_jax.models.specs import Dense, Mixture


class ExpertWeights(NamedTuple):
    """Channel-major weights of one layer's experts, each (E, F, D)."""

    gate: Float[Array, "E F D"]
    up: Float[Array, "E F D"]
    down: Float[Array, "E F D"]


class ExpertBiases(NamedTuple):
    """Biases of one layer's experts; they are never quantized."""

    gate: Float[Array, "E F"]
    up: Float[Array, "E F"]
    down: Float[Array, "E D"]


Activation = Callable[[Array, Array], Array]  # (gate, up) -> hidden channels, elementwise, finite where both are 0


class ExpertForm(NamedTuple):
    """What an expert computes beside its three products."""

    activation: Activation
    biases: ExpertBiases | None = None


# (index among the layers with experts, inputs (N, D), routing, that layer's float weights, form)
# -> (outputs (N, D), anything). The weights are None in a model whose experts are stored quantized.
ExpertsFn = Callable[[int, Array, Routing, ExpertWeights | None, ExpertForm], tuple[Array, Any]]


def silu_gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def gelu_gated(gate: Array, up: Array) -> Array:
    """With GELU's approximation by tanh (arXiv 1606.08415, section 2), written as a logistic function, which every
    kernel has."""
    return gate * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)) * up


GATED: dict[str, Activation] = {"silu": silu_gated, "gelu_pytorch_tanh": gelu_gated}


def activation_of(part: Mixture | Dense) -> Activation:
    """SwiGLU or GEGLU (arXiv 2002.05202), or the clamped form of the first with a linear offset of one (gpt-oss),
    or the first with both of its factors within a limit (Step-3.7)."""
    if part.swiglu_limit:
        return clamped_gated(part.swiglu_limit, part.swiglu_alpha)
    if part.swiglu_clamp:
        return bounded_gated(part.swiglu_clamp)
    return GATED[part.hidden_act]


@functools.cache  # one function for one form, by which programs are told apart
def clamped_gated(limit: float, alpha: float) -> Activation:
    def clamped(gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)

    return clamped


@functools.cache
def bounded_gated(limit: float) -> Activation:
    def bounded(gate: Array, up: Array) -> Array:
        return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)

    return bounded


def row_experts(order: RowOrder) -> Int[Array, " R"]:
    """The expert of each sorted row."""
    rows = jnp.arange(order.token.shape[0])
    return jnp.searchsorted(jnp.cumsum(order.group_sizes), rows, side="right")


def hidden_inputs(
    rows: Float[Array, "R D"], order: RowOrder, weights: ExpertWeights, form: ExpertForm
) -> tuple[Float[Array, "R F"], Float[Array, "R F"]]:
    """The gate and up projections of rows in expert order."""
    gate, up = (
        grouped_matmul(rows, w.astype(rows.dtype).swapaxes(1, 2), order.group_sizes) for w in (weights.gate, weights.up)
    )
    if form.biases is not None:
        expert = row_experts(order)
        gate = gate + form.biases.gate.astype(rows.dtype)[expert]
        up = up + form.biases.up.astype(rows.dtype)[expert]
    return gate, up


def row_outputs(
    hidden: Float[Array, "R F"], order: RowOrder, weights: ExpertWeights, form: ExpertForm
) -> Float[Array, "R D"]:
    """The down projection of rows in expert order."""
    out = grouped_matmul(hidden, weights.down.astype(hidden.dtype), order.group_sizes)
    if form.biases is not None:
        out = out + form.biases.down.astype(hidden.dtype)[row_experts(order)]
    return out


def few_rows(routing: Routing, num_experts: int) -> bool:
    """Whether a batch is so small, as in decoding, that most experts have no row."""
    return 2 * routing.experts.size <= num_experts


def one_expert_a_row(routing: Routing, form: ExpertForm) -> tuple[Int[Array, " R"], Routing, ExpertForm]:
    """The expert of each row, and routing and form in which row r has expert r to itself: for ``few_rows``,
    where picking the rows' experts is less work than touching all."""
    chosen = routing.experts.reshape(-1)
    own = jnp.arange(chosen.size, dtype=jnp.int32).reshape(routing.experts.shape)
    biases = form.biases and ExpertBiases(*(b[chosen] for b in form.biases))
    return chosen, routing._replace(experts=own), form._replace(biases=biases)


def expert_outputs(
    x: Float[Array, "N D"], routing: Routing, weights: ExpertWeights, form: ExpertForm
) -> Float[Array, "N D"]:
    """The gate-weighted sum of each token's experts."""
    if few_rows(routing, weights.gate.shape[0]):
        chosen, routing, form = one_expert_a_row(routing, form)
        weights = ExpertWeights(*(w[chosen] for w in weights))
    order = sort_by_expert(routing.experts, weights.gate.shape[0])
    gate, up = hidden_inputs(gather_rows(x, order), order, weights, form)
    out = row_outputs(form.activation(gate, up), order, weights, form)
    return combine_rows(out, routing.gates, order).astype(x.dtype)


def float_experts(
    layer: int, x: Array, routing: Routing, weights: ExpertWeights | None, form: ExpertForm
) -> tuple[Array, Routing]:
    """The model's own float experts; what it returns beside the outputs is the routing."""
    if weights is None:
        raise ValueError(f"layer {layer} has no float experts: pass experts= from dynamo_jax.runtime.switch")
    return expert_outputs(x, routing, weights, form), routing


def routing_counts(routings: list[Routing], batch: int, num_experts: int) -> Float[Array, "B L E"]:
    """Tokens of each sequence that went to each expert."""
    return piece_counts(routings, batch, num_experts, routings[0].experts.shape[0] // batch)[:, 0]


def piece_counts(
    routings: list[Routing], batch: int, num_experts: int, size: int, mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B K L E"]:
    """Tokens of each of K pieces of each sequence that went to each expert; pieces of ``size`` tokens, the last one of
    what is left. mask: False where a token does not count."""

    def layer(chosen: Int[Array, "N k"]) -> Int[Array, "B K E"]:
        own = chosen.reshape(batch, -1, chosen.shape[1])
        own = own if mask is None else jnp.where(mask[..., None], own, num_experts)
        filled = jnp.pad(own, ((0, 0), (0, -own.shape[1] % size), (0, 0)), constant_values=num_experts)  # of no expert
        pieces = filled.reshape(batch, -1, size * chosen.shape[1])
        return jax.vmap(jax.vmap(lambda e: jnp.bincount(e, length=num_experts)))(pieces)

    return jnp.stack([layer(r.experts) for r in routings], axis=2)
