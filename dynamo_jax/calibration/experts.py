"""The routed experts of one layer, one by one: their rows, what they compute, their planes and errors.

What calibration does with each expert (``layers.py``), as functions of arrays.

Axes: N tokens, k experts a token, X experts of a portion, R rows of one expert, A datasets, D hidden, F channels,
B channel blocks, P = 3 projections, U = 2 where gate with up and down are apart, else 0, M = B or U*B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.layout import widened
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import Activation
from dynamo_jax.quant.nested_gptq import CHUNK_WEIGHTS, PRIOR_ROWS, quantize_nested, shrunk
from dynamo_jax.quant.planes import Planes, dequantize, filled_up, quantize

PORTION_WEIGHTS = 2**18  # of experts in one go: the fastest on a CPU, whose caches hold what GPTQ works on then
PORTIONS = 8  # of a layer, at least, where it has so many experts
MAX_INPUTS = 4096  # of one Hessian; more are cut into parts whose correlations with each other are left out


class Routed(NamedTuple):
    """What the experts of a layer were given: inputs, and the experts and gates of each token, -1 for no expert."""

    x: Float[np.ndarray, "N D"]
    experts: Int[np.ndarray, "N k"]
    gates: Float[np.ndarray, "N k"]


class Rows(NamedTuple):
    """One expert's rows, filled up with zeros to one of a few sizes, so that few programs serve all experts."""

    x: Float[np.ndarray, "R D"]
    gates: Float[np.ndarray, " R"]


def tokens_of(routed: Routed, expert: int) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Its tokens, and their slots among k."""
    token, slot = np.nonzero(np.asarray(routed.experts) == expert)
    return token, slot


def rows_of(routed: Routed, expert: int) -> tuple[np.ndarray, np.ndarray, Rows]:
    """Its tokens, their slots among k, and its rows."""
    token, slot = tokens_of(routed, expert)
    size = padded_rows(len(token))
    x = np.zeros((size, routed.x.shape[1]), np.float32)
    x[: len(token)] = routed.x[token]
    gates = np.zeros(size, np.float32)
    gates[: len(token)] = routed.gates[token, slot]
    return token, slot, Rows(x, gates)


def padded_rows(rows: int) -> int:
    """The next of 32, 48, 64, 96, 128, ..: at most half is padding."""
    size = 32
    while size < rows:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class Portion(NamedTuple):
    """Experts that are quantized in one go, and the chunk that they are of, whose experts share the prior of down's
    Hessians: small experts are many to a chunk, large ones alone. Both go by the model's sizes alone."""

    experts: list[int]
    chunk: list[int]


def portions(sizes: ExpertSizes) -> list[Portion]:
    """All experts of a layer, in order: a portion is what one process does while the others do theirs."""
    weights = 3 * sizes.channels * sizes.hidden_size
    size, most = max(1, CHUNK_WEIGHTS // weights), min(PORTION_WEIGHTS // weights, sizes.experts // PORTIONS)
    found = []
    for start in range(0, sizes.experts, size):
        chunk = list(range(start, min(start + size, sizes.experts)))
        step = max(d for d in range(1, len(chunk) + 1) if len(chunk) % d == 0 and d <= max(1, most))
        found += [Portion(chunk[i : i + step], chunk) for i in range(0, len(chunk), step)]
    return found


def _expert(activation: Activation, x: Array, weights: Any, biases: Any) -> tuple[Array, Array]:
    """Hidden channels (R, F) and output (R, D) of one expert."""
    gate, up, down = (w.astype(x.dtype) for w in weights)
    a, u = x @ gate.T, x @ up.T
    if biases is not None:
        a, u = a + biases[0].astype(x.dtype), u + biases[1].astype(x.dtype)
    h = activation(a, u)
    y = h @ down
    return h, y if biases is None else y + biases[2].astype(x.dtype)


@functools.partial(jax.jit, static_argnames="activation")
def run_expert(activation, x, gates, member, weights, biases):
    """Hidden channels (R, F), output (R, D) and, by dataset, the sums that need no quantized weights."""
    h, y = _expert(activation, x, weights, biases)
    squared = member * gates**2
    return (
        h,
        y,
        {
            "counts": member.sum(axis=1),
            "gate": member @ gates,
            "gate_sq": squared.sum(axis=1),
            "hidden_energy": squared @ h**2,
            "output_energy": squared @ jnp.sum(y**2, axis=1),
        },
    )


@functools.partial(jax.jit, static_argnames="activation")
def expert_vjp(activation, x, gates, weights, biases, d_out):
    def weighted(x, gates):
        return _expert(activation, x, weights, biases)[1] * gates[:, None]

    return jax.vjp(weighted, x, gates)[1](d_out)


def errors_at(activation, channel_block, apart, width, x, gates, member, h, y, weights, planes, biases):
    """By dataset, the summed squared output error at ``width``: of the whole expert (A,), of gate with up and of down
    one without the other (A, U), and of blocks (A, M); no blocks without a channel_block."""
    own = _at_width(planes, width, weights.shape[1:])  # apart: one program for each number of rows serves all widths
    return _errors(activation, channel_block, apart, x, gates, member, h, y, weights, own, biases)


@functools.partial(jax.jit, static_argnames=("width", "sizes"))
def _at_width(planes, width, sizes):
    channels, hidden = sizes
    return dequantize(planes, width)[:, :channels, :hidden].astype(jnp.bfloat16).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("activation", "channel_block", "apart"))
def _errors(activation, channel_block, apart, x, gates, member, h, y, weights, rounded, biases):
    squared = member * gates**2
    h_at, y_at = _expert(activation, x, rounded, biases)
    whole = squared @ jnp.sum((y_at - y) ** 2, axis=1)
    down = weights[2].astype(jnp.float32)
    pairs = ((h_at - h, down), (h, rounded[2] - down)) if apart else ()
    each = [squared @ jnp.sum((hidden @ w) ** 2, axis=1) for hidden, w in pairs]
    each = jnp.stack(each, axis=1) if apart else jnp.zeros((len(squared), 0))
    if channel_block is None:
        return whole, each, None
    more = -len(down) % channel_block  # the last block may have fewer channels

    def blocks_of(hidden, w):
        return jnp.pad(hidden, ((0, 0), (0, more))), jnp.pad(w, ((0, more), (0, 0)))

    if apart:
        pairs = tuple(blocks_of(*pair) for pair in pairs)
    else:
        pairs = blocks_of(h_at, rounded[2]), blocks_of(h, down)

    def block(start):
        def product(hidden, w):
            cut = jax.lax.dynamic_slice_in_dim
            return cut(hidden, start, channel_block, 1) @ cut(w, start, channel_block, 0)

        parts = [product(*pair) for pair in pairs]
        found = jnp.stack(parts) if apart else (parts[0] - parts[1])[None]
        return squared @ jnp.sum(found**2, axis=2).T

    blocks = jax.lax.map(block, jnp.arange(0, down.shape[0], channel_block))  # (B, A, U or 1)
    return whole, each, jnp.moveaxis(blocks, 2, 0).reshape(-1, len(squared)).T


def planes_of(
    quantizer: str,
    channel_block: int,
    group_size: int,
    weights: Float[np.ndarray, "X P F D"],
    rows: list[Rows],
    hidden: list[Float[np.ndarray, "R F"]],
    spread: float,
    routed: Routed,
    emphasis: Float[np.ndarray, "X U 3"],
) -> Planes:
    """Planes (X, P, F, ..) of some experts, whole blocks and groups (``filled_up``); hidden, spread: hidden channels of
    their rows, and the mean square of those of their chunk (``mean_square``), for gptq; emphasis: what errors at 2, 3
    and 4 bits count for it, U = 1 for all projections or U = 2 for gate with up and for down."""
    whole = filled_up(weights, channel_block, group_size)
    if quantizer == "rtn":
        return quantize(whole, group_size)
    count, _, channels, hidden_size = whole.shape
    squared = [r.gates**2 for r in rows]
    shares = (np.asarray(routed.gates) ** 2 * (routed.experts >= 0)).sum(axis=1)
    typical = float(shares.sum()) / max(1, int((routed.experts >= 0).sum()))  # of one row
    inputs = [widened(r.x, hidden_size) for r in rows]

    def layer_hessian(part: slice) -> np.ndarray:
        x = np.asarray(routed.x)[:, part]  # without what fills up
        own = (x * (shares / max(float(shares.sum()), 1e-30))[:, None]).T @ x
        return np.pad(own, (0, part.stop - part.start - len(own)))

    gate_up = whole[:, :2].reshape(count, 2 * channels, hidden_size)
    first = _feedback_planes(group_size, gate_up, inputs, squared, typical, 2, layer_hessian, emphasis[:, 0])
    inner = [widened(h, channels) for h in hidden]

    def own_scale(part: slice) -> np.ndarray:  # hidden channels of different experts have nothing in common
        return np.eye(part.stop - part.start, dtype=np.float32) * np.float32(spread)

    down = _feedback_planes(group_size, whole[:, 2], inner, squared, typical, 1, own_scale, emphasis[:, -1])
    return jax.tree.map(
        lambda a, b: np.concatenate([a.reshape(count, 2, channels, -1), b[:, None]], axis=1), first, down
    )


def _feedback_planes(
    group_size: int,
    w: np.ndarray,
    inputs: list[np.ndarray],
    squared: list[np.ndarray],
    typical: float,
    input_axis: int,
    prior: Callable[[slice], np.ndarray],
    emphasis: np.ndarray,
) -> Planes:
    """GPTQ planes of one projection. inputs: rows (R, C) of each expert; squared: their squared gates."""
    size = w.shape[input_axis]
    step = size if size <= MAX_INPUTS else MAX_INPUTS // group_size * group_size
    parts = []
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        common = prior(part)
        hessians = [
            shrunk((x[:, part] * s[:, None]).T @ x[:, part], float(s.sum()), common, PRIOR_ROWS * typical)
            for x, s in zip(inputs, squared)
        ]
        own = w[:, part] if input_axis == 1 else w[:, :, part]
        parts.append(quantize_nested(own, np.stack(hessians), group_size, input_axis, emphasis))
    return jax.tree.map(lambda *a: np.concatenate(a, axis=input_axis), *parts)


class Energy(NamedTuple):
    """Of one expert: the sums over its rows of its squared gates, and of these times the mean square of its hidden
    channels."""

    gates: float
    hidden: float


def energy_of(rows: Rows, hidden: Float[np.ndarray, "R F"]) -> Energy:
    squared = rows.gates**2
    return Energy(float(squared.sum()), float(squared @ np.square(hidden).mean(axis=1)))


def mean_square(energies: list[Energy]) -> float:
    """Of the hidden channels of some experts, by their squared gates."""
    return sum(e.hidden for e in energies) / max(sum(e.gates for e in energies), 1e-30)


@functools.partial(jax.jit, static_argnames="activation")
def hidden_channels(activation, x, weights, biases):
    """(R, F)"""
    return _expert(activation, x, weights, biases)[0]
