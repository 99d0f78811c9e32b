"""Plans and their bytes; allocation against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.kernels.layout import LEVELS, WIDTHS
from dynamo_jax.precision.allocate import allocate, reallocate
from dynamo_jax.precision.plan import Plan, expert_plan


def instance(items, seed):
    """Errors that fall with the width, costs that rise, as real ones do."""
    rng = np.random.default_rng(seed)
    errors = -np.sort(-rng.random((items, 4)) * rng.random((items, 1)) ** 3, axis=1)
    costs = np.cumsum(rng.random((items, 4)) + 0.1, axis=1)
    return errors, costs


def best(errors, feasible):
    """The least error over all feasible choices, by trying them all."""
    items = range(len(errors))
    return min(
        sum(errors[i, c[i]] for i in items) for c in itertools.product(range(4), repeat=len(errors)) if feasible(c)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.floats(0, 1), st.integers(0, 999))
def test_allocation_is_the_best_of_all_plans_within_the_budget(items, share, seed):
    errors, costs = instance(items, seed)
    budget = costs[:, 0].sum() + share * (costs[:, 3] - costs[:, 0]).sum() + 1e-6
    widths = allocate(errors, costs, budget)
    chosen = np.searchsorted(WIDTHS, widths)
    rows = np.arange(items)
    assert costs[rows, chosen].sum() <= budget + 1e-5
    want = best(errors, lambda c: costs[rows, list(c)].sum() <= budget)
    assert errors[rows, chosen].sum() == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_more_budget_never_costs_more_error():
    errors, costs = instance(60, 3)
    budgets = np.linspace(costs[:, 0].sum(), costs[:, 3].sum(), 9) + 1e-6
    totals = []
    for budget in budgets:
        chosen = np.searchsorted(WIDTHS, allocate(errors, costs, budget))
        totals.append(errors[np.arange(60), chosen].sum())
    assert all(b <= a * (1 + 1e-3) for a, b in itertools.pairwise(totals))


def test_a_budget_that_no_plan_meets_names_the_least():
    errors, costs = np.ones((3, 4)), np.tile([10.0, 20, 30, 40], (3, 1))
    with pytest.raises(ValueError, match="budget of 29 bytes is below the least that a plan needs, 30 bytes"):
        allocate(errors, costs, 29)


def test_errors_with_nan_are_refused():
    errors, costs = instance(3, 0)
    errors[1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        allocate(errors, costs, 1e9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(0, 999))
def test_reallocation_keeps_all_limits_and_is_near_the_best(items, seed):
    errors, _ = instance(items, seed)
    rng = np.random.default_rng(seed)
    baseline = rng.integers(0, 4, items)
    pages = {level: int((np.asarray(WIDTHS)[baseline] >= level).sum()) for level in LEVELS}
    read = rng.random(items)[:, None] * np.array([2.25, 3.25, 4.25, 8.375])
    spent = read[np.arange(items), baseline].sum()
    widths = reallocate(errors, pages, read, spent)
    chosen = np.searchsorted(WIDTHS, widths)

    def feasible(c):
        c = np.asarray(c)
        fits = all((np.asarray(WIDTHS)[c] >= level).sum() <= pages[level] for level in LEVELS)
        return fits and read[np.arange(items), c].sum() <= spent + 1e-6

    assert feasible(chosen)
    got, want = errors[np.arange(items), chosen].sum(), best(errors, feasible)
    # each of the four limits leaves at most one item fractional, and it loses its refinement
    assert want - 1e-9 <= got <= want + np.sort(errors[:, 0] - errors[:, 3])[-4:].sum() + 1e-9


def test_without_a_reason_to_move_the_read_bytes_stay():
    """All blocks alike: any placement is as good, and none may read more than the baseline."""
    errors = np.tile([4.0, 3, 2, 1], (6, 1))
    read = np.tile([2.25, 3.25, 4.25, 8.375], (6, 1))
    widths = reallocate(errors, {3: 3, 4: 2, 8: 1}, read, 2.25 * 3 + 3.25 + 4.25 + 8.375)
    assert sorted(widths) == [2, 2, 2, 3, 4, 8]


def plan(widths):
    return Plan(widths=np.asarray(widths, np.int8), channel_block=16, group_size=64, hidden_size=128)


def test_the_bytes_of_a_plan_by_hand():
    # 3 x 16 x 128 weights a block: 1536 bytes of 2-bit codes and 96 groups of 2 bytes
    assert plan([[[2]]]).stored_bytes() == 1536 + 192
    assert plan([[[3]]]).stored_bytes() == 1536 + 192 + 768
    assert plan([[[8]]]).stored_bytes() == 6144 + 96 * 3
    assert plan([[[2, 8]]]).bits_per_weight() == pytest.approx(8 * (1728 + 6432) / (2 * 6144))


def test_bytes_read_follow_the_routing():
    two = plan([[[2], [8]]])
    assert two.bytes_per_token(np.array([[10.0, 0.0]]), 10) == 1728
    assert two.bytes_per_token(np.array([[5.0, 5.0]]), 10) == (1728 + 6432) / 2


def test_an_expert_plan_gives_all_blocks_the_experts_width():
    assert (expert_plan(np.array([[2, 4]]), 48, 16, 64, 128).widths == [[[2, 2, 2], [4, 4, 4]]]).all()


def test_an_unknown_width_is_refused():
    with pytest.raises(ValueError, match=r"widths \[5\]"):
        plan([[[5]]])
