"""Following generation: what is noticed, measured, adapted to and left between two steps, with and without a worker."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from later import Later

from dynamo_jax.commands.console import describe_event
from dynamo_jax.generation import (
    continued,
    quantized_language_model,
)
from dynamo_jax.runtime import online, serving
from dynamo_jax.runtime.generate import (
    GenerateConfig,
    generate,
    stream,
)
from dynamo_jax.runtime.memory import slots
from dynamo_jax.runtime.monitor import start
from dynamo_jax.runtime.standing import FIRST, RECENT, TRIED, Standing
from dynamo_jax.runtime.store import page_counts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def followed(rounded, texts, prompts=3):
    """A client's prompts, 200 tokens of verse each, where the monitor takes everything for novel; all new tokens."""
    model, follower = quantized_language_model(rounded, adaptive=True)
    strict = model.state.signatures._replace(limit=jnp.full(1, 1e-3))
    model = dataclasses.replace(model, state=model.state._replace(signatures=strict))
    ids = rounded.tokenizer.encode(texts["verse"]).ids
    out = []
    for index in range(prompts):
        prompt = ids[200 * index : 200 * (index + 1)]
        out += [list(stream(model, [prompt], GenerateConfig(max_tokens=3), between=follower))]
        model = continued(model, follower)
    return follower, out


def test_a_text_that_turns_novel_is_adapted_to_between_two_steps(rounded, texts):
    follower, out = followed(rounded, texts)
    assert [len(steps) for steps in out] == [3] * 3
    first, second = follower.events
    assert (first.what, first.text, first.token, first.request) == (
        "novel",
        2,
        201,
        0,
    )  # in the second prompt, at 256 tokens
    assert second.what in ("adapted", "not better") and (second.gain > 0) == (second.what == "adapted")
    assert second.moved > 0 and "text 2, token 20" in describe_event(second) and "novel" in describe_event(first)
    there = slots(rounded.plan, rounded.spare)  # the baseline's and the spare ones
    assert all(count <= there[level] for level, count in page_counts(follower.host.plans[1]).items())
    assert follower.state.number.tolist() == [int(second.what == "adapted")]


def follower_of(rounded, requests=1):
    model, follower = quantized_language_model(rounded, adaptive=True)
    return follower, model.state._replace(
        number=jnp.zeros(requests, jnp.int32), watch=start(model.state.signatures, requests)
    )


def labelled(state, *labels):
    return state._replace(watch=state.watch._replace(label=jnp.asarray(labels, jnp.int32)))


def test_the_follower_adapts_to_the_last_novel_tokens_of_all_texts(rounded, monkeypatch):
    """Windows end with the text, whatever came before it turned novel; short texts count together."""
    seen = []
    monkeypatch.setattr(online, "observe_windows", lambda _, windows, *__: seen.append(windows) or 1 / 0)
    follower, state = follower_of(rounded)
    known, novel = list(range(1000, 2000)), list(range(300))
    state = follower(labelled(state, 0), [known])
    with pytest.raises(ZeroDivisionError):
        follower(labelled(state, 1), [known + novel])
    assert seen[0].shape[0] * online.WINDOW >= FIRST and seen[0][-1, -1] == 299
    assert seen[0].min() >= 0 and (seen[0] >= 1000).sum() < FIRST

    seen.clear()
    follower, state = follower_of(rounded)
    state = labelled(state, 1)
    for begin in (0, 100):
        state = labelled(follower(state, [list(range(begin, begin + 100))]), 1)
    assert seen == []
    with pytest.raises(ZeroDivisionError):
        follower(state, [list(range(200, 300))])
    np.testing.assert_array_equal(seen[0], [np.arange(43, 172), np.arange(171, 300)])


def test_a_plan_that_could_not_prove_itself_does_not_serve(rounded, monkeypatch):
    """Its pages are there when the comparison fails; the variant of before is gone."""

    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(online, "divergence", fails)
    follower, state = follower_of(rounded)
    state, follower._standing = labelled(state, 1), Standing(online.HOP, serves=True)
    move = serving.begin(follower.host, state, rounded.plan)
    follower._move = online.Sent(move, np.zeros((1, 3), int), [None], np.zeros(1), follower._standing)
    assert follower(state, [[1, 2, 3]]).number.tolist() == [0]
    assert (follower.events[-1].what, follower.events[-1].name) == ("failed", "no memory")


def test_known_text_forgets_the_variant_and_other_requests_begin_anew(rounded):
    follower, state = follower_of(rounded)
    follower._standing = Standing(online.HOP, serves=True, wanted=4096)
    assert follower(labelled(state, 1), [[1, 2, 3]]).number.tolist() == [1]
    assert follower(labelled(state, 0), [[1, 2, 3, 4]]).number.tolist() == [0]
    assert follower._standing == Standing(online.HOP, known=True)
    follower._standing.serves = True
    _, two = follower_of(rounded, 2)
    assert follower(labelled(two, 1, 0), [[1], [2]]).number.tolist() == [0, 0]
    assert [(e.request, e.text, e.what) for e in follower.events[-2:]] == [(0, 1, "novel"), (1, 1, "known")]


def test_a_variant_is_left_when_the_router_says_that_it_no_longer_pays(rounded, monkeypatch):
    """From the counts of hops alone; another is adapted to the last tokens, later each time."""
    seen = []
    monkeypatch.setattr(online, "observe_windows", lambda _, windows, *__: seen.append(windows) or fails())
    follower, state = follower_of(rounded)
    shape = state.watch.older.shape[1:]

    def fails():
        raise ValueError("not now")

    def hop(state, number, share):
        """The next hop of one text, whose rows went to expert 0 to the given share, else to expert 1."""
        counts = np.zeros((1, *shape), np.float32)
        counts[..., 0], counts[..., 1] = 128 * share, 128 * (1 - share)
        watch = state.watch._replace(older=jnp.asarray(counts), older_tokens=jnp.full(1, 128.0))
        text = list(range(online.HOP * (number + 1)))
        return follower(labelled(state._replace(watch=watch), 1), [text])

    hops = RECENT // online.HOP
    follower._standing = Standing(online.HOP, serves=True, wanted=10**6)
    follower._standing.saves = saves = np.zeros(shape)
    saves[0, :2] = 1.0, -1.0  # nats a row, in one layer
    for number in range(hops):
        state = hop(state, number, 0.75)
        assert state.number.tolist() == [1]
    assert follower._standing.saved == [0.5] * hops
    for number in range(hops, hops + hops // 2 - 1):  # as much the other way, but not for as long
        state = hop(state, number, 0.25)
        assert state.number.tolist() == [1]
    state = hop(state, hops + hops // 2 - 1, 0.25)
    assert state.number.tolist() == [0] and [e.what for e in follower.events] == ["novel", "left", "failed"]
    assert "no longer suits" in describe_event(follower.events[1])
    assert seen[0].size // (online.WINDOW + 1) * online.WINDOW == RECENT  # the last ones, at once
    assert follower._standing.least == 2 * FIRST and follower._standing.wanted > RECENT
    state = hop(state, 2 * hops, 0.25)
    assert state.number.tolist() == [0] and len(seen) == 1


@pytest.mark.parametrize("certain", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_known_text_is_served_by_a_variant_where_the_gain_is_sure(rounded, monkeypatch, certain):
    """On the newer half of its windows, from which the plan was not made; and left when the text is novel."""
    follower, state = follower_of(rounded)
    text = [int(t) for t in np.random.default_rng(0).integers(3, 60, TRIED + 1)]
    made, judged, count = [], [], TRIED // online.WINDOW
    gains = np.full(count // 2, 1.0) if certain else np.resize([3.0, -2.0], count // 2)
    observe = online.observe_windows

    def divergence(model, state, w, seen, variant):
        judged.append((w, seen))
        return np.zeros(len(w)) if variant else gains * online.WINDOW

    monkeypatch.setattr(online, "observe_windows", lambda model, w, *__: made.append(w) or observe(model, w))
    monkeypatch.setattr(online, "divergence", divergence)
    state = follower(labelled(state, 0), [text[:TRIED]])
    assert follower.events[0].what == "known" and follower._move is None
    for _ in range(100):
        state = follower(labelled(state, 0), [text])
        if len(follower.events) > 1:
            break
        time.sleep(0.1)
    (windows, _), tokens = judged[0], np.array(text)
    assert [w.shape for w in (made[0], windows)] == [(count // 2, online.WINDOW + 1)] * 2
    np.testing.assert_array_equal(np.concatenate([made[0], windows])[:, 1:].reshape(-1), tokens[1:])
    np.testing.assert_array_equal(made[1], windows)
    event = follower.events[1]
    assert event.what == ("gains" if certain else "not sure") and event.gain == pytest.approx(gains.mean())
    assert state.number.tolist() == [int(certain)]
    assert ("the gain is sure" if certain else "no gain is sure") in describe_event(event)
    monkeypatch.setattr(online, "divergence", lambda *given: gains * given[-1])
    assert follower(labelled(state, 1), [text]).number.tolist() == [0]


def test_pages_that_come_for_text_that_is_over_serve_nobody(rounded, monkeypatch):
    follower, state = follower_of(rounded)
    monkeypatch.setattr(online, "divergence", lambda *_: 1 / 0)
    state = follower(labelled(state, 1), [list(range(10))])
    move = serving.begin(follower.host, state, rounded.plan)
    follower._move = online.Sent(move, np.zeros((1, 3), int), None, np.zeros(1), follower._standing)
    state = follower(labelled(state, 0), [list(range(11))])
    assert follower._move is None and state.number.tolist() == [0]


def beside(rounded, requests=2):
    follower, state = follower_of(rounded, requests)
    slower = online.Follower(rounded, follower.host, state, worker=Later())
    return slower, state


def until(follower, state, labels, what):
    """Steps without new tokens until pages have come."""
    for _ in range(100):
        state = follower.told(labelled(state, *labels), {})
        if what():
            return state
        time.sleep(0.1)
    raise AssertionError("nothing happened")


def test_a_worker_measures_and_judges_while_steps_go_on(rounded):
    """The same plan and the same event as without one, later; no slot is lent, and the variant serves when it is
    judged."""
    text = [int(t) for t in np.random.default_rng(0).integers(3, 60, FIRST + 1)]
    alone, state = follower_of(rounded, 2)
    until(alone, alone.told(labelled(state, 1, 0), {0: text, 1: text[:9]}), [1, 0], lambda: len(alone.events) > 2)
    follower, late = beside(rounded)
    late = follower.told(labelled(late, 1, 0), {0: text, 1: text[:9]})
    for _ in range(3):
        late = follower.told(labelled(late, 1, 0), {0: [3], 1: [3]})
        assert len(follower.worker.waiting) == 1 and late.number.tolist() == [0, 0]
    follower.worker.work()
    late = until(follower, late, [1, 0], lambda: follower.worker.waiting)
    assert late.number.tolist() == [0, 0] and (follower.host.plans[1].widths == alone.host.plans[1].widths).all()
    follower.worker.work()
    late = follower.told(labelled(late, 1, 0), {})
    (judged,) = [e for e in follower.events if e.what in ("adapted", "not better")]
    assert judged[3:] == alone.events[-1][3:] and not serving.lent(follower.host)
    assert late.number.tolist() == [int(judged.what == "adapted"), 0]


def test_what_a_worker_made_for_text_that_is_over_serves_nobody(rounded, monkeypatch):
    follower, state = beside(rounded)
    state = follower.told(labelled(state, 1, 0), {0: list(range(FIRST + 1))})
    state = follower.told(labelled(state, 0, 0), {})
    follower.worker.work()
    state = follower.told(labelled(state, 0, 0), {})
    assert follower._move is None and follower._measuring is None
    assert [e.what for e in follower.events] == ["novel", "known", "known"]


def test_a_worker_that_fails_leaves_the_baseline_running(rounded, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(online, "observe_windows", fails)
    follower, state = beside(rounded)
    state = follower.told(labelled(state, 1, 0), {0: list(range(FIRST + 1))})
    follower.worker.work()
    state = follower.told(labelled(state, 1, 0), {})
    assert state.number.tolist() == [0, 0]
    assert (follower.events[-1].what, follower.events[-1].name) == ("failed", "no memory")


def test_a_request_that_takes_the_place_of_another_begins_anew(rounded):
    """Its tokens are not those of the one before; and a client's monitor may go on with it."""
    follower, state = beside(rounded)
    state = follower.told(labelled(state, 1, 0), {0: list(range(100)), 1: list(range(100, 200))})
    follower._standing.serves = True
    state = follower.told(state, {})
    assert state.number.tolist() == [1, 0]
    state = follower.renewed(state, [0])
    assert state.number.tolist() == [0, 0] and state.watch.label.tolist() == [-1, 0]
    state = follower.told(labelled(state, 1, 0), {0: list(range(200, 250))})
    assert follower._windows(np.array([True, False])).size == 0
    assert [(e.request, e.text, e.token) for e in follower.events] == [(0, 0, 100), (1, 0, 100), (0, 1, 50)]
    state = follower.renewed(state, [1], monitors=jax.tree.map(lambda a: a[::-1], state.watch))
    assert state.watch.label.tolist() == [1, 1]


def test_a_request_that_has_ended_is_not_watched(rounded):
    model, _ = quantized_language_model(rounded, adaptive=True)
    first = generate(model, [[5] * 20], GenerateConfig(max_tokens=1))[0][0]
    states = []
    list(
        stream(
            model,
            [[5] * 20, [9] * 12],
            GenerateConfig(max_tokens=5, stop=(first,)),
            between=lambda s, _: states.append(s.watch.newer_tokens.tolist()) or s,
        )
    )
    assert states[0] == [20, 12] and states[-1][0] == 20 and states[-1][1] > 12


def test_texts_that_are_too_short_say_nothing(rounded):
    model, follower = quantized_language_model(rounded, adaptive=True)
    list(stream(model, [[5] * 20, [9] * 12], GenerateConfig(max_tokens=3), between=follower))
    assert follower.events == [] and follower.state.number.tolist() == [0, 0]


def test_adapting_that_fails_leaves_the_baseline_running(rounded, texts, monkeypatch):
    def damaged(*_, **__):
        raise ValueError("the 3-bit page of layer 0, expert 1, block 2 is damaged in host memory")

    monkeypatch.setattr(online, "begin", damaged)
    follower, out = followed(rounded, texts)
    assert follower.events[1].what == "failed" and "expert 1, block 2 is damaged" in describe_event(follower.events[1])
    plain, _ = quantized_language_model(rounded)
    ids = rounded.tokenizer.encode(texts["verse"]).ids
    for index, steps in enumerate(out):
        prompt = ids[200 * index : 200 * (index + 1)]
        assert [t[0] for t in steps] == generate(plain, [prompt], GenerateConfig(max_tokens=3))[0]
