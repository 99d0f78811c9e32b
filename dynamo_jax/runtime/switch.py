"""Switching: one jitted function, several precompiled precision variants, an index that chooses.

``lax.switch`` runs one branch, and a branch reads only the levels that its variant has a table for. Planes, pages and
tables are arguments, so new pages of the same shapes are new data and no new program. The index is one scalar for the
batch, or one for each sequence: then the rows of each variant and expert are multiplied together, and what a sequence
gets does not depend on its neighbours. It must not be vmapped, since a batched ``lax.switch`` runs every branch.

Axes: B sequences, N = B*T tokens, k experts a token, R = N*k rows, V variants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.arrangements import AnyResident
from dynamo_jax.kernels.fragments import FragmentResident
from dynamo_jax.kernels.layout import BasePlanes, PageTable, Resident, dequantize_experts, dequantize_layer, widened
from dynamo_jax.kernels.quantized_gpu import quantized_experts_gpu
from dynamo_jax.kernels.quantized_tpu import quantized_experts_tpu
from dynamo_jax.kernels.quantized_xla import quantized_experts_xla
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.kernels.tiles import TiledResident
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.experts import (
    ExpertBiases,
    ExpertForm,
    ExpertsFn,
    ExpertWeights,
    expert_outputs,
    few_rows,
    one_expert_a_row,
    piece_counts,
)
from dynamo_jax.models.loss import next_token_divergence, next_token_nll
from dynamo_jax.models.routing import Routing
from dynamo_jax.runtime.monitor import HOP


def switched_experts(
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    form: str = "bf16",
) -> ExpertsFn:
    """Experts at the precision of ``tables[index]``; an index out of range is clamped, as lax.switch does.

    index: of all tokens, or of each of B sequences, whose tokens lie one sequence after the other. Planes in tiles or
    fragments go through the kernel of a TPU, with activations in ``form``, or of a GPU: these take any number of
    variants at once, so nothing is switched there but which page tables a row is given.
    """

    channels, hidden = resident.sizes

    def experts(
        layer: int, x: Array, routing: Routing, _: ExpertWeights | None, own: ExpertForm
    ) -> tuple[Array, Routing]:
        biases = own.biases and ExpertBiases(*map(widened, own.biases, (channels, channels, hidden)))
        given = jnp.asarray(index), layer, widened(x, hidden), routing, own._replace(biases=biases)
        if not isinstance(resident, Resident):
            out = _by_kernel(resident, tables, *given, form)
        else:
            run = _at_one_variant if jnp.ndim(index) == 0 else _by_sequence
            out = run(resident, tables, *given)
        return out[:, : x.shape[1]], routing

    return experts


def _by_kernel(
    resident: TiledResident | FragmentResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    layer: int,
    x: Float[Array, "N D"],
    routing: Routing,
    own: ExpertForm,
    form: str,
) -> Float[Array, "N D"]:
    num_experts = resident.base.codes.shape[1]
    number = _of_tokens(jnp.atleast_1d(index), len(tables), x.shape[0])
    groups = number[:, None] * num_experts + routing.experts

    def kernel(rows: Array, *rest: Any) -> Array:
        if isinstance(resident, TiledResident):
            return quantized_experts_tpu(rows.astype(jnp.bfloat16), *rest, form=form)
        return quantized_experts_gpu(rows.astype(jnp.bfloat16), *rest)

    return _grouped(resident, tables, layer, x, routing, groups, own, kernel)


def _of_tokens(index: Int[Array, " B"], variants: int, tokens: int) -> Int[Array, " N"]:
    """The variant of each token, those of one sequence after those of another."""
    sequences = index.shape[0]
    if tokens % sequences:
        raise ValueError(f"{tokens} tokens are not of {sequences} sequences of one length")
    return jnp.repeat(jnp.clip(index, 0, variants - 1), tokens // sequences)


def _at_one_variant(
    resident: Resident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""],
    layer: int,
    x: Float[Array, "N D"],
    routing: Routing,
    form: ExpertForm,
) -> Float[Array, "N D"]:
    num_experts = resident.base.codes.shape[1]

    def few(table: PageTable) -> Array:
        """Unpack only the experts that the rows chose, all at once."""
        chosen, own_routing, own_form = one_expert_a_row(routing, form)
        weights = ExpertWeights(*dequantize_layer(resident, table, layer, chosen))
        return expert_outputs(x, own_routing, weights, own_form)

    def many(table: PageTable) -> Array:
        return _grouped(resident, (table,), layer, x, routing, routing.experts, form)

    branch = few if few_rows(routing, num_experts) else many
    return jax.lax.switch(index, [functools.partial(branch, table) for table in tables])


def _by_sequence(
    resident: Resident,
    tables: tuple[PageTable, ...],
    index: Int[Array, " B"],
    layer: int,
    x: Float[Array, "N D"],
    routing: Routing,
    form: ExpertForm,
) -> Float[Array, "N D"]:
    num_experts = resident.base.codes.shape[1]
    number = _of_tokens(index, len(tables), x.shape[0])
    if not few_rows(routing, num_experts):
        groups = number[:, None] * num_experts + routing.experts
        return _grouped(resident, tables, layer, x, routing, groups, form)
    chosen, own_routing, own_form = one_expert_a_row(routing, form)
    row_number = jnp.repeat(number, routing.experts.shape[1])
    levels = [level for level in resident.pages if any(level in table for table in tables)]
    own = {}
    for level in levels:
        shape = next(table[level].shape[1:] for table in tables if level in table)
        missing = jnp.full(shape, -1, jnp.int32)
        each = jnp.stack([table[level][layer] if level in table else missing for table in tables])
        own[level] = each[row_number, chosen]
    base = BasePlanes(*(a[layer][chosen] for a in resident.base))
    weights = ExpertWeights(*dequantize_experts(base, resident.pages, own))
    return expert_outputs(x, own_routing, weights, own_form)


def _grouped(
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    layer: int,
    x: Float[Array, "N D"],
    routing: Routing,
    groups: Int[Array, "N k"],
    form: ExpertForm,
    kernel: Callable[..., Array] = quantized_experts_xla,
) -> Float[Array, "N D"]:
    """Rows in the order of ``groups``: variant times the number of experts, plus expert."""
    order = sort_by_expert(groups, len(tables) * resident.base.codes.shape[1])
    rows, sizes = gather_rows(x, order), order.group_sizes
    out = kernel(rows, sizes, resident, tables, layer, form.activation, form.biases)
    return combine_rows(out, routing.gates, order).astype(x.dtype)


def window_losses(
    config: ModelConfig, parameters: dict[str, Array], tokens: Int[Array, "B T1"], **run: Any
) -> tuple[Float[Array, " B"], Float[Array, "B K L E"]]:
    """Each window's summed next-token loss in nats, and where its tokens were routed, in K pieces of ``HOP``."""
    model = with_parameters(config, parameters)
    hidden, routings = model.hidden_states(tokens[:, :-1], **run)
    nll = next_token_nll(hidden, model.head_weights(), tokens[:, 1:], *model.logit_form())
    return nll.sum(axis=1), piece_counts(routings, tokens.shape[0], config.num_experts, HOP)


@functools.partial(jax.jit, static_argnames="config")
def float_step(
    config: ModelConfig, parameters: dict[str, Array], tokens: Int[Array, "B T1"]
) -> tuple[Float[Array, " B"], Float[Array, "B K L E"]]:
    """``window_losses`` of the model with float experts."""
    return window_losses(config, parameters, tokens)


@functools.partial(jax.jit, static_argnames="config")
def switched_step(
    config: ModelConfig,
    parameters: dict[str, Array],
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    tokens: Int[Array, "B T1"],
) -> tuple[Float[Array, " B"], Float[Array, "B K L E"]]:
    """``window_losses`` at the precision of ``tables[index]``; changing the index compiles nothing."""
    return window_losses(config, parameters, tokens, experts=switched_experts(resident, tables, index))


@functools.partial(jax.jit, static_argnames="config")
def switched_divergence(
    config: ModelConfig,
    parameters: dict[str, Array],
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    tokens: Int[Array, "B T"],
    exact: Float[Array, "B T D"],
) -> Float[Array, " B"]:
    """Summed over each window, how far what ``tables[index]`` predicts is from what the hidden states ``exact`` do."""
    model = with_parameters(config, parameters)
    hidden, _ = model.hidden_states(tokens, experts=switched_experts(resident, tables, index))
    return next_token_divergence(exact, hidden, model.head_weights(), *model.logit_form()).sum(axis=1)
