"""What follows the requests of an engine, told by made-up reports; no engine is needed."""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from later import Later

from dynamo_jax.engines import following as engines_following
from dynamo_jax.engines.following import Following, Report, report_of
from dynamo_jax.runtime import online, serving
from dynamo_jax.runtime.monitor import UNKNOWN
from dynamo_jax.runtime.standing import FIRST

PLACES = 3
TEXT = np.random.default_rng(0).integers(3, 60, FIRST + 1)


class Steps:
    """An engine's steps, with labels as the test wants them."""

    def __init__(self, quantized, adapts=True):
        others = [quantized.plan] if adapts else []
        host, self.begun = serving.init(quantized, PLACES, 1 + len(others), others=others)
        self.worker = Later()
        state = self.begun._replace(watch=None)
        self.following = Following(quantized, host, state, adapts, worker=self.worker)
        self.label = np.full(PLACES, UNKNOWN)

    def step(self, *tokens_of, comes=(), auto=True):
        """One step that takes tokens of places; whether the one after it has other pages or tables."""
        for place in comes:
            self.following.comes(place, auto)
        place_of = np.concatenate([np.full(len(tokens), place) for place, tokens in tokens_of] or [[]])
        tokens = np.concatenate([tokens for _, tokens in tokens_of] or [[]])
        watch = self.begun.watch._replace(label=self.label.astype(np.int32))
        report = Report(place_of.astype(np.int32), tokens.astype(np.int32), np.isin(np.arange(PLACES), comes), watch)
        self.following.told(jax.device_put(report))
        return self.following.between()

    def until_adapted(self):
        """Novel text at place 0, measured, moved and judged; how often pages or tables were others."""
        self.step((0, TEXT[:10]), comes=[0])
        self.label[0] = 2
        changes = 0
        self.step((0, TEXT[10:]))
        assert self.following.described()["measures"]
        for _ in range(200):
            if self.worker.waiting:
                self.worker.work()
            changes += self.step()
            if self.following.totals["adapted"] + self.following.totals["not better"]:
                return changes
            time.sleep(0.05)
        raise AssertionError(self.following.totals)


@pytest.fixture
def gains(monkeypatch):
    """Every plan is better than the baseline."""
    monkeypatch.setattr(online, "divergence", lambda *given: np.full(len(given[2]), 1.0 - given[-1]))


def test_text_that_is_novel_gets_a_variant_of_its_own_and_others_the_baseline(quantized, gains):
    steps = Steps(quantized)
    steps.step((1, TEXT[:9]), comes=[1])
    steps.label[1] = 0
    baseline = jax.tree.map(np.asarray, steps.following.state.tables[0])
    assert steps.until_adapted() and steps.following.plans
    assert [steps.following.number_at(place) for place in range(PLACES)] == [1, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, steps.following.state.tables[0], baseline)
    found = steps.following.described()
    assert json.loads(json.dumps(found))["totals"]["adapted"] == 1
    assert found["serves_adapted"] and not found["measures"]
    assert [(r["place"], r["text"], r["variant"]) for r in found["requests"]] == [
        (0, "novel", "adapted"),
        (1, quantized.knowledge.names[0], "baseline"),
    ]
    assert {e["what"] for e in found["events"]} == {"known", "novel", "adapted"}


def test_pages_come_a_chunk_between_two_steps(quantized, gains, monkeypatch):
    """So that no step waits for more; until all have come, the baseline serves."""
    written = []
    commit = serving.commit
    monkeypatch.setattr(serving, "commit", lambda here, chunk: written.append(chunk) or commit(here, chunk))
    monkeypatch.setattr("dynamo_jax.runtime.residency.MOST_TOGETHER", 2)
    steps = Steps(quantized)
    changes = steps.until_adapted()
    assert len(written) == changes > 2
    assert all(sum(map(len, one.chunks.values())) == 1 for one in written)


def test_a_request_that_takes_the_place_of_another_begins_at_the_baseline(quantized, gains):
    """From the step that is put together on, though no report of it has come."""
    steps = Steps(quantized)
    steps.until_adapted()
    steps.following.leaves(0)
    steps.following.comes(0, auto=True)
    assert steps.following.number_at(0) == 0
    steps.following.between()
    assert steps.following.watch.label[0] == UNKNOWN
    steps.step((0, TEXT[:5]))  # the last step of the request that was there
    assert steps.following.number_at(0) == 0 and steps.following.watch.label[0] == UNKNOWN
    watch = steps.begun.watch
    report = report_of(steps.begun, jnp.array([0]), jnp.array([7]), jnp.arange(PLACES) == 0)
    assert report.watch is watch
    steps.following.told(report)
    steps.following.between()
    assert steps.following.number_at(0) == 0 and steps.following.follower._streams[0] == [7]
    assert [event.what for event in steps.following.recent] == ["novel", "adapted"]


def test_nothing_is_adapted_to_a_request_that_names_its_variant(quantized):
    steps = Steps(quantized)
    steps.step((0, [1]), comes=[0], auto=False)
    steps.label[0] = 2
    for _ in range(3):
        steps.step((0, TEXT))
    assert not steps.worker.waiting and not steps.following.totals and steps.following.novel.tolist()[0]
    assert steps.following.described()["requests"][0]["variant"] == "as it asked"


def test_short_requests_add_up(quantized, gains):
    """Novel text of one request after another, none of which is enough to adapt to."""
    steps = Steps(quantized)
    for part in np.split(TEXT[:-1], 2):
        steps.label[0] = UNKNOWN
        steps.step((0, [1]), comes=[0])
        steps.label[0] = 2
        steps.step((0, part))
        assert len(steps.worker.waiting) == (part[-1] == TEXT[-2])
        steps.following.leaves(0)
        steps.step()


def test_keys_and_values_of_another_plan_are_told_apart(quantized, gains):
    steps = Steps(quantized)
    before = [steps.following.prefix_key(number) for number in (None, 0, 2)]
    steps.until_adapted()
    after = [steps.following.prefix_key(number) for number in (None, 0, 2)]
    assert len({*before, after[0]}) == 4 and before[1:] == after[1:]


def test_a_report_is_read_when_it_has_come_and_in_order(quantized, monkeypatch):
    steps = Steps(quantized)
    monkeypatch.setattr(engines_following, "_has_come", lambda report: False)
    steps.step((0, [5, 6]), comes=[0])
    steps.following.leaves(1)
    assert steps.following.watch is None and len(steps.following._told) == 2
    monkeypatch.undo()
    steps.step((0, [7]))
    assert steps.following.follower._streams[0] == [5, 6, 7] and not steps.following._told


def test_an_error_that_nobody_expects_stops_adaptation_and_no_step(quantized, monkeypatch, caplog):
    steps = Steps(quantized)

    def fails(*_):
        raise KeyError("what")

    monkeypatch.setattr(steps.following.follower, "told", fails)
    assert not steps.step((0, [5]), comes=[0])
    assert "adaptation has stopped" in caplog.text and not steps.following.described()["adapts"]
    steps.step((0, [6]))
    assert [steps.following.number_at(place) for place in range(PLACES)] == [0, 0, 0]


def test_without_adaptation_monitors_are_read_all_the_same(quantized):
    steps = Steps(quantized, adapts=False)
    steps.label[2] = 2
    assert not steps.step((2, [5, 6]), comes=[2]) and steps.following.novel.tolist() == [False, False, True]
    assert steps.following.described()["requests"][0]["text"] == "novel"
    assert steps.following.prefix_key(0) == "variant=0" and steps.following.number_at(2) == 0


def test_what_measuring_takes_is_compiled_before_there_are_requests(quantized, compilations):
    steps = Steps(quantized)
    tables = jax.tree.map(np.asarray, steps.following.state.tables)
    steps.following.warm()
    jax.tree.map(np.testing.assert_array_equal, steps.following.state.tables, tables)
    with compilations() as count:
        steps.until_adapted()
    assert count.compiled == 0


def test_bytes_of_a_step_are_of_the_requests_that_run(quantized):
    steps = Steps(quantized)
    assert steps.following.bytes_per_step() == []
    older = steps.begun.watch.older.at[1].set(2 * 128 / steps.begun.watch.older.shape[2])
    steps.begun = steps.begun._replace(
        watch=steps.begun.watch._replace(older=older, older_tokens=jnp.array([0.0, 128.0, 0.0]))
    )
    steps.step((1, [4]), comes=[1])
    experts = older.shape[2]
    whole = quantized.plan.expert_bytes().sum()
    assert steps.following.bytes_per_step() == pytest.approx([2 / experts * whole] * 2)
