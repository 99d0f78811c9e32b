"""Nested quantization: one set of planes that serves 2, 3, 4 and 8 bits.

2, 3 and 4 bits are one grid whose cells nest, so the first bits of the nearest 4-bit value are the nearest 2-bit value.
The last plane codes what the grid leaves, tails included, with a step of its own. The base scale decides how well all
widths do: a small one suits 2 bits, a large one leaves the finer grid no clipped tails. It is searched for each group
over fractions of the group's largest weight, minimizing the sum over the widths that count of the squared error
relative to the best that any candidate reaches at that width: 2, 3 and 4 bits, unless the caller knows which will be
read. Half of the largest weight leaves no clipped tails, and 8 bits are then as good as int8; for 2, 3 and 4 bits a
smaller scale suits better, and 8 bits have 2.3 times that error (normally distributed weights, groups of 64). A group
of zeros has scale 0 and stays exactly zero at every width.
Arrays in, planes out; no model in sight.

Convention and storage: kernels.layout.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from dynamo_jax.kernels.layout import LEVELS, PLANE_BITS, RATIO_UNIT, STEP, WIDTHS, ZERO_POINT, filled, scaled, step_of
from dynamo_jax.quant.packing import pack

BASE_FRACTIONS = tuple(np.linspace(0.3, 0.75, 19).tolist())  # base scale over the group's largest weight
TAIL_FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # 8-bit plane's step over the one that reaches all residuals
CHUNK_WEIGHTS = 2**22  # quantized at a time: about 0.2 GB of temporary arrays
SMALLEST_SCALE = 1e-32  # below it float32 steps would underflow, and the group is zero


def _values() -> np.ndarray:
    codes = np.array(list(itertools.product(range(4), range(2), range(2))), np.float64)
    parts = [(codes[:, i] - ZERO_POINT[b]) * STEP[b] for i, b in enumerate((2, 3, 4))]
    return np.cumsum(parts, axis=0).astype(np.float32)


VALUES = _values()  # (3, 16): the weight at 2, 3 and 4 bits, in base scales, for each of the 16 codes of four bits


class Planes(NamedTuple):
    """Host arrays of one weight array (..., D): codes by width (packed), base scales, ratios of the 8-bit plane, None
    where that plane was left out."""

    codes: dict[int, np.ndarray]
    scales: np.ndarray
    ratios: np.ndarray | None

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that the planes can be read at."""
        return tuple(sorted(self.codes))


def narrowed(planes: Planes, width: int) -> Planes:
    """The planes up to ``width``; what refines them further is left out."""
    codes = {b: a for b, a in planes.codes.items() if b <= width}
    return Planes(codes, planes.scales, planes.ratios if width == WIDTHS[-1] else None)


def planes_of(
    four: UInt8[np.ndarray, "*S D"], eight: UInt8[np.ndarray, "*S D"], scales: ArrayLike, ratios: ArrayLike
) -> Planes:
    """Planes from codes: the 16 values of four bits, first plane in the highest bits, and the last plane's 16."""
    codes = {2: four >> 2, 3: four >> 1 & 1, 4: four & 1, 8: eight}
    packed = {b: pack(c, PLANE_BITS[b]) for b, c in codes.items()}
    return Planes(packed, np.asarray(jnp.asarray(scales).astype(jnp.bfloat16)), np.asarray(ratios, np.uint8))


def values_of(
    four: UInt8[np.ndarray, "*S D"], scales: Float[np.ndarray, "*S G"], width: int
) -> Float[np.ndarray, "*S D"]:
    """The weights at 2, 3 or 4 bits, from the codes of four bits and the base scales."""
    values = VALUES[WIDTHS.index(width)][four]
    return (values.reshape(*scales.shape, -1) * np.asarray(scales)[..., None]).reshape(four.shape)


def over(a: Array, scale: Array) -> Array:
    """a / scale; a scale of zero, that of a group of zeros, leaves ``a`` finite."""
    return a / jnp.where(scale == 0, 1.0, scale)


def rounded_scale(scale: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The scale in values that bfloat16 has, float32; 0 where float32 steps would underflow."""
    scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.where(scale < SMALLEST_SCALE, 0.0, scale)


def _nearest(w: Float[Array, "*S g"], base: Float[Array, "*S 1"]) -> UInt8[Array, "*S g"]:
    return jnp.clip(jnp.floor(over(w, base * STEP[4])) + 8, 0, 15).astype(jnp.uint8)


def refinement(
    residual: Float[Array, "*S g"], base: Float[Array, "*S 1"]
) -> tuple[UInt8[Array, "*S g"], UInt8[Array, "*S 1"]]:
    """The 8-bit plane of each group, its codes and its ratio to the base scale, for what 4 bits leave."""
    reach = jnp.abs(residual).max(axis=-1, keepdims=True) / ZERO_POINT[8]
    best: tuple[Array, ...] | None = None
    for fraction in TAIL_FRACTIONS:
        ratio = jnp.clip(jnp.round(over(reach * fraction, base * RATIO_UNIT)), 1, 255)
        step = ratio * RATIO_UNIT * base
        code = jnp.clip(jnp.round(over(residual, step) + ZERO_POINT[8]), 0, 15)
        left = residual - (code - ZERO_POINT[8]) * step
        candidate = (jnp.sum(left**2, axis=-1), ratio, code)
        best = candidate if best is None else _better(candidate, best)
    assert best is not None
    _, ratio, code = best
    return code.astype(jnp.uint8), ratio.astype(jnp.uint8)


def _better(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """Group by group, the candidate with the smaller error (the first entry)."""
    take = a[0] < b[0]
    return tuple(jnp.where(take if x.ndim == take.ndim else take[..., None], x, y) for x, y in zip(a, b))


@functools.partial(jax.jit, static_argnames="widths")
def _search(w: Float[Array, "*S g"], widths: tuple[int, ...]) -> tuple[Array, Array, Array, Array]:
    """Codes of four bits, codes of the last plane, base scales and ratios of groups."""
    largest = jnp.abs(w).max(axis=-1)

    def codes_at(base: Array) -> tuple[Array, Array, Array]:
        four = _nearest(w, base)
        return four, *refinement(w - jnp.asarray(VALUES[2])[four] * base, base)

    def errors_at(fraction: Array) -> Array:
        base = rounded_scale(largest * fraction)[..., None]
        four = _nearest(w, base)
        values = [jnp.asarray(VALUES[WIDTHS.index(width)])[four] * base for width in widths if width < WIDTHS[-1]]
        if WIDTHS[-1] in widths:
            _, eight, ratio = codes_at(base)
            finest = (eight.astype(jnp.float32) - ZERO_POINT[8]) * ratio * RATIO_UNIT * base
            values.append(jnp.asarray(VALUES[2])[four] * base + finest)
        return jnp.stack([jnp.sum((w - value) ** 2, axis=-1) for value in values])

    fractions = jnp.asarray(BASE_FRACTIONS)
    errors = jax.lax.map(errors_at, fractions)  # (candidates, widths, ..)
    relative = (errors / jnp.maximum(errors.min(axis=0), 1e-30)).sum(axis=1)
    base = rounded_scale(largest * fractions[jnp.argmin(relative, axis=0)])[..., None]
    four, eight, ratios = codes_at(base)
    return four, eight, base[..., 0], ratios[..., 0]


def filled_up(w: Float[np.ndarray, "*S F D"], channel_block: int, group_size: int) -> Float[np.ndarray, "*S F1 D1"]:
    """Experts' weights as whole blocks of channels and whole groups along D: channels of zeros, and along D the last
    group's own weights again, so that its scale is one for them."""
    channels, size = w.shape[-2:]
    more = filled(channels, channel_block) - channels, filled(size, group_size) - size
    if not any(more):
        return w
    begin = (size - 1) // group_size * group_size
    again = begin + np.arange(more[1]) % (size - begin)
    wide = np.concatenate([w, w[..., again]], axis=-1)
    return np.pad(wide, [(0, 0)] * (w.ndim - 2) + [(0, more[0]), (0, 0)])


def quantize(w: Float[ArrayLike, "*S D"], group_size: int, widths: tuple[int, ...] = (2, 3, 4)) -> Planes:
    """Planes of ``w`` with groups of ``group_size`` along the last axis, with the base scales that suit ``widths``.

    All widths can be read, those in ``widths`` best. ValueError: NaN or infinity, sizes that do not fit, no width.
    """
    w = np.asarray(w)
    size = w.shape[-1]
    if not widths or not set(widths) <= set(WIDTHS):
        raise ValueError(f"widths {widths}: expected some of {WIDTHS}")
    if size % group_size or group_size % 8:
        raise ValueError(f"last axis {size} must be a multiple of group_size {group_size}, and that of 8")
    rows = w.reshape(-1, size)
    step = max(1, CHUNK_WEIGHTS // size)
    parts = [
        _quantize_rows(rows[start : start + step], group_size, widths) for start in range(0, max(1, len(rows)), step)
    ]
    return jax.tree.map(lambda *a: np.concatenate(a).reshape(*w.shape[:-1], -1), *parts)


def _quantize_rows(rows: Float[np.ndarray, "R D"], group_size: int, widths: tuple[int, ...]) -> Planes:
    w32 = jnp.asarray(rows, jnp.float32)
    if not bool(jnp.isfinite(w32).all()):
        raise ValueError("weights to quantize hold NaN or infinity")
    four, eight, scales, ratios = _search(w32.reshape(len(rows), -1, group_size), tuple(sorted(set(widths))))
    four, eight = (np.asarray(c).reshape(rows.shape) for c in (four, eight))
    return planes_of(four, eight, scales, ratios)


def dequantize(planes: Planes, width: int) -> Float[Array, "*S D"]:
    """The float32 weights that reading ``planes`` up to ``width`` gives."""
    if width not in planes.codes:
        raise ValueError(f"width {width} is not one of {planes.widths}")
    base = jnp.asarray(planes.scales).astype(jnp.float32)
    value = scaled(jnp.asarray(planes.codes[2]), base, 2)
    for level in LEVELS:
        if level <= width:
            step = step_of(base, level, jnp.asarray(planes.ratios) if level == 8 else None)
            value = value + scaled(jnp.asarray(planes.codes[level]), step, level)
    return value
