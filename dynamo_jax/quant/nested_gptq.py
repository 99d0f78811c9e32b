"""Nested planes with error feedback: GPTQ for all widths of one stored weight at once, then coordinate descent.

GPTQ (arXiv 2210.17323) rounds one input column after the other, those with the largest inputs first, and adds what
the rounding did to the outputs, as the inputs' correlations predict it, to the columns that are still to come. Here
each of the widths 2, 3 and 4 keeps a feedback of its own, so three versions of the remaining columns are carried,
and the codes of a weight, which the widths share, are the ones with the least weighted sum of the widths'
squared errors (``EMPHASIS``). Sweeps of coordinate descent follow (as in QuantEase, arXiv 2309.01885, for one width):
each column's codes are chosen again, with all other columns as they are, which never makes the weighted sum of the
widths' output errors larger, as the damped Hessian predicts them. The last plane, 8 bits, rounds what is left without
feedback. Refining the finished 2-bit result by GPTQ on its residual instead does worse at 3 and 4 bits, since feedback
drives the 2-bit weights away from the ones that they stand for (docs/log.md).

Base scales are searched beforehand, for the weights as they are.

Axes: X experts, R outputs, C inputs, G groups, S rows or groups of rows that have one scale in each column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dynamo_jax.quant.gptq import damped, feedback_factor
from dynamo_jax.quant.planes import VALUES, Planes, over, planes_of, refinement, rounded_scale

Emphasis = tuple[float, float, float]
Refit = Callable[[UInt8[np.ndarray, "X A B"], Float[np.ndarray, "X A G"]], Float[np.ndarray, "X A G"]]
EMPHASIS: Emphasis = (1.0, 2.0, 4.0)  # of a squared error at 2, 3 and 4 bits when codes are chosen
PRIOR_ROWS = 256  # what the layer's own Hessian counts for in that of each expert
BASE_FRACTIONS = tuple(np.linspace(0.3, 0.75, 13).tolist())  # base scale over the group's largest weight
SWEEPS = 3  # of coordinate descent
BLOCK_COLUMNS = 128  # whose feedback waits until the block is done
EXACT = jax.lax.Precision.HIGHEST  # the slopes are kept up to date through all sweeps
CHUNK_WEIGHTS = 2**22  # in the compiled loop at a time: about 0.3 GB of temporary arrays


def quantize_nested(
    w: Float[np.ndarray, "X A B"],
    hessian: Float[np.ndarray, "X C C"],
    group_size: int,
    input_axis: int,
    emphasis: Emphasis | Float[np.ndarray, "X 3"] = EMPHASIS,
    sweeps: int = SWEEPS,
    *,
    target: Float[np.ndarray, "X A B"] | None = None,
    refit: Refit | None = None,
) -> Planes:
    """Planes of experts' weights with groups along the last axis, whichever axis holds the inputs.

    target: what the codes of 2, 3 and 4 bits stand for, ``w`` by default; the 8-bit plane is made for ``w`` in any
    case. refit: is given the codes of four bits, indices into ``VALUES``, and the base scales, and returns others.
    input_axis: 1 for weights (X, C, R), such as down projections, 2 for (X, R, C), such as gate and up.
    hessian: sums of products of inputs with inputs, weighted as the errors count; a zero one is taken as the
    identity, which leaves rounding without feedback. emphasis: what a squared error at 2, 3 and 4 bits counts when
    a code is chosen, of all experts or of each; one far above the others makes the weight for that width alone.
    sweeps: of coordinate descent. NaN or infinity in weights or Hessian is an error.
    """
    w = np.asarray(w)
    if input_axis not in (1, 2):
        raise ValueError(f"input_axis {input_axis} is neither 1 nor 2")
    if w.shape[2] % group_size or group_size % 8:
        raise ValueError(f"last axis {w.shape[2]} must be a multiple of group_size {group_size}, and that of 8")
    if hessian.shape != (len(w), w.shape[input_axis], w.shape[input_axis]):
        raise ValueError(f"hessian {hessian.shape} does not fit weights {w.shape} with inputs on axis {input_axis}")
    wanted = w if target is None else np.asarray(target)
    if not (np.isfinite(np.asarray(w, np.float32)).all() and np.isfinite(np.asarray(wanted, np.float32)).all()):
        raise ValueError("weights to quantize hold NaN or infinity")
    weights = np.broadcast_to(np.asarray(emphasis, np.float32), (len(w), 3))
    share = group_size if input_axis == 1 else 1  # rows that have one scale in a column
    columns = w.shape[input_axis]
    size = w.shape[3 - input_axis]
    rows = _divisor(size, share, CHUNK_WEIGHTS // columns)
    run = functools.partial(_run, sweeps=sweeps, block=_divisor(columns, 1, BLOCK_COLUMNS))
    four, scales = np.empty(w.shape, np.uint8), np.empty((*w.shape[:2], w.shape[2] // group_size), np.float32)
    step = max(1, CHUNK_WEIGHTS // (rows * columns))  # experts at a time
    for i in range(0, len(w), step):
        own = weights[i : i + step]
        orders, factors, products = (np.stack(a) for a in zip(*map(_prepared, hessian[i : i + step])))
        for r in range(0, size, rows):
            at = np.s_[i : i + step, :, r : r + rows] if input_axis == 1 else np.s_[i : i + step, r : r + rows]
            slab = jnp.asarray(wanted[at], jnp.float32)
            found = _scales(slab, own, group_size)
            groups = np.s_[i : i + step, :, r // group_size : (r + rows) // group_size] if input_axis == 1 else at
            scales[groups] = found
            if input_axis == 1:
                slab, of_columns = slab.swapaxes(1, 2), found
            else:
                of_columns = jnp.repeat(found, group_size, axis=2).swapaxes(1, 2)
            codes = np.asarray(run(slab, of_columns, orders, factors, products, own))
            four[at] = codes.swapaxes(1, 2) if input_axis == 1 else codes
    return finished(w, four, scales if refit is None else refit(four, scales))


def finished(
    w: Float[np.ndarray, "X A B"], four: UInt8[np.ndarray, "X A B"], scales: Float[np.ndarray, "X A G"]
) -> Planes:
    """The planes of these codes and base scales; the last one rounds what they leave of ``w``."""
    codes, ratios = [], []
    for weights, index, scale in zip(w, four, scales):
        code, ratio = _round_residual(jnp.asarray(weights, jnp.float32), jnp.asarray(index), jnp.asarray(scale))
        codes.append(np.asarray(code))
        ratios.append(np.asarray(ratio))
    return planes_of(four, np.stack(codes), scales, np.stack(ratios))


def _prepared(hessian: Float[np.ndarray, "C C"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of the columns, and in it the feedback factor (C, C) and the damped Hessian (C, C)."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    own = hessian[np.ix_(order, order)]
    return order, feedback_factor(own), damped(own).astype(np.float32)


@jax.jit
def _round_residual(
    w: Float[Array, "A B"], four: UInt8[Array, "A B"], scales: Float[Array, "A G"]
) -> tuple[UInt8[Array, "A B"], UInt8[Array, "A G"]]:
    base = scales[..., None]
    grouped = (*scales.shape, -1)
    residual = w.reshape(grouped) - jnp.asarray(VALUES[2])[four].reshape(grouped) * base
    code, ratio = refinement(residual, base)
    return code.reshape(w.shape), ratio[..., 0]


def _divisor(size: int, multiple: int, most: int) -> int:
    """The largest divisor of ``size`` that is a multiple of ``multiple`` and, but for that, at most ``most``."""
    whole = size // multiple
    return multiple * max(d for d in range(1, whole + 1) if whole % d == 0 and (d == 1 or d * multiple <= most))


@functools.partial(jax.jit, static_argnames="group_size")
def _scales(w: Float[Array, "X A B"], emphasis: Float[Array, "X 3"], group_size: int) -> Float[Array, "X A G"]:
    """The base scale of each group, in values that bfloat16 has; 0 for a group of zeros."""
    grouped = w.reshape(*w.shape[:2], -1, group_size)
    largest = jnp.abs(grouped).max(axis=-1)
    weights = [emphasis[:, k, None, None, None] for k in range(3)]

    def error(fraction):
        scale = rounded_scale(largest * fraction)
        t = over(grouped, scale[..., None])
        return scale**2 * functools.reduce(jnp.minimum, _costs((t, t, t), weights)).sum(axis=-1)

    fractions = jnp.asarray(BASE_FRACTIONS)
    best = jnp.argmin(jax.lax.map(error, fractions), axis=0)
    return rounded_scale(largest * fractions[best])


def _costs(t: Sequence[Array], emphasis: Sequence[Array]) -> list[Array]:
    """Of each of the 16 codes, how far its values at 2, 3 and 4 bits are from the targets, in squared base scales."""
    return [sum(emphasis[k] * (t[k] - value[k]) ** 2 for k in range(3)) for value in VALUES.T]  # type: ignore[misc]


@functools.partial(jax.jit, static_argnames=("sweeps", "block"))
def _run(
    w: Float[Array, "X R C"],
    scales: Float[Array, "X C S"],
    orders: Int[Array, "X C"],
    factors: Float[Array, "X C C"],
    hessians: Float[Array, "X C C"],
    emphasis: Float[Array, "X 3"],
    sweeps: int,
    block: int,
) -> UInt8[Array, "X R C"]:
    """Indices into ``VALUES``. Factors and Hessians have the columns in the orders already."""
    one = functools.partial(_run_one, sweeps=sweeps, block=block)
    return jax.vmap(one)(w, scales, orders, factors, hessians, emphasis)


def _run_one(w, scales, order, factor, hessian, emphasis, *, sweeps, block):
    w, scales = w[:, order], scales[order]
    values = jnp.asarray(VALUES)

    def nearest(target, scale):  # (3, R), (R,) -> codes (R,) and their values (3, R)
        code = jnp.argmin(jnp.stack(_costs(over(target, scale), emphasis)), axis=0).astype(jnp.uint8)
        return code, values[:, code] * scale

    def feed(target, _, scale, pivot):
        code, value = nearest(target, scale)
        return code, (value - target) / pivot

    def descend(slope, code, scale, pivot):  # slope: of half the squared error by the weights, negative
        old = values[:, code] * scale
        code, value = nearest(old + slope / pivot, scale)
        return code, old - value

    visit = functools.partial(_visit, scales=scales, block=block)
    targets = jnp.broadcast_to(w, (3, *w.shape))
    codes = visit(feed, targets, jnp.triu(factor, 1), jnp.diag(factor), jnp.zeros(w.shape, jnp.uint8))[1]
    wide = jnp.repeat(scales.T, len(w) // scales.shape[1], axis=0)
    slopes = jnp.matmul(w - values[:, codes] * wide, hessian, precision=EXACT)

    def sweep(_, state):
        return visit(descend, state[0], hessian, jnp.diag(hessian), state[1])

    codes = jax.lax.fori_loop(0, sweeps, sweep, (slopes, codes))[1]
    return codes[:, jnp.argsort(order)]


def _visit(
    choose: Callable[[Array, Array, Array, Array], tuple[Array, Array]],
    state: Float[Array, "3 R C"],
    matrix: Float[Array, "C C"],
    pivots: Float[Array, " C"],
    codes: UInt8[Array, "R C"],
    *,
    scales: Float[Array, "C S"],
    block: int,
) -> tuple[Float[Array, "3 R C"], UInt8[Array, "R C"]]:
    """Visit the columns in turn. ``choose`` makes of a column's state (3, R), codes, scales (R,) and pivot new codes
    and a change (3, R), whose product with the column's row of the matrix is added to the state."""
    rows, columns = codes.shape

    def block_step(b, carry):
        state, codes = carry
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=b * block, slice_size=block)
        of_block = cut(matrix, axis=0)
        inner, own, pivot = cut(of_block, axis=1), cut(scales, axis=0), cut(pivots, axis=0)

        def column_step(j, carry):
            local, changes, codes = carry
            scale = jnp.repeat(own[j], rows // own.shape[1])
            code, change = choose(local[:, :, j], codes[:, j], scale, pivot[j])
            return local + change[:, :, None] * inner[j], changes.at[:, :, j].set(change), codes.at[:, j].set(code)

        local = cut(state, axis=2)
        begin = (local, jnp.zeros_like(local), cut(codes, axis=1))
        _, changes, own_codes = jax.lax.fori_loop(0, block, column_step, begin)
        put = jax.lax.dynamic_update_slice_in_dim
        return state + jnp.matmul(changes, of_block, precision=EXACT), put(codes, own_codes, b * block, axis=1)

    return jax.lax.fori_loop(0, columns // block, block_step, (state, codes))


def shrunk(own: Float[np.ndarray, "C C"], weight: float, prior: Float[np.ndarray, "C C"], worth: float) -> np.ndarray:
    """A mean Hessian that leans on ``prior`` (of weight 1) where its own ``weight`` is small.

    ``worth``: the weight that the prior counts for. An expert that calibration never reached gets the prior.
    """
    return (own + worth * prior) / max(weight + worth, 1e-30)
