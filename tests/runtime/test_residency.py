"""Pages on the device: the budget, what moves, what a failure leaves behind."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.kernels.layout import LEVELS, dequantize_layer
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import dequantize, quantize
from dynamo_jax.runtime.residency import chunk_pages, commit, empty, levels_of, residency, stage, table_of
from dynamo_jax.runtime.store import host_pages, page_counts

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS, EXPERTS, BLOCKS, BLOCK, GROUP, HIDDEN = 2, 3, 2, 4, 32, 64
STORE = quantize(jax.random.normal(jax.random.key(0), (LAYERS, EXPERTS, 3, BLOCKS * BLOCK, HIDDEN)), GROUP)
BY_WIDTH = {w: np.asarray(dequantize(STORE, w).astype("bfloat16")) for w in (2, 3, 4, 8)}


def plan_of(widths, apart=False) -> Plan:
    shape = (LAYERS, EXPERTS, -1)
    widths = np.asarray(widths, np.int8).reshape(shape)
    return Plan(widths=widths, channel_block=BLOCK, group_size=GROUP, hidden_size=HIDDEN, apart=apart)


def plans(apart=False):
    size = LAYERS * EXPERTS * BLOCKS * (2 if apart else 1)
    return st.lists(st.sampled_from([2, 3, 4, 8]), min_size=size, max_size=size).map(lambda w: plan_of(w, apart))


def random_plan(seed, apart=False):
    size = LAYERS * EXPERTS * BLOCKS * (2 if apart else 1)
    return plan_of(np.random.default_rng(seed).choice([2, 3, 4, 8], size), apart)


def check_weights(here, plan):
    """What the plan's table reads is what its widths say."""
    table = table_of(here, plan)
    pages = plan.page_widths().reshape(LAYERS, EXPERTS, -1, BLOCKS)
    widths = np.repeat(np.broadcast_to(pages, (LAYERS, EXPERTS, 3, BLOCKS)), BLOCK, axis=3)[..., None]
    want = sum(np.where(widths == w, values, 0) for w, values in BY_WIDTH.items())
    for layer in range(LAYERS):
        got = np.asarray(dequantize_layer(here.resident, table, layer)).swapaxes(0, 1)
        np.testing.assert_array_equal(got, want[layer].astype(got.dtype))


def check_budget(here, slots):
    for level in LEVELS:
        assert here.resident.pages[level].codes.shape[0] == slots[level]
        taken = here.slots[level][here.slots[level] >= 0]
        assert len(set(taken.tolist())) == len(taken) and (taken < slots[level]).all()


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_row_of_switches_stays_in_the_budget_and_reads_what_its_plans_say(apart, data):
    baseline = data.draw(plans(apart))
    host = host_pages(STORE, baseline)
    spare = data.draw(st.integers(0, 12))
    slots = {level: count + spare for level, count in page_counts(baseline).items()}
    here, kept = residency(host, [baseline], slots), [baseline]
    for plan in data.draw(st.lists(plans(apart), max_size=4)):
        try:
            staged = stage(host, here, plan, keep=kept[:1])
        except ValueError as error:
            assert "slots are free" in str(error)
            union = {n: (baseline.page_widths() >= n) | (plan.page_widths() >= n) for n in LEVELS}
            assert any(has.sum() > slots[level] for level, has in union.items())
        else:
            here, kept = commit(here, staged), [baseline, plan]
        check_budget(here, slots)
        for each in kept:
            check_weights(here, each)


def test_only_pages_that_are_missing_move():
    first, host = random_plan(0), host_pages(STORE, random_plan(0))
    slots = {level: 2 * count for level, count in page_counts(first).items()}
    here = residency(host, [first], slots)
    assert stage(host, here, first, keep=[first]).nbytes() == 0
    widths = first.widths.copy()
    at = tuple(np.argwhere(widths == 2)[0])
    widths[at] = 3
    staged = stage(host, here, dataclasses.replace(first, widths=widths), keep=[first])
    assert [len(staged.chunks[level]) for level in LEVELS] == [1, 0, 0]
    page = 3 * BLOCK * HIDDEN // 8
    assert staged.nbytes() == chunk_pages(slots[3]) * (page + 4)
    jax.block_until_ready(jax.tree.leaves(staged.chunks))
    assert staged.ready()
    back = commit(commit(here, staged), stage(host, commit(empty(host, slots), staged), first, keep=[]))
    check_weights(back, first)


def test_a_page_that_left_can_come_back_and_one_that_stayed_need_not():
    first, second = plan_of([8] * 12), plan_of([2] * 12)
    host = host_pages(STORE, first)
    here = residency(host, [first])
    here = commit(here, stage(host, here, second, keep=[]))
    assert stage(host, here, first, keep=[]).nbytes() == 0  # nothing took its slots
    third = plan_of([3] * 6 + [2] * 6)
    host, here = host_pages(STORE, third), residency(host_pages(STORE, third), [third])
    moved = plan_of([2] * 6 + [3] * 6)
    here = commit(here, stage(host, here, moved, keep=[]))
    check_weights(here, moved)
    with pytest.raises(ValueError, match="6 pages of 3 bits that the plan reads are not on the device"):
        table_of(here, third)


def test_a_budget_of_no_pages_serves_two_bits_and_nothing_else():
    host = host_pages(STORE, plan_of([2] * 12))
    here = residency(host, [plan_of([2] * 12)], {})
    check_weights(here, plan_of([2] * 12))
    assert table_of(here, plan_of([2] * 12), ()) == {}
    with pytest.raises(ValueError, match="12 pages of 3 bits have to come and 0 of 0 slots are free"):
        stage(host, here, plan_of([3] * 12), keep=[])
    with pytest.raises(ValueError, match="-1 slots of 4 bits"):
        empty(host, {4: -1})


@pytest.mark.parametrize("part", ["codes", "ratios"])
def test_a_damaged_page_is_named_and_the_baseline_goes_on(part):
    baseline, wanted = plan_of([3] * 12), plan_of([3] * 11 + [8])
    planes = jax.tree.map(np.array, STORE)
    host = host_pages(planes, baseline)
    here = residency(host, [baseline], {3: 12, 4: 4, 8: 4})
    array = planes.codes[8] if part == "codes" else planes.ratios
    array[1, 2, 0, BLOCK, 0] ^= 1
    with pytest.raises(ValueError, match="8-bit page of layer 1, expert 2, block 1 is damaged in host memory"):
        stage(host, here, wanted, keep=[baseline])
    check_weights(here, baseline)
    fine = plan_of([8] + [3] * 11)
    check_weights(commit(here, stage(host, here, fine, keep=[baseline])), fine)


def test_a_transfer_that_fails_leaves_the_old_variant_running(monkeypatch):
    baseline, wanted = plan_of([2] * 12), plan_of([4] * 12)
    host = host_pages(STORE, baseline)
    here = residency(host, [baseline], {3: 12, 4: 12})

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", full)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            stage(host, here, wanted, keep=[baseline])
    check_weights(here, baseline)
    check_weights(commit(here, stage(host, here, wanted, keep=[baseline])), wanted)


def test_a_level_left_out_of_a_table_must_have_no_pages():
    plan = plan_of([4] * 12)
    here = residency(host_pages(STORE, plan), [plan])
    assert levels_of(plan) == (3, 4)
    with pytest.raises(ValueError, match="reads 12 pages of 4 bits, a level left out"):
        table_of(here, plan, (3,))


def test_any_number_of_pages_moves_with_the_same_programs(compilations):
    first = random_plan(0)
    host = host_pages(STORE, first)
    here = residency(host, [first, plan_of([8] * 12)])
    with compilations() as count:
        for seed in range(1, 6):
            here = commit(here, stage(host, here, random_plan(seed), keep=[]))
    assert count.compiled == 0
