"""When a variant is adapted, serves and is left: the rule, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from dynamo_jax.runtime.standing import AGAIN, FIRST, MOST, OVER, RECENT, TRIED, Limit, Standing, parts, sure


def test_each_time_that_a_variant_is_left_twice_as_many_tokens_are_waited_for():
    standing, piece = Standing(RECENT // 2), (np.ones((1, 1, 1)), np.full(1, 8.0))
    assert not standing.due(FIRST - 1) and standing.due(FIRST) and not standing.due(FIRST * AGAIN - 1)
    waited = []
    for _ in range(5):
        standing.begins(True, np.full((1, 1), -1.0), *piece)  # it loses, but on too few tokens yet
        assert standing.saved == [-1 / 8] and standing.leaves(*piece) and not standing.leaves(*piece)
        waited.append(standing.wanted)
        assert not standing.serves and not standing.due(standing.wanted - 1) and standing.due(standing.wanted)
    assert waited == [RECENT, RECENT, MOST, MOST, MOST]
    standing.begins(True, np.zeros((1, 1)), np.ones((9, 1, 1)), np.ones(9))
    assert len(standing.saved) == 2  # the last ones


def test_known_text_is_tried_late_and_must_gain_for_sure():
    novel, known = Standing(64), Standing(64, known=True)
    assert (novel.wanted, known.wanted) == (FIRST, TRIED) and not known.due(TRIED - 1) and known.due(TRIED)
    some, clear, none = np.array([1.0, -0.9, 0.1]), np.array([1.0, 0.9, 1.1]), np.array([-1.0, -0.9, -1.1])
    assert [novel.takes(g) for g in (some, clear, none)] == [True, True, False]
    assert [known.takes(g) for g in (some, clear, none)] == [False, True, False]
    assert not sure(np.array([5.0]))  # of one window nothing is sure


def test_known_text_is_made_into_a_plan_and_judged_by_different_halves():
    windows = np.arange(10).reshape(5, 2)
    for known, made, judged in ((True, [0, 1, 2], [3, 4]), (False, range(5), range(5))):
        for found, want in zip(parts(windows, known), (made, judged)):
            np.testing.assert_array_equal(found, windows[list(want)])
    one = parts(windows[:1], True)
    assert [len(w) for w in one] == [1, 1]  # of which nothing is sure


def standing_of(variant, allowed, batch=1):
    """A variant that serves, adapted to text whose rows all went to the first of two experts."""
    standing, counts = Standing(RECENT // 4), np.array([[[1.0, 0.0]]] * 4) * 256
    limit = Limit(np.array([variant], float), np.array([allowed], float), batch)
    assert standing.due(FIRST)
    standing.begins(True, np.ones((1, 2)), counts, np.full(4, 256.0), limit)
    return standing


def test_a_variant_that_reads_more_than_it_may_is_adapted_anew_and_serves_on():
    standing = standing_of([100, 102 + 100 * OVER], [100, 100])
    one = np.array([[[0.0, 1.0]]]) * 256, np.full(1, 256.0)
    assert standing.due(4 * RECENT) and not standing.due(4 * RECENT)
    assert [standing.overreads(*one) for _ in range(4)] == [
        False,
        False,
        False,
        True,
    ]  # on RECENT tokens that it served
    assert standing.serves and standing.due(RECENT)
    assert not standing.overreads(*one)  # what it reads is counted anew


def test_a_variant_within_its_limit_is_left_alone():
    standing = standing_of([100, 100.5], [100, 100])
    one = np.array([[[0.0, 1.0]]]) * 256, np.full(1, 256.0)
    assert not any(standing.overreads(*one) for _ in range(8))
    assert not Standing(RECENT).overreads(*one)


def test_a_large_batch_reads_every_expert_it_may_touch():
    """An expert that one token in ten needs is read in two steps of three by ten tokens."""
    limit = Limit(np.array([[0.0, 100.0]]), np.array([[100.0, 100.0]]), 10)
    assert limit.over(np.array([[1.0, 0.1]])) == pytest.approx((1 - 0.9**10) * 100 / ((2 - 0.9**10) * 100) - 1)


def test_a_plan_that_did_not_serve_is_not_tried_again_at_once():
    standing = standing_of([1, 1], [1, 1])
    standing.serves = False
    standing.ends()
    assert not standing.due(FIRST)
    standing.serves = True
    standing.ends()
    assert standing.due(FIRST) and not standing.serves
