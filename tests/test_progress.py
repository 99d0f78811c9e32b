"""What stages take: a clock between long work and whoever shows how far it is."""

from __future__ import annotations

from dynamo_jax import progress
from dynamo_jax.progress import Clock, Spent


def test_the_clock_gives_each_stage_the_time_until_it_spoke_and_the_most_memory(monkeypatch):
    times, sizes = iter([0.0, 1.0, 3.0, 3.5]), iter([10, 20, 30])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(progress, "peak_bytes", lambda: next(sizes))
    told = []
    clock = Clock(lambda *words: told.append(words))
    for words in (("read", 1, 1), ("write", 1, 2), ("write", 2, 2)):
        clock(*words)
    assert clock.stages == {"read": Spent(1.0, 10), "write": Spent(2.5, 30)}
    assert told == [("read", 1, 1), ("write", 1, 2), ("write", 2, 2)]


def test_the_peak_is_that_of_this_process():
    before = progress.peak_bytes()
    kept = bytearray(64 << 20)
    assert before is not None and len(kept) and progress.peak_bytes() >= max(before, len(kept))
