"""The planes as Hopper's tensor cores take them: fragments of 64 rows by 16, word by word where a thread needs them.

A warpgroup (128 threads) multiplies 64 rows of weights, which lie in its registers, by activations in shared memory,
which take the columns. Of gate and up the rows are channels and the inner dimension is hidden; of down the rows are
hidden and the inner dimension is channels, so that one program serves both. A tile is 64 rows by 128 of the inner
dimension: 8 fragments, of each 8 weights a thread,

    row 16 (t / 32) + 8 (p mod 2) + (t mod 32) / 4,   inner 16 i + 8 (p / 2) + 2 (t mod 4) + e

of thread t, fragment i, pair p = 0..3 and e = 0, 1. A word holds the nibbles of one fragment, the pair's in bits
4 p .. 4 p + 3 (e = 0) and 16 + 4 p .. (e = 1), so that a shift, a mask and an or make two bfloat16 numbers of it,

    n = 4 q2 + 2 q3 + q4,    w = (2 n - 16 + 2 z) s / 8,    z = 1/2, 1, 2 at 4, 3, 2 bits,

in which planes that are not read are zeros. The last plane has nibbles of its own, w8 = w4 + (2 q8 - 15) s8 / 2.

    plane     words of a thread     nibble's bits of word j
    2 bits    4                     bits 2, 3: fragment 2 j; bits 0, 1: fragment 2 j + 1
    3         2                     bits 3, 1, 2, 0: fragments 4 j, 4 j + 1, 4 j + 2, 4 j + 3
    4         2                     bits 2, 0, 3, 1: fragments 4 j, 4 j + 1, 4 j + 2, 4 j + 3
    8         8                     fragment j; words 4 .. 7 of all threads behind words 0 .. 3

So one shift of both words, or none, puts bits of the 3-bit plane beside those of the 4-bit plane, two for each nibble
as in a word of the base plane.

Pages keep their slots and all is of the same bytes as in ``layout.py``, but that ratios are bfloat16, and that scales
and ratios are repeated where a group is longer than 128.

Axes: L layers, E experts, N blocks of 128 channels, P = 3 projections, D hidden, X = D / 64 tiles of a block and
projection: of gate and up first those of channels 0..63, then of 64..127; Q pages of a level, p projections of a page.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int, Int32, UInt8

from dynamo_jax.kernels.layout import PLANE_BITS, BasePlanes, Pages, by_blocks

ROWS, INNER = 64, 128  # of a tile
THREADS = 128
BLOCK = 128  # channels
DOWN = 2  # the projection whose rows are hidden
WORDS = {2: 4, 3: 2, 4: 2, 8: 8}  # of a thread and tile
BIT = {2: (2, 0), 3: (3, 1, 2, 0), 4: (2, 0, 3, 1), 8: (0,)}  # of a nibble, the lowest of each fragment of a word


class FragmentBase(NamedTuple):
    """Two bits of every weight. scales: an eighth of the base scales; of gate and up half a block after the other, in
    each by groups of 128 hidden, then by channel; of down by groups of 128 hidden, then by channel."""

    codes: Int32[Array, "L E N P X 512"]
    scales: BFloat16[Array, "L E N P D"]


class FragmentPages(NamedTuple):
    """The resident pages of one level; Y = 128 words. ratios: in the order of the scales."""

    codes: Int32[Array, "Q p X Y"]
    ratios: BFloat16[Array, "Q p D"] | None


class FragmentResident(NamedTuple):
    """``layout.Resident`` in fragments; page tables are the same."""

    base: FragmentBase
    pages: dict[int, FragmentPages]

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels and hidden size."""
        scales = self.base.scales
        return scales.shape[2] * BLOCK, scales.shape[4]


def fragment_base(base: BasePlanes) -> FragmentBase:
    """Base planes on the host in fragments, host arrays. ValueError if the channels are not blocks of 128, or groups of
    weights not multiples of 128."""

    def arranged(codes: Any, scales: Any, which: Any) -> FragmentBase:
        own = _scales(scales, 4 * codes.shape[-1], which)
        return FragmentBase(_packed(codes, 2, which), (own.astype(np.float32) / 8).astype(scales.dtype))

    return by_blocks(base, BLOCK, arranged)


def fragment_pages(pages: Pages, level: int, projection: Int[np.ndarray, "Q p"]) -> FragmentPages:
    """Pages on the host in fragments; ``projection``: of each of their parts."""
    codes = np.asarray(pages.codes)
    if codes.shape[2] != BLOCK:
        raise ValueError(f"pages of {level} bits are of {codes.shape[2]} channels: fragments have {BLOCK}")
    size = codes.shape[-1] * 8 // PLANE_BITS[level]
    ratios = None if pages.ratios is None else _scales(np.asarray(pages.ratios), size, projection)
    exact = None if ratios is None else ratios.astype(jnp.bfloat16)
    return FragmentPages(_packed(codes, level, projection), exact)


def empty_pages(count: int, together: int, level: int, hidden_size: int) -> FragmentPages:
    """Slots for pages of ``together`` projections."""
    codes = jnp.zeros((count, together, hidden_size // ROWS, WORDS[level] * THREADS), jnp.int32)
    return FragmentPages(codes, jnp.zeros((count, together, hidden_size), jnp.bfloat16) if level == 8 else None)


def _scales(array: Any, hidden_size: int, projection: Int[np.ndarray, "*S"]) -> Any:
    """(*S, 128, G0) to (*S, D): one value for each group of 128 hidden and each channel."""
    group = hidden_size // array.shape[-1]
    if group % INNER:
        raise ValueError(f"groups of {group} weights: fragments need multiples of {INNER}")
    each = np.repeat(array, group // INNER, axis=-1)  # (*S, channel, G)
    halves = each.reshape(*each.shape[:-2], 2, ROWS, hidden_size // INNER).swapaxes(-1, -2)  # (*S, half, G, channel)
    by_group = np.swapaxes(each, -1, -2)
    flat = (*each.shape[:-2], hidden_size)
    return np.where((projection == DOWN)[..., None], by_group.reshape(flat), halves.reshape(flat))


def _packed(codes: UInt8[np.ndarray, "*S 128 Dp"], level: int, projection: Int[np.ndarray, "*S"]) -> Any:
    """Words of the fragments, (*S, X, 128 words) int32."""
    bits = PLANE_BITS[level]
    q = (codes[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    q = q.reshape(*codes.shape[:-1], codes.shape[-1] * (8 // bits))
    lead, size = q.shape[:-2], q.shape[-1]
    if size % INNER:
        raise ValueError(f"{size} hidden are not tiles of {INNER}")
    inner = np.moveaxis(q.reshape(*lead, 2, ROWS, size // INNER, INNER), -2, -3)  # (*S, half, G, rows, inner)
    down = np.swapaxes(q, -1, -2).reshape(*lead, size // ROWS, ROWS, BLOCK)
    tiles = np.where((projection == DOWN)[..., None, None, None], down, inner.reshape(down.shape))
    # rows: warp, p mod 2, lane / 4; inner: fragment i, p / 2, lane mod 4, e
    parts = tiles.reshape(*down.shape[:-2], 4, 2, 8, 8, 2, 4, 2)
    order = np.moveaxis(parts, (-7, -5, -2, -4, -3, -6, -1), (-7, -6, -5, -4, -3, -2, -1))
    fragments = order.reshape(*down.shape[:-2], THREADS, 8, 4, 2).astype(np.uint32)  # (.., thread, i, p, e)
    shifts = 4 * np.arange(4, dtype=np.uint32)[:, None] + 16 * np.arange(2, dtype=np.uint32)
    nibbles = np.bitwise_or.reduce(np.bitwise_or.reduce(fragments << shifts, axis=-1), axis=-1)  # (.., thread, i)
    bit = np.array(BIT[level], np.uint32)
    words = np.bitwise_or.reduce(nibbles.reshape(*nibbles.shape[:-1], WORDS[level], len(bit)) << bit, axis=-1)
    once = min(4, WORDS[level])  # words that a thread reads at once
    words = np.swapaxes(words.reshape(*down.shape[:-2], THREADS, WORDS[level] // once, once), -3, -2)
    return words.reshape(*down.shape[:-2], THREADS * WORDS[level]).view(np.int32)
