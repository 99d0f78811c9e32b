"""Nested planes with error feedback: GPTQ for all widths of one stored weight at once.

GPTQ (arXiv 2210.17323) rounds one input column after the other and adds what the rounding did to the
outputs, as the inputs' correlations predict it, to the columns that are still to come. Here each of the
widths 2, 3 and 4 keeps a feedback of its own, so three versions of the remaining columns are carried,
and the codes of a weight, which the widths share, are the ones with the least weighted sum of the widths'
squared errors (``EMPHASIS``). The last plane, 8 bits, rounds what is left without feedback. Refining the
finished 2-bit result by GPTQ on its residual instead does worse at 3 and 4 bits, since feedback drives the 2-bit
weights away from the ones that they stand for (docs/log.md).

The base scale of a group is searched when the first of its columns is reached.

Axes: X experts, R outputs, C inputs, G groups.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dynamo_jax.quant.gptq import feedback_factor
from dynamo_jax.quant.planes import VALUES, Planes, over, planes_of, refinement, rounded_scale

Emphasis = tuple[float, float, float]
EMPHASIS: Emphasis = (1.0, 2.0, 4.0)  # of a squared error at 2, 3 and 4 bits when codes are chosen
BASE_FRACTIONS = tuple(np.linspace(0.3, 0.75, 13).tolist())  # base scale over the group's largest weight
ROOM = 1.1  # a scale's share beyond the best one for the weights as they are: feedback makes them grow
BLOCK_COLUMNS = 128  # whose feedback waits until the block is done
CHUNK_WEIGHTS = 2**22  # in the compiled loop at a time: about 0.2 GB of temporary arrays


def quantize_nested(
    w: Float[np.ndarray, "X A B"],
    hessian: Float[np.ndarray, "X C C"],
    group_size: int,
    input_axis: int,
    emphasis: Emphasis | Float[np.ndarray, "X 3"] = EMPHASIS,
) -> Planes:
    """Planes of experts' weights with groups along the last axis, whichever axis holds the inputs.

    input_axis: 1 for weights (X, C, R), such as down projections, 2 for (X, R, C), such as gate and up.
    hessian: sums of products of inputs with inputs, weighted as the errors count; a zero one is taken as the
    identity, which leaves rounding without feedback. emphasis: what a squared error at 2, 3 and 4 bits counts when
    a code is chosen, of all experts or of each; one far above the others makes the weight for that width alone.
    NaN or infinity in weights or Hessian is an error.
    """
    w = np.asarray(w)
    if input_axis not in (1, 2):
        raise ValueError(f"input_axis {input_axis} is neither 1 nor 2")
    if w.shape[2] % group_size or group_size % 8:
        raise ValueError(f"last axis {w.shape[2]} must be a multiple of group_size {group_size}, and that of 8")
    if hessian.shape != (len(w), w.shape[input_axis], w.shape[input_axis]):
        raise ValueError(f"hessian {hessian.shape} does not fit weights {w.shape} with inputs on axis {input_axis}")
    if not np.isfinite(np.asarray(w, np.float32)).all():
        raise ValueError("weights to quantize hold NaN or infinity")
    factors = np.stack([feedback_factor(h) for h in hessian])
    weights = jnp.broadcast_to(jnp.asarray(emphasis, jnp.float32), (len(w), 3))
    columns = w.swapaxes(1, 2) if input_axis == 1 else w
    block = _divisor(columns.shape[2], group_size if input_axis == 2 else 1, BLOCK_COLUMNS)
    rows = _divisor(columns.shape[1], group_size if input_axis == 1 else 1, CHUNK_WEIGHTS // columns.shape[2])
    step = max(1, CHUNK_WEIGHTS // (rows * columns.shape[2]))  # experts at a time
    found = []
    for i in range(0, len(w), step):
        factor = jnp.asarray(factors[i : i + step])
        slabs = [
            jnp.asarray(columns[i : i + step, r : r + rows], jnp.float32) for r in range(0, columns.shape[1], rows)
        ]
        own = weights[i : i + step]
        runs = [_run(slab, factor, own, group_size, input_axis == 2, block) for slab in slabs]
        found.append([np.concatenate(a, axis=axis) for a, axis in zip(zip(*runs), (1, 2))])
    four, scales = (np.concatenate(a) for a in zip(*found))
    if input_axis == 1:
        four = four.swapaxes(1, 2)
    else:
        scales = scales[:, ::group_size].swapaxes(1, 2)
    eight, ratios = _finest(w, four, scales, group_size)
    return planes_of(four, eight, scales, ratios)


def _finest(w: np.ndarray, four: np.ndarray, scales: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (X, A, B) and ratios (X, A, G) of the 8-bit plane, expert by expert."""
    codes, ratios = [], []
    for weights, index, scale in zip(w, four, scales):
        code, ratio = _round_residual(jnp.asarray(weights, jnp.float32), jnp.asarray(index), jnp.asarray(scale))
        codes.append(np.asarray(code))
        ratios.append(np.asarray(ratio))
    return np.stack(codes), np.stack(ratios)


@jax.jit
def _round_residual(
    w: Float[Array, "A B"], four: UInt8[Array, "A B"], scales: Float[Array, "A G"]
) -> tuple[UInt8[Array, "A B"], UInt8[Array, "A G"]]:
    base = scales[..., None]
    grouped = (*scales.shape, -1)
    residual = w.reshape(grouped) - jnp.asarray(VALUES[2])[four].reshape(grouped) * base
    code, ratio = refinement(residual, base)
    return code.reshape(w.shape), ratio[..., 0]


class _Codes(NamedTuple):
    """four: index into ``VALUES``; scales: see ``_run``."""

    four: UInt8[Array, "X R C"]
    scales: Float[Array, "X C G"]


def _divisor(size: int, multiple: int, most: int) -> int:
    """The largest divisor of ``size`` that is a multiple of ``multiple`` and, but for that, at most ``most``."""
    whole = size // multiple
    return multiple * max(d for d in range(1, whole + 1) if whole % d == 0 and (d == 1 or d * multiple <= most))


@functools.partial(jax.jit, static_argnames=("group_size", "grouped_inputs", "block"))
def _run(
    w: Float[Array, "X R C"],
    factors: Float[Array, "X C C"],
    emphasis: Float[Array, "X 3"],
    group_size: int,
    grouped_inputs: bool,
    block: int,
) -> _Codes:
    """Scales are (X, C, G): of each column, one a row if inputs share them (G = R), or one for each
    ``group_size`` neighbouring rows."""
    one = functools.partial(_run_one, group_size=group_size, grouped_inputs=grouped_inputs, block=block)
    return jax.vmap(one)(w, factors, emphasis)


def _run_one(
    w: Float[Array, "R C"],
    factor: Float[Array, "C C"],
    emphasis: Float[Array, " 3"],
    *,
    group_size: int,
    grouped_inputs: bool,
    block: int,
) -> _Codes:
    rows, columns = w.shape
    share = 1 if grouped_inputs else group_size  # rows that share a scale

    def column_step(j, state):
        left, errors, scale, own, out = state  # left, errors: (3, R, block); own: (block, block) of the factor
        t = left[:, :, j]
        if grouped_inputs:
            fresh = lambda: _search(jax.lax.dynamic_slice_in_dim(left, j, group_size, axis=2), emphasis)  # noqa: E731
            scale = jax.lax.cond(j % group_size == 0, fresh, lambda: scale)
        else:
            scale = _search(t.reshape(3, -1, group_size), emphasis)
        s = jnp.repeat(scale, share)
        four = jnp.argmin(jnp.stack(_costs(over(t, s), emphasis)), axis=0)
        error = (t - jnp.asarray(VALUES)[:, four] * s) / own[j, j]
        left = left - error[:, :, None] * jnp.where(jnp.arange(block) > j, own[j], 0.0)
        errors = errors.at[:, :, j].set(error)
        codes = out.four.at[:, j].set(four.astype(jnp.uint8))
        return left, errors, scale, own, _Codes(codes, out.scales.at[j].set(scale))

    def block_step(b, state):
        targets, out = state
        start = b * block
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        factor_rows = cut(factor, axis=0)
        empty = _Codes(cut(out.four, axis=1), cut(out.scales, axis=0))
        left = cut(targets, axis=2)
        begin = (left, jnp.zeros_like(left), jnp.zeros(rows // share), cut(factor_rows, axis=1), empty)
        _, errors, _, _, codes = jax.lax.fori_loop(0, block, column_step, begin)
        later = jnp.where(jnp.arange(columns) >= start + block, factor_rows, 0.0)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start)
        filled = _Codes(put(out.four, codes.four, axis=1), put(out.scales, codes.scales, axis=0))
        return targets - errors @ later, filled

    codes = jnp.zeros((rows, columns), jnp.uint8)
    begin = (jnp.broadcast_to(w, (3, rows, columns)), _Codes(codes, jnp.zeros((columns, rows // share))))
    return jax.lax.fori_loop(0, columns // block, block_step, begin)[1]


def _costs(t: Float[Array, "3 *S"], emphasis: Float[Array, " 3"]) -> list[Float[Array, "*S"]]:
    """Of each of the 16 codes, how far its values at 2, 3 and 4 bits are from the targets, in squared base scales."""
    return [sum(emphasis[k] * (t[k] - value[k]) ** 2 for k in range(3)) for value in VALUES.T]  # type: ignore[misc]


def _search(t: Float[Array, "3 *S g"], emphasis: Float[Array, " 3"]) -> Float[Array, "*S"]:
    """The base scale of each group, in values that bfloat16 has; 0 for a group of zeros."""
    largest = jnp.abs(t[1]).max(axis=-1)

    def error(fraction):
        s = rounded_scale(largest * fraction)
        nearest = functools.reduce(jnp.minimum, _costs(over(t, s[..., None]), emphasis))
        return s**2 * nearest.sum(axis=-1)

    fractions = jnp.asarray(BASE_FRACTIONS)
    best = jnp.argmin(jax.lax.map(error, fractions), axis=0)
    return rounded_scale(largest * fractions[best] * ROOM)


def shrunk(own: Float[np.ndarray, "C C"], weight: float, prior: Float[np.ndarray, "C C"], worth: float) -> np.ndarray:
    """A mean Hessian that leans on ``prior`` (of weight 1) where its own ``weight`` is small.

    ``worth``: the weight that the prior counts for. An expert that calibration never reached gets the prior.
    """
    return (own + worth * prior) / max(weight + worth, 1e-30)
