"""What each step of the TPU kernel works on, as arrays that are there before it runs.

Rows are put in tiles of one expert each, and for each expert and variant it is written down which pages its steps read.
All of it is plain XLA; ``quantized_tpu.py`` has the kernel.

Axes: R rows in order, V variants, E experts, N blocks, G tiles of 128 hidden, K groups of hidden with scales of their
own, M rows a tile, T tiles of rows, S steps of a tile, B blocks a step, U parts of a block with pages of their own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from dynamo_jax.kernels.layout import PROJECTIONS, PageTable
from dynamo_jax.kernels.rows import spans
from dynamo_jax.kernels.tiles import TILE

MOST_ROWS = 256  # of a tile
FEW_ROWS = 96  # the most of a tile that has not many
WIDE_FEW_ROWS = 80  # where a matrix unit is 256 wide: from more rows on scaled weights take less time
LITE_ROWS = 32  # of a tile that has room to spare
ROWS_UNIT = 8  # that the rows of a tile are a multiple of, as many as a vector register has
MANY_ROWS_UNIT = 64  # the same where they are many, so that few programs serve all numbers of rows
STEP_WEIGHTS = 6 * 2**20  # of a grid step: what a step costs whatever it does is then a small share of it


class Fetches(NamedTuple):
    """The pages of one level that each step of each group reads. run: (VE*S*U,) the first slot of each part whose pages
    of all blocks lie in slots one after the other, as they are first put there, else -1. Of the others: single (VE*S,)
    how many there are, and in the first places of a step's (VE*S*B*U,) page, the slot of each, and place, where in the
    step it goes; none of them is of a block that the step before had too."""

    run: Int[Array, " VESU"]
    single: Int[Array, " VES"]
    page: Int[Array, " VESBU"]
    place: Int[Array, " VESBU"]


class Reads(NamedTuple):
    """What the steps of each group, a variant and an expert, read of one layer. path: (VE*S,) the widest plane that one
    reads; widths: (VE*S*B*2,) of each block, gate and up, then down; alone: (VE*S,) how many pages are in no run;
    fetches: by level."""

    path: Int[Array, " VES"]
    widths: Int[Array, " VESB2"]
    alone: Int[Array, " VES"]
    fetches: dict[int, Fetches]


class Tiles(NamedTuple):
    """Tiles of rows of one group each. used: (1,) tiles that hold rows; of each (T,) group, first: its first row, and
    rows: how many it has, 0 past the last tile."""

    used: Int[Array, " 1"]
    group: Int[Array, " T"]
    first: Int[Array, " T"]
    rows: Int[Array, " T"]


class Steps(NamedTuple):
    """What each grid step works on, in the kernel. layer: (1,)"""

    layer: Any
    tiles: Tiles
    reads: Reads


class Shape(NamedTuple):
    """What a kernel is compiled for. levels: those that any variant reads; units: parts of a block with pages of their
    own, 1 or 3; together: projections of a page."""

    rows: int  # M
    tiles: int  # G
    alike: int  # tiles along hidden that share their scales
    all_blocks: int  # N
    blocks: int  # B
    levels: tuple[int, ...]
    units: int
    form: str

    @property
    def steps(self) -> int:
        return -(-self.all_blocks // self.blocks)

    @property
    def skipped(self) -> int:
        """Blocks of a tile's last step that the step before had too and that need no copy: in their places lie others
        of the same expert, from two steps before, and their hidden channels are zeros."""
        return self.steps * self.blocks - self.all_blocks if self.steps > 2 else 0

    @property
    def groups(self) -> int:
        """K"""
        return self.tiles // self.alike

    @property
    def places(self) -> int:
        """Of pages of one level, those of a step and of the next."""
        return 2 * self.blocks * self.units

    def lanes(self, group: int) -> slice:
        """The hidden of a group."""
        return slice(group * self.alike * TILE, (group + 1) * self.alike * TILE)

    @property
    def many(self) -> bool:
        """Whether scaling the weights is less work than scaling sums of them for each row."""
        return self.rows > FEW_ROWS

    @property
    def together(self) -> int:
        return PROJECTIONS // self.units


class Core(NamedTuple):
    """What sizes follow from. unit: rows of weights that a matrix unit multiplies by at once; lite: whether the chip is
    one (v5e, v6e) whose memory is so slow beside its core that mostly copies bind and a few more rows cost little."""

    unit: int
    lite: bool


def core() -> Core:
    """That of the chip that is compiled for; on no TPU v5e's."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return Core(TILE, True)
    return Core(info.mxu_column_size, info.is_lite)


def blocks_of_step(tiles: int, all_blocks: int) -> int:
    """B: about as many as a step should have, between half and one and a half times that, so that the steps have as few
    blocks twice as can be, and pairs of blocks if they can be had."""
    wanted = max(1, round(STEP_WEIGHTS / (PROJECTIONS * TILE * TILE * tiles)))
    some = range(-(-min(all_blocks, wanted) // 2), min(all_blocks, wanted * 3 // 2) + 1)
    return min(some, key=lambda b: (-(-all_blocks // b) * b, b % 2, abs(b - wanted), -b))


def rows_of_tile(count: int, num_experts: int, at: Core) -> int:
    """M: enough for the rows of most experts at one variant, so that their planes are read and unpacked once; of still
    more where rows that are not there cost little. They are many only where a matrix unit is 256 wide: beside a smaller
    one scaling the weights takes longer than all products."""
    mean = count / num_experts
    wanted = mean + 2 * mean**0.5
    if at.lite:
        wanted = max(wanted, min(LITE_ROWS, mean + 3 * mean**0.5))
    if at.unit == TILE:
        wanted = min(wanted, FEW_ROWS)
    elif wanted > WIDE_FEW_ROWS:
        return min(MOST_ROWS, MANY_ROWS_UNIT * math.ceil(wanted / MANY_ROWS_UNIT))
    return max(ROWS_UNIT, ROWS_UNIT * math.ceil(wanted / ROWS_UNIT))


def tiles_of(group_sizes: Int[Array, " VE"], count: int, tile_rows: int) -> Tiles:
    """R = ``count`` rows, in the order of their groups, in tiles of up to ``tile_rows``. What is of a tile's group
    comes by comparing each tile with all groups: a gather of numbers is a loop on a TPU, or is left to another core."""
    (row_begin, row_end), (tile_begin, tile_end), most = spans(group_sizes, count, tile_rows)
    tiles = jnp.arange(most)[:, None]
    own = (tiles >= tile_begin) & (tiles < tile_end)  # (T, VE)
    of_group = lambda values: jnp.where(own, values, 0).sum(axis=1).astype(jnp.int32)  # noqa: E731
    first = row_begin + (tiles - tile_begin) * tile_rows
    rows = jnp.clip(row_end - first, 0, tile_rows)
    used = tile_end[-1:].astype(jnp.int32)
    return Tiles(used, of_group(jnp.arange(group_sizes.shape[0])), of_group(first), of_group(rows))


def reads_of(
    tables: tuple[PageTable, ...], levels: tuple[int, ...], num_experts: int, units: int, all_blocks: int, blocks: int
) -> Reads:
    """Of page tables of one layer, (E, U*N) at each level; its size does not grow with the rows."""
    count, steps = len(tables) * num_experts, -(-all_blocks // blocks)
    wanted = jnp.arange(steps)[:, None] * blocks
    first = jnp.minimum(wanted, all_blocks - blocks)
    block = (first + jnp.arange(blocks)).reshape(-1)
    real = (first + jnp.arange(blocks) >= wanted)[:, None]  # (S, 1, B): not of the step before
    fetches = {}
    width = jnp.full((count, steps, units, blocks), 2, jnp.int32)
    for level in levels:
        missing = jnp.full((num_experts, units * all_blocks), -1, jnp.int32)
        each = jnp.concatenate([table.get(level, missing) for table in tables])
        own = each.reshape(count, units, all_blocks)[:, :, block]
        own = own.reshape(count, units, steps, blocks).transpose(0, 2, 1, 3)
        width = jnp.where((own >= 0) & real, level, width)
        fetches[level] = _fetches(own.reshape(count * steps, units, blocks), jnp.tile(real[:, 0], (count, 1)))
    of_parts = width[:, :, jnp.array([0, units - 1])].swapaxes(2, 3)  # gate and up share a width
    return Reads(
        path=width.max(axis=(2, 3)).reshape(-1),
        widths=of_parts.reshape(-1),
        alone=sum((fetch.single for fetch in fetches.values()), jnp.zeros(count * steps, jnp.int32)),
        fetches=fetches,
    )


def _fetches(pages: Int[Array, "I U B"], real: Bool[Array, "I B"]) -> Fetches:
    """Of the pages of each step, -1 where there is none; ``real``: of which blocks pages that lie alone are read."""
    in_turn = (pages == pages[:, :, :1] + jnp.arange(pages.shape[2])).all(axis=2) & (pages[:, :, 0] >= 0)
    alone = jnp.where(in_turn[:, :, None] | ~real[:, None], -1, pages).reshape(len(pages), -1)
    there = alone >= 0
    turn = jnp.where(there, jnp.cumsum(there, axis=1) - 1, -1)  # of each among those that lie alone
    is_next = turn[:, None] == jnp.arange(alone.shape[1])[:, None]  # (I, which in turn, U*B)
    page, place = (
        jnp.where(is_next, own, 0).sum(axis=2).astype(jnp.int32) for own in (alone[:, None], jnp.arange(alone.shape[1]))
    )
    run = jnp.where(in_turn, pages[:, :, 0], -1).astype(jnp.int32)
    return Fetches(run.reshape(-1), there.sum(axis=1).astype(jnp.int32), page.reshape(-1), place.reshape(-1))


def sizes_of_reads(shape: Shape, groups: int) -> Any:
    """How long each of ``reads_of``'s arrays is: the same tree, of numbers."""
    steps, pages = groups * shape.steps, groups * shape.steps * shape.units
    each: Any = pages, steps, pages * shape.blocks, pages * shape.blocks
    lengths: Any = steps, 2 * steps * shape.blocks, steps, {level: Fetches(*each) for level in shape.levels}
    return Reads(*lengths)


def in_one(parts: Any) -> Int[Array, " X"]:
    """All arrays of a tree one behind the other: each array is an operation of its own to the kernel's host program."""
    return jnp.concatenate([part.reshape(-1).astype(jnp.int32) for part in jax.tree.leaves(parts)])


class Part:
    """One of the arrays that ``in_one`` put together, for use in a kernel."""

    def __init__(self, ref: Any, begin: int):
        self.ref, self.begin = ref, begin

    def __getitem__(self, index: Any) -> Any:
        return self.ref[self.begin + index]


def parts_of(ref: Any, sizes: Any) -> Any:
    """The arrays of ``in_one``, given a tree of their lengths."""
    lengths, tree = jax.tree.flatten(sizes)
    return jax.tree.unflatten(tree, [Part(ref, sum(lengths[:i])) for i in range(len(lengths))])
