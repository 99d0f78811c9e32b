"""Monitors and adaptation beside the steps of an engine: what a step reports, and what the next one is given.

    following = Following(model, host, state, adapts=True)
    following.comes(place, auto=True)      # a request takes this place with the step that is put together now
    following.number_at(place)             # the variant there, of a request that leaves the choice to its monitor
    if following.between():                # before a step is begun: pages or tables are others
        state = following.state
    following.told(report)                 # of a step that was just begun; nothing waits for it
    following.leaves(place)                # the request there has ended, or was put back into the queue

Reports are read in the order of their steps, each when its arrays have come, so a request switches a step or two after
its monitor changed its mind. Texts are measured, and plans made and judged, in a thread. Steps may be put together in
one thread and begun in another. No engine is imported here.

Axes: N tokens of a step, B places for requests.
"""

from __future__ import annotations

import collections
import logging
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from dynamo_jax.precision.plan import touched_share
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.adapt import observe_windows
from dynamo_jax.runtime.monitor import UNKNOWN, Watch
from dynamo_jax.runtime.online import WINDOW, Event, Follower
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import Host, State

RECENT_EVENTS = 100  # that are remembered
ADAPTED = 1  # the variant that follows the texts
NAMES = "baseline", "adapted"
log = logging.getLogger(__name__)


class Report(NamedTuple):
    """What a step says: the place of the request that each token is of, -1 for padding; the tokens; places that a
    request has taken with it; the monitors after it."""

    place_of: Int[Array, " N"]
    tokens: Int[Array, " N"]
    comes: Bool[Array, " B"]
    watch: Watch


class Following:
    """What runs at each of B places, and the variant that is adapted to it.

    state: of the next step, but for numbers and monitors, which are the engine's. adapts: whether
    ``ADAPTED`` is adapted at all; if not, monitors are read and nothing switches. plans: how often what that variant
    reads has changed, which keys and values in a prefix cache have to be told apart by. totals: of the events, pages
    and switches so far.
    """

    def __init__(
        self,
        model: QuantizedModel,
        host: Host,
        state: State,
        adapts: bool = True,
        batch: int | None = None,
        reads: float = 1.0,
        worker: Executor | None = None,
    ):
        self.model, self.state, self.plans = model, state, 0
        self.worker = worker or ThreadPoolExecutor(1, thread_name_prefix="adaptation")
        self.follower = Follower(model, host, state, batch, reads, worker=self.worker) if adapts else None
        self.totals: collections.Counter[str] = collections.Counter()
        self.recent: collections.deque[Event] = collections.deque(maxlen=RECENT_EVENTS)
        self.watch: Watch | None = None
        self._host, places = host, len(state.number)
        self._told: collections.deque[Report | int] = collections.deque()  # an int: the place that a request has left
        self._empty, self._number = np.ones(places, bool), np.zeros(places, int)
        self._auto = np.zeros(places, bool)  # requests that leave the choice to their monitor
        self._came, self._begun = np.zeros(places, int), np.zeros(places, int)  # requests, put together and reported

    @property
    def host(self) -> Host:
        return self._host if self.follower is None else self.follower.host

    def warm(self) -> None:
        """Compile what measuring a text takes, and send pages once, before there are requests."""
        if self.follower is None:
            return
        tokens = np.random.default_rng(0).integers(0, self.model.config.vocab_size, (2, WINDOW + 1))
        host, state = self.follower.host, self.state
        baseline, seen = host.plans[0], observe_windows(self.model, tokens, state.placement)
        plan = serving.adapted(self.model, host, state, seen, ADAPTED)
        host, state = serving.finish(host, state, serving.begin(host, state, plan, ADAPTED))
        serving.divergence(self.model, state, tokens, seen, ADAPTED)
        self.follower.host, self.state = serving.finish(host, state, serving.begin(host, state, baseline))
        self.follower.state = self.state

    def comes(self, place: int, auto: bool) -> None:
        """A request takes this place, with the step that is put together now. auto: it leaves the choice to its
        monitor; else nothing is adapted to its text."""
        self._came[place] += 1
        self._auto[place] = auto

    def number_at(self, place: int) -> int:
        """The variant for a request at this place that leaves the choice to its monitor."""
        return int(self._number[place]) if self._came[place] == self._begun[place] else 0

    def leaves(self, place: int) -> None:
        """The request has left this place."""
        self._told.append(place)

    def told(self, report: Report) -> None:
        """What a step says whose arrays are still to come; nothing before there are requests."""
        if not self._came.any():
            return
        for array in jax.tree.leaves(report):
            array.copy_to_host_async()
        self._told.append(report)

    def between(self) -> bool:
        """Between two steps: read the reports that have come. Whether pages or tables in ``state`` are others since."""
        before = self.state
        try:
            self._read()
        except Exception:
            log.exception("adaptation has stopped; requests that name no variant stay at the baseline")
            self.follower, self._number = None, np.zeros_like(self._number)
        parts = [jax.tree.leaves((s.resident, s.tables)) for s in (before, self.state)]
        return any(a is not b for a, b in zip(*parts))

    def _read(self) -> None:
        read = 0
        while self._told and (isinstance(first := self._told[0], int) or _has_come(first)):
            self._told.popleft()
            if isinstance(first, int):
                self._empty[first] = True
                self._forget([first])
                self.watch = self.watch and self._masked(self.watch)
            else:
                self._take(jax.device_get(first))
            read += 1
        if not read and self.watch is not None:
            self._follow(self.watch, {})  # a plan or its pages may have come

    def _forget(self, places: list[int]) -> None:
        if self.follower is not None:
            self.follower.forgets(places)

    def _take(self, report: Report) -> None:
        comes = np.flatnonzero(report.comes)
        self._empty[comes] = False
        self._begun[comes] += 1
        self._forget(comes.tolist())
        new = {
            int(place): report.tokens[report.place_of == place].tolist()
            for place in np.unique(report.place_of)
            if place >= 0 and self._auto[place] and not self._empty[place]
        }
        self.watch = self._masked(report.watch)
        self._follow(self.watch, new)

    def _masked(self, watch: Watch) -> Watch:
        """The monitors, of which those of empty places say nothing."""
        return watch._replace(label=cast(Any, np.where(self._empty, UNKNOWN, watch.label)))

    def _follow(self, watch: Watch, new: dict[int, list[int]]) -> None:
        if self.follower is None:
            return
        tables, label = self.state.tables, np.where(self._auto, watch.label, UNKNOWN)
        self.state = self.follower.told(self.state._replace(watch=watch._replace(label=cast(Any, label))), new)
        number = np.asarray(self.state.number)
        for place in np.flatnonzero((number != self._number) & ~self._empty).tolist():
            self.totals["switches"] += 1
            log.info("place %d: switched to the %s variant", place, NAMES[number[place]])
        self._number = number
        if self.state.tables[ADAPTED] is not tables[ADAPTED]:
            self.plans += 1
        for event in self.follower.events:
            self._note(event)
        self.follower.events.clear()

    def _note(self, event: Event) -> None:
        self.recent.append(event)
        self.totals[event.what] += 1
        self.totals["pages"] += event.moved or 0
        log.info("place %d, token %d: %s", event.request, event.token, words_of(event))

    def prefix_key(self, number: int | None) -> str:
        """Under which keys and values of a request at variant ``number``, None for one that leaves the choice to its
        monitor, may serve another's."""
        changes = number is None or (number == ADAPTED and self.follower is not None)
        name = "auto" if number is None else f"variant={number}"
        return f"{name};plan={self.plans}" if changes else name

    @property
    def novel(self) -> Bool[np.ndarray, " B"]:
        """The places whose text is novel."""
        if self.watch is None:
            return np.zeros(len(self._empty), bool)
        return np.asarray(self.watch.label == len(self.model.knowledge.names))

    def bytes_per_step(self) -> list[float]:
        """What a step reads of the experts at each variant, expected from where the router sent the last tokens of the
        requests that run; empty before there are any."""
        if self.watch is None or not (seen := ~self._empty & (self.watch.older_tokens > 0)).any():
            return []
        rows, tokens = np.asarray(self.watch.older), np.asarray(self.watch.older_tokens)
        use = rows[seen].sum(axis=0) / tokens[seen].sum()
        touched = touched_share(use, int(seen.sum()))
        return [float((touched * plan.expert_bytes()).sum()) for plan in self.host.plans]

    def described(self) -> dict[str, Any]:
        """All that an operator may ask, in JSON's types."""
        names, places = [*self.model.knowledge.names, "novel"], []
        if self.watch is not None:
            for place in np.flatnonzero(~self._empty).tolist():
                label = int(self.watch.label[place])
                text, score = names[label] if label >= 0 else "unknown", float(self.watch.score[place])
                variant = NAMES[self.number_at(place)] if self._auto[place] else "as it asked"
                places.append({"place": place, "text": text, "score": round(score, 4), "variant": variant})
        return {
            "adapts": self.follower is not None,
            "serves_adapted": self.follower is not None and self.follower.serves,
            "measures": self.follower is not None and self.follower.busy,
            "expected_nats_saved": 0.0 if self.follower is None else self.follower.saves,
            "plans": self.plans,
            "bytes_per_step": self.bytes_per_step(),
            "totals": dict(self.totals),
            "requests": places,
            "events": [event._asdict() for event in self.recent],
        }


def report_of(
    state: State, place_of: Int[Array, " N"], tokens: Int[Array, " N"], comes: Bool[Array, " B"]
) -> Report | None:
    """What a step that left this state says, for use inside jit; nothing where nobody watches."""
    return None if state.watch is None else Report(place_of, tokens, comes, state.watch)


def words_of(event: Event) -> str:
    """ "known, wiki, score 0.31"."""
    found = [event.what, *[event.name] * bool(event.name), f"score {event.score:.2f}"]
    if event.gain is not None:
        found.append(f"{event.gain:+.4f} nats a token nearer to 8 bits, {event.moved} pages moved")
    return ", ".join(found)


def _has_come(report: Report) -> bool:
    return all(a.is_ready() for a in jax.tree.leaves(report))
