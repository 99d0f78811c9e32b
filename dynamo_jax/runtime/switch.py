"""Switching: one jitted function, several precompiled precision variants, an index that chooses.

``lax.switch`` runs one branch, and a branch reads only the planes that its variant has pages for: a
level without pages is not in that branch's program. Variants are arguments, so new pages of the same
shapes are new data and no new program. The index is one scalar for the batch; it must not be vmapped,
since a batched ``lax.switch`` runs every branch.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.layout import BasePlanes, Variant, dequantize_layer
from dynamo_jax.kernels.quantized_xla import quantized_experts_xla
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.experts import (
    ExpertForm,
    ExpertsFn,
    ExpertWeights,
    expert_outputs,
    few_rows,
    one_expert_a_row,
    routing_counts,
)
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.routing import Routing


def switched_experts(base: BasePlanes, variants: tuple[Variant, ...], index: Int[Array, ""]) -> ExpertsFn:
    """Experts at the precision of ``variants[index]``; an index out of range is clamped, as lax.switch does."""

    def experts(
        layer: int, x: Array, routing: Routing, _: ExpertWeights | None, form: ExpertForm
    ) -> tuple[Array, Routing]:
        def few(variant: Variant) -> Array:
            """Unpack only the experts that the rows chose, all at once."""
            chosen, own_routing, own_form = one_expert_a_row(routing, form)
            weights = ExpertWeights(*dequantize_layer(base, variant, layer, chosen))
            return expert_outputs(x, own_routing, weights, own_form)

        def many(variant: Variant) -> Array:
            order = sort_by_expert(routing.experts, base.codes.shape[1])
            rows, sizes = gather_rows(x, order), order.group_sizes
            out = quantized_experts_xla(rows, sizes, base, variant, layer, form.activation, form.biases)
            return combine_rows(out, routing.gates, order).astype(x.dtype)

        branch = few if few_rows(routing, base.codes.shape[1]) else many
        branches = [functools.partial(branch, variant) for variant in variants]
        return jax.lax.switch(index, branches), routing

    return experts


def window_losses(
    config: ModelConfig, parameters: dict[str, Array], tokens: Int[Array, "B T1"], **run: Any
) -> tuple[Float[Array, " B"], Float[Array, "B L E"]]:
    """Each window's summed next-token loss in nats, and where its tokens were routed."""
    model = with_parameters(config, parameters)
    hidden, routings = model.hidden_states(tokens[:, :-1], **run)
    nll = next_token_nll(hidden, model.head_weights(), tokens[:, 1:], model.logit_bias())
    return nll.sum(axis=1), routing_counts(routings, tokens.shape[0], config.num_experts)


@functools.partial(jax.jit, static_argnames="config")
def float_step(
    config: ModelConfig, parameters: dict[str, Array], tokens: Int[Array, "B T1"]
) -> tuple[Float[Array, " B"], Float[Array, "B L E"]]:
    """``window_losses`` of the model with float experts."""
    return window_losses(config, parameters, tokens)


@functools.partial(jax.jit, static_argnames="config")
def switched_step(
    config: ModelConfig,
    parameters: dict[str, Array],
    base: BasePlanes,
    variants: tuple[Variant, ...],
    index: Int[Array, ""],
    tokens: Int[Array, "B T1"],
) -> tuple[Float[Array, " B"], Float[Array, "B L E"]]:
    """``window_losses`` at the precision of ``variants[index]``; changing the index compiles nothing."""
    return window_losses(config, parameters, tokens, experts=switched_experts(base, variants, index))
