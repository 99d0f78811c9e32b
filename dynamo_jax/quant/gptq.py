"""GPTQ (arXiv 2210.17323): rounding one input column after the other, with feedback of the error to those to come.

What the rounding of a column did to the outputs is, as the correlations of the inputs predict it, added to the columns
that are still to be rounded. Many experts at once; plain arrays in and out. The nested planes have their own version
of it, ``nested_gptq.py``; this one makes weights for a single width.

Axes: X experts, R outputs, C inputs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from dynamo_jax.quant.grids import Grid, GridSpec, grid_of, on_grid

DAMPING = 0.01  # of the mean diagonal, added to every diagonal entry of a Hessian


class GptqResult(NamedTuple):
    """weights: dequantized, (X, R, C) float32. starved: the experts whose Hessian was the pooled one."""

    weights: Float[np.ndarray, "X R C"]
    starved: tuple[int, ...]


def gptq(
    w: Float[np.ndarray, "X R C"],
    hessians: Float[np.ndarray, "X C C"],
    spec: GridSpec,
    rows: Float[np.ndarray, " X"] | None = None,
    *,
    damping: float = DAMPING,
    act_order: bool = True,
    least_rows: int = 0,
) -> GptqResult:
    """Quantize experts' weights with groups along the inputs, scales of the weights as they were.

    hessians: sums of products of inputs, x x^T. rows: the calibration rows of each expert; one with fewer than
    ``least_rows`` of them, or with a Hessian of zeros, takes the sum of all experts' Hessians instead, and is named
    in the result. act_order: columns with the largest inputs first. NaN or infinity is an error.
    """
    w = np.asarray(w)
    if hessians.shape != (len(w), w.shape[2], w.shape[2]):
        raise ValueError(f"hessians {hessians.shape} do not fit weights {w.shape}")
    if not np.isfinite(np.asarray(w, np.float32)).all():
        raise ValueError("weights to quantize hold NaN or infinity")
    few = np.zeros(len(w), bool) if rows is None else np.asarray(rows) < least_rows
    starved = tuple(x for x in range(len(w)) if few[x] or not np.trace(hessians[x]) > 0)
    pooled = np.asarray(hessians, np.float64).sum(axis=0) if starved else None
    orders, factors = [], []
    for x in range(len(w)):
        h = np.asarray(hessians[x], np.float64) if x not in starved else pooled
        assert h is not None
        order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))
        orders.append(order)
        factors.append(feedback_factor(h[np.ix_(order, order)], damping))
    out = _run(jnp.asarray(w, jnp.float32), jnp.asarray(np.stack(factors)), jnp.asarray(np.stack(orders)), spec)
    return GptqResult(np.asarray(out), starved)


def damped(hessian: Float[np.ndarray, "C C"], damping: float = DAMPING) -> Float[np.ndarray, "C C"]:
    """The Hessian over its mean diagonal, plus ``damping`` on the diagonal, float64; the identity for zeros."""
    h = np.array(hessian, np.float64)
    if not np.isfinite(h).all():
        raise ValueError("the Hessian of the inputs holds NaN or infinity")
    scale = float(np.trace(h)) / len(h)
    if scale <= 0:
        return np.eye(len(h))
    h /= scale  # so that no product over- or underflows
    h[np.diag_indices(len(h))] += damping
    return h


def feedback_factor(hessian: Float[np.ndarray, "C C"], damping: float = DAMPING) -> Float[np.ndarray, "C C"]:
    """The upper triangular U with U^T U = (H + damping)^-1, float32; the identity for a Hessian of zeros."""
    h = damped(hessian, damping)
    # H = A A^T with A upper triangular is the Cholesky factorization in reversed order; then U = A^-1
    # (all by scipy: where numpy has a BLAS of its own, the threads of the two get in each other's way)
    upper = scipy.linalg.cholesky(h[::-1, ::-1], lower=True)[::-1, ::-1]
    return scipy.linalg.solve_triangular(upper, np.eye(len(h)), lower=False).astype(np.float32)


@functools.partial(jax.jit, static_argnames="spec")
def _run(w: Float[Array, "X R C"], factors: Float[Array, "X C C"], orders: Array, spec: GridSpec) -> Array:
    return jax.vmap(functools.partial(_run_one, spec=spec))(w, factors, orders)


def _run_one(w: Float[Array, "R C"], factor: Float[Array, "C C"], order: Array, *, spec: GridSpec) -> Array:
    rows, columns = w.shape
    group = spec.group_of(columns)
    grid = grid_of(w.reshape(rows, -1, group), spec)

    def step(j, state):
        left, out = state  # both in the order in which columns are rounded
        own = Grid(*(a[:, order[j] // group] for a in grid))
        target = left[:, j]
        value = on_grid(target, own, spec.bits)
        error = (target - value) / factor[j, j]
        left = left - error[:, None] * jnp.where(jnp.arange(columns) > j, factor[j], 0.0)
        return left, out.at[:, j].set(value)

    begin = (w[:, order], jnp.zeros((rows, columns)))
    _, out = jax.lax.fori_loop(0, columns, step, begin)
    return out[:, jnp.argsort(order)]
