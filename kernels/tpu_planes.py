"""How the TPU kernel reads planes that are in fast memory: bits of words to nibbles, and scales.

A block whose variant reads fewer planes has the bits of the others masked away, by masks that are scalars, so that
blocks of different widths are read by the same instructions.

Axes: G groups of 128 hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int4

from dynamo_jax.kernels.layout import RATIO_UNIT
from dynamo_jax.kernels.tpu_steps import Shape, Steps

HIGH, MIDDLE, LOW = -0x33333334, 0x22222222, 0x11111111  # of every nibble: bits 2 and 3, bit 1, bit 0


class Reading(NamedTuple):
    """How a block's tiles are read. three, four: which bits of a nibble its 3- and 4-bit planes give; offset: z; eight:
    1 where the last plane is read."""

    three: Any
    four: Any
    offset: Any
    eight: Any


def _reading(path: int, width: Any) -> Reading:
    if path == 2:
        return Reading(0, 0, 2.0, 0.0)
    bits = lambda least, mask: jnp.where(width >= least, jnp.int32(mask), jnp.int32(0))  # noqa: E731
    offset = jnp.where(width == 2, 2.0, jnp.where(width == 3, 1.0, 0.5))
    return Reading(bits(3, MIDDLE), bits(4, LOW), offset, jnp.where(width == 8, 1.0, 0.0) if path == 8 else 0.0)


def _shifted(words: Array, left: int) -> Array:
    return words if left == 0 else (words << left if left > 0 else words >> -left)


class StepPlanes:
    """The tiles and scales of a step's blocks, at widths up to ``path``."""

    def __init__(self, shape: Shape, path: int, steps: Steps, at: Any, inputs: Any, pages: Any, turn: Any):
        self.shape, self.path, self.inputs, self.pages, self.turn = shape, path, inputs, pages, turn
        self.how = [
            [_reading(path, steps.widths[(at * shape.blocks + k) * 2 + part]) for part in (0, 1)]
            for k in range(shape.blocks)
        ]

    def _block_of(self, name: str, k: int) -> Any:
        refs = self.inputs[name]
        return refs[0].at[k] if len(refs) == 1 else refs[k].at[0]

    def _page(self, level: int, kind: int, k: int, projection: int) -> Any:
        """kind: 0 for codes, 1 for ratios."""
        together = self.shape.together
        place = projection // together * self.shape.blocks + k
        return self.pages[level][kind].at[self.turn, place, projection % together]

    def tile(self, k: int, projection: int, group: int) -> Int4[Array, "128 128"]:
        """n of 128 x 128 weights."""
        base, own = self._block_of("base", k)[projection, group], self.how[k][projection // 2]
        paired = -(-self.shape.groups // 2)
        parts = []
        for part in (0, 1):
            bits = _shifted(base, 2 - 2 * part) & jnp.int32(HIGH)
            index = 2 * (group // paired) + part
            for level, mask, to in ((3, own.three, 1), (4, own.four, 0)):
                if self.path >= level and level in self.shape.levels:
                    words = self._page(level, 0, k, projection)[group % paired]
                    bits = bits | (_shifted(words, to - index) & mask)
            parts.append(pltpu.bitcast(bits, jnp.int4))
        return jnp.concatenate(parts, axis=0)

    def last_tile(self, k: int, projection: int, group: int) -> Int4[Array, "128 128"]:
        """n8 of 128 x 128 weights."""
        return pltpu.bitcast(self._page(8, 0, k, projection)[group], jnp.int4)

    def scales(self, k: int, projection: int) -> Float[Array, "G 128"]:
        return self._block_of("scales", k)[projection].astype(jnp.float32)

    def last_scales(self, k: int, projection: int) -> Float[Array, "G 128"]:
        """Those of the last plane, zero where the block does not read it."""
        ratios = self._page(8, 1, k, projection)[...].astype(jnp.int32).astype(jnp.float32)
        return self.scales(k, projection) * ratios * (4 * RATIO_UNIT * self.how[k][projection // 2].eight)
