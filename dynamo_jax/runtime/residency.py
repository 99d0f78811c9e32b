"""Which pages are on the device: a fixed number of slots, filled from host memory as variants ask for them.

The base planes are always there. Of each refinement level there are as many slots as the budget says, never more, and
all variants share them. A switch to a plan moves only the pages that are missing, into slots that no plan in use reads:

    staged = stage(host, residency, plan, keep=[baseline])     # checked, on their way; the device goes on meanwhile
    residency = commit(residency, staged)                      # written into free slots; the old tables stay valid
    table = table_of(residency, plan)

A page that is damaged, or has no slot, is found in ``stage``, before anything is written: the plans in use keep
theirs. The first chunk of each level travels while the device goes on, the others as those before them are written, so
that few bytes are on the device twice.

On several devices (``mesh.py``) each has slots of its own, of one number, for the pages of its own experts: slots are
counted through on the host, shard after shard, and from zero in a device's page tables.

Axes: L layers, E experts, U*N pages of an expert and level, Q slots, n shards.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from dynamo_jax.kernels.arrangements import ARRANGEMENTS, AnyResident, Arrangement
from dynamo_jax.kernels.layout import LEVELS, PROJECTIONS, BasePlanes, Pages, PageTable, Resident
from dynamo_jax.kernels.tiles import TiledPages
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime.mesh import Placement, as_slice, put, put_by
from dynamo_jax.runtime.store import HostPages, page_counts, pages_of

MOST_TOGETHER = 64  # pages that are written at a time


class Residency(NamedTuple):
    """What is on the device, and for each level the slot of each page (L, E, U*N), -1 for one that is not there.
    placement: of both on several devices."""

    resident: AnyResident
    slots: dict[int, Int[np.ndarray, "L E UN"]]
    placement: Placement | None = None

    def capacity(self, level: int) -> int:
        """Slots of one shard."""
        return self.resident.pages[level].codes.shape[0] // shards_of(self.placement)

    def owners(self, host: HostPages, level: int) -> Int[np.ndarray, "E UN"]:
        """The shard of each page."""
        return owners_of(self.placement, self.slots[level].shape, PROJECTIONS // host.together)


class Chunk(NamedTuple):
    """Pages of one level on their way to slots; the slot past the last takes what fills the chunk up."""

    slots: Int[Array, " C"]
    codes: Any
    ratios: Any


class Waiting(NamedTuple):
    """A chunk in host memory. pages: of the level, all that this process sends; at: which of them each slot takes, any
    where it takes none of them."""

    slots: Int[np.ndarray, " C"]
    at: Int[np.ndarray, " C"]
    pages: Any


class Staged(NamedTuple):
    """Pages on their way, how many, and the slots of all pages once they are there."""

    chunks: dict[int, list[Chunk | Waiting]]
    pages: int
    slots: dict[int, Int[np.ndarray, "L E UN"]]

    def ready(self) -> bool:
        """Whether the chunks that travel have come."""
        return all(a.is_ready() for a in self._on_device())

    def wait(self) -> None:
        """For the chunks that travel; a transfer that failed fails here."""
        jax.block_until_ready(self._on_device())

    def parted(self, now: Residency) -> tuple[Staged, Staged | None]:
        """The first chunk, and the others, whose own first one is sent; none where there is but one. Pages whose slots
        others take are nowhere from the first chunk on."""
        level = next((level for level, chunks in self.chunks.items() if chunks), None)
        if level is None or sum(map(len, self.chunks.values())) == 1:
            return self, None
        first, *others = self.chunks[level]
        if others:
            others[0] = _sent(now.placement, others[0])
        stay = {at: np.where(now.slots[at] == after, after, -1) for at, after in self.slots.items()}
        return Staged({level: [first]}, self.pages, stay), self._replace(chunks={**self.chunks, level: others})

    def nbytes(self) -> int:
        """Bytes on the device, those that fill chunks up included."""
        return sum(a.nbytes for a in self._on_device())

    def _on_device(self) -> list[Any]:
        return [a for a in jax.tree.leaves(self.chunks) if isinstance(a, jax.Array)]


def shards_of(placement: Placement | None) -> int:
    return 1 if placement is None else placement.shards


def owners_of(placement: Placement | None, shape: tuple[int, ...], units: int) -> Int[np.ndarray, "E UN"]:
    """The shard of each page of an expert."""
    return np.zeros(shape[-2:], int) if placement is None else placement.owners(shape, units)


def largest_shard(placement: Placement | None, plans: Sequence[Plan]) -> dict[int, int]:
    """For each level, the most pages of one shard that any of the plans reads."""
    found = {}
    for level, first in pages_of(plans[0]).items():
        has = np.logical_or.reduce([first, *(pages_of(plan)[level] for plan in plans[1:])])
        owners = owners_of(placement, has.shape, PROJECTIONS if plans[0].apart else 1)
        found[level] = int(np.bincount(owners.reshape(-1), has.sum(axis=0).reshape(-1)).max())
    return found


def chunk_pages(slots: int) -> int:
    """Pages that are written at a time to a level of so many slots: one program for any number of them, and few pages
    that only fill up."""
    return min(max(1, slots // MOST_TOGETHER), MOST_TOGETHER)


def empty(host: HostPages, slots: dict[int, int], placement: Placement | None = None) -> Residency:
    """The base planes, and ``slots[level]`` slots of each level, of one shard, with nothing in them."""
    planes = host.planes
    groups, hidden = planes.scales.shape[-1], 4 * planes.codes[2].shape[-1]
    kind = ARRANGEMENTS[host.arrangement]
    pages: dict[int, Any] = {}
    for level in LEVELS:
        count = slots.get(level, 0)
        if count < 0:
            raise ValueError(f"{count} slots of {level} bits: expected none or more")
        pages[level] = _slots(kind, placement, count, host.together, level, hidden, host.channel_block, groups)
    arrays: Any = (planes.codes[2], planes.scales)
    if placement is None:
        base = jax.tree.map(jnp.asarray, kind.base(BasePlanes(*arrays)))
    else:
        base = _base_over(placement, kind, BasePlanes(*arrays), host.channel_block, host.place)
    nowhere = {level: np.full(sums.shape, -1, np.int32) for level, sums in host.checksums.items()}
    return Residency(kind.resident(base, pages), nowhere, placement)


def _base_over(
    placement: Placement, kind: Arrangement, planes: BasePlanes, channel_block: int, place: Int[np.ndarray, " E"]
) -> Any:
    """Base planes on several devices, each device's part arranged by itself. place: as ``HostPages`` has it."""
    layers, _, _, channels, _ = planes.codes.shape
    experts = len(place)
    by_channel = kind.resident is Resident
    step = 1 if by_channel else channel_block

    @functools.cache
    def arranged(first: int, last: int, begin: int, end: int) -> Any:
        own = as_slice(place[first:last])
        return kind.base(BasePlanes(*(a[:, own][:, :, :, begin:end] for a in planes)))

    some = int((place >= 0).argmax())
    one = arranged(some, some + 1, 0, channel_block)
    leaves, tree = jax.tree.flatten(one)
    axis = 3 if by_channel else 2
    specs = jax.tree.leaves(placement.base_specs(one, kind.resident), is_leaf=lambda s: isinstance(s, P))
    out = []
    for number, (leaf, spec) in enumerate(zip(leaves, specs)):
        shape = list(leaf.shape)
        shape[0], shape[1], shape[axis] = layers, experts, channels // step

        def part(index: Any, number: int = number) -> Any:
            first, last, _ = index[1].indices(experts)
            begin, end, _ = index[axis].indices(channels // step)
            return jax.tree.leaves(arranged(first, last, begin * step, end * step))[number]

        out.append(jax.make_array_from_callback(tuple(shape), placement.sharding(spec), part))
    return jax.tree.unflatten(tree, out)


def _slots(kind: Arrangement, placement: Placement | None, count: int, *sizes: Any) -> Any:
    if placement is None:
        return kind.empty(count, *sizes)
    whole = jax.eval_shape(lambda: kind.empty(count * placement.shards, *sizes))
    over = placement.sharding(P(placement.both) if count else P())  # XLA has no parts of an empty array
    make = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), whole), out_shardings=over)
    return make()


def residency(
    host: HostPages, plans: list[Plan], slots: dict[int, int] | None = None, placement: Placement | None = None
) -> Residency:
    """All pages of ``plans`` on the device, in ``slots[level]`` slots of each level (of one shard), by default as many
    as it takes."""
    found = empty(host, largest_shard(placement, plans) if slots is None else slots, placement)
    for index, plan in enumerate(plans):
        found = commit(found, stage(host, found, plan, keep=plans[:index]))
    return found


def stage(host: HostPages, now: Residency, plan: Plan, keep: list[Plan]) -> Staged:
    """Start to bring the pages of ``plan`` that are not on the device, for slots that neither it nor ``keep`` reads.

    ValueError: there are not enough such slots, or a page is damaged in host memory. Nothing has changed then.
    """
    moving: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    slots = {}
    for level in LEVELS:
        want = pages_of(plan)[level]
        here = now.slots[level]
        used = functools.reduce(np.logical_or, (pages_of(p)[level] for p in keep), want) & (here >= 0)
        missing, taken = _places(now, level, now.owners(host, level), want & (here < 0), here[used])
        after = np.where(np.isin(here, taken) & ~used, -1, here)
        after[tuple(missing.T)] = taken
        slots[level], moving[level] = after, (missing, taken)
    chunks = {level: _chunks(host, now, level, *moving[level]) for level in LEVELS}
    return Staged(chunks, sum(len(where) for where, _ in moving.values()), slots)


def _places(
    now: Residency, level: int, owners: np.ndarray, come: np.ndarray, used: np.ndarray
) -> tuple[Int[np.ndarray, "Q 3"], Int[np.ndarray, " Q"]]:
    """The pages that have to ``come``, (L, E, UN), those of one shard after those of another, and a slot for each."""
    capacity, missing, taken = now.capacity(level), [], []
    for shard in range(shards_of(now.placement)):
        own = np.argwhere(come & (owners == shard))
        free = np.setdiff1d(np.arange(shard * capacity, (shard + 1) * capacity), used)
        if len(own) > len(free):
            device = "" if now.placement is None else f" on device {shard + 1} of {now.placement.shards}"
            raise ValueError(
                f"{len(own)} pages of {level} bits have to come and {len(free)} of {capacity} slots are free{device}"
            )
        missing.append(own)
        taken.append(free[: len(own)])
    return np.concatenate(missing), np.concatenate(taken)


def _chunks(host: HostPages, now: Residency, level: int, where: np.ndarray, slots: np.ndarray) -> list[Chunk | Waiting]:
    """Pages in chunks, each with as many places for every shard, whose own are filled up."""
    out: list[Waiting] = []
    if not len(where):
        return []
    capacity, shards = now.capacity(level), shards_of(now.placement)
    size = chunk_pages(capacity)
    here = host.has(where)
    own: Any = host.arrays(level, where[here])
    if not here.any():  # this process's devices take no page, but their part in the chunks
        own = jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), own)
    index = np.where(here, np.cumsum(here) - 1, 0)
    first = np.searchsorted(slots // capacity, np.arange(shards + 1))
    turns = -(-int(np.diff(first).max()) // size)
    for turn in range(turns):
        begin = np.minimum(first[:-1] + turn * size, first[1:])
        at = np.minimum(begin[:, None] + np.arange(size), first[1:, None])  # (shards, size), the end where none is left
        real = at < first[1:, None]
        at = np.where(real, at, 0).reshape(-1)
        to = np.where(real.reshape(-1), slots[at] % capacity, capacity).astype(np.int32)
        out.append(Waiting(to, index[at], own))
    return [_sent(now.placement, out[0]), *out[1:]]


def _sent(placement: Placement | None, chunk: Chunk | Waiting) -> Chunk:
    """On the way, to each device its own part, which is gathered now."""
    if isinstance(chunk, Chunk):
        return chunk
    if placement is None:
        pages = jax.tree.map(lambda a: jax.device_put(a[chunk.at]), tuple(chunk.pages))
        return Chunk(jax.device_put(chunk.slots), *pages)
    over = placement.sharding(P(placement.both))

    def sent(array: np.ndarray) -> Array:
        shape = (len(chunk.at), *array.shape[1:])
        return jax.make_array_from_callback(shape, over, lambda index: array[chunk.at[cast(Any, index)[0]]])

    return Chunk(put(placement, chunk.slots, placement.both), *jax.tree.map(sent, tuple(chunk.pages)))


def commit(now: Residency, staged: Staged) -> Residency:
    """Write the staged pages; ``now``'s own pages are given up to that (donated): use what comes back."""
    pages: Any = dict(now.resident.pages)
    for level, chunks in staged.chunks.items():
        for chunk in chunks:
            pages[level] = jax.block_until_ready(_write(now.placement, pages[level], _sent(now.placement, chunk)))
    return now._replace(resident=now.resident._replace(pages=pages), slots=staged.slots)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write(placement: Placement | None, pages: Pages | TiledPages, chunk: Chunk) -> Pages | TiledPages:
    def written(pages: Any, chunk: Chunk) -> Any:
        new = type(pages)(chunk.codes, chunk.ratios)
        return jax.tree.map(lambda into, what: into.at[chunk.slots].set(what, mode="drop"), pages, new)

    if placement is None:
        return written(pages, chunk)
    own = P(placement.both)
    return jax.shard_map(written, mesh=placement.mesh, in_specs=own, out_specs=own, check_vma=False)(pages, chunk)


def table_of(now: Residency, plan: Plan, levels: tuple[int, ...] = LEVELS, partly: bool = False) -> PageTable:
    """The page table of a plan whose pages are all there; ``levels``: those that its program reads at all, of which
    all that the plan has pages of must be given. partly: pages may be missing; then what they refine is read without
    them, and without what refines them further."""
    table: PageTable = {}
    there: np.ndarray | None = None
    for level, want in pages_of(plan).items():
        slots = now.slots[level]
        if partly:
            there = want & (slots >= 0) if there is None else want & there & (slots >= 0)
            want = there
        if absent := int((want & (slots < 0)).sum()):
            raise ValueError(f"{absent} pages of {level} bits that the plan reads are not on the device")
        if level in levels:
            table[level] = _on_devices(now, level, np.where(want, slots, -1).astype(np.int32), plan.apart)
        elif want.any():
            raise ValueError(f"the plan reads {int(want.sum())} pages of {level} bits, a level left out")
    return table


def _on_devices(now: Residency, level: int, slots: Int[np.ndarray, "L E UN"], apart: bool) -> Array:
    placement = now.placement
    if placement is None:
        return jnp.asarray(slots)
    local = np.where(slots < 0, -1, slots % max(1, now.capacity(level)))
    return put_by(placement, placement.by_shard(local, PROJECTIONS if apart else 1), placement.table_spec)


def levels_of(plan: Plan) -> tuple[int, ...]:
    """The levels that a plan has pages of: what a program for it, and for plans of its kind, must read."""
    return tuple(level for level, count in page_counts(plan).items() if count)
