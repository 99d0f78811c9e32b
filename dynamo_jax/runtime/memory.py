"""What a quantized model takes in memory: on the device while it serves, and in the host's.

On the device lie the base planes, slots for the pages that the baseline reads, spare slots for those of other variants,
and the page tables. Pages on their way are there a second time, a chunk of each level at once. All of that is what a
budget counts. Attention, embeddings, caches, activations and a monitor for each request come beside it.

Axes: L layers, E experts, U*N pages of an expert and level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from dynamo_jax.kernels.layout import LEVELS, PROJECTIONS, WIDTHS, block_bytes
from dynamo_jax.models.config import ExpertSizes, ModelConfig
from dynamo_jax.precision.plan import Plan, num_weights
from dynamo_jax.runtime.mesh import Placement
from dynamo_jax.runtime.residency import chunk_pages, largest_shard, levels_of, shards_of
from dynamo_jax.runtime.store import page_counts

SPARE = 0.05  # of the baseline's pages: slots beside theirs, for those of other variants
UNPACKED_WEIGHTS = 2**24  # of experts that are measured at a time
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


def slots(
    plan: Plan, share: float = SPARE, placement: Placement | None = None, plans: Sequence[Plan] = ()
) -> dict[int, int]:
    """All slots of each level: the baseline's and the spare ones. placement: those of one shard, each with as many as
    the largest takes for the baseline, and for ``plans`` where they are given, and its part of the spare ones."""
    shards = shards_of(placement)
    largest = page_counts(plan) if placement is None else largest_shard(placement, [plan, *plans])
    of_shard, spare = plan.page_widths().size // shards, spare_slots(plan, share)
    return {level: min(count + -(-spare[level] // shards), of_shard) for level, count in largest.items()}


def page_bytes(plan: Plan) -> dict[int, int]:
    """Bytes of one page of each level."""
    parts = PROJECTIONS if plan.apart else 1
    each = [block_bytes(w, plan.channel_block, plan.hidden_size, plan.group_size) // parts for w in WIDTHS]
    return dict(zip(LEVELS, (high - low for low, high in itertools.pairwise(each))))


def device_bytes(plan: Plan, share: float = SPARE, placement: Placement | None = None) -> DeviceBytes:
    """What serving ``plan`` as the baseline takes, with spare slots for a ``share`` of its pages. placement: on each of
    several devices, which all have the slots of the one that needs most."""
    pages, shards = page_bytes(plan), shards_of(placement)
    base = plan.stored_bytes() - sum(count * pages[level] for level, count in page_counts(plan).items())
    largest, all_slots = largest_shard(placement, [plan]), slots(plan, share, placement)
    return DeviceBytes(
        plan=base // shards + sum(count * pages[level] for level, count in largest.items()),
        spare=sum((count - largest[level]) * pages[level] for level, count in all_slots.items()),
        staged=sum(chunk_pages(count) * (pages[level] + SLOT_BYTES) for level, count in all_slots.items() if count),
        tables=SLOT_BYTES * 2 * len(levels_of(plan)) * plan.page_widths().size // shards,
    )


def device_bits(plan: Plan, share: float = SPARE) -> float:
    """The same, in bits a weight of the experts."""
    return 8 * device_bytes(plan, share).total / num_weights(plan)


def measured_together(sizes: ExpertSizes) -> int:
    """Experts that are unpacked at a time where a text is measured for adaptation."""
    most = max(1, UNPACKED_WEIGHTS // (PROJECTIONS * sizes.channels * sizes.hidden_size))
    return max(n for n in range(1, sizes.experts + 1) if sizes.experts % n == 0 and n <= most)


def measuring_bytes(config: ModelConfig, layer_planes: int, widths: int) -> int:
    """Device memory that ``adapt.observe_windows`` takes beside the activations of a window: a layer's planes, of so
    many bytes, and some of its experts in float32 at each of so many widths, all but one twice while they are put
    together."""
    weights = PROJECTIONS * config.intermediate_size * config.hidden_size
    return layer_planes + measured_together(config.expert_sizes) * weights * 4 * (2 * widths - 1)
