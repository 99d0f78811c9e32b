"""Mixed-precision experts on a TPU: one Pallas kernel from rows to rows, all widths in one pass.

A grid step takes one tile of rows of one expert and some of its channel blocks: gate and up are multiplied, the
activation is applied, and what the blocks' channels add to the outputs is summed in fast memory. The planes come packed
(``tiles.py``); whole words are masked and merged into signed nibbles, which the core itself widens to what its matrix
unit multiplies. A block whose variant reads fewer planes has the bits of the others masked away, so blocks of different
widths share one straight run of instructions; only whether a step reads 3, 4 or 8 bits at all chooses between programs.
Scales are never multiplied into weights: each group of 128 hidden is one matrix product, scaled after it in gate and up,
and before it, in the few rows of hidden channels, in down. A page that is not read has the index of the one before,
and moves no bytes.

Forms: "bf16" activations; "int8" and "fp8" (e4m3) activations with one scale a row, where the chip multiplies those.

Axes: R rows in order, V variants, E experts, N blocks, D hidden, G groups of 128 hidden, M rows a tile, T tiles of rows,
S steps of a tile, B blocks a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.layout import PROJECTIONS, RATIO_UNIT, PageTable
from dynamo_jax.kernels.tiles import TILE, TiledResident

FORMS = {"bf16": (jnp.bfloat16, 0.0), "int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
ROWS = 16  # of a tile, as long as experts have few
HIGH, MIDDLE, LOW = -0x33333334, 0x22222222, 0x11111111  # of every nibble: bits 2 and 3, bit 1, bit 0
MAGIC = 1.5 * 2**23  # a small float32 that is added to it has its nearest whole number in the lowest bits


class Steps(NamedTuple):
    """What each grid step works on. expert, first, rows: of each tile of rows (T,), its expert and how many tiles there
    are (1,); path: (T*S,) the widest plane that a step reads; widths: (T*S*B*2,) of each block, gate and up, then down;
    pages: for each level, (T*S*B*U) the page of each block's part."""

    tiles: Int[Array, " 1"]
    expert: Int[Array, " T"]
    path: Int[Array, " TS"]
    widths: Int[Array, " TSB2"]
    pages: dict[int, Int[Array, " TSBU"]]


class Shape(NamedTuple):
    """What a kernel is compiled for. levels: those that any variant reads; units: parts of a block with pages of their
    own, 1 or 3; together: projections of a page."""

    rows: int  # M
    groups: int  # G
    all_blocks: int  # N
    blocks: int  # B
    levels: tuple[int, ...]
    units: int
    form: str

    @property
    def steps(self) -> int:
        return -(-self.all_blocks // self.blocks)

    @property
    def together(self) -> int:
        return PROJECTIONS // self.units


DOWN_BLOCKS = 2  # that one product with down sums over: the depth of a matrix unit, and the others run meanwhile
STEP_WEIGHTS = 6 * 2**20  # of a grid step at least: what a step costs whatever it does is then a small share of it


def blocks_of_step(groups: int, all_blocks: int) -> int:
    """B: as many as a step should have, and of those the number that divides all of them best."""
    most = max(1, min(all_blocks, round(STEP_WEIGHTS / (PROJECTIONS * TILE * TILE * groups))))
    return min(range(max(1, most - 1), most + 1), key=lambda b: (-(-all_blocks // b) * b, -b))


def quantized_experts_tpu(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " VE"],
    resident: TiledResident,
    tables: tuple[PageTable, ...],
    layer: int,
    activation: Callable[[Array, Array], Array],
    biases: Any = None,
    *,
    form: str = "bf16",
    blocks: int | None = None,
    tile_rows: int = ROWS,
    interpret: Any = False,
) -> Float[Array, "R D"]:
    """Each row through its expert, as ``quantized_experts_xla`` does it; activations in the given form.

    ``blocks``: of a grid step, by rule where None. ``interpret``: for ``pallas_call``.
    """
    num_experts = resident.base.codes.shape[1]
    if group_sizes.shape[0] != num_experts * len(tables):
        raise ValueError(f"{group_sizes.shape[0]} groups are not {len(tables)} variants of {num_experts} experts")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    count, size = rows.shape
    if count == 0:
        return rows
    all_blocks, groups = resident.base.codes.shape[2], resident.base.codes.shape[4]
    levels = tuple(
        level for level, pages in resident.pages.items() if pages.codes.shape[0] and any(level in t for t in tables)
    )
    units = max([PROJECTIONS // resident.pages[level].codes.shape[1] for level in levels], default=1)
    blocks = blocks or blocks_of_step(groups, all_blocks)
    shape = Shape(tile_rows, groups, all_blocks, blocks, levels, units, form)
    place, source, group, used = tile_rows_of(group_sizes, count, tile_rows)
    steps = steps_of(shape, group, used, num_experts, tables, layer)
    filled = jnp.pad(rows, ((0, 1), (0, groups * TILE - size)))[source]  # the last row is empty
    out = _call(shape, steps, filled, resident, layer, activation, biases, interpret)
    return jnp.where((jnp.arange(count) < group_sizes.sum())[:, None], out[place, :size], 0).astype(rows.dtype)


def tile_rows_of(
    group_sizes: Int[Array, " VE"], count: int, tile: int
) -> tuple[Int[Array, " R"], Int[Array, " TM"], Int[Array, " T"], Int[Array, ""]]:
    """Rows in tiles of one group each: where each row lies in them, the row in each of their places (R where there is
    none), the group of each tile, and how many tiles hold rows."""
    each = -(-group_sizes // tile)
    tile_end, row_end = jnp.cumsum(each), jnp.cumsum(group_sizes)
    most = count // tile + min(group_sizes.shape[0], count)
    last = group_sizes.shape[0] - 1
    group = jnp.minimum(jnp.searchsorted(tile_end, jnp.arange(most), side="right"), last)
    first = (row_end - group_sizes)[group] + (jnp.arange(most) - (tile_end - each)[group]) * tile
    row = first[:, None] + jnp.arange(tile)
    real = (row < row_end[group][:, None]) & (jnp.arange(most) < tile_end[-1])[:, None]
    owner = jnp.minimum(jnp.searchsorted(row_end, jnp.arange(count), side="right"), last)
    place = (tile_end - each)[owner] * tile + jnp.arange(count) - (row_end - group_sizes)[owner]
    place = jnp.clip(place, 0, most * tile - 1)
    return place, jnp.where(real, row, count).reshape(-1), group.astype(jnp.int32), tile_end[-1]


def steps_of(
    shape: Shape,
    group: Int[Array, " T"],
    tiles: Int[Array, ""],
    num_experts: int,
    tables: tuple[PageTable, ...],
    layer: int,
) -> Steps:
    """The work of all grid steps, for scalar prefetch."""
    most, units, blocks = group.shape[0], shape.units, shape.blocks
    block = jnp.arange(shape.steps * blocks)
    real = block < shape.all_blocks
    pages = {}
    width = jnp.full((most, shape.steps, blocks, units), 2, jnp.int32)
    for level in shape.levels:
        missing = jnp.full((num_experts, units * shape.all_blocks), -1, jnp.int32)
        each = jnp.concatenate([t[level][layer] if level in t else missing for t in tables])[group]
        own = each.reshape(most, units, shape.all_blocks)[:, :, jnp.minimum(block, shape.all_blocks - 1)]
        own = jnp.where(real, own, -1).reshape(most, units, shape.steps, blocks).transpose(0, 2, 3, 1)
        width = jnp.where(own >= 0, level, width)
        pages[level] = _last_read(own.reshape(most * shape.steps, -1)).reshape(-1)
    of_parts = width[..., jnp.array([0, units - 1])]  # gate and up share a width
    return Steps(
        tiles=tiles.reshape(1).astype(jnp.int32),
        expert=(group % num_experts).astype(jnp.int32),
        path=width.max(axis=(2, 3)).reshape(-1),
        widths=of_parts.reshape(-1),
        pages=pages,
    )


def _last_read(pages: Int[Array, "I X"]) -> Int[Array, "I X"]:
    """Each page, or the last one before it, so that nothing is fetched where nothing is read."""
    at = jnp.where(pages >= 0, jnp.arange(pages.shape[0])[:, None], -1)
    at = jnp.maximum(jax.lax.cummax(at, axis=0), 0)
    return jnp.maximum(jnp.take_along_axis(pages, at, axis=0), 0)


def _call(
    shape: Shape,
    steps: Steps,
    rows: Float[Array, "TM Dp"],
    resident: TiledResident,
    layer: int,
    activation: Callable[[Array, Array], Array],
    biases: Any,
    interpret: Any,
) -> Float[Array, "TM Dp"]:
    size, units, last = shape.groups * TILE, shape.units, shape.all_blocks - 1
    prefetched, tree = jax.tree.flatten(steps)

    def of(scalars: tuple[Any, ...]) -> Steps:
        return jax.tree.unflatten(tree, scalars)

    def by_rows(tile: Any, step: Any, *_: Any) -> tuple[Any, ...]:
        return tile, 0

    def by_block(k: int, lead: tuple[int, ...], rank: int) -> Callable[..., tuple[Any, ...]]:
        def index(tile: Any, step: Any, *scalars: Any) -> tuple[Any, ...]:
            block = jnp.minimum(step * shape.blocks + k, last)
            return (*lead, of(scalars).expert[tile], block, *[0] * rank)

        return index

    def by_page(k: int, level: int, unit: int, rank: int) -> Callable[..., tuple[Any, ...]]:
        def index(tile: Any, step: Any, *scalars: Any) -> tuple[Any, ...]:
            at = ((tile * shape.steps + step) * shape.blocks + k) * units + unit
            return (of(scalars).pages[level][at], *[0] * rank)

        return index

    def spec(array: Array, lead: int, index: Callable[..., tuple[Any, ...]]) -> tuple[Array, pl.BlockSpec]:
        return array, pl.BlockSpec((*[None] * lead, *array.shape[lead:]), index)

    def of_blocks(array: Array) -> list[tuple[Array, pl.BlockSpec]]:
        """The step's blocks in one piece, or where steps do not divide them, each on its own."""
        rank = array.ndim - 3
        if shape.all_blocks % shape.blocks:
            one = (None, None, 1, *array.shape[3:])
            return [(array, pl.BlockSpec(one, by_block(k, (layer,), rank))) for k in range(shape.blocks)]
        all_of = (None, None, shape.blocks, *array.shape[3:])
        index = lambda tile, step, *scalars: (layer, of(scalars).expert[tile], step, *[0] * rank)  # noqa: E731
        return [(array, pl.BlockSpec(all_of, index))]

    inputs: dict[str, Any] = {
        "x": (rows, pl.BlockSpec((shape.rows, size), by_rows)),
        "base": of_blocks(resident.base.codes),
        "scales": of_blocks(resident.base.scales),
        "pages": {},
        "ratios": [],
        "biases": [],
    }
    for level in shape.levels:
        codes, ratios = resident.pages[level]
        parts = [(k, unit) for k in range(shape.blocks) for unit in range(units)]
        inputs["pages"][level] = [spec(codes, 1, by_page(k, level, unit, 4)) for k, unit in parts]
        if ratios is not None:
            inputs["ratios"] = [spec(ratios, 1, by_page(k, level, unit, 3)) for k, unit in parts]
    if biases is not None:
        fill = shape.all_blocks * TILE - biases[0].shape[1]
        inner = jnp.stack([jnp.pad(b.astype(jnp.float32), ((0, 0), (0, fill))) for b in biases[:2]], axis=1)
        inner = jnp.moveaxis(inner.reshape(inner.shape[0], 2, -1, TILE), 2, 1)  # (E, N, 2, 128)
        outer = jnp.pad(biases[2].astype(jnp.float32), ((0, 0), (0, size - biases[2].shape[1])))[:, None]
        inputs["biases"] = [spec(inner, 2, by_block(k, (), 2)) for k in range(shape.blocks)]
        inputs["biases"].append(spec(outer, 1, lambda tile, step, *scalars: (of(scalars).expert[tile], 0, 0)))
    is_pair = lambda leaf: isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[1], pl.BlockSpec)  # noqa: E731
    pairs, inputs_tree = jax.tree.flatten(inputs, is_leaf=is_pair)
    dtype = FORMS[shape.form][0]

    def kernel(*refs: Any) -> None:
        scalars, rest = refs[: len(prefetched)], refs[len(prefetched) :]
        named = jax.tree.unflatten(inputs_tree, rest[: len(pairs)])
        out, *scratch = rest[len(pairs) :]
        _body(shape, of(scalars), named, activation, out, _Scratch(*scratch))

    return pl.pallas_call(
        kernel,
        name=f"experts_{shape.form}",
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], size), rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(steps.tiles[0], shape.steps),
            in_specs=[spec for _, spec in pairs],
            out_specs=pl.BlockSpec((shape.rows, size), by_rows),
            scratch_shapes=[
                pltpu.VMEM((shape.rows, size), dtype),
                pltpu.VMEM((shape.rows, TILE), jnp.float32),
                pltpu.VMEM((shape.rows, 2 * shape.groups), jnp.bfloat16),
                pltpu.VMEM((shape.rows, TILE), jnp.float32),
                pltpu.VMEM((shape.blocks, 2, 2, shape.groups, TILE), jnp.float32),
                pltpu.VMEM((2, -(-shape.blocks // DOWN_BLOCKS), shape.groups, DOWN_BLOCKS * TILE), jnp.float32),
                pltpu.VMEM((shape.rows, size), jnp.float32),
            ],
        ),
        interpret=interpret,
    )(*prefetched, *[array for array, _ in pairs])


class _Scratch(NamedTuple):
    """What lasts over the steps of a tile. x: (M, Dp) its rows as they are multiplied; x_scale: (M, 128) what they were
    divided by, in all lanes; x_sums: (M, 2 G) lane g is the sum of group g, in units of x, lane G + g what bfloat16 left
    of it; h_sums: (M, 128) lane g is what the offsets z of down add to all outputs of group g; scales: of the step's
    gate and up, (B, 2, 2, G, 128), and down_scales of its down, (2, .., G, 128 blocks), those of the last plane behind
    those of the others; rows of them are read from memory, which spreads them over registers at no cost; total: (M, Dp)
    the outputs."""

    x: Any
    x_scale: Any
    x_sums: Any
    h_sums: Any
    scales: Any
    down_scales: Any
    total: Any


def _body(
    shape: Shape,
    steps: Steps,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    out: Any,
    scratch: _Scratch,
) -> None:
    """One grid step."""
    step = pl.program_id(1)
    at = pl.program_id(0) * shape.steps + step

    @pl.when(step == 0)
    def _begin() -> None:
        rows = inputs["x"][...].astype(jnp.float32)
        if shape.form == "bf16":
            own = rows.astype(jnp.bfloat16)
        else:
            largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
            scale = jnp.where(largest > 0, largest, 1.0) * (1 / FORMS[shape.form][1])
            own = _in_form(rows * (1 / scale), shape.form)
            scratch.x_scale[...] = jnp.broadcast_to(scale, scratch.x_scale.shape)
        scratch.x[...] = own
        lane = jax.lax.broadcasted_iota(jnp.int32, (shape.rows, TILE), 1)
        sums = jnp.zeros((shape.rows, TILE), jnp.float32)
        for g in range(shape.groups):
            one = own[:, g * TILE : (g + 1) * TILE].astype(jnp.float32).sum(axis=1, keepdims=True)
            sums = jnp.where(lane == g, one, sums)
        high = sums.astype(jnp.bfloat16)
        low = (sums - high.astype(jnp.float32)).astype(jnp.bfloat16)
        scratch.x_sums[...] = jnp.concatenate([high[:, : shape.groups], low[:, : shape.groups]], axis=1)
        scratch.h_sums[...] = jnp.zeros(scratch.h_sums.shape, jnp.float32)
        scratch.total[...] = jnp.zeros(scratch.total.shape, jnp.float32)

    for width in (2, *shape.levels):

        @pl.when(steps.path[at] == width)
        def _run(width: int = width) -> None:
            _step(shape, width, steps, at, step, inputs, activation, scratch)

    @pl.when(step == shape.steps - 1)
    def _end() -> None:
        sums = scratch.h_sums[...]
        for g in range(shape.groups):
            lanes = slice(g * TILE, (g + 1) * TILE)
            found = scratch.total[:, lanes] + sums[:, g : g + 1]
            if inputs["biases"]:
                found = found + inputs["biases"][-1][:, lanes]
            out[:, lanes] = found.astype(out.dtype)


def _in_form(scaled: Float[Array, "M K"], form: str) -> Array:
    """Numbers within the form's limit as it has them, the nearest ones."""
    if form != "int8":
        return scaled.astype(FORMS[form][0])
    return jax.lax.bitcast_convert_type(scaled + jnp.float32(MAGIC), jnp.int32).astype(jnp.int8)


class _Block(NamedTuple):
    """How a block's tiles are read. three, four: which bits of a nibble its 3- and 4-bit planes give; offset: z; eight:
    1 where the last plane is read."""

    three: Any
    four: Any
    offset: Any
    eight: Any


def _block(path: int, width: Any) -> _Block:
    if path == 2:
        return _Block(0, 0, 2.0, 0.0)
    bits = lambda least, mask: jnp.where(width >= least, jnp.int32(mask), jnp.int32(0))  # noqa: E731
    offset = jnp.where(width == 2, 2.0, jnp.where(width == 3, 1.0, 0.5))
    return _Block(bits(3, MIDDLE), bits(4, LOW), offset, jnp.where(width == 8, 1.0, 0.0) if path == 8 else 0.0)


def _shifted(words: Array, left: int) -> Array:
    return words if left == 0 else (words << left if left > 0 else words >> -left)


def _step(
    shape: Shape,
    path: int,
    steps: Steps,
    at: Any,
    step: Any,
    inputs: dict[str, Any],
    activation: Callable[[Array, Array], Array],
    scratch: _Scratch,
) -> None:
    """The blocks of one step, at widths up to ``path``."""
    blocks, groups, units = range(shape.blocks), shape.groups, shape.units
    paired = -(-groups // 2)
    dtype, limit = FORMS[shape.form]
    sum_dtype = jnp.int32 if shape.form == "int8" else jnp.float32
    how = [[_block(path, steps.widths[(at * shape.blocks + k) * 2 + part]) for part in (0, 1)] for k in blocks]

    def block_of(name: str, k: int) -> Any:
        refs = inputs[name]
        return refs[0].at[k] if len(refs) == 1 else refs[k].at[0]

    def page(refs: list[Any], k: int, projection: int) -> Any:
        return refs[k * units + projection // shape.together], projection % shape.together

    def tile(k: int, projection: int, group: int) -> Array:
        """Four bits of 128 x 128 weights, as they are multiplied."""
        base, own = block_of("base", k)[projection, group], how[k][projection // 2]
        parts = []
        for part in (0, 1):
            bits = _shifted(base, 2 - 2 * part) & jnp.int32(HIGH)
            index = 2 * (group // paired) + part
            for level, mask, to in ((3, own.three, 1), (4, own.four, 0)):
                if path >= level and level in shape.levels:
                    ref, inner = page(inputs["pages"][level], k, projection)
                    bits = bits | (_shifted(ref[inner, group % paired], to - index) & mask)
            parts.append(pltpu.bitcast(bits, jnp.int4))
        return jnp.concatenate(parts, axis=0).astype(dtype)

    def last_tile(k: int, projection: int, group: int) -> Array:
        ref, inner = page(inputs["pages"][8], k, projection)
        return pltpu.bitcast(ref[inner, group], jnp.int4).astype(dtype)

    def scales_of(k: int, projection: int) -> Float[Array, "G 128"]:
        return block_of("scales", k)[projection].astype(jnp.float32)

    def last_scales_of(k: int, projection: int) -> Float[Array, "G 128"]:
        ref, inner = page(inputs["ratios"], k, projection)
        ratios = ref[inner].astype(jnp.int32).astype(jnp.float32)
        return scales_of(k, projection) * ratios * (4 * RATIO_UNIT * how[k][projection // 2].eight)

    def product(lhs: Array, rhs: Array) -> Array:
        return jnp.dot(lhs, rhs, preferred_element_type=sum_dtype).astype(jnp.float32)

    planes = [False, True] if path == 8 else [False]  # whether it is the last plane, which has scales of its own
    parts = [list(blocks[first : first + DOWN_BLOCKS]) for first in range(0, shape.blocks, DOWN_BLOCKS)]
    hidden: dict[int, Float[Array, "M 128"]] = {}
    offsets: list[Float[Array, "M 256"]] = []  # what z adds to gate and up of each block
    largest: dict[tuple[int, bool], Float[Array, "G 1"]] = {}  # scale of down in each part

    def begin() -> None:
        """All that needs no hidden channel: scales to where rows of them are read, and offsets."""
        for k in blocks:
            found = jnp.zeros((shape.rows, 2 * TILE), jnp.float32)
            for plane in planes:
                scales = [(last_scales_of if plane else scales_of)(k, projection) for projection in (0, 1)]
                for projection in (0, 1):
                    scratch.scales[k, int(plane), projection] = scales[projection]
                twice = jnp.concatenate([jnp.concatenate(scales, axis=1)] * 2, axis=0)
                found = found + (0.5 if plane else how[k][0].offset) * _dot(scratch.x_sums[...], twice)
            offsets.append(found)
        for part, own in enumerate(parts):
            for plane in planes:
                every = jnp.concatenate([(last_scales_of if plane else scales_of)(k, 2) for k in own], axis=1)
                if shape.form != "bf16":
                    most = jnp.max(every, axis=1, keepdims=True)
                    every, largest[part, plane] = every / jnp.where(most > 0, most, 1.0), most
                scratch.down_scales[int(plane), part, :, : len(own) * TILE] = every

    def inner(k: int) -> None:
        """Gate and up of block k into ``hidden``."""
        found = offsets[k]
        for plane in planes:
            for g in range(groups):
                lanes = slice(g * TILE, (g + 1) * TILE)
                rhs = jnp.concatenate([(last_tile if plane else tile)(k, p, g) for p in (0, 1)], axis=1)
                row = jnp.concatenate([scratch.scales[k, int(plane), p, g : g + 1] for p in (0, 1)], axis=1)
                found = found + product(scratch.x[:, lanes], rhs) * row
        if shape.form != "bf16":
            found = found * jnp.concatenate([scratch.x_scale[...]] * 2, axis=1)
        if inputs["biases"]:
            bias = inputs["biases"][k]
            found = found + jnp.concatenate([bias[0:1], bias[1:2]], axis=1)
        own = activation(found[:, :TILE], found[:, TILE:])
        hidden[k] = jnp.where(step * shape.blocks + k < shape.all_blocks, own, 0.0)

    def down(part: int, own: list[int]) -> None:
        """What the channels of some blocks add to the outputs."""
        rows, width = jnp.concatenate([hidden[k] for k in own], axis=1), len(own) * TILE
        if shape.form != "bf16":  # |rows * scales| is at most the product of the largest of each
            rows_most = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
            rows = rows * (limit / jnp.where(rows_most > 0, rows_most, 1.0))
            rows_most = rows_most * (1 / limit)
        for plane in planes:
            for g in range(groups):
                lanes = slice(g * TILE, (g + 1) * TILE)
                lhs = rows * scratch.down_scales[int(plane), part, g : g + 1, :width]
                rhs = jnp.concatenate([(last_tile if plane else tile)(k, 2, g) for k in own], axis=0)
                if shape.form == "bf16":
                    scratch.total[:, lanes] += product(lhs.astype(jnp.bfloat16), rhs)
                else:
                    most = rows_most * largest[part, plane][g : g + 1]
                    scratch.total[:, lanes] += product(_in_form(lhs, shape.form), rhs) * most

    def end() -> None:
        """What z adds to the outputs."""
        for plane in planes:
            own = [hidden[k] * (0.5 if plane else how[k][1].offset) for k in blocks]
            scales = [(last_scales_of if plane else scales_of)(k, 2) for k in blocks]
            both = (jnp.concatenate(own, axis=1), jnp.concatenate(scales, axis=1))
            scratch.h_sums[:, :groups] += _dot(*both, transposed=True)

    begin()
    for part in range(len(parts) + 1):  # the matrix unit never waits for hidden channels: others are on the way
        for k in parts[part] if part < len(parts) else []:
            inner(k)
        if part:
            down(part - 1, parts[part - 1])
    end()


def _dot(a: Float[Array, "M K"], b: Float[Array, "K N"], transposed: bool = False) -> Float[Array, "M N"]:
    """One pass in bfloat16, of ``b`` (N, K) where it is transposed."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    operands = (a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    return jax.lax.dot_general(*operands, dims, preferred_element_type=jnp.float32)
