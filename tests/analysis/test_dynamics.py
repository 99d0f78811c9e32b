"""Movement of routing and significance: each measure against scipy or by hand, and what happens where there is none."""

from __future__ import annotations

import itertools
import json
import math

import jax
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dynamo_jax.analysis.dynamics import (
    SPANS,
    Significance,
    agreement,
    agreement_within_experts,
    busiest_share,
    chance_overlap,
    cut,
    decile_overlap,
    dynamics,
    half_orders,
    orders,
    rank_correlation,
    routing_divergence,
    routing_shift,
    span_shifts,
)
from dynamo_jax.calibration.summary import dynamics_json, plain

LAYERS, EXPERTS, BLOCKS, WINDOWS = 3, 12, 4, 8


def drawn(seed=0, windows=WINDOWS, experts=EXPERTS, spread=1.0):
    """Routing counts (S, L, E) of a dataset with experts of its own that it prefers."""
    rng = np.random.default_rng(seed)
    return rng.poisson(200 * rng.lognormal(0, spread, (LAYERS, experts)), (windows, LAYERS, experts)).astype(float)


def of(*names, **options):
    """Windows and significance of datasets, each with a seed of its own."""
    windows = {n: drawn(i, **options) for i, n in enumerate(names)}
    experts = {n: np.random.default_rng(i).random(w.shape[1:]) for i, (n, w) in enumerate(windows.items())}
    blocks = {n: np.random.default_rng(i).random((*e.shape, BLOCKS)) for i, (n, e) in enumerate(experts.items())}
    whole = {n: Significance(experts[n], blocks[n]) for n in names}
    noise = np.random.default_rng(99).normal(0, 0.02, (len(names), 2, LAYERS, windows[names[0]].shape[2], BLOCKS))
    halves = {
        n: tuple(Significance(experts[n] + half[..., 0], blocks[n] + half) for half in own)
        for n, own in zip(names, noise)
    }
    return windows, whole, halves


# The measures


def test_divergence_is_jensen_shannons_layer_by_layer():
    a, b = np.random.default_rng(0).random((2, LAYERS, 7))
    want = [scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2 for p, q in zip(a, b)]
    np.testing.assert_allclose(routing_divergence(a, b), want, rtol=1e-12)
    np.testing.assert_allclose(routing_divergence(b, a), want, rtol=1e-12)
    np.testing.assert_allclose(routing_divergence(a, 5 * a), 0, atol=1e-12)
    stacked = routing_divergence(np.stack([a, b]), np.stack([b, b]))
    np.testing.assert_allclose(stacked, [want, np.zeros(LAYERS)], rtol=1e-12, atol=1e-12)


def test_divergence_is_one_bit_where_no_expert_is_shared_and_nan_without_tokens():
    assert routing_divergence(np.array([[1.0, 0]]), np.array([[0, 1.0]])) == pytest.approx(1)
    found = routing_divergence(np.array([[0.0, 0], [1, 1]]), np.array([[1.0, 1], [1, 1]]))
    np.testing.assert_array_equal(found, [math.nan, 0])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30))
def test_rank_correlation_is_that_of_scipy(pairs):
    a, b = np.array(pairs, np.float64).T
    ours = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_rank_correlation_leaves_out_what_is_not_finite():
    assert rank_correlation(np.array([1, 2, np.nan, 3.0]), np.array([1, 2, 9, 4.0])) == pytest.approx(1)
    assert math.isnan(rank_correlation(np.array([1.0]), np.array([1.0])))


def test_overlap_counted_by_hand():
    a = np.arange(20.0)  # the top two are 18 and 19
    assert decile_overlap(a, a) == 1.0
    assert decile_overlap(a, -a) == 0.0
    swapped = a.copy()
    swapped[[18, 3]] = swapped[[3, 18]]  # now 3 and 19
    assert decile_overlap(a, swapped) == 0.5
    assert decile_overlap(np.arange(11.0), np.arange(11.0) % 10) == 0.5  # 9, 10 against 8, 9


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=14))
def test_ties_are_broken_at_random_and_averaged(pairs):
    """All ways to fill the top, by enumeration."""
    a, b = np.array(pairs, np.float64).T
    top = math.ceil(len(a) / 10)

    def tops(values):
        sums = {c: values[list(c)].sum() for c in itertools.combinations(range(len(values)), top)}
        return [set(c) for c, s in sums.items() if s == max(sums.values())]

    want = np.mean([len(x & y) / top for x in tops(a) for y in tops(b)])
    assert decile_overlap(a, b) == pytest.approx(want)


def test_overlap_of_unrelated_orders_is_what_chance_gives():
    rng = np.random.default_rng(0)
    found = np.mean([decile_overlap(rng.random(25), rng.random(25)) for _ in range(3000)])
    deviation = scipy.stats.hypergeom(25, 3, 3).std() / 3 / math.sqrt(3000)
    assert abs(found - chance_overlap(25)) < 4 * deviation
    assert chance_overlap(25) == 3 / 25 and chance_overlap(64) == 7 / 64 and chance_overlap(1) == 1


def test_a_constant_overlaps_with_anything_as_by_chance():
    assert decile_overlap(np.ones(30), np.arange(30.0)) == pytest.approx(chance_overlap(30))
    assert decile_overlap(np.zeros(30), np.zeros(30)) == pytest.approx(chance_overlap(30))


def test_overlap_leaves_out_what_is_not_finite():
    assert decile_overlap(np.array([np.nan, 3, 2, 1]), np.array([9, 3, 2, np.inf])) == 1.0
    assert math.isnan(decile_overlap(np.array([np.nan]), np.array([1.0])))


def test_busiest_share_is_one_where_experts_are_alike_and_e_where_one_has_all():
    counts = np.array([[5.0, 5, 5, 5], [8, 0, 0, 0], [4, 2, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(busiest_share(counts), [1, 4, 2, math.nan])


def test_an_order_within_experts_is_the_mean_over_those_that_have_one():
    a, b = np.random.default_rng(0).random((2, LAYERS, EXPERTS, BLOCKS))
    a[0, 3] = 0  # an expert without tokens
    b[2] = math.nan  # a layer that was not measured
    experts = [[scipy.stats.spearmanr(x, y).statistic for x, y in zip(a[i], b[i]) if x.any()] for i in range(2)]
    np.testing.assert_allclose(agreement_within_experts(a, b), [*map(np.mean, experts), math.nan])


def test_order_of_experts_that_only_differ_in_scale_is_the_same():
    a = drawn()[0]
    shift = routing_shift(a, 3 * a)
    np.testing.assert_allclose(shift.use.correlation, 1)
    np.testing.assert_allclose(shift.use.overlap, 1)


# Spans


def test_spans_are_cut_evenly_and_none_shares_a_window():
    counts = np.eye(10)[:, None, :]  # window s counts for expert s
    spans = cut(counts, 2)
    assert spans.shape == (SPANS, 1, 10) and spans.sum(axis=0).max() == 1
    assert [list(np.flatnonzero(s)) for s in spans[:, 0]] == [[0, 1], [2, 3], [5, 6], [7, 8]]


def test_spans_of_all_datasets_have_the_same_tokens():
    windows = {"short": drawn(0, windows=9), "long": drawn(1, windows=33)}
    spans = span_shifts(windows)
    assert spans.windows == 2
    halves = [drawn(0, windows=9)[s : s + 2].sum(axis=0) for s in (0, 2, 4, 6)]
    want = np.mean([routing_divergence(x, y) for x, y in itertools.combinations(halves, 2)], axis=0)
    np.testing.assert_allclose(spans.within["short"].divergence, want)


def test_every_span_of_one_dataset_is_compared_with_every_span_of_the_other():
    a, b = drawn(0, windows=SPANS), drawn(1, windows=SPANS)  # a window is a span
    want = np.mean([routing_divergence(x, y) for x in a for y in b], axis=0)
    np.testing.assert_allclose(span_shifts({"a": a, "b": b}).between["a", "b"].divergence, want, rtol=1e-12)


def test_a_dataset_is_nearer_to_itself_than_to_one_with_other_favourites():
    spans = span_shifts({"a": drawn(0), "b": drawn(1)})
    (between,) = spans.between.values()
    for within in spans.within.values():
        assert (within.divergence < between.divergence / 10).all()
        assert (within.use.correlation > between.use.correlation).all()


def test_two_samples_of_one_source_move_no_more_between_than_within():
    same = drawn(0, windows=64)
    spans = span_shifts({"a": same[::2], "b": same[1::2]})
    within = np.mean([s.divergence for s in spans.within.values()], axis=0)
    np.testing.assert_allclose(spans.between["a", "b"].divergence, within, rtol=0.5)


def test_one_window_has_no_second_span():
    spans = span_shifts({"one": drawn(0, windows=1), "more": drawn(1, windows=8)})
    assert spans.windows == 1
    assert np.isnan(spans.within["one"].divergence).all() and np.isfinite(spans.within["more"].divergence).all()
    assert np.isfinite(spans.between["one", "more"].divergence).all()


def test_no_window_is_an_error_that_names_the_dataset():
    with pytest.raises(ValueError, match="empty: no windows, expected at least one"):
        span_shifts({"a": drawn(), "empty": drawn(windows=0)})


# All together


def test_pairs_are_those_of_the_whole_counts():
    windows, whole, halves = of("a", "b", "c")
    moved = dynamics(windows, whole, halves)
    assert list(moved.routing) == [("a", "b"), ("a", "c"), ("b", "c")]
    want = routing_divergence(windows["a"].sum(axis=0), windows["c"].sum(axis=0))
    np.testing.assert_array_equal(moved.routing["a", "c"].divergence, want)
    want = agreement(*(whole[n].blocks.reshape(LAYERS, -1) for n in "bc"))
    np.testing.assert_array_equal(moved.significance["b", "c"].blocks.overlap, want.overlap)
    assert moved.chance_experts == 2 / EXPERTS and moved.chance_blocks == 5 / (EXPERTS * BLOCKS)


def test_halves_of_one_dataset_agree_more_than_those_of_two():
    _, _, halves = of("a", "b", "c")
    found = half_orders(halves)
    assert list(found.within) == ["a", "b", "c"] and list(found.between) == [("a", "b"), ("a", "c"), ("b", "c")]
    for within in found.within.values():
        for between in found.between.values():
            for values, others in zip(jax.tree.leaves(within), jax.tree.leaves(between)):
                assert values.mean() > others.mean()
    each = [orders(x, y).experts.correlation for x in halves["a"] for y in halves["b"]]
    np.testing.assert_allclose(found.between["a", "b"].experts.correlation, np.mean(each, axis=0))


def test_one_dataset_has_no_pairs():
    moved = dynamics(*of("a"))
    assert not moved.routing and not moved.significance and not moved.spans.between
    assert np.isfinite(moved.spans.within["a"].divergence).all()


def test_one_expert_cannot_be_ordered():
    moved = dynamics(*of("a", "b", experts=1))
    shift = moved.routing["a", "b"]
    np.testing.assert_array_equal(shift.divergence, 0)
    assert np.isnan(shift.use.correlation).all() and (shift.use.overlap == moved.chance_experts).all()
    assert (moved.busiest["a"] == 1).all()


def test_json_holds_null_where_a_number_is_missing():
    windows, whole, halves = of("a", "b", windows=1)
    windows["a"][:, 1] = 0  # a layer without tokens
    whole["b"].experts[0] = math.nan
    halves["a"][1].experts[:], halves["a"][1].blocks[:] = math.nan, math.nan  # of one window
    told = dynamics_json(dynamics(windows, whole, halves), 64)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    pair = told["between"]["a | b"]
    assert [d is None for d in pair["divergence"]] == [False, True, False]
    assert pair["use"]["correlation"][1] is None and pair["experts"]["correlation"][0] is None
    assert told["busiest_share"]["a"][1] is None and told["spans"]["within"]["a"]["divergence"] == [None] * LAYERS
    assert told["spans"]["tokens"] == 64
    alone, both = told["halves"]["within"]["a"], told["halves"]["between"]["a | b"]
    assert alone["experts"]["correlation"] == alone["blocks"]["overlap"] == [None] * LAYERS
    assert None not in both["experts"]["correlation"] + both["blocks"]["correlation_within_experts"]


def test_plain_keeps_the_shape():
    assert plain(np.array([[1.5, math.inf], [math.nan, 2]])) == [[1.5, None], [None, 2.0]]
    assert plain(np.array([1, 2])) == [1, 2] and plain(math.nan) is None
