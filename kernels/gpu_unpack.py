"""Words of planes to weights, as the GPU kernels do it: in plain jax.numpy, which the interpreter on the CPU runs.

``fragments.py`` has the layout of words; ``gpu_registers.py`` has the same as instructions of a thread: shifts, masks
and two bfloat16 numbers at a time. A block whose variant does not read a plane has its bits masked to zero, by
masks that are data, so that blocks of all widths run the same instructions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int, Int32

from dynamo_jax.kernels.fragments import BIT, INNER, ROWS, THREADS, WORDS

BASE_BITS = 0xCCCCCCCC  # of every nibble: bits 2 and 3
MASKS = {3: 0xAAAAAAAA, 4: 0x55555555}  # every second bit: those of a plane in a word that has two for each nibble
NIBBLE_BIT = {2: 2, 3: 1, 4: 0, 8: 0}  # the lowest of a plane in n
PAIR = 0x001E001E  # where a shift leaves the nibbles of two weights
ONE_TWENTY_EIGHT, ONE_TWENTY_EIGHT_BITS = 128, 0x4300  # bfloat16: the last bits of 128 + 2 n are those of n
LAST_TWICE = 1  # 2 z of the last plane


class Reading(NamedTuple):
    """How a block's tiles are read, scalars. masks: of the planes of 3 and 4 bits that the program has; twice: 2 z."""

    masks: dict[int, Int[Array, ""]]
    twice: Int[Array, ""]


def reading(present: dict[int, Array]) -> Reading:
    """Of a block, from whether its variant reads each plane of 3 and 4 bits that the program has."""
    masks = {level: jnp.where(has, jnp.uint32(MASKS[level]), 0) for level, has in present.items() if level in MASKS}
    masks = {level: jax.lax.bitcast_convert_type(mask, jnp.int32) for level, mask in masks.items()}
    twice = jnp.int32(4)
    for level, value in ((3, 2), (4, 1)):
        if level in masks:
            twice = jnp.where(present[level], jnp.int32(value), twice)
    return Reading(masks, twice)


def weights(
    words: dict[int, Int32[Array, ...]], how: Reading, scales: BFloat16[Array, " S"] | None, rows: bool
) -> BFloat16[Array, "64 128"]:
    """A tile: (2 n - 16 + 2 z) times its scales, of each row (64) or, where ``rows`` is False, of the inner dimension
    (128); without scales 128 + 2 n, of which 144 - 2 z is too much. words: a tile of each plane of 2, 3 and 4 bits that
    the program has."""
    nibbles = _by_fragment(words[2], 2) & jnp.uint32(BASE_BITS)
    for level, mask in how.masks.items():
        own = mask.astype(jnp.uint32) & jnp.uint32(~BASE_BITS & 0xFFFFFFFF)
        nibbles = nibbles | (_by_fragment(words[level], level) & own)
    return _tile(nibbles, how.twice, scales, rows)


def last_weights(
    words: Int32[Array, ...], scales: BFloat16[Array, " S"] | None, rows: bool
) -> BFloat16[Array, "64 128"]:
    """A tile's share of the last plane: (2 q8 - 15) times its scales; without them 128 + 2 q8."""
    return _tile(_by_fragment(words, 8), LAST_TWICE, scales, rows)


def _by_fragment(words: Int32[Array, ...], level: int) -> Any:
    """(128 threads, 8 fragments): a plane's bits where the nibble of each fragment wants them, others beside them."""
    once = min(4, WORDS[level])
    own = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(-1, THREADS, once).swapaxes(0, 1)
    own = own.reshape(THREADS, WORDS[level])
    left = [NIBBLE_BIT[level] - bit for bit in BIT[level]]
    return jnp.stack([_shift(own[:, i // len(left)], left[i % len(left)]) for i in range(8)], axis=1)


def _shift(words: Any, left: int) -> Any:
    return words << jnp.uint32(left) if left >= 0 else words >> jnp.uint32(-left)


def _tile(nibbles: Any, twice: Any, scales: Any, rows: bool) -> BFloat16[Array, "64 128"]:
    n = jnp.stack([_shift(nibbles, -4 * p - 16 * e) for p in range(4) for e in range(2)], axis=-1) & jnp.uint32(15)
    parts = n.reshape(4, 8, 4, 8, 2, 2, 2)  # warp, lane / 4, lane mod 4, i, p / 2, p mod 2, e
    tile = 2 * parts.transpose(0, 5, 1, 3, 4, 2, 6).reshape(ROWS, INNER).astype(jnp.float32)
    if scales is None:
        return (tile + ONE_TWENTY_EIGHT).astype(jnp.bfloat16)
    exact = (tile + (ONE_TWENTY_EIGHT - too_much(twice))).astype(jnp.bfloat16)
    return exact * (scales[:, None] if rows else scales[None, :])


def too_much(twice: Any) -> Any:
    """144 - 2 z."""
    return ONE_TWENTY_EIGHT + 16 - twice


def offset_word(twice: Any) -> Any:
    """``too_much`` as two bfloat16 numbers; the last bits of those of 128 to 255 are the numbers' own."""
    half = too_much(twice) - ONE_TWENTY_EIGHT + ONE_TWENTY_EIGHT_BITS
    return half | (half << 16)


def words_shape(level: int) -> tuple[int, ...]:
    """Of a tile's words, in dimensions of at most 256, which is what one copy takes."""
    words = WORDS[level] * THREADS
    return (words // 256, 256) if words > 256 else (words,)
