"""How the TPU kernel reads planes that are in fast memory: bits of words to nibbles, and scales.

A block whose variant reads fewer planes has the bits of the others masked away, by masks that are scalars, so that
blocks of different widths are read by the same instructions.

Axes: G groups of 128 hidden.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int4, Int32

from dynamo_jax.kernels.layout import RATIO_UNIT
from dynamo_jax.kernels.tpu_steps import Shape, Steps

HIGH, HALF = -0x33333334, 0x33333333  # of every nibble: bits 2 and 3, bits 0 and 1
ODD, EVEN = -0x55555556, 0x55555555  # bits of a word


class Reading(NamedTuple):
    """How a block's tiles are read. three, four: which bits of a word its 3- and 4-bit planes give; offset: z; eight: 1
    where the last plane is read."""

    three: Any
    four: Any
    offset: Any
    eight: Any


def _reading(path: int, width: Any) -> Reading:
    if path == 2:
        return Reading(0, 0, 2.0, 0.0)
    bits = lambda least, mask: jnp.where(width >= least, jnp.int32(mask), jnp.int32(0))  # noqa: E731
    offset = jnp.where(width == 2, 2.0, jnp.where(width == 3, 1.0, 0.5))
    return Reading(bits(3, ODD), bits(4, EVEN), offset, jnp.where(width == 8, 1.0, 0.0) if path == 8 else 0.0)


def _merged(base: Int32[Array, "8 128"], rest: Int32[Array, "8 128"]) -> tuple[Array, Array]:
    """Nibbles of a tile's first and last 64 rows: the lower half of each nibble of ``base`` and the upper one of
    ``rest`` change places, which takes six operations where masks and shifts take eight."""
    other = (base ^ (rest >> 2)) & jnp.int32(HALF)
    return rest ^ (other << 2), base ^ other


class StepPlanes:
    """The tiles and scales of a step's blocks, at widths up to ``path``."""

    def __init__(self, shape: Shape, path: int, steps: Steps, number: Any, planes: Any, turn: Any):
        self.shape, self.path, self.planes, self.turn = shape, path, planes, turn
        self.how = [
            [_reading(path, steps.widths[(number * shape.blocks + k) * 2 + part]) for part in (0, 1)]
            for k in range(shape.blocks)
        ]

    def _block(self, kind: int, k: int) -> Any:
        """kind: 0 for codes, 1 for scales."""
        return self.planes[2][kind].at[self.turn, k]

    def _page(self, level: int, kind: int, k: int, projection: int) -> Any:
        """kind: 0 for codes, 1 for ratios."""
        together = self.shape.together
        place = projection // together * self.shape.blocks + k
        return self.planes[level][kind].at[self.turn, place, projection % together]

    def tile(self, k: int, projection: int, group: int) -> Int4[Array, "128 128"]:
        """n of 128 x 128 weights."""
        base, own = self._block(0, k)[projection, group], self.how[k][projection // 2]
        levels = [level for level in (3, 4) if self.path >= level and level in self.shape.levels]
        masks = {3: own.three, 4: own.four}
        bits = [self._bits(level, k, projection, group) & masks[level] for level in levels]
        if bits:
            low, high = _merged(base, functools.reduce(jnp.bitwise_or, bits))
        else:
            low, high = (base << 2) & jnp.int32(HIGH), base & jnp.int32(HIGH)
        return jnp.concatenate([pltpu.bitcast(low, jnp.int4), pltpu.bitcast(high, jnp.int4)], axis=0)

    def _bits(self, level: int, k: int, projection: int, group: int) -> Int32[Array, "8 128"]:
        """A plane's bits of a tile where the words of ``_merged`` want them, those of another tile between them."""
        paired = -(-self.shape.groups // 2)
        words = self._page(level, 0, k, projection)[group % paired]
        if group >= paired:
            return words
        return words << 1 if level == 3 else words >> 1

    def last_tile(self, k: int, projection: int, group: int) -> Int4[Array, "128 128"]:
        """n8 of 128 x 128 weights."""
        return pltpu.bitcast(self._page(8, 0, k, projection)[group], jnp.int4)

    def scales(self, k: int, projection: int) -> Float[Array, "G 128"]:
        return self._block(1, k)[projection].astype(jnp.float32)

    def last_scales(self, k: int, projection: int) -> Float[Array, "G 128"]:
        """Those of the last plane, zero where the block does not read it."""
        ratios = self._page(8, 1, k, projection)[...].astype(jnp.int32).astype(jnp.float32)
        return self.scales(k, projection) * ratios * (4 * RATIO_UNIT * self.how[k][projection // 2].eight)
