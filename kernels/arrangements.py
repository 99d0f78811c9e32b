"""How planes lie on the device: as ``layout.py`` has them, for XLA; in tiles, for a TPU; in fragments, for Hopper GPUs.

Whichever it is, pages keep their slots and page tables are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dynamo_jax.kernels import fragments, layout, tiles
from dynamo_jax.kernels.layout import BasePlanes, Pages, Resident

AnyResident = Resident | tiles.TiledResident | fragments.FragmentResident
BLOCK = 128  # channels, and the least group of weights, of what a matrix unit takes


class Arrangement(NamedTuple):
    """resident: the planes on the device, of a base and pages by level. base, pages: of arrays on the host, to host
    arrays; pages take the projection (Q, p) of each of their parts too. empty: slots with nothing in them, of a count,
    projections of a page, level, hidden size, channels of a block and groups."""

    resident: Any
    base: Callable[[BasePlanes], Any]
    pages: Callable[[Pages, int, Any], Any]
    empty: Callable[..., Any]


ARRANGEMENTS = {
    "planes": Arrangement(Resident, lambda base: base, lambda pages, _, __: pages, layout.empty_pages),
    "tiles": Arrangement(
        tiles.TiledResident,
        tiles.tiled_base,
        tiles.tiled_pages,
        lambda count, together, level, hidden, _, groups: tiles.empty_pages(count, together, level, hidden, groups),
    ),
    "fragments": Arrangement(
        fragments.FragmentResident,
        fragments.fragment_base,
        fragments.fragment_pages,
        lambda count, together, level, hidden, *_: fragments.empty_pages(count, together, level, hidden),
    ),
}


def arrangement_for(channels: int, channel_block: int, group_size: int) -> str:
    """Of planes of these sizes on the device that JAX uses."""
    if channels % BLOCK or channel_block != BLOCK or group_size % BLOCK:
        return "planes"
    if jax.default_backend() == "tpu":
        return "tiles"
    hopper = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
    return "fragments" if hopper else "planes"
