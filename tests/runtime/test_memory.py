"""What a budget counts is what the device holds: planes, slots, pages on their way, page tables."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_jax.kernels.layout import LEVELS, WIDTHS
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.memory import device_bits, device_bytes, page_bytes, spare_slots
from dynamo_jax.runtime.store import page_counts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def held(tree) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["quantized", "apart"])
def test_the_state_that_serves_takes_what_the_budget_counted(request, kind, novel):
    """Allocated and added up, with two variants that differ and pages on their way."""
    model = request.getfixturevalue(kind)
    counted = device_bytes(model.plan, model.spare)
    host, state = serving.init(model)
    assert held(state.resident) == counted.plan + counted.spare
    assert set(spare_slots(model.plan, model.spare)) == set(LEVELS)
    room = serving.spare(host, state)
    widths = model.plan.widths.copy()
    order = np.random.default_rng(0).permutation(widths.size)
    for index in order:  # move as many pages as there is room for
        flat = widths.reshape(-1)
        at = WIDTHS.index(flat[index])
        level = LEVELS[at] if at < len(LEVELS) else None
        each = int(np.tile(model.plan.pages(), widths[..., 0].size)[index])
        if (
            level
            and page_counts(model.plan)[level]
            and room[level] >= each
            and at == WIDTHS.index(model.plan.widths.reshape(-1)[index])
        ):
            flat[index], room[level] = level, room[level] - each
    move = serving.begin(host, state, dataclasses.replace(model.plan, widths=widths))
    assert 0 < move.staged.nbytes() <= counted.staged
    host, state = serving.finish(host, state, move)
    assert held(state.tables) == counted.tables
    assert held((state.resident, state.tables)) + move.staged.nbytes() <= counted.total


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0, 3.0]), st.booleans())
def test_spare_slots_are_a_share_of_the_pages_and_no_more_than_there_are(seed, share, apart):
    rng = np.random.default_rng(seed)
    widths = rng.choice(WIDTHS, (2, 5, 4)).astype(np.int8)
    plan = Plan(widths=widths, channel_block=8, group_size=16, hidden_size=32, apart=apart)
    counts, slots = page_counts(plan), spare_slots(plan, share)
    for level in LEVELS:
        rest = plan.page_widths().size - counts[level]
        assert min(share * counts[level], rest) <= slots[level] < min(share * counts[level], rest) + 1
    assert sum(page_bytes(plan)[level] * counts[level] for level in LEVELS) == plan.stored_bytes() - (
        dataclasses.replace(plan, widths=np.full_like(widths, 2)).stored_bytes()
    )
    assert device_bits(plan, share) >= plan.bits_per_weight()
