"""The routed experts of one layer, one by one: their rows, what they compute, their planes and errors.

What calibration does with each expert (``layers.py``), as functions of arrays.

Axes: N tokens, k experts a token, X experts of a portion, R rows of one expert, A datasets, D hidden, F channels,
B channel blocks, P = 3 projections, U = 2 where gate with up and down are apart, else 0, M = B or U*B.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dynamo_jax.kernels.layout import WIDTHS, widened
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import Activation
from dynamo_jax.quant.asymmetric import channel_factors, corrected
from dynamo_jax.quant.nested_gptq import CHUNK_WEIGHTS, PRIOR_ROWS, quantize_nested, shrunk
from dynamo_jax.quant.planes import Planes, dequantize, rounded_scale, values_of

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
    gate, up, down = weights
    h = _hidden(activation, x, gate, up, biases)
    y = h @ down.astype(x.dtype)
    return h, y if biases is None else y + biases[2].astype(x.dtype)


def _hidden(activation: Activation, x: Array, gate: Array, up: Array, biases: Any) -> Array:
    a, u = x @ gate.astype(x.dtype).T, x @ up.astype(x.dtype).T
    if biases is not None:
        a, u = a + biases[0].astype(x.dtype), u + biases[1].astype(x.dtype)
    return activation(a, u)


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
    own = at_width(planes, width, weights.shape[1:])  # apart: one program for each number of rows serves all widths
    return _errors(activation, channel_block, apart, x, gates, member, h, y, weights, own, biases)


@functools.partial(jax.jit, static_argnames=("width", "sizes"))
def at_width(planes, width, sizes):
    """One expert's weights (P, F, D), without what fills up, as a matrix unit takes them."""
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


class Given(NamedTuple):
    """What some experts were given, for error feedback. hidden: float hidden channels of their rows; spread: the mean
    square of those of their chunk (``mean_square``); typical: the squared gate of one row of the layer."""

    rows: list[Rows]
    hidden: list[Float[np.ndarray, "R F"]]
    spread: float
    typical: float

    @property
    def squared(self) -> list[Float[np.ndarray, " R"]]:
        return [r.gates**2 for r in self.rows]


def given_of(routed: Routed, rows: list[Rows], hidden: list[Float[np.ndarray, "R F"]], spread: float) -> Given:
    squared = float((np.asarray(routed.gates) ** 2 * (routed.experts >= 0)).sum())
    return Given(rows, hidden, spread, squared / max(1, int((routed.experts >= 0).sum())))


def layer_hessians(routed: Routed, size: int, group_size: int) -> list[Float[np.ndarray, "C C"]]:
    """Of all tokens of a layer, by their gates: for each part of the ``size`` inputs that has a Hessian of its own."""
    shares = (np.asarray(routed.gates) ** 2 * (routed.experts >= 0)).sum(axis=1)
    shares = (shares / max(float(shares.sum()), 1e-30))[:, None]
    found = []
    for part in _input_parts(size, group_size):
        of_layer = np.asarray(routed.x)[:, part]  # without what fills up
        common = (of_layer * shares).T @ of_layer
        found.append(np.pad(common, (0, part.stop - part.start - len(common))))
    return found


def gate_up_planes(
    w: Float[np.ndarray, "X 2 F D"],
    given: Given,
    of_layer: list[Float[np.ndarray, "C C"]],
    group_size: int,
    emphasis: Float[np.ndarray, "X 3"],
) -> Planes:
    """Planes (X, 2, F, ..) of gate and up, by error feedback along the inputs of the layer. of_layer: its
    ``layer_hessians``, which the experts of all portions lean on."""
    count, _, channels, size = w.shape
    rows = w.reshape(count, 2 * channels, size)
    parts = []
    for part, common in zip(_input_parts(size, group_size), of_layer):
        hessians = []
        for x, s in zip(given.rows, given.squared):
            own = widened(x.x, size)[:, part]
            hessians.append(_leaning((own * s[:, None]).T @ own, s, common, given))
        parts.append(quantize_nested(rows[:, :, part], np.stack(hessians), group_size, 2, emphasis))
    found = jax.tree.map(lambda *a: np.concatenate(a, axis=2), *parts)
    return jax.tree.map(lambda a: a.reshape(count, 2, channels, -1), found)


def down_planes(
    w: Float[np.ndarray, "X F D"],
    given: Given,
    reached: list[Float[np.ndarray, "3 R F"]] | None,
    group_size: int,
    emphasis: Float[np.ndarray, "X U 3"],
) -> Planes:
    """Planes (X, F, ..) of down. reached: the hidden channels that gate and up give at 2, 3 and 4 bits; down is made
    for these then (``quant.asymmetric``), each counted as an error at that width is. Its last plane is made for the
    float ones in any case: at 8 bits gate and up give nearly these."""
    channels = w.shape[1]
    counted = emphasis / emphasis.sum(axis=-1, keepdims=True)
    parts = []
    for part in _input_parts(channels, group_size):
        common = np.eye(part.stop - part.start, dtype=np.float32) * np.float32(given.spread)
        exact = [widened(h, channels)[:, part] for h in given.hidden]
        weights = w[:, part]
        if reached is None:
            own = [(h * s[:, None]).T @ h for h, s in zip(exact, given.squared)]
            target = refit = None
        else:
            weights = np.asarray(weights, np.float32)
            own, cross = [], []
            for h, ways, s, share in zip(exact, reached, given.squared, counted[:, 0]):
                cut = [widened(way, channels)[:, part] for way in ways]
                weighted = [(s[:, None] * p * way).T for p, way in zip(share, cut)]
                own.append(sum(a @ way for a, way in zip(weighted, cut)))
                cross.append(sum(weighted) @ h)
            prior = PRIOR_ROWS * given.typical * given.spread
            target = np.stack([corrected(each, a, b, prior) for each, a, b in zip(weights, own, cross)])
            refit = functools.partial(_with_factors, weights, own, cross, counted[:, -1])
        hessians = np.stack([_leaning(a, s, common, given) for a, s in zip(own, given.squared)])
        found = quantize_nested(weights, hessians, group_size, 1, emphasis[:, -1], target=target, refit=refit)
        parts.append(found)
    return jax.tree.map(lambda *a: np.concatenate(a, axis=1), *parts)


def _with_factors(
    w: Float[np.ndarray, "X C D"],
    own: list[Float[np.ndarray, "C C"]],
    cross: list[Float[np.ndarray, "C C"]],
    shares: Float[np.ndarray, "X 3"],
    four: UInt8[np.ndarray, "X C D"],
    scales: Float[np.ndarray, "X C G"],
) -> Float[np.ndarray, "X C G"]:
    """Base scales of down with the ``channel_factors`` in them."""
    out = []
    for weights, a, b, share, codes, scale in zip(w, own, cross, shares, four, scales):
        at_widths = np.stack([values_of(codes, scale, width) for width in WIDTHS[:3]])
        factors = channel_factors(weights, at_widths, share, a, b)
        out.append(np.asarray(rounded_scale(jnp.asarray(scale * factors[:, None]))))
    return np.stack(out)


def _input_parts(size: int, group_size: int) -> list[slice]:
    """All inputs, or parts of them that have Hessians of their own."""
    step = size if size <= MAX_INPUTS else MAX_INPUTS // group_size * group_size
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _leaning(
    own: Float[np.ndarray, "C C"], squared: Float[np.ndarray, " R"], common: Float[np.ndarray, "C C"], given: Given
) -> np.ndarray:
    """An expert's Hessian, which leans on the one that its layer has in common."""
    return shrunk(own, float(squared.sum()), common, PRIOR_ROWS * given.typical)


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
def hidden_channels(activation, x, gate, up, biases):
    """(R, F)"""
    return _hidden(activation, x, gate, up, biases)
