"""Which pages are on the device: a fixed number of slots, filled from host memory as variants ask for them.

The base planes are always there. Of each refinement level there are as many slots as the budget says, never more, and
all variants share them. A switch to a plan moves only the pages that are missing, into slots that no plan in use reads:

    staged = stage(host, residency, plan, keep=[baseline])     # checked, on their way; the device goes on meanwhile
    residency = commit(residency, staged)                      # written into free slots; the old tables stay valid
    table = table_of(residency, plan)

A page that is damaged, or has no slot, is found in ``stage``, before anything is written: the plans in use keep
theirs. The first chunk of each level travels while the device goes on, the others as those before them are written, so
that few bytes are on the device twice.

Axes: L layers, E experts, U*N pages of an expert and level, Q slots.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamo_jax.kernels.arrangements import ARRANGEMENTS, AnyResident
from dynamo_jax.kernels.layout import LEVELS, BasePlanes, Pages, PageTable
from dynamo_jax.kernels.tiles import TiledPages
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime.store import HostPages, page_counts, pages_of

MOST_TOGETHER = 64  # pages that are written at a time


class Residency(NamedTuple):
    """What is on the device, and for each level the slot of each page (L, E, U*N), -1 for one that is not there."""

    resident: AnyResident
    slots: dict[int, Int[np.ndarray, "L E UN"]]


class Chunk(NamedTuple):
    """Pages of one level on their way to slots; the slot past the last takes what fills the chunk up. In host memory
    until their turn comes."""

    slots: Int[Any, " C"]
    codes: Any
    ratios: Any


class Staged(NamedTuple):
    """Pages on their way, how many, and the slots of all pages once they are there."""

    chunks: dict[int, list[Chunk]]
    pages: int
    slots: dict[int, Int[np.ndarray, "L E UN"]]

    def ready(self) -> bool:
        """Whether the chunks that travel have come."""
        return all(a.is_ready() for a in self._on_device())

    def wait(self) -> None:
        """For the chunks that travel; a transfer that failed fails here."""
        jax.block_until_ready(self._on_device())

    def nbytes(self) -> int:
        """Bytes on the device, those that fill chunks up included."""
        return sum(a.nbytes for a in self._on_device())

    def _on_device(self) -> list[Any]:
        return [a for a in jax.tree.leaves(self.chunks) if isinstance(a, jax.Array)]


def chunk_pages(slots: int) -> int:
    """Pages that are written at a time to a level of so many slots: one program for any number of them, and few pages
    that only fill up."""
    return min(max(1, slots // MOST_TOGETHER), MOST_TOGETHER)


def empty(host: HostPages, slots: dict[int, int]) -> Residency:
    """The base planes, and ``slots[level]`` slots of each level with nothing in them."""
    planes = host.planes
    groups, hidden = planes.scales.shape[-1], 4 * planes.codes[2].shape[-1]
    kind = ARRANGEMENTS[host.arrangement]
    pages: dict[int, Any] = {}
    for level in LEVELS:
        count = slots.get(level, 0)
        if count < 0:
            raise ValueError(f"{count} slots of {level} bits: expected none or more")
        pages[level] = kind.empty(count, host.together, level, hidden, host.channel_block, groups)
    arrays: Any = (planes.codes[2], planes.scales)
    base = jax.tree.map(jnp.asarray, kind.base(BasePlanes(*arrays)))
    nowhere = {level: np.full(sums.shape, -1, np.int32) for level, sums in host.checksums.items()}
    return Residency(kind.resident(base, pages), nowhere)


def residency(host: HostPages, plans: list[Plan], slots: dict[int, int] | None = None) -> Residency:
    """All pages of ``plans`` on the device, in ``slots[level]`` slots of each level, by default as many as it takes."""
    if slots is None:
        union = {level: np.logical_or.reduce([pages_of(p)[level] for p in plans]) for level in LEVELS}
        slots = {level: int(has.sum()) for level, has in union.items()}
    found = empty(host, slots)
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
        capacity = now.resident.pages[level].codes.shape[0]
        free = np.setdiff1d(np.arange(capacity), here[used])
        missing = np.argwhere(want & (here < 0))
        if len(missing) > len(free):
            raise ValueError(
                f"{len(missing)} pages of {level} bits have to come and {len(free)} of {capacity} slots are free"
            )
        taken = free[: len(missing)]
        after = np.where(np.isin(here, taken) & ~used, -1, here)
        after[tuple(missing.T)] = taken
        slots[level], moving[level] = after, (missing, taken)
    chunks = {level: _chunks(host, now, level, *moving[level]) for level in LEVELS}
    return Staged(chunks, sum(len(where) for where, _ in moving.values()), slots)


def _chunks(host: HostPages, now: Residency, level: int, where: np.ndarray, slots: np.ndarray) -> list[Chunk]:
    out: list[Chunk] = []
    if not len(where):
        return out
    capacity = now.resident.pages[level].codes.shape[0]
    size = chunk_pages(capacity)
    own: Any = host.arrays(level, where)
    codes, ratios = own

    def filled(array: np.ndarray, value: int = 0) -> np.ndarray:
        more = [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, more, constant_values=value)

    for start in range(0, len(where), size):
        own = slice(start, start + size)
        put = filled(slots[own].astype(np.int32), capacity)
        out.append(Chunk(put, filled(codes[own]), None if ratios is None else filled(ratios[own])))
    return [jax.device_put(out[0]), *out[1:]]


def commit(now: Residency, staged: Staged) -> Residency:
    """Write the staged pages; ``now``'s own pages are given up to that (donated): use what comes back."""
    pages: Any = dict(now.resident.pages)
    for level, chunks in staged.chunks.items():
        for chunk in chunks:
            pages[level] = jax.block_until_ready(_write(pages[level], jax.device_put(chunk)))
    return Residency(now.resident._replace(pages=pages), staged.slots)


@functools.partial(jax.jit, donate_argnums=0)
def _write(pages: Pages | TiledPages, chunk: Chunk) -> Pages | TiledPages:
    new = type(pages)(chunk.codes, chunk.ratios)
    return jax.tree.map(lambda into, what: into.at[chunk.slots].set(what, mode="drop"), pages, new)


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
            table[level] = jnp.asarray(np.where(want, slots, -1).astype(np.int32))
        elif want.any():
            raise ValueError(f"the plan reads {int(want.sum())} pages of {level} bits, a level left out")
    return table


def levels_of(plan: Plan) -> tuple[int, ...]:
    """The levels that a plan has pages of: what a program for it, and for plans of its kind, must read."""
    return tuple(level for level, count in page_counts(plan).items() if count)
