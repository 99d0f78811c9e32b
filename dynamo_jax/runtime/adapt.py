"""A plan for novel data, from a window of its own tokens: no labels, no gradients.

One forward pass measures the output error of each block at each width (``observe_windows``). How often each expert is
used, and what a row costs there, are then estimated apart, since the first is known sooner: both begin from the known
datasets' and follow the text as it shows more (``expected``). The same number of refinement pages as in the baseline
goes where it lowers the loss most, and no more bytes are read a token (``adapted_plan``, a small linear program).

Axes: L layers, E experts, M widths of an expert (of its N channel blocks; twice as many where projections are apart),
D hidden, W widths, S windows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dynamo_jax.analysis.significance import cost_of_row
from dynamo_jax.analysis.statistics import observe_experts
from dynamo_jax.kernels.layout import WIDTHS, widened
from dynamo_jax.models.config import ExpertSizes, ModelConfig
from dynamo_jax.models.decoder import layer_with_parameters
from dynamo_jax.models.experts import ExpertBiases, ExpertForm, ExpertWeights
from dynamo_jax.models.layerwise import embedded, finished, places_of
from dynamo_jax.models.routing import Routing
from dynamo_jax.precision.allocate import Limits, reallocate
from dynamo_jax.precision.plan import Plan, touched_share
from dynamo_jax.quant.planes import Planes, dequantize
from dynamo_jax.runtime.memory import measured_together
from dynamo_jax.runtime.mesh import Placement, check_same, fetch, in_order, own_experts, placed_parameters, put_experts
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel
from dynamo_jax.runtime.store import page_counts, places

PRIOR_TOKENS = 128  # of the known datasets, in how often each expert is used
PRIOR_COST_ROWS = 32  # of the known datasets, in what a row costs at each expert
LAYER_COST_ROWS = 1024  # of the layer's experts, in what a row of the known datasets costs at each


class Observation(NamedTuple):
    """What a text showed, as sums over its tokens.

    errors: gate-weighted squared output error of each of an expert's widths, the largest that there are planes of
    (8 bits, if none were left out) taken as exact. counts: routed tokens of each window. tokens: of each window. exact:
    the last hidden states, at the largest width.
    """

    errors: Float[np.ndarray, "L E M W"]
    counts: Float[np.ndarray, "S L E"]
    tokens: Float[np.ndarray, " S"]
    exact: Float[np.ndarray, "S T D"]


def _at_width(sizes: ExpertSizes, planes: Planes, width: int) -> ExpertWeights:
    whole = dequantize(planes, width)[..., : sizes.channels, : sizes.hidden_size]
    return ExpertWeights(*whole.astype(jnp.bfloat16).astype(jnp.float32).swapaxes(0, 1))


def observe_planes(
    sizes: ExpertSizes,
    planes: Planes,
    x: Float[Array, "N D"],
    routing: Routing,
    form: ExpertForm,
    channel_block: int,
    apart: bool,
) -> tuple[Float[Array, "N D"], tuple[Float[Array, "E M W1"], Float[Array, " E"]]]:
    """What a layer's experts put out at the largest width that there are planes of; and the errors of their blocks at
    the other widths, summed over tokens, with their rows. planes: of the layer's experts, (E, P, F, ..)."""
    size = measured_together(sizes)
    parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (planes, form.biases))

    def some(out: Array, part: tuple[Array, Any]) -> tuple[Array, Any]:
        first, (own, biases) = part
        inside = (routing.experts >= first) & (routing.experts < first + size)
        here = jnp.where(inside, routing.experts - first, size)  # rows of other experts come last, in no group
        there = routing._replace(experts=here, gates=jnp.where(inside, routing.gates, 0))
        *candidates, full = (_at_width(sizes, own, width) for width in own.widths)
        common = (jnp.ones(x.shape[0]), channel_block, form._replace(biases=biases), apart)
        more, sums = observe_experts(x, there, full, candidates, *common)
        return out + more, (sums.block_errors, sums.counts)

    firsts = jnp.arange(0, sizes.experts, size)
    out, sums = jax.lax.scan(some, jnp.zeros_like(x), (firsts, parts))
    return out, jax.tree.map(lambda a: a.reshape(sizes.experts, *a.shape[2:]), sums)


def _over_shards(
    placement: Placement,
    sizes: ExpertSizes,
    planes: Planes,
    x: Float[Array, "N D"],
    routing: Routing,
    form: ExpertForm,
    channel_block: int,
    apart: bool,
) -> tuple[Float[Array, "N D"], tuple[Float[Array, "E M W1"], Float[Array, " E"]]]:
    """``observe_planes`` where each device measures its own experts, or its own channel blocks of them."""
    channels = planes.scales.shape[2] if placement.blocks else sizes.channels  # the first are filled up
    biases = form.biases
    if biases:
        biases = ExpertBiases(widened(biases.gate, channels), widened(biases.up, channels), biases.down)
    of_biases = biases and placement.bias_specs
    of_planes = jax.tree.map(lambda _: P(placement.experts, None, placement.blocks), planes)
    local_sizes = sizes._replace(
        experts=sizes.experts // placement.expert_shards, channels=channels // placement.block_shards
    )

    def local(planes: Planes, biases: Any, x: Array, chosen: Array, gates: Array) -> Any:
        first = jax.lax.axis_index(placement.experts) * local_sizes.experts if placement.experts else 0
        if biases and placement.blocks:
            here = jax.lax.axis_index(placement.blocks) == 0
            biases = biases._replace(down=jnp.where(here, biases.down, 0))
        own = routing._replace(experts=chosen - first, gates=gates)
        out, sums = observe_planes(local_sizes, planes, x, own, form._replace(biases=biases), channel_block, apart)
        return jax.lax.psum(out, placement.both), sums

    run = jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(of_planes, of_biases, P(), P(), P()),
        out_specs=(P(), (P(placement.experts, placement.blocks), P(placement.experts))),
        check_vma=False,
    )
    return run(planes, biases, x, routing.experts, routing.gates)


@functools.partial(jax.jit, static_argnames=("config", "like", "channel_block", "apart", "placement"))
def _observe_layer(
    config: ModelConfig,
    like: int,
    parameters: dict[str, Array],
    planes: Planes | None,
    x: Float[Array, "1 T D"],
    channel_block: int,
    apart: bool,
    placement: Placement | None = None,
) -> tuple[Float[Array, "1 T D"], tuple[Array, Array] | None]:
    """A layer's output with its experts at the largest width, the errors of their blocks at other widths and their
    tokens; of a dense layer, no more than the output."""

    def experts(_: int, x: Array, routing: Routing, __: ExpertWeights | None, form: ExpertForm) -> tuple[Array, Any]:
        assert planes is not None
        common = config.expert_sizes, planes, x, routing, form, channel_block, apart
        return observe_planes(*common) if placement is None else _over_shards(placement, *common)

    out, sums, _ = layer_with_parameters(config, like, parameters)(x, experts, places_of(config, x))
    return out, sums


def checked_windows(config: ModelConfig, windows: Int[np.ndarray, "S T1"]) -> Int[np.ndarray, "S T1"]:
    """The windows, as numpy's. ValueError: no such array, no tokens, ids or positions that the model does not have."""
    windows = np.asarray(windows)
    if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer):
        raise ValueError(f"windows are {windows.dtype} of the shape {windows.shape}: expected token ids (S, T + 1)")
    if windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"no tokens to adapt to: {windows.shape[0]} windows of {windows.shape[1]} tokens")
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise ValueError(f"token ids {windows.min()} to {windows.max()}: the model has 0 to {config.vocab_size - 1}")
    if windows.shape[1] - 1 > config.max_position_embeddings:
        raise ValueError(
            f"windows of {windows.shape[1] - 1} tokens: the model has {config.max_position_embeddings} positions"
        )
    return windows


def observe_windows(
    model: QuantizedModel, windows: Int[np.ndarray, "S T1"], placement: Placement | None = None
) -> Observation:
    """Measure the planes on windows of tokens: layer after layer and some experts after others, so that few are
    unpacked at a time, and window after window, so that one program serves any number. placement: each device measures
    its own experts."""
    windows = checked_windows(model.config, windows)
    check_same(placement, "windows", windows)
    config, params = model.config, placed_parameters(placement, model.config, model.parameters)
    place = places(config.num_experts, model.held, own_experts(placement, config.num_experts))
    rest = {name: a for name, a in params.items() if not name.startswith("layers.")}
    states = [embedded(config, rest, jnp.asarray(window[None, :-1])) for window in windows]
    errors: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): a for name, a in params.items() if name.startswith(prefix)}
        planes = None
        if layer in config.moe_layers:
            index = config.moe_layers.index(layer)
            after = () if placement is None else (None, placement.blocks)
            planes = jax.tree.map(
                lambda a, index=index, after=after: put_experts(placement, a[index], place, *after), model.store
            )
        fixed = config, config.kinds[layer], own, planes
        found = [_observe_layer(*fixed, x, model.plan.channel_block, model.plan.apart, placement) for x in states]
        states = [x for x, _ in found]
        if planes:
            units = 2 if model.plan.apart else 1
            pairs = zip(*((in_order(placement, fetch(own), units), fetch(rows)) for _, (own, rows) in found))
            each_errors, each_counts = (np.stack(part).astype(np.float64) for part in pairs)
            errors.append(each_errors.sum(axis=0))
            counts.append(each_counts)
    each = np.full(len(windows), windows.shape[1] - 1.0)
    exact = np.concatenate([fetch(finished(config, rest, x)) for x in states])
    exactly = len(WIDTHS) - len(model.store.widths) + 1  # the largest, and those that were left out
    return Observation(np.pad(np.stack(errors), [(0, 0)] * 3 + [(0, exactly)]), np.stack(counts, axis=1), each, exact)


class Expected(NamedTuple):
    """Of the text to come. cost: nats a row that each of an expert's widths loses; use: rows of a token."""

    cost: Float[np.ndarray, "L E M W"]
    use: Float[np.ndarray, "L E"]

    @property
    def errors(self) -> Float[np.ndarray, "L E M W"]:
        """Nats a token."""
        return self.use[:, :, None, None] * self.cost


def expected(known: Knowledge, seen: Observation) -> Expected:
    """What was seen, shrunk towards the known datasets'.

    A token goes to few experts, so that most experts have few rows in a short window: what a row costs is uncertain
    long after the shares of the experts are known. The errors are one times the other. A row of the known datasets
    counts with its own token's importance, one that was seen with its layer's mean, since it has no gradient.
    """
    tokens, rows, known_rows = float(seen.tokens.sum()), seen.counts.sum(axis=0), known.counts.sum(axis=0)
    use = (rows + PRIOR_TOKENS * known_rows / known.tokens) / (tokens + PRIOR_TOKENS)
    known_cost = cost_of_row(known.block_errors * known.tokens, known_rows, LAYER_COST_ROWS)
    cost = (known.losses(seen.errors) + PRIOR_COST_ROWS * known_cost) / (rows + PRIOR_COST_ROWS)[:, :, None, None]
    return Expected(cost, use)


def check_limit(batch: int, reads: float) -> None:
    """ValueError if these cannot limit what a step reads: see ``adapted_plan``."""
    if batch < 1:
        raise ValueError(f"batch {batch}: expected 1 or more")
    if not (math.isfinite(reads) and reads > 0):
        raise ValueError(f"reads {reads}: expected a number above 0")


def adapted_plan(
    plan: Plan,
    known: Knowledge,
    seen: Observation,
    spare: Mapping[int, Limits] | None = None,
    batch: int = 1,
    reads: float = 1.0,
    slots: Mapping[int, Limits] | None = None,
    placement: Placement | None = None,
) -> Plan:
    """The plan for what was seen: the pages of ``plan``, the baseline, placed anew.

    It is expected to read no more bytes a step than ``reads`` times what the baseline reads, where a step is of
    ``batch`` tokens of this text, each of another request. slots: pages of each level at most, by default as many as
    the baseline has; spare: how many of them may be others than the baseline's, by default any. placement: on several
    devices, of which each has its own slots; then both have a number for each shard, or one for every shard.
    ValueError: ``batch`` below 1, ``reads`` that nothing meets.
    """
    found = expected(known, seen)
    return placed_anew(plan, found.errors, found.use, spare, batch, reads, slots, placement)


def saved_by(plan: Plan, baseline: Plan, known: Knowledge, seen: Observation) -> Float[np.ndarray, "L E"]:
    """Nats a row by which ``plan`` is expected to lose less at each expert than ``baseline``.

    Rows of any later text, as the router counts them, times this say whether the plan still suits it, without a pass
    of the model.
    """
    cost = expected(known, seen).cost
    return (baseline.chosen(cost) - plan.chosen(cost)).sum(axis=-1)


def placed_anew(
    plan: Plan,
    errors: Float[np.ndarray, "L E M W"],
    use: Float[np.ndarray, "L E"],
    spare: Mapping[int, Limits] | None = None,
    batch: int = 1,
    reads: float = 1.0,
    slots: Mapping[int, Limits] | None = None,
    placement: Placement | None = None,
) -> Plan:
    """The pages of ``plan`` where they lower the errors most; where a token has ``use`` rows at each expert.

    spare, batch, reads, slots, placement: as ``adapted_plan`` takes them.
    """
    check_limit(batch, reads)
    touched = touched_share(use, batch)
    read = np.broadcast_to(touched[:, :, None, None] * plan.costs(), errors.shape).reshape(-1, len(WIDTHS))
    budget = reads * plan.bytes_per_step(use, batch)
    most = page_counts(plan) if slots is None else slots
    pages_each = np.tile(plan.pages(), plan.widths[..., 0].size)
    now, shards = plan.widths.reshape(-1), None
    if placement is not None:
        own = placement.owners(plan.widths.shape, plan.widths.shape[-1] // plan.blocks)
        shards = np.broadcast_to(own, plan.widths.shape).reshape(-1)
    widths = reallocate(errors.reshape(-1, len(WIDTHS)), most, read, budget, pages_each, now, spare, shards)
    return dataclasses.replace(plan, widths=widths.reshape(plan.widths.shape).astype(np.int8))
