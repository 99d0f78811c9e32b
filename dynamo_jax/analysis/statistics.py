"""Streaming statistics of one dataset: what each expert and channel did, as sums over tokens.

Every field is a sum in float32, so merging two batches is addition, and a mask of zeros leaves a
padded token out. g is the gate of a routed token, x the expert's input, h its hidden channels,
y its output, w what an error at the token counts for (``token_importance``, or 1): see docs/design.md for why each
sum is kept.

Axes: L layers, E experts, F channels, B channel blocks of an expert, D hidden, W widths (2, 3, 4, 8), N tokens,
R = N*k rows, C channels of a block, U = 2 where gate with up and down are measured apart, else 0, M = B or U*B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.grouped_matmul import grouped_matmul
from dynamo_jax.kernels.layout import num_blocks
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.experts import (
    ExpertForm,
    ExpertWeights,
    expert_outputs,
    hidden_inputs,
    routing_counts,
    row_experts,
    row_outputs,
    silu_gated,
)
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.routing import Routing


class Statistics(NamedTuple):
    """Sums over the tokens of a dataset; the leading axis is the layer once all layers are stacked."""

    tokens: Float[Array, " L"]  # tokens seen
    counts: Float[Array, "L E"]  # tokens routed to the expert
    gate: Float[Array, "L E"]  # sum of g
    gate_sq: Float[Array, "L E"]  # sum of g^2
    hidden_energy: Float[Array, "L E F"]  # sum of g^2 h_f^2
    output_energy: Float[Array, "L E"]  # sum of g^2 |y|^2
    errors: Float[Array, "L E W"]  # sum of w g^2 |y - y at width|^2; W is 0 where nothing was measured
    apart_errors: Float[Array, "L E U W"]  # the same when only gate and up, and when only down is at the width
    block_errors: Float[Array, "L E M W"]  # when only one block of channels is, or one block's gate and up, then down


def observe_experts(
    x: Float[Array, "N D"],
    routing: Routing,
    weights: ExpertWeights,
    candidates: list[ExpertWeights],
    mask: Float[Array, " N"],
    channel_block: int,
    form: ExpertForm = ExpertForm(silu_gated),  # noqa: B008 (immutable)
    apart: bool = False,
    importance: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "N D"], Statistics]:
    """One layer's outputs and sums; ``candidates`` are the same experts at each width to be measured, whole and
    ``channel_block`` channels at a time; ``apart``: gate with up and down one without the other; ``importance``: of
    an error at each token, 1 by default."""
    num_experts = weights.gate.shape[0]
    order = sort_by_expert(routing.experts, num_experts)
    rows = gather_rows(x, order)
    expert = row_experts(order)
    gates = jnp.zeros(rows.shape[0]).at[order.position.reshape(-1)].set(routing.gates.reshape(-1))
    row_mask = mask[order.token]
    g2 = (gates**2 * row_mask)[:, None]
    weight = g2[:, 0] if importance is None else g2[:, 0] * importance[order.token]

    def total(values: Float[Array, "R ..."]) -> Float[Array, "E ..."]:
        return jax.ops.segment_sum(values, expert, num_experts, indices_are_sorted=True)

    def run(w: ExpertWeights) -> tuple[Array, Array]:
        h = form.activation(*hidden_inputs(rows, order, w, form))
        return h, row_outputs(h, order, w, form)

    h, y = run(weights)
    blocks = num_blocks(h.shape[1], channel_block)
    more = blocks * channel_block - h.shape[1]  # the last block may have fewer

    def by_block(hidden: Float[Array, "R F"]) -> Float[Array, "B R C"]:
        return jnp.pad(hidden, ((0, 0), (0, more))).reshape(-1, blocks, channel_block).swapaxes(0, 1)

    def down_blocks(down: Float[Array, "E F D"]) -> Float[Array, "B E C D"]:
        whole = jnp.pad(down, ((0, 0), (0, more), (0, 0)))
        return whole.reshape(num_experts, blocks, channel_block, -1).swapaxes(0, 1)

    def squared(hidden: Float[Array, "R C"], down: Float[Array, "E C D"]) -> Float[Array, " E"]:
        error = grouped_matmul(hidden, down.astype(rows.dtype), order.group_sizes)
        return total(weight * jnp.sum(error**2, axis=1))

    def by_blocks(hidden: Float[Array, "B R C"], down: Float[Array, "B E C D"]) -> Float[Array, "B E"]:
        return jax.lax.map(lambda part: squared(*part), (hidden, down))

    def measured(w: ExpertWeights) -> tuple[Array, Array, Array]:
        """The squared error of whole experts (E,), of what is apart in them (E, U), and of single blocks (E, M)."""
        h_at, y_at = run(w)
        whole = total(weight * jnp.sum((y_at - y) ** 2, axis=1))
        if apart:
            pairs = ((h_at - h, weights.down), (h, w.down - weights.down))
            each = jnp.stack([squared(*pair) for pair in pairs], axis=1)
            parts = jnp.concatenate([by_blocks(by_block(a), down_blocks(b)) for a, b in pairs])
            return whole, each, parts.T
        differences = jnp.concatenate([by_block(h_at), -by_block(h)], axis=2)
        parts = by_blocks(differences, jnp.concatenate([down_blocks(w.down), down_blocks(weights.down)], axis=2))
        return whole, jnp.zeros((num_experts, 0)), parts.T

    if candidates:  # one after the other, in one loop: a program for one width, and the memory of one
        errors = jax.lax.map(measured, jax.tree.map(lambda *w: jnp.stack(w), *candidates))
        whole, each, single = (jnp.moveaxis(e, 0, -1) for e in errors)
    else:
        units = 2 if apart else 0
        shapes = ((), (units,), (blocks * max(1, units),))
        whole, each, single = (jnp.zeros((num_experts, *shape, 0)) for shape in shapes)
    sums = Statistics(
        tokens=mask.sum(),
        counts=total(row_mask),
        gate=total(gates * row_mask),
        gate_sq=total(g2[:, 0]),
        hidden_energy=total(g2 * h**2),
        output_energy=total(g2[:, 0] * jnp.sum(y**2, axis=1)),
        errors=whole,
        apart_errors=each,
        block_errors=single,
    )
    return combine_rows(y, routing.gates, order).astype(x.dtype), sums


def observe(
    model: Decoder,
    tokens: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    weights: list[ExpertWeights],
    candidates: list[list[ExpertWeights]],
    channel_block: int,
    apart: bool = False,
    importance: Float[Array, "L B T"] | None = None,
) -> tuple[Statistics, Float[Array, "B L E"]]:
    """Sums of one batch over all layers, and each sequence's routed tokens.

    weights, candidates: one entry a layer (candidates may be []). mask: 1 for a token that counts. importance: of
    an error at each token, ``token_importance``; 1 by default.
    """

    def experts(layer: int, x: Array, routing: Routing, _: ExpertWeights | None, form: ExpertForm) -> tuple[Array, Any]:
        measured = candidates[layer] if candidates else []
        own = None if importance is None else importance[layer].reshape(-1)
        common = (mask.reshape(-1), channel_block, form, apart, own)
        out, sums = observe_experts(x, routing, weights[layer], measured, *common)
        return out, (sums, routing)

    _, layers = model.hidden_states(tokens, experts=experts)
    sums, routings = zip(*layers)
    counts = routing_counts(list(routings), tokens.shape[0], model.config.num_experts)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *sums), counts


def token_importance(model: Decoder, tokens: Int[Array, "B T1"], mask: Float[Array, "B T"]) -> Float[Array, "L B T"]:
    """|d loss / d y|^2 / 2 D of each token, y being the sum of its experts' outputs in a layer and the loss each
    sequence's summed next-token negative log-likelihood: nats for each unit of squared error there. One backward
    pass."""
    config = model.config

    def loss(shifts: list[Array]) -> Array:
        def experts(
            layer: int, x: Array, routing: Routing, weights: ExpertWeights | None, form: ExpertForm
        ) -> tuple[Array, None]:
            assert weights is not None
            return expert_outputs(x, routing, weights, form) + shifts[layer], None

        hidden, _ = model.hidden_states(tokens[:, :-1], experts=experts)
        return jnp.sum(next_token_nll(hidden, model.head_weights(), tokens[:, 1:], *model.logit_form()) * mask)

    zero = jnp.zeros((mask.size, config.hidden_size))
    gradients = jax.grad(loss)([zero] * config.num_moe_layers)
    return jnp.stack([jnp.sum(g**2, axis=1).reshape(mask.shape) for g in gradients]) / (2 * config.hidden_size)


def merge(a: Statistics, b: Statistics) -> Statistics:
    return jax.tree.map(lambda x, y: x + y, a, b)
