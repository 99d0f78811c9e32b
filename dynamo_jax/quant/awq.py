"""Activation-aware scaling (AWQ, arXiv 2306.00978): large inputs are divided by a scale, their weights multiplied.

Rounding then costs less where it counts. The scale of input c is m_c^a, m_c being the mean size of the input and a the
exponent in 0, 0.05, .. 1 with the least output error. It has to go somewhere: what divides the inputs of gate and up
must be the same for all experts of a layer, since it is folded into the norm before them (and the router's columns are
multiplied by it); what divides the inputs of down is each expert's own, since it is folded into the rows of up. Both
folds are exact, so that the weights returned here, scales divided out again, compute what folded ones do.

Axes: X experts, R outputs, C inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.rtn import round_to_nearest

EXPONENTS = tuple(np.linspace(0, 1, 21).tolist())


class AwqResult(NamedTuple):
    """weights: dequantized, scales divided out again, (X, R, C) float32. scales: (X, C), equal if shared."""

    weights: Float[np.ndarray, "X R C"]
    scales: Float[np.ndarray, "X C"]


def awq(
    w: Float[np.ndarray, "X R C"],
    hessians: Float[np.ndarray, "X C C"],
    magnitudes: Float[np.ndarray, "X C"],
    spec: GridSpec,
    *,
    shared: bool,
) -> AwqResult:
    """Round experts' weights on scaled inputs, groups along the inputs.

    hessians: sums of products of inputs, x x^T, which measure the output error; magnitudes: mean |x| of each
    input, with one row for all experts if ``shared``. An input that is always zero has scale 1. NaN or infinity is an
    error.
    """
    w = np.asarray(w)
    if hessians.shape != (len(w), w.shape[2], w.shape[2]):
        raise ValueError(f"hessians {hessians.shape} do not fit weights {w.shape}")
    if magnitudes.shape != ((1 if shared else len(w)), w.shape[2]):
        raise ValueError(f"magnitudes {magnitudes.shape} do not fit weights {w.shape} with shared={shared}")
    if not np.isfinite(np.asarray(w, np.float32)).all():
        raise ValueError("weights to quantize hold NaN or infinity")
    if not (np.isfinite(hessians).all() and np.isfinite(magnitudes).all()):
        raise ValueError("the inputs' statistics hold NaN or infinity")
    w32, h, m = jnp.asarray(w, jnp.float32), jnp.asarray(hessians, jnp.float32), jnp.asarray(magnitudes, jnp.float32)
    plain = dataclasses.replace(spec, clip=False)  # as in the paper: spans are searched once scales are known
    errors = np.stack([np.asarray(_error(w32, h, _scales(m, jnp.float32(a)), plain)) for a in EXPONENTS])
    if shared:
        errors = np.repeat(errors.sum(axis=1, keepdims=True), len(w), axis=1)
    scales = _scales(m, jnp.asarray(EXPONENTS, jnp.float32)[errors.argmin(axis=0)][:, None])
    return AwqResult(np.asarray(_rounded(w32, scales, spec)), np.asarray(scales))


def _scales(magnitudes: Float[Array, "X C"], exponent: Array) -> Float[Array, "X C"]:
    """Powers of the magnitudes, with a geometric mean of 1 over the inputs that are not always zero."""
    used = magnitudes > 0
    logs = jnp.where(used, jnp.log(jnp.where(used, magnitudes, 1.0)), 0.0)
    logs = jnp.where(used, logs - logs.sum(-1, keepdims=True) / jnp.maximum(used.sum(-1, keepdims=True), 1), 0.0)
    return jnp.exp(exponent * logs)


def _rounded(w: Array, scales: Array, spec: GridSpec) -> Array:
    return round_to_nearest(w * scales[:, None], spec) / scales[:, None]


@functools.partial(jax.jit, static_argnames="spec")
def _error(w: Array, hessians: Array, scales: Array, spec: GridSpec) -> Float[Array, " X"]:
    left = _rounded(w, scales, spec) - w
    return jnp.einsum("xrc,xcd,xrd->x", left, hessians, left)
