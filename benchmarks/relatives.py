"""The nearest relatives of our planes, each after its paper or its authors' code, on the same Hessians.

    matgptq   MatGPTQ (arXiv 2602.03537): GPTQ of one code of 8 bits whose first bits are the codes of fewer, chosen
              among all 256 for the sum of the widths' squared errors, one feedback of their mean error, columns in
              their order, symmetric. Slices are rounded and clamped, as in the authors' code.
    anybcq    AnyBCQ (arXiv 2510.10467): sums of binary codes times scales, each width with scales of its own. Two bits
              by alternating least squares, then a bit at a time, the codes before it as they are. The authors train
              the scales of a block on its outputs; here they are the least-squares fit of each projection's outputs.
    direct    GPTQ (arXiv 2210.17323) at the width that the plan gives, not nested: ``quant.gptq``
    autoround AutoRound (arXiv 2309.05516): an offset of each weight within its rounding cell and two factors of each
              group's span, by the signs of gradients, 200 steps that shrink to nothing, the best one kept. The paper
              minimizes the error of a block's outputs on samples; here it is that of each projection by its Hessian.

None has a plan for experts, so that each is read at the widths of ours; that leaves codes and scales to differ. Groups
are of ``GROUP`` weights along the inputs of a projection where that divides them, else all its inputs.

Axes: X experts of a layer, R outputs, C inputs, G groups, g weights of a group, B binary codes, L layers, E experts,
P projections, F channels, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from peers import LEAST_ROWS, Sums, _both
from peers import gptq_weights as direct_weights

from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.quant.gptq import damped, feedback_factor
from dynamo_jax.quant.grids import GridSpec

GROUP = 128
RELATIVES = ("matgptq", "anybcq", "direct", "autoround")
ROUNDS = 20  # of alternating least squares
STEPS = 200  # of learned rounding
SCALE_BITS = 16
Quantizer = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]  # (X, R, C), (X, C, C) -> (X, R, C) at each width


def group_of(inputs: int) -> int:
    return GROUP if inputs % GROUP == 0 else inputs


def bits_of(name: str, widths: np.ndarray, weights: np.ndarray) -> float:
    """Bits a weight of experts (L, E, P, F, D) at widths (L, E, P): codes, and the scales that these widths read."""
    inputs = [weights.shape[-1], weights.shape[-1], weights.shape[-2]]
    scales = SCALE_BITS / np.array([group_of(size) for size in inputs])
    return float((widths + scales * (widths if name == "anybcq" else 1)).mean())


def options(name: str, weights: np.ndarray, sums: Sums) -> list[np.ndarray]:
    """Dequantized weights (L, E, P, F, D) at each of ``WIDTHS``."""
    if name == "direct":
        group = group_of(weights.shape[-1])
        return [direct_weights(weights, sums, GridSpec(width, group, True, True)) for width in WIDTHS]
    run: Quantizer = {"matgptq": matgptq, "anybcq": anybcq, "autoround": autoround}[name]
    layers = []
    for layer, w in enumerate(weights):
        inner, hidden = (_pooled(h[layer], sums.rows[layer]) for h in (sums.inner, sums.hidden))
        gate_up = run(w[:, :2].reshape(len(w), -1, w.shape[-1]), inner)
        layers.append((gate_up, run(w[:, 2].swapaxes(1, 2), hidden)))
    return [_both(weights, *(lambda at, _, p=p, i=i: layers[at][p][i] for p in (0, 1))) for i in range(len(WIDTHS))]


def _pooled(hessians: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(X, C, C): of an expert with few rows the sum of all, as ``peers.gptq_weights`` takes it."""
    few = (rows < LEAST_ROWS) | (np.trace(hessians, axis1=1, axis2=2) <= 0)
    return np.where(few[:, None, None], hessians.sum(axis=0), hessians)


# MatGPTQ


def sliced(code: np.ndarray | jax.Array, width: int) -> np.ndarray | jax.Array:
    """What a code of 8 bits is at fewer: its first bits, rounded by the next one and clamped, in units of 8 bits."""
    drop = 8 - width
    if not drop:
        return code
    return jnp.minimum((code >> drop) + (code >> (drop - 1) & 1), 2**width - 1) << drop


def matgptq(w: np.ndarray, hessians: np.ndarray) -> list[np.ndarray]:
    factors = np.stack([feedback_factor(h) for h in hessians])
    codes, scales = _matgptq(jnp.asarray(w), jnp.asarray(factors))
    of_columns = jnp.repeat(scales, group_of(w.shape[2]), axis=2)
    return [np.asarray((sliced(codes, width) - 128) * of_columns) for width in WIDTHS]


@jax.jit
def _matgptq(w: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes (X, R, C), int32, and scales (X, R, G)."""
    columns, group = w.shape[2], group_of(w.shape[2])
    values = jnp.stack([sliced(jnp.arange(256), width) - 128 for width in WIDTHS], axis=1)  # (256, widths)

    def step(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, codes, scales = state
        start = j // group * group
        own = jax.lax.dynamic_slice_in_dim(left, start, group, axis=2)  # as the feedback left them when it begins
        fresh = 2 * jnp.abs(own).max(axis=2) / 255
        scale = jnp.where(j == start, fresh, scales[:, :, j // group])
        scale = jnp.where(scale > 0, scale, 1.0)
        target = left[:, :, j] / scale  # (X, R), in units of the scale

        def better(code: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            error = ((target[..., None] - values[code]) ** 2).sum(axis=-1)
            return jnp.where(error < best[0], error, best[0]), jnp.where(error < best[0], code, best[1])

        infinite = jnp.full(target.shape, jnp.inf), jnp.zeros(target.shape, jnp.int32)
        _, code = jax.lax.fori_loop(0, 256, better, infinite)
        error = (target - values[code].mean(axis=-1)) * scale / factors[:, j, j][:, None]
        later = jnp.where(jnp.arange(columns) > j, factors[:, j], 0.0)
        left = left - error[..., None] * later[:, None]
        return left, codes.at[:, :, j].set(code), scales.at[:, :, j // group].set(scale)

    scales = jnp.zeros((*w.shape[:2], columns // group))
    _, codes, scales = jax.lax.fori_loop(0, columns, step, (w, jnp.zeros(w.shape, jnp.int32), scales))
    return codes, scales


# AnyBCQ


def anybcq(w: np.ndarray, hessians: np.ndarray) -> list[np.ndarray]:
    h = jnp.asarray(np.stack([damped(each) for each in hessians]), jnp.float32)
    w, group = jnp.asarray(w), group_of(w.shape[2])
    grouped = w.reshape(*w.shape[:2], -1, group)
    codes = two_bits(grouped)
    out = []
    for width in range(2, WIDTHS[-1] + 1):
        codes = codes if width == 2 else with_bit(grouped, codes)
        if width in WIDTHS:
            out.append(np.asarray(fitted(w, h, codes)))
    return out


@jax.jit
def two_bits(w: jax.Array) -> jax.Array:
    """Binary codes (X, R, G, g, 2) of weights (X, R, G, g): of the residual's sign, then alternating with scales."""
    first = jnp.where(w < 0, -1.0, 1.0)
    rest = w - first * jnp.abs(w).mean(axis=-1, keepdims=True)
    codes = jnp.stack([first, jnp.where(rest < 0, -1.0, 1.0)], axis=-1)

    def again(_: int, codes: jax.Array) -> jax.Array:
        scales = scales_of(w, codes)
        each = jnp.asarray([(a, b) for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
        values = scales @ each.T  # (X, R, G, 4)
        return each[jnp.abs(w[..., None] - values[..., None, :]).argmin(axis=-1)]

    return jax.lax.fori_loop(0, ROUNDS, again, codes)


@jax.jit
def with_bit(w: jax.Array, codes: jax.Array) -> jax.Array:
    """One more binary code of each weight: the residual's sign, alternating with the scales of all; the others stay."""
    rest = w - (codes * scales_of(w, codes)[..., None, :]).sum(axis=-1)
    more = jnp.concatenate([codes, jnp.where(rest < 0, -1.0, 1.0)[..., None]], axis=-1)

    def again(_: int, codes: jax.Array) -> jax.Array:
        scales = scales_of(w, codes)[..., None, :]
        rest = w - (codes * scales)[..., :-1].sum(axis=-1)
        return codes.at[..., -1].set(jnp.where(rest * scales[..., -1] < 0, -1.0, 1.0))

    return jax.lax.fori_loop(0, ROUNDS, again, more)


def scales_of(w: jax.Array, codes: jax.Array) -> jax.Array:
    """Scales (X, R, G, B) of least squared error of the weights."""
    gram = jnp.einsum("...gb,...gc->...bc", codes, codes) + 1e-4 * jnp.eye(codes.shape[-1])
    return jnp.linalg.solve(gram, jnp.einsum("...gb,...g->...b", codes, w)[..., None])[..., 0]


@jax.jit
def fitted(w: jax.Array, hessians: jax.Array, codes: jax.Array) -> jax.Array:
    """Weights (X, R, C) of these codes with the scales of least (W - W') H (W - W')^T, row by row."""
    experts, rows, groups, group, bits = codes.shape
    places = jnp.eye(groups)[:, None, :, None]  # a code is 0 in the columns of other groups
    basis = (codes[..., None, :] * places).reshape(experts, rows, groups * group, groups * bits)
    weighed = jnp.einsum("xcd,xrdk->xrck", hessians, basis, precision="highest")
    gram = jnp.einsum("xrck,xrcl->xrkl", basis, weighed, precision="highest")
    gram += 1e-5 * jnp.trace(gram, axis1=2, axis2=3)[..., None, None] / gram.shape[-1] * jnp.eye(gram.shape[-1])
    scales = jnp.linalg.solve(gram, jnp.einsum("xrck,xrc->xrk", weighed, w, precision="highest")[..., None])[..., 0]
    return jnp.einsum("xrck,xrk->xrc", basis, scales)


# AutoRound


def autoround(w: np.ndarray, hessians: np.ndarray) -> list[np.ndarray]:
    h = jnp.asarray(np.stack([damped(each) for each in hessians]), jnp.float32)
    return [np.asarray(_autoround(jnp.asarray(w), h, width)) for width in WIDTHS]


def rounded(w: jax.Array, offsets: jax.Array, spans: jax.Array, width: int) -> jax.Array:
    """Weights (X, R, G, g), symmetric, with offsets of the same shape in units of a step, and factors (X, R, G, 2) of
    the spans below and above zero. Gradients pass the rounding as if it were not there."""
    half = 2 ** (width - 1)
    low, high = (jnp.abs(f(w, axis=-1)) * spans[..., i] for i, f in enumerate((jnp.min, jnp.max)))
    scale = jnp.maximum(jnp.maximum(low, high) / (half - 0.5), 1e-9)[..., None]
    exact = w / scale + offsets
    code = exact + jax.lax.stop_gradient(jnp.round(exact) - exact)
    return jnp.clip(code, -half, half - 1) * scale


def loss_of(w: jax.Array, hessians: jax.Array, made: jax.Array) -> jax.Array:
    """(W - W') H (W - W')^T of each expert, (X,)."""
    apart = (w - made).reshape(*w.shape[:2], -1)
    return jnp.einsum("xrc,xcd,xrd->x", apart, hessians, apart)


@functools.partial(jax.jit, static_argnames="width")
def _autoround(w: jax.Array, hessians: jax.Array, width: int) -> jax.Array:
    grouped = w.reshape(*w.shape[:2], -1, group_of(w.shape[2]))

    def value(parameters: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        made = rounded(grouped, *parameters, width)
        each = loss_of(grouped, hessians, made)
        return each.sum(), (each, made)

    def step(i: int, state: tuple) -> tuple:
        offsets, spans, least, best = state
        (_, (each, made)), (by_offset, by_span) = jax.value_and_grad(value, has_aux=True)((offsets, spans))
        best = jnp.where((each < least)[:, None, None, None], made, best)
        rate = (1 - i / STEPS) / STEPS
        offsets = jnp.clip(offsets - rate * jnp.sign(by_offset), -0.5, 0.5)
        return offsets, jnp.clip(spans - rate * jnp.sign(by_span), 0, 1), jnp.minimum(each, least), best

    begin = jnp.zeros_like(grouped), jnp.ones((*grouped.shape[:3], 2))
    state = (*begin, jnp.full(len(w), jnp.inf), grouped)
    return jax.lax.fori_loop(0, STEPS + 1, step, state)[3].reshape(w.shape)
