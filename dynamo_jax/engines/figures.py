"""What an operator watches, as figures of Prometheus, in the registry of the process that runs the steps."""

from __future__ import annotations

import time

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from dynamo_jax.engines.following import NAMES, Following
from dynamo_jax.engines.variants import AUTO

EACH = 1.0  # seconds between two updates
SCORES = 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0  # bounds; above 1 text is novel
OUTCOMES = ("adapted", "not better", "gains", "not sure", "left", "reads too much", "failed")


class Figures:
    """Of one engine. Gauges are of the process that set them last, where there are several."""

    def __init__(self, registry: CollectorRegistry = REGISTRY):
        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"dynamo_{name}", what, labels, registry=registry, multiprocess_mode="mostrecent")

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"dynamo_{name}", what, labels, registry=registry)

        self.requests = counter("requests", "Requests by the variant that they asked for.", "variant")
        self.switches = counter("switches", "Requests that were switched to another variant.")
        self.adaptations = counter("adaptations", "What became of plans for the texts of requests.", "outcome")
        self.pages = counter("pages_moved", "Pages sent to the device for plans that were judged.")
        self.novel = gauge("novel_requests", "Running requests whose text is novel.")
        self.bytes = gauge("expert_bytes_per_step", "Bytes of the experts that a step reads, expected.", "variant")
        self.saved = gauge("saved_nats_per_token", "Loss that the adapted variant is expected to save where it serves.")
        self.score = Histogram(
            "dynamo_monitor_score", "Of each decision of a monitor.", registry=registry, buckets=SCORES
        )
        self._totals: dict[str, int] = {}
        self._decisions: np.ndarray | None = None
        self._next = 0.0

    def asked(self, number: int, following: Following) -> None:
        """A request came that asked for this variant of the state, or left the choice to its monitor."""
        self.requests.labels("auto" if number == AUTO else _name(number, following)).inc()

    def told(self, following: Following) -> None:
        """Read what there is to read, once in ``EACH`` seconds."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + EACH
        for what, total in following.totals.items():
            if more := total - self._totals.get(what, 0):
                self._totals[what] = total
                if what in OUTCOMES:
                    self.adaptations.labels(what).inc(more)
                elif what in ("switches", "pages"):
                    getattr(self, what).inc(more)
        self.novel.set(int(following.novel.sum()))
        self.saved.set(0.0 if following.follower is None else following.follower.saves)
        for number, count in enumerate(following.bytes_per_step()):
            self.bytes.labels(_name(number, following)).set(count)
        if following.watch is not None:
            decisions, score = np.asarray(following.watch.decisions), np.asarray(following.watch.score)
            before = np.zeros_like(decisions) if self._decisions is None else self._decisions
            for value in score[(decisions > 0) & (decisions != before)].tolist():
                self.score.observe(value)
            self._decisions = decisions


def _name(number: int, following: Following) -> str:
    """What a request would call the state's variant: the adapted one has no number."""
    if following.follower is None or number == 0:
        return str(number)
    return NAMES[1] if number == 1 else str(number - 1)
