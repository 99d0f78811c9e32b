"""The planes as a TPU's matrix unit takes them: tiles of 128 channels by 128 hidden, packed along its rows.

A tile is what one pass of the matrix unit multiplies: of gate and up, hidden (rows) by channels (lanes); of down,
channels (rows) by hidden (lanes). Every plane of it is whole vector registers of 8 x 128 32-bit words, in which the
bits of one weight sit where masks and shifts of whole words leave them in one signed nibble,

    n = 4 q2 + 2 q3 + q4 - 8,    w = (n + z) s / 4,    z = 1/2, 1, 2 at 4, 3, 2 bits,

in which planes that are not read are zeros. A nibble of a word is a row: word s of a lane holds rows 8 s .. 8 s + 7.
The last plane has its own nibbles, n8 = q8 - 8, and its own scale: w8 = w4 + (n8 + 1/2) s8. Pages keep their slots;
all is of the same bytes as in ``layout.py``, but pages where G is odd.

    plane     words of a tile     bits 4 i + j of word s, i = 0..7
    2 bits    8                   row 64 (j / 2) + 8 s + i, bits j = 0, 1 and 2, 3
    3, 4      8 for two tiles     row 64 (j / 2) + 8 s + i, of tile 2 h (j even) and of tile 2 h + 1 (j odd)
    8         16                  row 8 s + i

So where the words of the 3- and 4-bit plane change every second bit, each is a word of one tile like that of its base
plane; and those two change halves to make nibbles (``tpu_planes.py``).

Axes: L layers, E experts, P = 3 projections, F channels, N blocks of 128 channels, D hidden, G = D / 128 tiles of a
block, H = ceil(G / 2), K groups of hidden with scales of their own, Q pages of a level, p projections of a page.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Int32, UInt8

from dynamo_jax.kernels.layout import PLANE_BITS, BasePlanes, Pages, by_blocks

TILE = 128
SUBLANES = 8
DOWN = 2  # the projection whose tiles have channels as rows


class TiledBase(NamedTuple):
    """Two bits of every weight. scales: a quarter of the base scales, lane c that of channel c."""

    codes: Int32[Array, "L E N P G 8 128"]
    scales: BFloat16[Array, "L E N P K 128"]


class TiledPages(NamedTuple):
    """The resident pages of one level. codes: of 3 and 4 bits X = H and Y = 8, of 8 bits X = G and Y = 16."""

    codes: Int32[Array, "Q p X Y 128"]
    ratios: UInt8[Array, "Q p K 128"] | None


class TiledResident(NamedTuple):
    """``layout.Resident`` in tiles; page tables are the same."""

    base: TiledBase
    pages: dict[int, TiledPages]

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels and hidden size."""
        codes = self.base.codes
        return codes.shape[2] * TILE, codes.shape[4] * TILE


def tiled_base(base: BasePlanes) -> TiledBase:
    """Base planes on the host in tiles, host arrays. ValueError if the channels are not blocks of 128, or groups of
    weights not multiples of 128."""

    def arranged(codes: Any, scales: Any, which: Any) -> TiledBase:
        own = _scales(scales, 4 * codes.shape[-1])
        return TiledBase(_packed(codes, 2, which), (own.astype(np.float32) / 4).astype(scales.dtype))

    return by_blocks(base, TILE, arranged)


def tiled_pages(pages: Pages, level: int, projection: Int[np.ndarray, "Q p"]) -> TiledPages:
    """Pages on the host in tiles; ``projection``: of each of their parts."""
    codes = np.asarray(pages.codes)
    if codes.shape[2] != TILE:
        raise ValueError(f"pages of {level} bits are of {codes.shape[2]} channels: tiles have {TILE}")
    size = codes.shape[-1] * 8 // PLANE_BITS[level]
    ratios = None if pages.ratios is None else _scales(np.asarray(pages.ratios), size)
    return TiledPages(_packed(codes, level, projection), ratios)


def empty_pages(count: int, together: int, level: int, hidden_size: int, num_groups: int) -> TiledPages:
    """Slots for pages of ``together`` projections; num_groups: K."""
    tiles = hidden_size // TILE
    words = (tiles, 2 * SUBLANES) if level == 8 else (-(-tiles // 2), SUBLANES)
    ratios = jnp.zeros((count, together, num_groups, TILE), jnp.uint8) if level == 8 else None
    return TiledPages(jnp.zeros((count, together, *words, TILE), jnp.int32), ratios)


def _scales(array: Float[np.ndarray, "*S 128 K"], hidden_size: int) -> Any:
    """(*S, K, 128): channels as lanes."""
    group = hidden_size // array.shape[-1]
    if group % TILE:
        raise ValueError(f"groups of {group} weights: tiles need multiples of {TILE}")
    if array.shape[-1] > TILE:
        raise ValueError(f"{array.shape[-1]} groups of {group} weights: there may be {TILE}")
    return np.ascontiguousarray(np.swapaxes(array, -1, -2))


def _packed(codes: UInt8[np.ndarray, "*S 128 Dp"], level: int, projection: Int[np.ndarray, "*S"]) -> Any:
    """Words of the tiles, (.., X, Y, 128) int32."""
    bits = PLANE_BITS[level]
    q = (codes[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    q = q.reshape(*codes.shape[:-1], codes.shape[-1] * (8 // bits))
    size, lead = q.shape[-1], q.shape[:-2]
    if size % TILE:
        raise ValueError(f"{size} hidden are not tiles of {TILE}")
    count = size // TILE
    by_channel = np.swapaxes(q.reshape(*lead, TILE, count, TILE), -3, -2)  # (.., G, channel, hidden)
    tiles = np.where((projection == DOWN)[..., None, None, None], by_channel, np.swapaxes(by_channel, -1, -2))
    if level == 2:
        tiles = tiles ^ 2  # n is signed
    if level == 8:
        tiles = tiles ^ 8
    else:
        tiles = tiles.reshape(*lead, count, 2, TILE // 2, TILE)  # halves of the rows
    if level in (3, 4):
        tiles = np.pad(tiles, [(0, 0)] * len(lead) + [(0, count % 2)] + [(0, 0)] * 3)
        pairs = tiles.reshape(*lead, -(-count // 2), 2, 2, TILE // 2, TILE)
        tiles = pairs.swapaxes(-3, -4).reshape(*lead, -(-count // 2), 4, TILE // 2, TILE)  # half, then tile
    # (.., parts of a nibble, rows, lanes): rows to words and nibbles, parts to bits
    parts = 1 if level == 8 else tiles.shape[-3]
    words = tiles.reshape(*lead, tiles.shape[len(lead)], parts, tiles.shape[-2] // SUBLANES, SUBLANES, TILE).astype(
        np.uint32
    )
    shifts = 4 * np.arange(SUBLANES)[None, None, :, None] + bits * np.arange(parts)[:, None, None, None]
    return np.bitwise_or.reduce(np.bitwise_or.reduce(words << shifts.astype(np.uint32), axis=-2), axis=-3).view(
        np.int32
    )
