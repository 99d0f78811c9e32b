"""What a quantized model takes in memory: on the device while it serves, and in the host's.

On the device lie the base planes, slots for the pages that the baseline reads, spare slots for those of other variants,
and the page tables. Pages on their way are there a second time, a chunk of each level at once. All of that is what a
budget counts. Attention, embeddings, caches, activations and a monitor for each request come beside it.

Axes: L layers, E experts, U*N pages of an expert and level.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from dynamo_jax.kernels.layout import LEVELS, PROJECTIONS, WIDTHS, block_bytes
from dynamo_jax.precision.plan import Plan, num_weights
from dynamo_jax.runtime.residency import chunk_pages, levels_of
from dynamo_jax.runtime.store import page_counts

SPARE = 0.05  # of the baseline's pages: slots beside theirs, for those of other variants
SLOT_BYTES = 4  # of a number in a page table, or of a page on its way


class DeviceBytes(NamedTuple):
    """Of all experts. plan: planes that the baseline reads; spare: slots beside them; staged: most that is on its way
    at once; tables: page tables of the baseline and of one variant."""

    plan: int
    spare: int
    staged: int
    tables: int

    @property
    def total(self) -> int:
        return sum(self)


def spare_slots(plan: Plan, share: float = SPARE) -> dict[int, int]:
    """Slots of each level beside those of a baseline: a share of its pages, and no more than there are other pages."""
    of_level = plan.page_widths().size
    return {level: min(math.ceil(share * count), of_level - count) for level, count in page_counts(plan).items()}


def page_bytes(plan: Plan) -> dict[int, int]:
    """Bytes of one page of each level."""
    parts = PROJECTIONS if plan.apart else 1
    each = [block_bytes(w, plan.channel_block, plan.hidden_size, plan.group_size) // parts for w in WIDTHS]
    return dict(zip(LEVELS, (high - low for low, high in itertools.pairwise(each))))


def device_bytes(plan: Plan, share: float = SPARE) -> DeviceBytes:
    """What serving ``plan`` as the baseline takes, with spare slots for a ``share`` of its pages."""
    spare, pages, counts = spare_slots(plan, share), page_bytes(plan), page_counts(plan)
    moving = {level: chunk_pages(counts[level] + count) for level, count in spare.items() if counts[level]}
    return DeviceBytes(
        plan=plan.stored_bytes(),
        spare=sum(count * pages[level] for level, count in spare.items()),
        staged=sum(count * (pages[level] + SLOT_BYTES) for level, count in moving.items()),
        tables=SLOT_BYTES * 2 * len(levels_of(plan)) * plan.page_widths().size,
    )


def device_bits(plan: Plan, share: float = SPARE) -> float:
    """The same, in bits a weight of the experts."""
    return 8 * device_bytes(plan, share).total / num_weights(plan)
