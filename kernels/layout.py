"""The stored form of mixed-precision experts: nested planes, pages and page tables.

A weight is the sum of the planes that are read, each with one convention, w = (q - z) * s:

    2 bits: W2 = (q2 - 1.5) * s             q2 in 0..3,  s bfloat16
    3 bits: W3 = W2 + (q3 - 0.5) * s / 2    q3 in 0..1
    4 bits: W4 = W3 + (q4 - 0.5) * s / 4    q4 in 0..1
    8 bits: W8 = W4 + (q8 - 7.5) * s8       q8 in 0..15, s8 = s * ratio8 / 1020

so 2, 3 and 4 bits are one uniform grid of step s / 4 read to different depths, W4 = (4 q2 + 2 q3 + q4 - 7.5) s / 4,
and the last plane, which has to reach the weights that lie outside of that grid, has a step of its own.
Zero points are the constants above, so nothing is stored for them; ratios are uint8. One scale
serves ``group_size`` neighbouring weights along D. All three projections are channel-major, (F, D):
a channel block is ``channel_block`` rows of gate, up and down together, so its precision touches no
other block. A plan may also give down a precision of its own; then a page holds a block of one projection.
Codes are packed along D, first weight in the lowest bits.

Planes are of whole blocks and groups: F and D here are the next multiples of ``channel_block`` and ``group_size`` where
an expert's own sizes are none. Channels that fill up are zeros at every width; along D whatever the planes hold there
meets inputs of zero, in gate and up, or makes outputs that nobody reads, in down.

The base plane of every block is always there. Refinement planes lie in pages, a page being one plane of one block.
All variants share the pages that are on the device; a variant is a page table, which says which page holds the plane
of (layer, expert, block), -1 where the variant does not read it. A level that a variant has no table for costs it
nothing.

Axes: L layers, E experts, P=3 projections, F channels, N channel blocks an expert, C channels a block, D hidden,
G groups along D, Q pages of a level, p projections of a page (3, or 1), U = P / p of them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, UInt8

WIDTHS = (2, 3, 4, 8)
LEVELS = (3, 4, 8)  # refinement levels, named by the width that they reach
PLANE_BITS = {2: 2, 3: 1, 4: 1, 8: 4}
ZERO_POINT = {2: 1.5, 3: 0.5, 4: 0.5, 8: 7.5}
STEP = {2: 1.0, 3: 0.5, 4: 0.25}  # in base scales
RATIO_UNIT = 1 / 1020  # of the 8-bit plane's step, in base scales
PROJECTIONS = 3  # gate, up, down


class BasePlanes(NamedTuple):
    """Two bits of every expert weight. codes: (L, E, P, F, D/4) uint8; scales: (L, E, P, F, G) bfloat16."""

    codes: UInt8[Array, "L E P F D4"]
    scales: BFloat16[Array, "L E P F G"]


class Pages(NamedTuple):
    """The resident pages of one refinement level, whichever variants read them.

    codes: (Q, p, C, D*bits/8) uint8; ratios: (Q, p, C, G) uint8 at level 8, None at others.
    """

    codes: UInt8[Array, "Q p C Dp"]
    ratios: UInt8[Array, "Q p C G"] | None


class Resident(NamedTuple):
    """The planes on the device: the base of everything, and the pages of each refinement level."""

    base: BasePlanes
    pages: dict[int, Pages]

    @property
    def sizes(self) -> tuple[int, int]:
        """F and D."""
        codes = self.base.codes
        return codes.shape[3], codes.shape[4] * (8 // PLANE_BITS[2])


# A variant: for each refinement level that it reads, (L, E, U*N): which page holds the plane of a block, or -1; with
# p = 1 first the blocks of gate, then those of up and of down. A level that is missing is not in the program at all.
PageTable = dict[int, Int[Array, "L E UN"]]


def filled(size: int, multiple: int) -> int:
    """``size``, or the next multiple."""
    return -(-size // multiple) * multiple


def widened(x: Float[Array | np.ndarray, "*S D"], size: int) -> Any:
    """Rows (.., D) with zeros up to (.., size), for planes that are filled up."""
    more = size - x.shape[-1]
    if more <= 0:
        return x
    pad = jnp.pad if isinstance(x, jax.Array) else np.pad
    return pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])


def num_blocks(channels: int, channel_block: int) -> int:
    """Channel blocks of a projection, the last one filled up."""
    return filled(channels, channel_block) // channel_block


def block_bytes(width: int, channel_block: int, hidden_size: int, group_size: int) -> int:
    """Bytes stored and read for one channel block at ``width``: codes, base scales and, at 8 bits, ratios."""
    weights = PROJECTIONS * channel_block * filled(hidden_size, group_size)
    codes = sum(weights * PLANE_BITS[b] // 8 for b in WIDTHS if b <= width)
    return codes + weights // group_size * (3 if width == 8 else 2)


def by_blocks(base: BasePlanes, channel_block: int, arrange: Callable[[Any, Any, Any], Any]) -> Any:
    """What ``arrange`` makes of base planes on the host, of codes (1, E, N, P, C, D/4), scales (1, E, N, P, C, G) and
    the projection (1, E, N, P) of each: a layer at a time, since what is made on the way is several times as large.
    ValueError if the channels are not blocks of so many."""
    codes, scales = np.asarray(base.codes), np.asarray(base.scales)
    layers, experts, projections, channels, _ = codes.shape
    if channels % channel_block:
        raise ValueError(f"{channels} channels are not blocks of {channel_block}")

    def cut(array: Any) -> Any:
        shape = (1, experts, projections, channels // channel_block, channel_block, array.shape[-1])
        return np.moveaxis(array.reshape(shape), 3, 2)

    which = np.broadcast_to(np.arange(projections), (1, experts, channels // channel_block, projections))
    each = [arrange(cut(codes[layer]), cut(scales[layer]), which) for layer in range(layers)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *each)


def empty_pages(count: int, together: int, level: int, hidden_size: int, channel_block: int, num_groups: int) -> Pages:
    """Slots for pages of ``together`` projections."""
    shape = (count, together, channel_block)
    codes = jnp.zeros((*shape, hidden_size * PLANE_BITS[level] // 8), jnp.uint8)
    return Pages(codes, jnp.zeros((*shape, num_groups), jnp.uint8) if level == 8 else None)


def unpack(codes: UInt8[Array, "*S Dp"], bits: int) -> UInt8[Array, "*S D"]:
    """The codes of ``bits`` bits in each byte, lowest bits first."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    parts = (codes[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return parts.reshape(*codes.shape[:-1], codes.shape[-1] * (8 // bits))


def step_of(
    scales: Float[Array, "*S G"], level: int, ratios: UInt8[Array, "*S G"] | None = None
) -> Float[Array, "*S G"]:
    """The step of one plane, float32; ``ratios`` are those of level 8."""
    scales = scales.astype(jnp.float32)
    return scales * STEP[level] if ratios is None else scales * ratios.astype(jnp.float32) * RATIO_UNIT


def scaled(codes: UInt8[Array, "*S Dp"], scales: Float[Array, "*S G"], level: int) -> Float[Array, "*S D"]:
    """One plane's share of the weights, float32."""
    q = unpack(codes, PLANE_BITS[level]).astype(jnp.float32) - ZERO_POINT[level]
    grouped = q.reshape(*scales.shape, -1) * scales[..., None]
    return grouped.reshape(q.shape)


def dequantize_layer(
    resident: Resident, table: PageTable, layer: int, experts: Int[Array, " R"] | None = None
) -> BFloat16[Array, "P E F D"]:
    """The weights of one layer's experts at a variant's precision, gate, up and down first: the sum of the
    planes in float32, rounded to bfloat16, the operand of a matrix unit. ``experts`` picks some of them, R for E.
    """

    def picked(array: Array) -> Array:
        return array[layer] if experts is None else array[layer][experts]

    base = BasePlanes(*map(picked, resident.base))
    return dequantize_experts(base, resident.pages, {level: picked(rows) for level, rows in table.items()})


def dequantize_experts(
    base: BasePlanes, pages: dict[int, Pages], table: dict[int, Int[Array, "R UN"]]
) -> BFloat16[Array, "P R F D"]:
    """The same for R experts of any layers, given their own base planes (R, P, F, ..) and rows of page tables."""
    scales = base.scales.astype(jnp.float32)
    weights = scaled(base.codes, scales, 2)
    for level in LEVELS:
        if level not in table or pages[level].codes.shape[0] == 0:
            continue
        codes, ratios = pages[level]
        _, together, channels, _ = codes.shape
        own = table[level].reshape(len(weights), PROJECTIONS // together, -1)  # (R, U, N)
        page = jnp.maximum(own, 0)
        step = step_of(scales, level, None if ratios is None else _beside(ratios[page]))
        present = jnp.repeat(jnp.repeat(own >= 0, channels, axis=2), together, axis=1)[..., None]
        weights = weights + jnp.where(present, scaled(_beside(codes[page]), step, level), 0.0)
    return weights.swapaxes(0, 1).astype(jnp.bfloat16)


def _beside(pages: UInt8[Array, "E U N p C last"]) -> UInt8[Array, "E P F last"]:
    """Pages beside their blocks' base planes."""
    experts, units, blocks, together, channels, last = pages.shape
    return pages.swapaxes(2, 3).reshape(experts, units * together, blocks * channels, last)
