"""How the TPU kernel reads planes that are in fast memory: bits of words to nibbles, and scales.

A block whose variant reads fewer planes has zeros in place of the others, which are read at another address (of the
last plane a scale of zero), so that blocks of different widths are read by the same instructions and nothing is masked.

Axes: K groups of hidden with scales of their own.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int4, Int32

from dynamo_jax.kernels.layout import RATIO_UNIT
from dynamo_jax.kernels.tpu_steps import Shape, Steps

HIGH, HALF = -0x33333334, 0x33333333  # of every nibble: bits 2 and 3, bits 0 and 1
ODD, EVEN = -0x55555556, 0x55555555  # bits of a word

Words = Int32[Array, "8 128"]


def no_pages(shape: Shape, planes: Any) -> None:
    """Make the zeros that are read in place of pages."""
    for level in shape.levels:
        if level != 8:
            codes = planes[level][0]
            codes[shape.places] = jnp.zeros(codes.shape[1:], codes.dtype)


def _nibbles(base: Words, rest: Words | None) -> tuple[Words, Words]:
    """Of a tile's first and last 64 rows: the lower half of each nibble of ``base`` and the upper one of ``rest``
    change places, which takes six operations where masks and shifts take eight."""
    if rest is None:
        return (base << 2) & jnp.int32(HIGH), base & jnp.int32(HIGH)
    other = (base ^ (rest >> 2)) & jnp.int32(HALF)
    return rest ^ (other << 2), base ^ other


def _of_tiles(three: Words, four: Words | None) -> tuple[Words, Words]:
    """What ``_nibbles`` wants of two tiles from their 3- and 4-bit planes: these change every second bit."""
    if four is None:
        return (three << 1) & jnp.int32(ODD), three & jnp.int32(ODD)
    other = (three ^ (four >> 1)) & jnp.int32(EVEN)
    return four ^ (other << 1), three ^ other


class StepPlanes:
    """The tiles and scales of a step's blocks, at widths up to ``path``."""

    def __init__(self, shape: Shape, path: int, steps: Steps, number: Any, planes: Any, turn: Any):
        self.shape, self.path, self.planes, self.turn = shape, path, planes, turn
        first = number * shape.blocks
        self.widths = [[steps.reads.widths[(first + k) * 2 + part] for part in (0, 1)] for k in range(shape.blocks)]
        self._rests: dict[tuple[int, int, int], tuple[Words, Words]] = {}

    def offset(self, k: int, projection: int) -> Any:
        """z"""
        width = self.widths[k][projection // 2]
        return 2.0 if self.path == 2 else jnp.where(width == 2, 2.0, jnp.where(width == 3, 1.0, 0.5))

    def _block(self, kind: int, k: int) -> Any:
        """kind: 0 for codes, 1 for scales."""
        return self.planes[2][kind].at[self.turn, k]

    def _page(self, level: int, kind: int, k: int, projection: int) -> Any:
        """kind: 0 for codes, 1 for ratios."""
        shape = self.shape
        place = (self.turn * shape.units + projection // shape.together) * shape.blocks + k
        if level != 8:
            place = jnp.where(self.widths[k][projection // 2] >= level, place, shape.places)
        return self.planes[level][kind].at[place, projection % shape.together]

    def tile(self, k: int, projection: int, tile: int) -> Int4[Array, "128 128"]:
        """n of 128 x 128 weights."""
        rest = None if self.path == 2 else self._rest(k, projection, tile // 2)[tile % 2]
        low, high = _nibbles(self._block(0, k)[projection, tile], rest)
        return jnp.concatenate([pltpu.bitcast(low, jnp.int4), pltpu.bitcast(high, jnp.int4)], axis=0)

    def _rest(self, k: int, projection: int, pair: int) -> tuple[Words, Words]:
        """Of two tiles; they are asked for one soon after the other."""
        at = (k, projection, pair)
        if at not in self._rests:
            four = None if self.path == 3 else self._page(4, 0, k, projection)[pair]
            self._rests[at] = _of_tiles(self._page(3, 0, k, projection)[pair], four)
        return self._rests[at]

    def last_tile(self, k: int, projection: int, tile: int) -> Int4[Array, "128 128"]:
        """n8 of 128 x 128 weights."""
        return pltpu.bitcast(self._page(8, 0, k, projection)[tile], jnp.int4)

    def scales(self, k: int, projection: int) -> Float[Array, "K 128"]:
        return self._block(1, k)[projection].astype(jnp.float32)

    def last_scales(self, k: int, projection: int) -> Float[Array, "K 128"]:
        """Those of the last plane, zero where the block does not read it."""
        ratios = self._page(8, 1, k, projection)[...].astype(jnp.int32).astype(jnp.float32)
        read = jnp.where(self.widths[k][projection // 2] == 8, 4 * RATIO_UNIT, 0.0)
        return self.scales(k, projection) * ratios * read
