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
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.arrangements import AnyResident
from dynamo_jax.kernels.fragments import FragmentResident
from dynamo_jax.kernels.layout import BasePlanes, PageTable, Resident, dequantize_experts, dequantize_layer, widened
from dynamo_jax.kernels.quantized_xla import quantized_experts_xla
from dynamo_jax.kernels.rows import RowOrder, combine_rows, gather_rows, sort_by_expert
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
from dynamo_jax.runtime.mesh import DATA, Placement
from dynamo_jax.runtime.monitor import HOP

PIECE = 512  # rows, of which a device takes a multiple at a time where it has few of all rows


def switched_experts(
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    form: str = "bf16",
    placement: Placement | None = None,
) -> ExpertsFn:
    """Experts at the precision of ``tables[index]``; an index out of range is clamped, as lax.switch does.

    index: of all tokens, or of each of B sequences, whose tokens lie one sequence after the other. Planes in tiles or
    fragments go through the kernel of a TPU, with activations in ``form``, or of a GPU: these take any number of
    variants at once, so nothing is switched there but which page tables a row is given. placement: of the planes, pages
    and tables on several devices; then each device multiplies its own experts (``over_shards``).
    """
    if placement is not None:
        return over_shards(placement, resident, tables, index, form)

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


def over_shards(
    placement: Placement,
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    form: str = "bf16",
) -> ExpertsFn:
    """``switched_experts`` where each device has some of the experts, or of their channel blocks.

    Every device sees the rows of all requests, multiplies those that go to its own experts, and what the devices give
    is added up: one reduction over an axis, so at most two a layer. No plane leaves its device.
    """
    channels, hidden = resident.sizes
    num_experts = resident.base.codes.shape[1]
    of_resident = placement.resident_specs(resident)
    of_tables = jax.tree.map(lambda _: placement.table_spec, tables)

    def experts(
        layer: int, x: Array, routing: Routing, _: ExpertWeights | None, own: ExpertForm
    ) -> tuple[Array, Routing]:
        index_of = jnp.atleast_1d(jnp.asarray(index))
        number = _of_tokens(index_of, len(tables), x.shape[0])
        rows = placement.rows(index_of.shape[0]) if x.shape[0] % placement.mesh.shape[DATA] == 0 else None
        biases = own.biases and ExpertBiases(*map(widened, own.biases, (channels, channels, hidden)))
        sent = (widened(x, hidden), number[:, None], routing.experts, routing.gates)
        wanted = (P(), *[P(rows)] * len(sent), of_resident, of_tables, biases and placement.bias_specs)

        def local(layer: Array, x: Array, number: Array, chosen: Array, gates: Array, *here: Any) -> Array:
            if rows:
                both = jnp.concatenate([number, chosen, jax.lax.bitcast_convert_type(gates, jnp.int32)], axis=1)
                x, both = (jax.lax.all_gather(a, rows, tiled=True) for a in (x, both))
                number, chosen, gates = jnp.split(both, (1, 1 + chosen.shape[1]), axis=1)
                gates = jax.lax.bitcast_convert_type(gates, jnp.float32)
            out = _own_part(placement, num_experts, own, form, layer, x, number, chosen, gates, *here)
            if rows:
                out = jax.lax.psum_scatter(out, rows, tiled=True)
            over = tuple(name for name in placement.mesh.axis_names if name != rows)
            return (jax.lax.psum(out, over) if over else out).astype(x.dtype)

        run = jax.shard_map(local, mesh=placement.mesh, in_specs=wanted, out_specs=P(rows), check_vma=False)
        out = run(jnp.asarray(layer), *sent, resident, tables, biases)
        return out[:, : x.shape[1]], routing

    return experts


def _own_part(
    placement: Placement,
    num_experts: int,
    own: ExpertForm,
    form: str,
    layer: Array,
    x: Float[Array, "N D"],
    number: Int[Array, "N 1"],
    chosen: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    biases: ExpertBiases | None,
) -> Float[Array, "N D"]:
    """What this device's experts, or its blocks of them, add to each token's output."""
    here = resident.base.codes.shape[1]
    at = chosen - jax.lax.axis_index(placement.experts) * here if placement.experts else chosen
    last = len(tables) * here  # rows of other devices' experts come last, in a group that is left off
    groups = jnp.where((at >= 0) & (at < here), number * here + at, last)
    if biases and placement.blocks:
        first = jax.lax.axis_index(placement.blocks) == 0  # the bias of down is added once
        biases = biases._replace(down=jnp.where(first, biases.down, 0))
    kernel = _kernel_of(resident, form)
    expected = -(-chosen.size * here // num_experts)

    def multiplied(rows: Array, sizes: Array) -> Array:
        return kernel(rows, sizes, resident, tables, layer, own.activation, biases, expected=min(expected, len(rows)))

    order = sort_by_expert(groups, last + 1)
    sizes = order.group_sizes[:-1]
    piece = -(-max(PIECE, 5 * expected // 4) // PIECE) * PIECE
    if chosen.size <= piece:
        out = combine_rows(multiplied(gather_rows(x, order), sizes), gates, order)
    else:
        out = _in_pieces(multiplied, x, gates, order, sizes, piece)
    return out  # in float32, in which the devices' parts are added up


def _in_pieces(
    multiplied: Callable[[Array, Array], Array],
    x: Float[Array, "N D"],
    gates: Float[Array, "N k"],
    order: RowOrder,
    sizes: Int[Array, " G"],
    piece: int,
) -> Float[Array, "N D"]:
    """The same with so many rows at a time: as many turns as this device's own rows take, mostly one, so that it never
    holds the rows of all devices."""
    end = jnp.cumsum(sizes)
    token = jnp.pad(order.token, (0, piece))

    def turn(now: tuple[Array, Array]) -> tuple[Array, Array]:
        start, out = now
        rows = x[jax.lax.dynamic_slice_in_dim(token, start, piece)]
        inside = jnp.clip(end, start, start + piece) - jnp.clip(end - sizes, start, start + piece)
        made = multiplied(rows, inside)
        for column in range(gates.shape[1]):
            at = order.position[:, column] - start
            there = (at >= 0) & (at < piece)
            own = made[jnp.clip(at, 0, piece - 1)].astype(jnp.float32) * gates[:, column, None]
            out = out + jnp.where(there[:, None], own, 0)
        return start + piece, out

    begin = jnp.zeros((), jnp.int32), jnp.zeros(x.shape, jnp.float32)
    return jax.lax.while_loop(lambda now: now[0] < end[-1], turn, begin)[1]


def _kernel_of(resident: AnyResident, form: str) -> Callable[..., Array]:
    """The kernel for planes in this arrangement, as ``quantized_experts_xla`` is called."""
    if isinstance(resident, Resident):
        return quantized_experts_xla

    # Imported where they run: what they need of Pallas takes a second, on a machine that has neither device, too.
    def kernel(rows: Array, *rest: Any, **own: Any) -> Array:
        if isinstance(resident, TiledResident):
            from dynamo_jax.kernels.quantized_tpu import quantized_experts_tpu

            return quantized_experts_tpu(rows.astype(jnp.bfloat16), *rest, form=form, **own)
        from dynamo_jax.kernels.quantized_gpu import quantized_experts_gpu

        return quantized_experts_gpu(rows.astype(jnp.bfloat16), *rest, **own)

    return kernel


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

    return _grouped(resident, tables, layer, x, routing, groups, own, _kernel_of(resident, form))


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
) -> tuple[Float[Array, " B"], Float[Array, "B K L E"], Float[Array, "B T D"]]:
    """Each window's summed next-token loss in nats, where its tokens were routed, in K pieces of ``HOP``, and what the
    head takes."""
    model = with_parameters(config, parameters)
    hidden, routings = model.hidden_states(tokens[:, :-1], **run)
    nll = next_token_nll(hidden, model.head_weights(), tokens[:, 1:], *model.logit_form())
    return nll.sum(axis=1), piece_counts(routings, tokens.shape[0], config.num_experts, HOP), hidden


@functools.partial(jax.jit, static_argnames="config")
def float_step(
    config: ModelConfig, parameters: dict[str, Array], tokens: Int[Array, "B T1"]
) -> tuple[Float[Array, " B"], Float[Array, "B K L E"], Float[Array, "B T D"]]:
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
) -> tuple[Float[Array, " B"], Float[Array, "B K L E"], Float[Array, "B T D"]]:
    """``window_losses`` at the precision of ``tables[index]``; changing the index compiles nothing."""
    return window_losses(config, parameters, tokens, experts=switched_experts(resident, tables, index))


@functools.partial(jax.jit, static_argnames=("config", "placement"))
def switched_divergence(
    config: ModelConfig,
    parameters: dict[str, Array],
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    tokens: Int[Array, "B T"],
    exact: Float[Array, "B T D"],
    placement: Placement | None = None,
) -> Float[Array, " B"]:
    """Summed over each window, how far what ``tables[index]`` predicts is from what the hidden states ``exact`` do."""
    model = with_parameters(config, parameters)
    run = switched_experts(resident, tables, index, placement=placement)
    hidden, _ = model.hidden_states(tokens, experts=run)
    return next_token_divergence(exact, hidden, model.head_weights(), *model.logit_form()).sum(axis=1)
