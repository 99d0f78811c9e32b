"""Plain GPTQ: all experts of a model at one width, from the same windows that calibration has.

What others do with experts, to compare with: grids from the smallest to the largest weight of a group, with a zero
point, columns in the order of their inputs' energy (``quant.gptq``). Inputs are those of the unquantized model, a layer
at a time; the experts of one layer are in memory with their Hessians.

Axes: S windows of T tokens (T1 = T + 1), N = S*T, D hidden, E experts, k experts a token, F channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.calibration.experts import Routed, hidden_channels, rows_of
from dynamo_jax.calibration.sweeps import biases_of
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import ExpertWeights, activation_of
from dynamo_jax.models.layerwise import embedded, outer_of, whole_layer
from dynamo_jax.models.sources import LayerSource
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.quant.gptq import gptq
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.texts.windows import batches

LEAST_ROWS = 16  # an expert with fewer calibration rows takes the Hessian of all experts of its layer


def grids(bits: int, group_size: int, sizes: ExpertSizes) -> tuple[GridSpec, GridSpec]:
    """Of gate with up, whose groups lie along D, and of down, whose groups lie along F: the largest that divide both
    the group size and the axis."""
    inner, hidden = (math.gcd(group_size, size) for size in (sizes.hidden_size, sizes.channels))
    return GridSpec(bits, inner), GridSpec(bits, hidden)


def uniform_bits(bits: int, group_size: int, sizes: ExpertSizes) -> float:
    """Stored bits a weight, with scales and zero points."""
    inner, hidden = grids(bits, group_size, sizes)
    return (2 * inner.bits_per_weight(sizes.hidden_size) + hidden.bits_per_weight(sizes.channels)) / 3


def uniform_gptq(
    source: LayerSource,
    windows: Int[np.ndarray, "S T1"],
    bits: Sequence[int],
    group_size: int,
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> dict[int, dict[str, np.ndarray]]:
    """The weights (E, F, D) of all experts at each width, by the decoder's names, in bfloat16 as a matrix unit takes
    them. ValueError: a width that no grid has, weights that are not finite."""
    config, sizes = source.config, source.config.expert_sizes
    specs = {width: grids(width, group_size, sizes) for width in bits}
    found: dict[int, dict[str, np.ndarray]] = {width: {} for width in bits}
    top = {name: jnp.asarray(a) for name, a in source.top().items()}
    states = [
        np.asarray(embedded(config, top, jnp.asarray(tokens[:, :-1]))) for tokens, _ in batches(windows, batch_size)
    ]
    del top
    for layer in range(config.num_hidden_layers):
        rest, like = source.layer(layer), config.kinds[layer]
        arrays = {name: jnp.asarray(a) for name, a in rest.items()}
        if layer in config.moe_layers:
            triples = [source.expert(layer, expert) for expert in range(config.num_experts)]
            own = dict(zip(ExpertWeights._fields, map(np.stack, zip(*triples))))
            del triples
            outer = [outer_of(config, like, arrays, jnp.asarray(x)) for x in states]
            routed = _routed([o[1:4] for o in outer], len(windows))
            inner, hidden, rows = _hessians(routed, own, rest, activation_of(config.mixture_of(layer)))
            for width, (of_gate_up, of_down) in specs.items():
                gate_up = np.concatenate([own["gate"], own["up"]], axis=1)
                first = gptq(gate_up, inner, of_gate_up, rows, least_rows=LEAST_ROWS).weights
                last = gptq(own["down"].swapaxes(1, 2), hidden, of_down, rows, least_rows=LEAST_ROWS).weights
                parts = (*np.split(first, 2, axis=1), last.swapaxes(1, 2))
                for name, part in zip(ExpertWeights._fields, parts):
                    found[width][f"layers.{layer}.{name}"] = part.astype(ml_dtypes.bfloat16)
            arrays |= {name: jnp.asarray(a) for name, a in own.items()}
        states = [np.asarray(whole_layer(config, like, arrays, jnp.asarray(x))[0]) for x in states]
        source.release()
        progress("uniform gptq", layer + 1, config.num_hidden_layers)
    return found


def _routed(parts: Sequence[tuple[Any, Any, Any]], count: int) -> Routed:
    """Of ``count`` windows, from batches of which the last one may be filled up."""
    arrays = (np.concatenate([np.asarray(a) for a in each])[:count] for each in zip(*parts))
    return Routed(*(a.reshape(-1, a.shape[-1]) for a in arrays))


def _hessians(
    routed: Routed, weights: dict[str, np.ndarray], rest: dict[str, np.ndarray], activation: Any
) -> tuple[Float[np.ndarray, "E D D"], Float[np.ndarray, "E F F"], Float[np.ndarray, " E"]]:
    """Of each expert, the sums of products of its inputs and of its hidden channels, and its rows."""
    experts, channels, size = weights["gate"].shape
    inner, hidden = np.zeros((experts, size, size), np.float32), np.zeros((experts, channels, channels), np.float32)
    rows = np.zeros(experts)
    for expert in range(experts):
        token, _, given = rows_of(routed, expert)
        gate_up = weights["gate"][expert], weights["up"][expert]
        h = np.asarray(hidden_channels(activation, given.x, *gate_up, biases_of(rest, expert)))[: len(token)]
        x = given.x[: len(token)]
        inner[expert], hidden[expert], rows[expert] = x.T @ x, h.T @ h, len(token)
    return inner, hidden, rows
