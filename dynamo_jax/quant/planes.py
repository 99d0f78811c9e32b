"""Nested quantization: one set of planes that serves 2, 3, 4 and 8 bits.

Each refinement plane codes the residual of the planes before it with a scale of its own. The base
scale decides how well all widths do: a small one suits 2 bits, a large one leaves the finer planes
no clipped tails. It is searched for each group over fractions of the group's largest weight,
minimizing the sum over 2, 3 and 4 bits of the squared error relative to the best that any
candidate reaches at that width. A group of zeros has scale 0 and stays exactly zero at every width.
Arrays in, planes out; no model in sight.

Convention and storage: kernels.layout.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dynamo_jax.kernels.layout import LEVELS, PLANE_BITS, RATIO_UNIT, WIDTHS, ZERO_POINT, scaled
from dynamo_jax.quant.packing import pack

BASE_FRACTIONS = tuple(np.linspace(0.3, 0.7, 17).tolist())  # base scale over the group's largest weight
TAIL_FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # 8-bit plane's scale over the one that reaches all residuals
SEARCHED = (2, 3, 4)  # the widths whose errors choose the base scale
CHUNK_WEIGHTS = 2**22  # quantized at a time: about 0.2 GB of temporary arrays
SMALLEST_SCALE = 1e-32  # below it float32 steps would underflow, and the group is zero


class Planes(NamedTuple):
    """Host arrays of one weight array (..., D): codes by width (packed), base scales, ratios by level."""

    codes: dict[int, np.ndarray]
    scales: np.ndarray
    ratios: dict[int, np.ndarray]


class _Quantized(NamedTuple):
    codes: dict[int, Array]
    scale: Array
    ratios: dict[int, Array]
    errors: dict[int, Array]


def _plane(residual: Array, step: Array, level: int) -> Array:
    top = 2 ** PLANE_BITS[level] - 1
    return jnp.clip(jnp.round(_over(residual, step) + ZERO_POINT[level]), 0, top)


def _ratio(step: Array, base: Array, level: int) -> Array:
    return jnp.clip(jnp.round(_over(step, base * RATIO_UNIT[level])), 1, 255)


def _over(a: Array, scale: Array) -> Array:
    """a / scale; a scale of zero, that of a group of zeros, leaves ``a`` finite."""
    return a / jnp.where(scale == 0, 1.0, scale)


def _quantize_groups(
    w: Float[Array, "*S g"], fraction: Float[Array, ...], levels: tuple[int, ...] = LEVELS
) -> _Quantized:
    """The planes of each group for one candidate of the base scale; errors are sums of squares a group."""
    largest = jnp.abs(w).max(axis=-1, keepdims=True)
    base = (largest * fraction).astype(jnp.bfloat16).astype(jnp.float32)
    base = jnp.where(base < SMALLEST_SCALE, 0.0, base)
    codes = {2: _plane(w, base, 2)}
    value = (codes[2] - ZERO_POINT[2]) * base
    ratios, errors = {}, {2: jnp.sum((w - value) ** 2, axis=-1)}
    for level in levels:
        codes[level], ratios[level], left = refinement(w - value, base, level)
        errors[level], value = jnp.sum(left**2, axis=-1), w - left
    return _Quantized(codes, base, ratios, errors)


def refinement(
    residual: Float[Array, "*S g"], base: Float[Array, "*S 1"], level: int
) -> tuple[Float[Array, "*S g"], Float[Array, "*S 1"], Float[Array, "*S g"]]:
    """One plane of each group: its codes, its ratio to the base scale, and what it leaves of the residual."""
    if level == 8:
        reach = jnp.abs(residual).max(axis=-1, keepdims=True) / ZERO_POINT[8]
        steps = [reach * f for f in TAIL_FRACTIONS]
    else:  # the sign's best step is twice the mean size of the residual
        steps = [2 * jnp.abs(residual).mean(axis=-1, keepdims=True)]
    best: tuple[Array, ...] | None = None
    for step in steps:
        ratio = _ratio(step, base, level)
        step = ratio * RATIO_UNIT[level] * base
        code = _plane(residual, step, level)
        left = residual - (code - ZERO_POINT[level]) * step
        candidate = (jnp.sum(left**2, axis=-1), ratio, code, left)
        best = candidate if best is None else _better(candidate, best)
    assert best is not None
    _, ratio, code, left = best
    return code, ratio, left


def _better(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """Group by group, the candidate with the smaller error (the first entry)."""
    take = a[0] < b[0]
    return tuple(jnp.where(take if x.ndim == take.ndim else take[..., None], x, y) for x, y in zip(a, b))


@jax.jit
def _search(w: Float[Array, "*S g"]) -> _Quantized:
    errors = jax.lax.map(lambda f: _quantize_groups(w, f, SEARCHED[1:]).errors, jnp.asarray(BASE_FRACTIONS))
    relative = sum(errors[b] / jnp.maximum(errors[b].min(axis=0), 1e-30) for b in SEARCHED)
    fraction = jnp.asarray(BASE_FRACTIONS)[jnp.argmin(relative, axis=0)]
    return _quantize_groups(w, fraction[..., None])


def quantize(w: Float[ArrayLike, "*S D"], group_size: int) -> Planes:
    """Planes of ``w`` with groups of ``group_size`` along the last axis; NaN or infinity is an error."""
    w = np.asarray(w)
    size = w.shape[-1]
    if size % group_size or group_size % 8:
        raise ValueError(f"last axis {size} must be a multiple of group_size {group_size}, and that of 8")
    rows = w.reshape(-1, size)
    step = max(1, CHUNK_WEIGHTS // size)
    parts = [_quantize_rows(rows[start : start + step], group_size) for start in range(0, max(1, len(rows)), step)]
    return jax.tree.map(lambda *a: np.concatenate(a).reshape(*w.shape[:-1], -1), *parts)


def _quantize_rows(rows: Float[np.ndarray, "R D"], group_size: int) -> Planes:
    w32 = jnp.asarray(rows, jnp.float32)
    if not bool(jnp.isfinite(w32).all()):
        raise ValueError("weights to quantize hold NaN or infinity")
    found = _search(w32.reshape(len(rows), -1, group_size))
    codes = {b: pack(np.asarray(c, np.uint8).reshape(rows.shape), PLANE_BITS[b]) for b, c in found.codes.items()}
    ratios = {b: np.asarray(r, np.uint8)[..., 0] for b, r in found.ratios.items()}
    return Planes(codes, np.asarray(found.scale.astype(jnp.bfloat16))[..., 0], ratios)


def dequantize(planes: Planes, width: int) -> Float[Array, "*S D"]:
    """The float32 weights that reading ``planes`` up to ``width`` gives."""
    if width not in WIDTHS:
        raise ValueError(f"width {width} is not one of {WIDTHS}")
    base = jnp.asarray(planes.scales).astype(jnp.float32)
    value = scaled(jnp.asarray(planes.codes[2]), base, 2)
    for level in LEVELS:
        if level <= width:
            step = base * jnp.asarray(planes.ratios[level]).astype(jnp.float32) * RATIO_UNIT[level]
            value = value + scaled(jnp.asarray(planes.codes[level]), step, level)
    return value
