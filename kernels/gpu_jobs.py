"""What the two kernels of a Hopper GPU do, one block of threads (a warpgroup) at a time.

Weights are the left operand of the tensor cores: a warpgroup copies a tile's words to shared memory, a few steps ahead,
unpacks them into its registers as bfloat16 and multiplies them by the rows, which are columns there and may be as few
as 16. A page that a variant does not read is not copied. While an item is multiplied, the copies of the next start.

Of few rows no weight is scaled: gate and up multiply 128 + 2 n, whose sums over 128 hidden are scaled after what is too
much in them is taken off, by sums of the rows from outside; for down the rows are multiplied by the scales instead, for
each group of hidden, and what is too much is a product of its own that the tiles of a group share. Of many rows weights
are scaled in registers.

Axes: M rows a tile, T tiles of rows, V variants, L layers, E experts, D hidden, F channels, N blocks of 128, S parts of
the channels, U parts of a block with pages of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dynamo_jax.kernels.fragments import BLOCK, DOWN, INNER, ROWS
from dynamo_jax.kernels.gpu_registers import (
    last_weights_in_registers,
    plane_layout,
    scale_layout,
    weights_in_registers,
)
from dynamo_jax.kernels.gpu_unpack import (
    LAST_TWICE,
    Reading,
    last_weights,
    offset_word,
    reading,
    too_much,
    weights,
)
from dynamo_jax.kernels.layout import RATIO_UNIT

MANY_ROWS = 64


class Shape(NamedTuple):
    """What the kernels are compiled for. levels: those that any variant reads; blocks: of threads; split: S."""

    rows: int  # M
    tiles: int  # T, at most
    hidden: int  # D
    layers: int  # L
    all_blocks: int  # N
    num_experts: int  # E
    levels: tuple[int, ...]
    units: int  # U
    split: int
    blocks: int
    interpret: bool

    @property
    def many(self) -> bool:
        """Whether scaling the weights is less work than scaling sums of them for each row."""
        return self.rows >= MANY_ROWS

    @property
    def down_tiles(self) -> int:
        """Tiles of hidden that one step, and so an item, of the second kernel multiplies."""
        return tiles_of_step(self.rows, self.hidden)

    @property
    def step_tiles(self) -> int:
        """Tiles of each of gate and up that one step of the first kernel multiplies."""
        return self.down_tiles // 2


class Inputs(NamedTuple):
    """References of a kernel to the GPU's memory. work: how many tiles hold rows, and the layer; group: of each tile, a
    variant and an expert; page: of each level, (V * L * E * U * N,) the slot of each part of each block, or -1; sums:
    (T, D / 128, M) of rows over each 128 hidden, None in the second kernel and of many rows; biases: of gate and up,
    None in the second kernel."""

    work: Any
    group: Any
    page: dict[int, Any]
    x: Any
    sums: Any
    codes: Any
    scales: Any
    pools: dict[int, Any]
    ratios: Any
    biases: Any


class Staged(NamedTuple):
    """Shared memory: a ring of steps, of each its rows and the planes of its tiles; few rows of the second kernel, by
    groups of hidden times the scales of each, and for them what is too much in a weight, by 2 z; what is on its way
    out; and for each step of the ring a barrier that waits for its copies."""

    x: Any
    scaled: Any
    less: Any
    codes: Any
    scales: Any
    pages: dict[int, Any]
    ratios: Any
    out: Any
    barrier: Any


def tiles_of_step(rows: int, hidden: int) -> int:
    """Tiles of 64 x 128 that one step of either kernel multiplies."""
    return 2 if rows >= MANY_ROWS or hidden % (2 * INNER) else 4


class Item(NamedTuple):
    """Scalars that all steps of an item share: its tile of rows, and that tile's group; the (first) block; the half of
    the block, or which tiles of hidden; and of each level the pages of each part of the block, where all steps read the
    same."""

    tile: Any
    group: Any
    block: Any
    part: Any
    slots: dict[int, list[Any]]


class Job:
    """What both kernels do with planes. An item is a tile of rows and a part of its expert, ``per_tile`` of them, each
    of ``steps``."""

    per_tile: Any
    steps: Any
    rows_scaled: bool  # whether scales are those of rows of a tile, not of its inner dimension

    def __init__(self, shape: Shape, stages: int, inputs: Inputs, staged: Staged, out: Any) -> None:
        self.shape, self.stages, self.inputs, self.staged, self.out = shape, stages, inputs, staged, out
        self.layer = inputs.work[1]

    def block(self, group: Any, block: Any) -> Any:
        """Which block of all layers."""
        expert = jax.lax.rem(group, self.shape.num_experts)
        return (self.layer * self.shape.num_experts + expert) * self.shape.all_blocks + block

    def slot(self, level: int, group: Any, block: Any, part: int) -> Any:
        """Where the page of a part of a block is, -1 where its variant does not read it."""
        variant, expert = jax.lax.div(group, self.shape.num_experts), jax.lax.rem(group, self.shape.num_experts)
        of_expert = (variant * self.shape.layers + self.layer) * self.shape.num_experts + expert
        unit = part if self.shape.units > 1 else 0
        return self.inputs.page[level][(of_expert * self.shape.units + unit) * self.shape.all_blocks + block]

    def copy(self, source: Any, target: Any, ring: Any) -> None:
        plgpu.copy_gmem_to_smem(source, target, self.staged.barrier.at[ring])

    def copy_pages(self, slots: dict[int, Any], ring: Any, cut: Any, into: Any) -> None:
        """Of each level a page: what ``cut`` takes of it, to ``into`` of the ring's step."""
        for level, slot in slots.items():
            pairs = [(self.inputs.pools[level], self.staged.pages[level], False)]
            if level == 8:
                pairs.append((self.inputs.ratios, self.staged.ratios, True))
            for pool, here, ratios in pairs:

                @pl.when(slot >= 0)
                def _there(slot: Any = slot, pool: Any = pool, here: Any = here, ratios: bool = ratios) -> None:
                    self.copy(cut(pool, slot, ratios), into(here), ring)

                @pl.when(slot < 0)
                def _nothing() -> None:
                    plgpu.barrier_arrive(self.staged.barrier.at[ring])

    def reading(self, slots: dict[int, Any]) -> tuple[Reading, Any]:
        """How tiles are read whose pages are in ``slots``, and whether the last plane is."""
        present = {level: slot >= 0 for level, slot in slots.items()}
        return reading(present), present.get(8)

    def planes(self, last: Any) -> list[bool]:
        """Of each product that a tile takes, whether it is that of the last plane."""
        return [False] if last is None else [False, True]

    def scales(self, at: tuple, layout: Any, last: Any, last_plane: bool) -> Array:
        """Of a tile, bfloat16, zeros for a last plane that is not read."""
        own = self.read(self.staged.scales, at, layout)
        if not last_plane:
            return own
        ratios = self.read(self.staged.ratios, at, layout).astype(jnp.float32)
        return jnp.where(last, own.astype(jnp.float32) * ratios * (4 * RATIO_UNIT), 0.0).astype(jnp.bfloat16)

    def tile(self, at: tuple, how: Reading, last_plane: bool, scales: Array | None) -> Array:
        """The weights of the tile that lies there, as they are multiplied."""
        levels, rows = tuple(how.masks), None if scales is None else self.rows_scaled
        here = {8: self.staged.pages[8]} if last_plane else {2: self.staged.codes, **self.staged.pages}
        words = {
            level: self.read(ref, at, plane_layout(level)) for level, ref in here.items() if level < 8 or last_plane
        }
        if self.shape.interpret:
            if last_plane:
                return last_weights(words[8], scales, self.rows_scaled)
            return weights(words, how, scales, self.rows_scaled)
        twice = self.twice(how, last_plane)
        scaling = () if scales is None else (offset_word(twice), scales)
        if last_plane:
            return last_weights_in_registers(rows)(words[8], *scaling)
        planes = (words[level] for level in levels)
        return weights_in_registers(levels, rows)(words[2], *planes, *how.masks.values(), *scaling)

    def start(self) -> None:
        """What is done before all items."""

    def twice(self, how: Reading, last_plane: bool) -> Any:
        """2 z."""
        return jnp.int32(LAST_TWICE) if last_plane else how.twice

    def less(self, twice: Any) -> Any:
        """What has to be added to each weight of a tile that has no scales."""
        return -too_much(twice).astype(jnp.float32)

    def laid(self, value: Array) -> Array:
        """As the tensor cores' results lie."""
        return value if self.shape.interpret else plgpu.layout_cast(value, plgpu.Layout.WGMMA)

    def sums(self, count: int, run: Callable[..., Any]) -> Any:
        """What ``run`` returns, a function of accumulators (64, M), and a tuple of what they hold then."""
        size = (ROWS, self.shape.rows)

        def scoped(*totals: Any) -> Any:
            if self.shape.interpret:
                for total in totals:
                    total[...] = jnp.zeros(size, jnp.float32)
            returned = run(*totals)
            return returned, tuple(total[...] for total in totals)

        one = plgpu.SMEM(size, jnp.float32) if self.shape.interpret else plgpu.ACC(size, jnp.float32)
        return pl.run_scoped(scoped, *[one] * count)

    def wait(self, but: int = 0) -> None:
        """For all products, or all but the last."""
        if not self.shape.interpret:
            plgpu.wgmma_wait(but)

    def read(self, here: Any, at: tuple, layout: Any, shared: bool = True) -> Array:
        """shared: whether it is in shared memory, from which reads without conflicts are insisted on."""
        return here[at] if self.shape.interpret else plgpu.load(here, at, layout=layout, optimized=shared)

    def operand(self, here: Any, *at: Any) -> Any:
        """What lies in shared memory, of a product."""
        return here[at] if self.shape.interpret else here.at[at]

    def product(self, total: Any, tile: Any, x: Any) -> None:
        if self.shape.interpret:
            total[...] = total[...] + jnp.dot(tile, x, preferred_element_type=jnp.float32)
        else:
            plgpu.wgmma(total, tile, x)

    def store(self, value: Array, to: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.staged.out[...] = value.astype(self.staged.out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.staged.out, to)


class Inner(Job):
    """Gate, up and activation of half a block of channels, some hidden a step."""

    rows_scaled = True

    @property
    def per_tile(self) -> int:
        return 2 * self.shape.all_blocks

    @property
    def steps(self) -> int:
        return self.shape.hidden // (INNER * self.shape.step_tiles)

    def item(self, number: Any) -> Item:
        tile, rest = jax.lax.div(number, self.per_tile), jax.lax.rem(number, self.per_tile)
        group, block = self.inputs.group[tile], jax.lax.div(rest, 2)
        parts = range(1 if self.shape.units == 1 else 2)
        slots = {level: [self.slot(level, group, block, part) for part in parts] for level in self.shape.levels}
        return Item(tile, group, block, jax.lax.rem(rest, 2), slots)

    def issue(self, item: Item, step: Any, ring: Any) -> None:
        shape, count = self.shape, self.shape.step_tiles
        row = self.block(item.group, item.block)
        tiles = pl.ds(item.part * (shape.hidden // INNER) + step * count, count)
        hidden = pl.ds(step * count * INNER, count * INNER)
        both = pl.ds(0, 2)
        self.copy(self.inputs.x.at[item.tile, :, hidden], self.staged.x.at[ring], ring)
        self.copy(self.inputs.codes.at[row, both, tiles], self.staged.codes.at[ring], ring)
        self.copy(self.inputs.scales.at[row, both, tiles], self.staged.scales.at[ring], ring)
        if shape.units == 1:
            slots = {level: own[0] for level, own in item.slots.items()}
            self.copy_pages(slots, ring, lambda pool, slot, _: pool.at[slot, both, tiles], lambda here: here.at[ring])
            return
        for part in (0, 1):
            self.copy_pages(
                {level: own[part] for level, own in item.slots.items()},
                ring,
                lambda pool, slot, _: pool.at[slot, 0, tiles],
                lambda here, part=part: here.at[ring, part],
            )

    def run(self, item: Item, over_steps: Callable[..., Any], activation: Callable[..., Any], ahead: Item) -> Item:
        how = self.reading({level: own[0] for level, own in item.slots.items()})  # gate and up share a width
        if self.shape.many:

            def all_steps(*totals: Any) -> Any:
                return over_steps(lambda _, ring, carry: self.many_rows(ring, carry, how, totals), (), ahead)[1]

            ahead, found = self.sums(2, all_steps)
        else:
            zeros = self.laid(jnp.zeros((ROWS, self.shape.rows), jnp.float32))
            found, ahead = over_steps(
                lambda k, ring, totals: self.few_rows(item, k, ring, totals, how), (zeros, zeros), ahead
            )
        self.end(item, found, activation)
        return ahead

    def rows_of(self, ring: Any, j: int) -> Any:
        """Some hidden of the rows, (128, M)."""
        hidden = pl.ds(j * INNER, INNER)
        if self.shape.interpret:
            return self.staged.x[ring, :, hidden].T
        return plgpu.transpose_ref(self.staged.x.at[ring, :, hidden], (1, 0))

    def many_rows(self, ring: Any, carry: tuple, how: tuple, totals: tuple) -> tuple:
        reading, last = how
        for j in range(self.shape.step_tiles):
            for plane in self.planes(last):
                for part, total in enumerate(totals):
                    at = (ring, part, j)
                    scales = self.scales(at, scale_layout(True), last, plane)
                    self.product(total, self.tile(at, reading, plane, scales), self.rows_of(ring, j))
        self.wait()
        return carry

    def few_rows(self, item: Item, step: Any, ring: Any, totals: tuple, how: tuple) -> tuple:
        reading, last = how
        for j in range(self.shape.step_tiles):
            at = (item.tile, step * self.shape.step_tiles + j)
            of_rows = self.read(self.inputs.sums, at, scale_layout(False), shared=False)
            for plane in self.planes(last):

                def products(*sums: Any, j: int = j, plane: bool = plane) -> None:
                    x = self.rows_of(ring, j)
                    tiles = [self.tile((ring, part, j), reading, plane, None) for part in (0, 1)]
                    for own, tile in zip(sums, tiles):
                        self.product(own, tile, x)

                _, found = self.sums(2, products)
                less = self.less(self.twice(reading, plane))
                less = jax.lax.broadcast_in_dim(of_rows * less, found[0].shape, (1,))
                scales = [self.scales((ring, part, j), scale_layout(True), last, plane) for part in (0, 1)]
                wide = [jax.lax.broadcast_in_dim(s.astype(jnp.float32), less.shape, (0,)) for s in scales]
                totals = tuple(total + (own + less) * s for total, own, s in zip(totals, found, wide))
        return totals

    def end(self, item: Item, totals: tuple, activation: Callable[[Array, Array], Array]) -> None:
        found = list(totals)
        if self.inputs.biases is not None:
            row = jax.lax.rem(item.group, self.shape.num_experts) * self.shape.all_blocks + item.block
            for part in (0, 1):
                bias = self.read(self.inputs.biases, (row, part, item.part), scale_layout(True), shared=False)
                found[part] = found[part] + jax.lax.broadcast_in_dim(bias, found[part].shape, (0,))
        channels = pl.ds(item.block * BLOCK + item.part * ROWS, ROWS)
        self.store(activation(*found), self.out.at[item.tile, channels])


class Down(Job):
    """Some tiles of hidden, a block of channels a step."""

    rows_scaled = False

    @property
    def per_tile(self) -> int:
        return self.shape.hidden // (ROWS * self.shape.down_tiles) * self.shape.split

    @property
    def steps(self) -> int:
        return self.shape.all_blocks // self.shape.split

    def item(self, number: Any) -> Item:
        tile, rest = jax.lax.div(number, self.per_tile), jax.lax.rem(number, self.per_tile)
        block = jax.lax.rem(rest, self.shape.split) * self.steps
        return Item(tile, self.inputs.group[tile], block, jax.lax.div(rest, self.shape.split), {})

    def slots(self, item: Item, step: Any) -> dict[int, Any]:
        return {level: self.slot(level, item.group, item.block + step, DOWN) for level in self.shape.levels}

    def issue(self, item: Item, step: Any, ring: Any) -> None:
        block, count = item.block + step, self.shape.down_tiles
        row = self.block(item.group, block)
        tiles = pl.ds(item.part * count, count)
        groups = pl.ds(item.part * (count // 2), count // 2)
        channels = pl.ds(block * BLOCK, BLOCK)
        self.copy(self.inputs.x.at[item.tile, channels], self.staged.x.at[ring], ring)
        self.copy(self.inputs.codes.at[row, DOWN, tiles], self.staged.codes.at[ring], ring)
        self.copy(self.inputs.scales.at[row, DOWN, groups], self.staged.scales.at[ring], ring)
        part = DOWN if self.shape.units == 1 else 0
        self.copy_pages(
            self.slots(item, step),
            ring,
            lambda pool, slot, ratios: pool.at[slot, part, groups if ratios else tiles],
            lambda here: here.at[ring],
        )

    def start(self) -> None:
        if self.shape.many:
            return
        for twice in (1, 2, 4):
            value = jnp.broadcast_to(self.less(jnp.int32(twice)), (ROWS, self.shape.rows))
            self.staged.less[twice >> 1] = self.laid(value).astype(jnp.bfloat16)

    def run(self, item: Item, over_steps: Callable[..., Any], activation: Callable[..., Any], ahead: Item) -> Item:
        count = self.shape.down_tiles
        step = self.many_rows if self.shape.many else self.few_rows

        def all_steps(*totals: Any) -> Any:
            return over_steps(lambda k, ring, carry: step(item, k, ring, carry, totals), (), ahead)[1]

        ahead, found = self.sums(count if self.shape.many else count + count // 2, all_steps)
        for index in range(count):
            own = found[index] if self.shape.many else found[index] + found[count + index // 2]
            hidden = pl.ds((item.part * count + index) * ROWS, ROWS)
            split = jax.lax.div(item.block, self.steps)
            self.store(own, self.out.at[item.tile, split, hidden])
        return ahead

    def many_rows(self, item: Item, step: Any, ring: Any, carry: tuple, totals: tuple) -> tuple:
        reading, last = self.reading(self.slots(item, step))
        x = self.operand(self.staged.x, ring)
        for plane in self.planes(last):
            for index, total in enumerate(totals):
                scales = self.scales((ring, index // 2), scale_layout(False), last, plane)
                self.product(total, self.tile((ring, index), reading, plane, scales), x)
        self.wait()
        return carry

    def few_rows(self, item: Item, step: Any, ring: Any, carry: tuple, totals: tuple) -> tuple:
        reading, last = self.reading(self.slots(item, step))
        count = self.shape.down_tiles
        rows = self.read(self.staged.x, (ring,), plgpu.Layout.WGMMA)
        planes = self.planes(last)
        for plane in planes:
            for group in range(count // 2):
                scales = self.scales((ring, group), scale_layout(True), last, plane)
                wide = jax.lax.broadcast_in_dim(scales, rows.shape, (0,))
                self.staged.scaled[plane * (count // 2) + group] = rows * wide
        if not self.shape.interpret:
            plgpu.commit_smem()
        for plane in planes:
            less = self.operand(self.staged.less, self.twice(reading, plane) >> 1)
            for group in range(count // 2):
                where = plane * (count // 2) + group
                for index in (2 * group, 2 * group + 1):
                    x = self.operand(self.staged.scaled, where)
                    self.product(totals[index], self.tile((ring, index), reading, plane, None), x)
                    self.wait(1)  # the registers of more tiles than two are not there
                for start in range(0, INNER, self.shape.rows):
                    x = self.operand(self.staged.scaled, where, pl.ds(start, self.shape.rows))
                    self.product(totals[count + group], less, x)
        self.wait()
        return carry
