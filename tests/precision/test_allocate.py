"""Allocation against trying all plans: exact offline, and near the best within all limits at run time."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.kernels.layout import LEVELS, WIDTHS
from dynamo_jax.precision import allocate as module
from dynamo_jax.precision.allocate import RELATIVE_GAP, allocate, allocate_known, reallocate
from dynamo_jax.precision.plan import block_costs

CHOICES = np.asarray(WIDTHS)
GAP = 2 * RELATIVE_GAP  # the solver may stop there; its absolute gap adds 1e-6 of the largest error


def everything(items):
    """All plans of ``items`` items, as indices of widths: (4^items, items)."""
    return np.array(list(itertools.product(range(len(WIDTHS)), repeat=items)))


def total(values, chosen):
    """Sum over items of values[item, chosen width]."""
    return np.take_along_axis(values[None], chosen[..., None], axis=2)[..., 0].sum(axis=-1)


def indices(widths):
    assert set(widths) <= set(WIDTHS)
    return np.searchsorted(CHOICES, widths)[None]


def falling(rng, items):
    """Errors as real ones are: the more bits the less, over many magnitudes."""
    drops = rng.random((items, 4)) * 10.0 ** rng.uniform(-4, 0, (items, 1))
    return np.cumsum(drops[:, ::-1], axis=1)[:, ::-1]


# Offline: the exact program


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0, 1.1), st.booleans(), st.integers(0, 9999))
def test_no_plan_within_the_budget_is_better(items, share, ordered, seed):
    """For any errors and costs, also where more bits cost less or err more."""
    rng = np.random.default_rng(seed)
    errors = falling(rng, items) if ordered else rng.random((items, 4))
    costs = rng.integers(1, 200, (items, 4)).astype(float)
    low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    budget = np.floor(low + share * (high - low))
    chosen = indices(allocate(errors, costs, budget))
    assert total(costs, chosen) <= budget
    plans = everything(items)
    best = total(errors, plans)[total(costs, plans) <= budget].min()
    assert total(errors, chosen) <= best * (1 + GAP) + 2e-6 * errors.max()


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 7), st.integers(0, 9999))
def test_the_bytes_of_real_blocks_stay_within_the_budget(bits, seed):
    """Costs of megabytes an item: not one byte more, whatever the solver's tolerance."""
    rng = np.random.default_rng(seed)
    costs = np.tile(block_costs(128, 2048, 64), (40, 1)) * rng.integers(1, 9, (40, 1))
    budget = bits / 8 * costs[:, 3].sum()
    budget = max(budget, costs[:, 0].sum())
    assert total(costs, indices(allocate(falling(rng, 40), costs, budget))) <= budget


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9999))
def test_a_larger_budget_never_does_worse(seed):
    rng = np.random.default_rng(seed)
    errors, costs = falling(rng, 20), np.tile(block_costs(16, 128, 64), (20, 1))
    budgets = np.linspace(costs[:, 0].sum(), costs[:, 3].sum(), 6)
    found = [float(total(errors, indices(allocate(errors, costs, b)))[0]) for b in budgets]
    for before, after in itertools.pairwise(found):
        assert after <= before * (1 + GAP) + 2e-6 * errors.max()


def test_the_least_budget_gives_the_cheapest_plan_and_the_largest_the_best():
    rng = np.random.default_rng(0)
    errors, costs = falling(rng, 9), np.tile(block_costs(16, 128, 64), (9, 1))
    assert (allocate(errors, costs, costs[:, 0].sum()) == 2).all()
    assert (allocate(errors, costs, costs[:, 3].sum()) == 8).all()


def test_the_item_that_gains_most_gets_the_bits():
    errors = np.array([[1.0, 0.9, 0.8, 0.7], [9.0, 4.0, 2.0, 1.0], [1.0, 0.9, 0.8, 0.7]])
    costs = np.tile([2.0, 3.0, 4.0, 8.0], (3, 1))
    np.testing.assert_array_equal(allocate(errors, costs, 12), [2, 8, 2])


def test_errors_of_any_unit_give_the_same_plan():
    rng = np.random.default_rng(1)
    errors, costs = falling(rng, 12), np.tile([2.25, 3.25, 4.25, 8.375], (12, 1))
    plans = [allocate(size * errors, costs, 50.0) for size in (1e-9, 1.0, 1e9)]
    for plan in plans[1:]:
        assert total(errors, indices(plan)) == pytest.approx(total(errors, indices(plans[0])), rel=GAP)


def test_errors_that_are_all_zero_allow_any_plan_within_the_budget():
    costs = np.tile([2.0, 3.0, 4.0, 8.0], (5, 1))
    assert total(costs, indices(allocate(np.zeros((5, 4)), costs, 17))) <= 17


def test_a_budget_below_every_plan_names_the_least():
    costs = np.tile([10.0, 20.0, 30.0, 80.0], (3, 1))
    with pytest.raises(ValueError, match="budget of 29 bytes is below the least that a plan needs, 30 bytes"):
        allocate(np.ones((3, 4)), costs, 29)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_errors_that_are_not_finite_are_refused(bad):
    errors = np.ones((3, 4))
    errors[1, 2] = bad
    costs = np.tile([2.25, 3.25, 4.25, 8.375], (3, 1))
    with pytest.raises(ValueError, match="errors to allocate by hold NaN or infinity"):
        allocate(errors, costs, 20)
    with pytest.raises(ValueError, match="errors to allocate by hold NaN or infinity"):
        reallocate(errors, {3: 3, 4: 3, 8: 3}, costs, 99.0)


# Several datasets, and programs so large that the relaxation goes first


def worst_ratio(errors, costs, budget, chosen):
    """Of plans (P, I): the largest over datasets of the error over the least that is possible for it alone."""
    plans = everything(errors.shape[1])
    affordable = plans[total(costs, plans) <= budget]
    return np.max([total(e, chosen) / total(e, affordable).min() for e in errors], axis=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.floats(0, 1), st.booleans(), st.integers(0, 9999))
def test_the_worst_datasets_ratio_is_the_least_there_is(items, datasets, share, large, seed):
    rng = np.random.default_rng(seed)
    errors = np.stack([falling(rng, items) for _ in range(datasets)])
    costs = np.tile(block_costs(16, 128, 64), (items, 1))
    low, high = costs[:, 0].sum(), costs[:, 3].sum()
    budget = low + share * (high - low)
    with mock.patch.object(module, "LARGE", 0 if large else 10**9):
        chosen = indices(allocate_known(errors, costs, budget, "worst"))
    assert total(costs, chosen) <= budget
    plans = everything(items)
    best = worst_ratio(errors, costs, budget, plans[total(costs, plans) <= budget]).min()
    found = worst_ratio(errors, costs, budget, chosen)[0]
    assert found <= best * (1 + 3 * GAP) + 1e-4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.floats(0, 1.1), st.booleans(), st.integers(0, 9999))
def test_a_large_programs_two_steps_keep_the_best_plan(items, share, ordered, seed):
    """Here the core holds every choice, so that nothing may be lost."""
    rng = np.random.default_rng(seed)
    errors = falling(rng, items) if ordered else rng.random((items, 4))
    costs = rng.integers(1, 200, (items, 4)).astype(float)
    budget = np.floor(costs.min(axis=1).sum() + share * (costs.max(axis=1).sum() - costs.min(axis=1).sum()))
    with mock.patch.object(module, "LARGE", 0):
        chosen = indices(allocate(errors, costs, budget))
    assert total(costs, chosen) <= budget
    plans = everything(items)
    best = total(errors, plans)[total(costs, plans) <= budget].min()
    assert total(errors, chosen) <= best * (1 + GAP) + 2e-6 * errors.max()


@pytest.mark.parametrize("objective", ["sum", pytest.param("worst", marks=pytest.mark.slow)])
def test_a_large_program_is_as_good_decomposed_as_whole(objective):
    rng = np.random.default_rng(3)
    errors = np.stack([falling(rng, 500) for _ in range(2)])
    costs = np.tile(block_costs(16, 128, 64), (500, 1))
    budget = 3 / 8 * 3 * 16 * 128 * 500
    values = []
    for large in (1000, 10**9):
        with mock.patch.object(module, "LARGE", large):
            chosen = indices(allocate_known(errors, costs, budget, objective))
            alone = [total(e, indices(allocate(e, costs, budget)))[0] for e in errors]
        sums = np.array([total(e, chosen)[0] for e in errors])
        values.append(sums.sum() if objective == "sum" else (sums / alone).max())
    assert values[0] <= values[1] * (1 + 1e-3)


def test_weights_decide_whose_error_counts():
    rng = np.random.default_rng(4)
    errors = np.stack([falling(rng, 20), falling(rng, 20)])
    costs = np.tile(block_costs(16, 128, 64), (20, 1))
    budget = 3 / 8 * 3 * 16 * 128 * 20
    only = allocate_known(errors, costs, budget, weights=np.array([0.0, 2.0]))
    assert total(errors[1], indices(only)) == pytest.approx(
        total(errors[1], indices(allocate(errors[1], costs, budget)))
    )
    both = allocate_known(errors, costs, budget)
    assert total(errors.sum(axis=0), indices(both)) <= total(errors.sum(axis=0), indices(only)) * (1 + GAP)


@pytest.mark.parametrize("bad", [[1.0], [-1.0, 1.0], [0.0, 0.0], [np.nan, 1.0]])
def test_weights_that_count_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="expected 2 of them, none negative, not all zero"):
        allocate_known(np.ones((2, 3, 4)), np.ones((3, 4)), 9, weights=np.array(bad))


def test_a_dataset_without_errors_does_not_count_as_the_worst():
    errors = np.stack([np.zeros((3, 4)), [[9.0, 1.0, 0.5, 0.1], [2.0, 1.0, 0.5, 0.1], [2.0, 1.0, 0.5, 0.1]]])
    costs = np.tile([2.0, 3.0, 4.0, 8.0], (3, 1))
    np.testing.assert_array_equal(allocate_known(errors, costs, 7, "worst"), [3, 2, 2])
    assert total(costs, indices(allocate_known(errors[:1], costs, 7, "worst"))) <= 7


def test_an_objective_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="objective 'best': known are sum, worst"):
        allocate_known(np.ones((1, 3, 4)), np.ones((3, 4)), 9, "best")
    with pytest.raises(ValueError, match="the objective worst takes no weights"):
        allocate_known(np.ones((2, 3, 4)), np.ones((3, 4)), 9, "worst", np.array([1.0, 2.0]))


# At run time: pages of a baseline, placed anew


def baseline_limits(rng, items):
    """A random baseline, its pages, and the bytes that it reads."""
    baseline = rng.integers(0, 4, items)
    pages = {level: int((CHOICES[baseline] >= level).sum()) for level in LEVELS}
    use = rng.random(items) * (rng.random(items) < 0.8)
    read = use[:, None] * block_costs(16, 128, 64)
    spent = total(read, baseline[None])[0]
    return baseline, pages, read, spent


def feasible(plans, pages, read, budget, slack=0.0):
    fits = [(CHOICES[plans] >= level).sum(axis=1) <= pages[level] for level in LEVELS]
    fits.append(total(read, plans) <= budget * (1 + slack))
    return np.all(fits, axis=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 7), st.integers(0, 9999))
def test_replacing_pages_keeps_all_limits_and_loses_at_most_a_few_items(items, seed):
    """A vertex of the relaxed program leaves at most one item fractional for each limit, and such an item falls back to
    its lowest share: what that can cost is the spread of its errors. All else is at most the best plan's error."""
    rng = np.random.default_rng(seed)
    errors = falling(rng, items)
    _, pages, read, spent = baseline_limits(rng, items)
    chosen = indices(reallocate(errors, pages, read, spent))
    assert feasible(chosen, pages, read, spent, slack=1e-6).all()
    plans = everything(items)
    best = total(errors, plans)[feasible(plans, pages, read, spent, slack=1e-9)].min()
    limits = len(LEVELS) + 1
    spread = np.sort(errors[:, 0] - errors[:, 3])[-limits:].sum()
    assert total(errors, chosen)[0] <= best + spread + 1e-6 * errors.max()


def test_the_loss_of_rounding_vanishes_among_many_items():
    """The same bound for 400 items: four of them weigh little, so the plan must beat the baseline by far."""
    rng = np.random.default_rng(2)
    errors = falling(rng, 400)
    baseline, pages, read, spent = baseline_limits(rng, 400)
    chosen = indices(reallocate(errors, pages, read, spent))
    assert feasible(chosen, pages, read, spent, slack=1e-6).all()
    assert total(errors, chosen)[0] < 0.8 * total(errors, baseline[None])[0]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(0, 9999))
def test_the_baseline_stays_where_the_errors_ask_for_it(items, seed):
    """Errors that are zero from the baseline's width up, and one below: only the baseline has none at all."""
    rng = np.random.default_rng(seed)
    baseline, pages, read, spent = baseline_limits(rng, items)
    errors = (np.arange(4)[None] < baseline[:, None]).astype(float)
    np.testing.assert_array_equal(reallocate(errors, pages, read, spent), CHOICES[baseline])


def test_without_a_reason_to_move_the_read_bytes_stay():
    """All blocks alike: any placement is as good, and none may read more than the baseline."""
    errors = np.tile([4.0, 3, 2, 1], (6, 1))
    read = np.tile([2.25, 3.25, 4.25, 8.375], (6, 1))
    widths = reallocate(errors, {3: 3, 4: 2, 8: 1}, read, 2.25 * 3 + 3.25 + 4.25 + 8.375)
    assert sorted(widths) == [2, 2, 2, 3, 4, 8]


def test_pages_that_only_one_item_needs_move_to_it():
    errors = np.array([[0.0] * 4, [0.0] * 4, [8.0, 4.0, 2.0, 1.0], [0.0] * 4])
    read = np.tile([2.0, 3.0, 4.0, 8.0], (4, 1))
    widths = reallocate(errors, {3: 1, 4: 1, 8: 1}, read, 14.0)
    np.testing.assert_array_equal(widths, [2, 2, 8, 2])


def test_a_hot_block_is_refined_only_as_far_as_its_reads_allow():
    """Every token reads item 0, none reads item 1: the pages exist, the bytes do not."""
    errors = np.array([[8.0, 4.0, 2.0, 1.0], [1.0, 0.9, 0.8, 0.7]])
    read = np.array([[2.0, 3.0, 4.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    widths = reallocate(errors, {3: 1, 4: 1, 8: 1}, read, 2.0)
    np.testing.assert_array_equal(widths, [2, 8])


def test_a_baseline_without_pages_is_its_own_plan_in_a_large_model():
    """The read limit is then met to the last byte, by sums of 1e9."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        read = rng.random(1024)[:, None] * np.array([2.25, 3.25, 4.25, 8.375]) * 1e6
        widths = reallocate(falling(rng, 1024), {3: 0, 4: 0, 8: 0}, read, float(read[:, 0].sum()))
        assert (widths == 2).all()


def test_limits_that_no_plan_meets_are_named():
    read = np.tile([2.0, 3.0, 4.0, 8.0], (2, 1))
    with pytest.raises(ValueError, match="no plan fits the pages and the read budget"):
        reallocate(np.ones((2, 4)), {3: 2, 4: 2, 8: 2}, read, 3.0)
