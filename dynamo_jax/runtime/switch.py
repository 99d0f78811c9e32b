"""Switching: one jitted function, several precompiled precision variants, an index that chooses.

``lax.switch`` runs one branch, and a branch reads only the levels that its variant has a table for. Planes, pages and
tables are arguments, so new pages of the same shapes are new data and no new program. The index is one scalar for the
batch, or one for each request: then the rows of each variant and expert are multiplied together, and what a request
gets does not depend on its neighbours. Padding goes to no expert. It must not be vmapped, since a batched
``lax.switch`` runs every branch.

Axes: B requests, N tokens, k experts a token, R = N*k rows, V variants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.kernels.arrangements import AnyResident
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
    request_of: Int[Array, " N"] | None = None,
) -> ExpertsFn:
    """Experts at the precision of ``tables[index]``; an index out of range is clamped, as lax.switch does.

    index: of all tokens, or of each of B requests. request_of: the request that each token is of; a token of none, -1,
    is padding, which no expert gets and whose output is 0. Where it is not given there are as many tokens of each
    request, one request after the other. Planes in tiles or fragments go through the kernel of a TPU, with activations
    in ``form``, or of a GPU: these take any number of variants at once, so nothing is switched there but which page
    tables a row is given. placement: of the planes, pages and tables on several devices; then each device multiplies
    its own experts (``over_shards``). ValueError: tokens that are not of as many requests, or of other shape than
    request_of.
    """
    if placement is not None:
        return over_shards(placement, resident, tables, index, form, request_of)

    channels, hidden = resident.sizes
    through = _through(resident, tables, form, _pages_read(resident, tables))

    def experts(
        layer: int, x: Array, routing: Routing, _: ExpertWeights | None, own: ExpertForm
    ) -> tuple[Array, Routing]:
        biases = own.biases and ExpertBiases(*map(widened, own.biases, (channels, channels, hidden)))
        real = _real(request_of, jnp.size(index), x.shape[0])
        given = real, layer, widened(x, hidden), routing, own._replace(biases=biases)
        if isinstance(resident, Resident) and jnp.ndim(index) == 0:
            out = _at_one_variant(resident, tables, jnp.asarray(index), *given)
        else:
            number = _of_tokens(jnp.atleast_1d(jnp.asarray(index)), len(tables), x.shape[0], request_of)
            num_experts = resident.base.codes.shape[1]
            if isinstance(resident, Resident) and few_rows(routing, num_experts):
                out = _by_token(resident, tables, number, *given)
            else:
                out = _grouped(through, len(tables), num_experts, number, *given)
        return out[:, : x.shape[1]], routing

    return experts


def over_shards(
    placement: Placement,
    resident: AnyResident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""] | Int[Array, " B"],
    form: str = "bf16",
    request_of: Int[Array, " N"] | None = None,
) -> ExpertsFn:
    """``switched_experts`` where each device has some of the experts, or of their channel blocks.

    Every device sees the rows of all requests, multiplies those that go to its own experts, and what the devices give
    is added up: one reduction over an axis, so at most two a layer. No plane leaves its device.
    """
    channels, hidden = resident.sizes
    num_experts = resident.base.codes.shape[1]
    of_resident = placement.resident_specs(resident)
    of_tables = jax.tree.map(lambda _: placement.table_spec, tables)
    of_reads = P(None, (*placement.experts, *placement.blocks))
    reads = None
    if isinstance(resident, TiledResident):
        both = of_resident, of_tables
        read = jax.shard_map(_pages_read, mesh=placement.mesh, in_specs=both, out_specs=of_reads, check_vma=False)
        reads = read(resident, tables)

    def experts(
        layer: int, x: Array, routing: Routing, _: ExpertWeights | None, own: ExpertForm
    ) -> tuple[Array, Routing]:
        index_of = jnp.atleast_1d(jnp.asarray(index))
        tokens = x.shape[0]
        real = _real(request_of, index_of.shape[0], tokens)
        number = _of_tokens(index_of, len(tables), tokens, request_of)
        if real is not None:
            number = jnp.where(real, number, len(tables))  # no variant: no device multiplies it
        rows = placement.rows(index_of.shape[0]) if tokens % placement.mesh.shape[DATA] == 0 else None
        biases = own.biases and ExpertBiases(*map(widened, own.biases, (channels, channels, hidden)))
        sent = (widened(x, hidden), number[:, None], routing.experts, routing.gates)
        wanted = (
            P(),
            *[P(rows)] * len(sent),
            of_resident,
            of_tables,
            reads and of_reads,
            biases and placement.bias_specs,
        )

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
        out = _of_real(run(jnp.asarray(layer), *sent, resident, tables, reads, biases), real)
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
    reads: Any,
    biases: ExpertBiases | None,
) -> Float[Array, "N D"]:
    """What this device's experts, or its blocks of them, add to each token's output."""
    here = resident.base.codes.shape[1]
    at = chosen - jax.lax.axis_index(placement.experts) * here if placement.experts else chosen
    last = len(tables) * here  # rows of other devices' experts come last, in a group that is left off
    groups = jnp.where((at >= 0) & (at < here) & (number < len(tables)), number * here + at, last)
    if biases and placement.blocks:
        first = jax.lax.axis_index(placement.blocks) == 0  # the bias of down is added once
        biases = biases._replace(down=jnp.where(first, biases.down, 0))
    expected = -(-chosen.size * here // num_experts)
    order = sort_by_expert(groups, last + 1)
    sizes = order.group_sizes[:-1]
    piece = -(-max(PIECE, 5 * expected // 4) // PIECE) * PIECE
    if chosen.size <= piece:  # the devices' parts are added up in float32
        through = _through(resident, tables, form, reads)
        return through(layer, x, gates, order, sizes, own.activation, biases, expected=min(expected, chosen.size))
    kernel = _kernel_of(resident, form)

    def multiplied(rows: Array, sizes: Array) -> Array:
        given = rows, sizes, resident, tables, layer, own.activation, biases
        return kernel(*given, expected=min(expected, len(rows)), **({} if reads is None else {"reads": reads}))

    return _in_pieces(multiplied, x, gates, order, sizes, piece)


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


def _pages_read(resident: AnyResident, tables: tuple[PageTable, ...]) -> Any:
    """What the kernel of a TPU reads of page tables, for all layers at once; None for others."""
    if not isinstance(resident, TiledResident):
        return None
    from dynamo_jax.kernels.quantized_tpu import pages_read

    return pages_read(resident, tables)


def _through(resident: AnyResident, tables: tuple[PageTable, ...], form: str, reads: Any) -> Callable[..., Array]:
    """A function that multiplies a layer's tokens. It takes the layer, tokens, gates, the order of their rows, rows of
    each group, then the activation and biases, and gives the weighted sum of each token's experts, in float32. The
    kernel of a TPU has its own way of gathering rows. reads: of ``_pages_read``."""
    if isinstance(resident, TiledResident):
        from dynamo_jax.kernels.quantized_tpu import tokens_through_experts

        def tiled(layer: Any, x: Array, gates: Array, order: RowOrder, sizes: Array, *own: Any, **more: Any) -> Array:
            given = x, gates, order, sizes, resident, reads, layer
            return tokens_through_experts(*given, *own, form=form, **more)

        return tiled
    kernel = _kernel_of(resident, form)

    def through(layer: Any, x: Array, gates: Array, order: RowOrder, sizes: Array, *own: Any, **more: Any) -> Array:
        return combine_rows(kernel(gather_rows(x, order), sizes, resident, tables, layer, *own, **more), gates, order)

    return through


def _real(request_of: Int[Array, " N"] | None, requests: int, tokens: int) -> Bool[Array, " N"] | None:
    """Which tokens are of a request; None where all are."""
    if request_of is None:
        return None
    if request_of.shape != (tokens,):
        raise ValueError(
            f"request_of has the shape {request_of.shape}: expected one request for each of {tokens} tokens"
        )
    return (request_of >= 0) & (request_of < requests)


def _of_tokens(
    index: Int[Array, " B"], variants: int, tokens: int, request_of: Int[Array, " N"] | None
) -> Int[Array, " N"]:
    """The variant of each token."""
    requests, clipped = index.shape[0], jnp.clip(index, 0, variants - 1)
    if request_of is not None:
        return clipped[jnp.clip(request_of, 0, requests - 1)]
    if tokens % requests:
        raise ValueError(f"{tokens} tokens are not of {requests} requests of one length")
    return jnp.repeat(clipped, tokens // requests)


def _at_one_variant(
    resident: Resident,
    tables: tuple[PageTable, ...],
    index: Int[Array, ""],
    real: Bool[Array, " N"] | None,
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
        return _of_real(expert_outputs(x, own_routing, weights, own_form), real)

    def many(table: PageTable) -> Array:
        through = _through(resident, (table,), "bf16", None)
        return _grouped(through, 1, num_experts, jnp.zeros(x.shape[0], jnp.int32), real, layer, x, routing, form)

    branch = few if few_rows(routing, num_experts) else many
    return jax.lax.switch(index, [functools.partial(branch, table) for table in tables])


def _by_token(
    resident: Resident,
    tables: tuple[PageTable, ...],
    number: Int[Array, " N"],
    real: Bool[Array, " N"] | None,
    layer: int,
    x: Float[Array, "N D"],
    routing: Routing,
    form: ExpertForm,
) -> Float[Array, "N D"]:
    """Unpack only the experts that the rows chose, all at once, each at its token's variant."""
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
    return _of_real(expert_outputs(x, own_routing, weights, own_form), real)


def _of_real(out: Float[Array, "N D"], real: Bool[Array, " N"] | None) -> Float[Array, "N D"]:
    return out if real is None else jnp.where(real[:, None], out, 0)


def _grouped(
    through: Callable[..., Array],
    variants: int,
    num_experts: int,
    number: Int[Array, " N"],
    real: Bool[Array, " N"] | None,
    layer: int,
    x: Float[Array, "N D"],
    routing: Routing,
    form: ExpertForm,
) -> Float[Array, "N D"]:
    """Rows in the order of variants, then of experts; those of padding come last, in a group that is left off.
    through: of ``_through``."""
    groups, last = number[:, None] * num_experts + routing.experts, variants * num_experts
    groups = groups if real is None else jnp.where(real[:, None], groups, last)
    order = sort_by_expert(groups, last + 1)
    out = through(layer, x, routing.gates, order, order.group_sizes[:-1], form.activation, form.biases)
    return _of_real(out.astype(x.dtype), real)


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
