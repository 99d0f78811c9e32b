"""Figures of Prometheus, from made-up followings."""

from __future__ import annotations

import collections
import dataclasses
import types

import numpy as np
from prometheus_client import CollectorRegistry

from dynamo_jax.engines import figures
from dynamo_jax.engines.figures import Figures
from dynamo_jax.engines.variants import AUTO


@dataclasses.dataclass
class Made:
    follower: object = None
    watch: object = None
    totals: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    novel: np.ndarray = dataclasses.field(default_factory=lambda: np.array([True, False]))
    bytes: list = dataclasses.field(default_factory=list)

    def bytes_per_step(self):
        return self.bytes


def test_figures_are_of_what_happened_since_they_were_last_read(monkeypatch):
    monkeypatch.setattr(figures, "EACH", 0.0)
    registry = CollectorRegistry()
    own = Figures(registry)
    made = Made(types.SimpleNamespace(saves=0.02), bytes=[5.0, 4.0, 3.0])
    made.totals.update({"adapted": 2, "switches": 3, "pages": 40, "novel": 7})
    own.told(made)
    made.totals.update({"adapted": 1, "not better": 1})
    own.told(made)
    value = registry.get_sample_value
    assert value("dynamo_adaptations_total", {"outcome": "adapted"}) == 3
    assert value("dynamo_adaptations_total", {"outcome": "not better"}) == 1
    assert value("dynamo_adaptations_total", {"outcome": "novel"}) is None  # that is a label, no plan
    assert (value("dynamo_switches_total"), value("dynamo_pages_moved_total")) == (3, 40)
    assert (value("dynamo_novel_requests"), value("dynamo_saved_nats_per_token")) == (1, 0.02)
    for variant, count in (("0", 5.0), ("adapted", 4.0), ("1", 3.0)):
        assert value("dynamo_expert_bytes_per_step", {"variant": variant}) == count


def test_each_decision_of_a_monitor_counts_once(monkeypatch):
    monkeypatch.setattr(figures, "EACH", 0.0)
    registry = CollectorRegistry()
    own, made = Figures(registry), Made()
    for decisions, score in (([0, 0], [0.0, 0.0]), ([1, 0], [0.6, 0.0]), ([1, 1], [0.6, 3.0]), ([1, 1], [0.6, 3.0])):
        made.watch = types.SimpleNamespace(decisions=np.array(decisions), score=np.array(score))
        own.told(made)
    assert registry.get_sample_value("dynamo_monitor_score_count") == 2
    assert registry.get_sample_value("dynamo_monitor_score_bucket", {"le": "1.0"}) == 1


def test_figures_are_read_at_most_once_a_second():
    registry = CollectorRegistry()
    own, made = Figures(registry), Made()
    own.told(made)
    made.totals["switches"] = 9
    own.told(made)
    assert registry.get_sample_value("dynamo_switches_total") == 0


def test_requests_are_counted_by_what_they_asked_for():
    registry = CollectorRegistry()
    own, adapts, still = Figures(registry), Made(types.SimpleNamespace(saves=0.0)), Made()
    for number, made in ((AUTO, adapts), (0, adapts), (2, adapts), (1, still)):
        own.asked(number, made)
    for variant, count in (("auto", 1), ("0", 1), ("1", 2)):
        assert registry.get_sample_value("dynamo_requests_total", {"variant": variant}) == count
