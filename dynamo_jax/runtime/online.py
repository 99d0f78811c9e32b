"""A batch of running requests, followed: a variant is adapted to text that is novel, or where the gain is sure.

An object for the host's loop over decode steps; the state that it hands back is data for the same compiled step. A loop
that must not wait, as an engine's, gives it a thread to measure in (``worker``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from dynamo_jax.runtime.adapt import Observation, check_limit, observe_windows, saved_by
from dynamo_jax.runtime.mesh import all_agree, fetch, of_first, recoverable
from dynamo_jax.runtime.monitor import HOP, UNKNOWN, Watch
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import (
    Host,
    Move,
    State,
    adapted,
    advance,
    begin,
    divergence,
    is_novel,
    lent,
    renew,
    switch,
    whole,
)
from dynamo_jax.runtime.standing import MOST, RECENT, Limit, Standing, parts

WINDOW = 128  # tokens that are measured at a time
KEPT = 8192  # tokens of a request that are remembered
DEPARTED = 32  # requests that have ended whose tokens are


class Event(NamedTuple):
    """What happened after ``token`` tokens of a request's ``text``-th text. gain: nats a token that the adapted plan's
    predictions came nearer to those of 8 bits, on the text that it saw; moved: pages sent to the device."""

    token: int
    request: int
    text: int
    what: str  # known | novel | adapted | not better | of known text gains | not sure | reads too much | left | failed
    name: str  # the nearest known dataset, or why it failed
    score: float
    gain: float | None = None
    moved: int | None = None


class Sent(NamedTuple):
    """Pages on their way. judging: windows that say whether their plan is better; seen: of those that it is made from,
    and of those that judge it where they are others; before: the baseline's divergence on each that judges; standing:
    of the text that they are for."""

    move: Move
    judging: Int[np.ndarray, "S T1"]
    seen: list[Observation]
    before: Float[np.ndarray, " S"]
    standing: Standing


@dataclasses.dataclass
class Follower:
    """What follows the texts of a model that adapts (``text_model(.., adapt=True).follower``): ``events`` says what it
    found and did.

    It is called ``between`` two steps of ``runtime.generate.stream``; an engine calls ``told`` and ``renewed`` instead.
    Requests whose text is novel share variant 1. While no text is novel, those whose text is known share it, where
    adapting to that text surely gains. When it is adapted, serves and is left ``standing.py`` says. batch: requests
    that a step is taken to serve, by default as many as there are; reads: how many times the baseline's bytes a step
    may read at the variant. state: the last one handed back; a call of ``stream`` that begins with it goes on with the
    monitors and the variant of the call before.

    worker: where texts are measured and plans are made and judged, one at a time, while steps go on: a thread. Without
    one that is done within the call. With one the baseline lends no slots, since any step may need it, and no step may
    be given the planes and pages for good (``donate_argnums``), since they are read meanwhile. ValueError: a worker in
    a model on several processes, which would not measure in the same order.
    """

    model: QuantizedModel
    host: Host
    state: State
    batch: int | None = None
    reads: float = 1.0
    events: list[Event] = dataclasses.field(default_factory=list)
    worker: Executor | None = None

    def __post_init__(self) -> None:
        check_limit(1 if self.batch is None else self.batch, self.reads)
        if self.worker is not None and jax.process_count() > 1:
            raise ValueError("a worker measures beside the steps; several processes measure between them, together")
        self._measuring: Future[Sent] | None = None
        self._move: Sent | None = None
        self._judging: tuple[Sent, Future[Float[np.ndarray, " S"]]] | None = None
        self._lends = self.worker is None  # and until a page of the baseline can't come back
        self._begin(self.state.number.shape[0])

    def _begin(self, requests: int) -> None:
        """Nothing is known of the requests."""
        self._labels = np.full(requests, UNKNOWN)
        self._streams: list[list[int]] = [[] for _ in range(requests)]  # tokens, since about when the label is the same
        self._tokens, self._looked = np.zeros(requests, int), np.zeros(requests, int)  # of all texts; hops looked at
        self._current: list[list[int]] = [[] for _ in range(requests)]
        self._text, self._length = np.zeros(requests, int), np.zeros(requests, int)  # its number and tokens
        self._departed: list[list[int]] = []  # tokens of requests that have ended, of the text that the variant is for
        self._standing = Standing(HOP, known=True)

    def __call__(self, state: State, texts: list[list[int]]) -> State:
        """The state for the next step; texts: all tokens of each request so far. Other tokens than it had before are
        the next text of the same client."""
        if len(texts) != len(self._labels):
            self._begin(len(texts))
        new = {}
        for request, text in enumerate(texts):
            before = self._current[request]
            goes_on = bool(before) and text[: len(before)] == before
            if not goes_on:
                self._next_text(request)
            new[request], self._current[request] = text[len(before) :] if goes_on else text, text
        return self.told(state, new)

    def renewed(self, state: State, ended: Collection[int], monitors: Watch | None = None) -> State:
        """The state with other requests in the places of those that have ended; monitors: as ``serving.renew`` takes
        them."""
        self.forgets(ended)
        which = np.isin(np.arange(len(self._labels)), list(ended))
        self.state = renew(state, which, monitors)
        return self.state

    def forgets(self, ended: Collection[int]) -> None:
        """These requests have ended: others may take their places. What they showed of the text that the variant is for
        is kept, so that short requests add up."""
        for request in ended:
            if self._labels[request] != UNKNOWN and self._standing.known == (self._labels[request] != self._novel):
                self._departed = [*self._departed, self._streams[request]][-DEPARTED:]
            self._labels[request], self._streams[request], self._current[request] = UNKNOWN, [], []
            self._tokens[request], self._looked[request] = 0, 0
            self._next_text(request)

    @property
    def _novel(self) -> int:
        """The label of novel text."""
        return len(self.model.knowledge.names)

    @property
    def serves(self) -> bool:
        """Whether requests run at the variant that was adapted."""
        return self._standing.serves

    @property
    def busy(self) -> bool:
        """Whether a text is measured, or a plan for it is on its way."""
        return any(part is not None for part in (self._measuring, self._move, self._judging))

    @property
    def saves(self) -> float:
        """Nats a token that the variant is expected to save on the text that it serves, by the router's last choices;
        0 where none serves."""
        return float(np.mean(self._standing.saved)) if self.serves and self._standing.saved else 0.0

    def told(self, state: State, new: Mapping[int, list[int]]) -> State:
        """The state for the next step, after steps that took these tokens of each request, prompts too."""
        assert state.watch is not None
        novel, labels = fetch(is_novel(state)), fetch(state.watch.label)
        if len(labels) != len(self._labels):
            self._begin(len(labels))
        for request, more in new.items():
            self._append(request, more)
        for request in np.flatnonzero(labels != self._labels).tolist():
            self._note(state, request, "novel" if novel[request] else "known")
            if novel[request] or self._labels[request] == self._novel:  # else known before, too
                del self._streams[request][: -2 * HOP - 1]
        self._labels = np.array(labels)
        meant = self._meant(novel)
        self._look(state, meant)
        if self._measuring is None and self._move is None and self._judging is None:
            state = self._adapt(state, meant)
        if self._measuring is not None and self._measuring.done():
            self._send(state, meant)
        if self._move is not None and all_agree(state.placement, self._move.move.staged.ready()):
            state = self._take(state, meant)
        if self._judging is not None and self._judging[1].done():
            self._judge(state, meant)
        if self._lends and lent(self.host) and not (meant & self._standing.serves).all():
            state = self._whole(state, meant)
        self.state = switch(state, np.where(meant & self._standing.serves, 1, 0))
        return self.state

    def _whole(self, state: State, meant: np.ndarray) -> State:
        """Give the baseline its slots back: a request needs it."""
        self._standing.ends()
        try:
            self.host, state = whole(self.host, state)
        except recoverable(state.placement) as error:
            self._lends = False
            self._fail(state, meant, error)
        return state

    def _meant(self, novel: Bool[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """The requests that the variant is for: those whose text is novel, else those whose text has a name. It is
        left at once when text begins or stops to be novel, not while there is none."""
        known = not novel.any() and (self._standing.known or bool((self._labels != UNKNOWN).any()))
        if known != self._standing.known:
            self._standing, self._departed = Standing(HOP, known), []
        return self._labels != UNKNOWN if known else novel

    def _next_text(self, request: int) -> None:
        self._text[request] += 1
        self._length[request] = 0

    def _append(self, request: int, more: list[int]) -> None:
        stream = self._streams[request]
        stream += more
        del stream[:-KEPT]
        self._tokens[request] += len(more)
        self._length[request] += len(more)

    def _look(self, state: State, meant: np.ndarray) -> None:
        """Whether the variant still suits the text, from the router's counts of each hop, as they come."""
        assert state.watch is not None
        new = np.flatnonzero(meant & (self._tokens // HOP > self._looked))
        self._looked = self._tokens // HOP
        if not self._standing.serves or not len(new):
            return
        counts, tokens = fetch(state.watch.older), fetch(state.watch.older_tokens)
        ended = new[tokens[new] > 0]
        seen = counts[ended], tokens[ended]

        def agree(flag: bool) -> bool:
            return bool(of_first(state.placement, np.asarray(flag)))

        if self._standing.leaves(*seen, agree):
            self._note(state, int(new[0]), "left")
            self._departed = []
            for stream in self._streams:
                del stream[: -RECENT - 1]
        elif self._standing.overreads(*seen, agree):
            self._note(state, int(new[0]), "reads too much")

    def _texts(self, meant: np.ndarray) -> list[list[int]]:
        """What the variant is for: of requests that run, then of those that have ended, the last first."""
        return [*(stream for stream, own in zip(self._streams, meant) if own), *self._departed[::-1]]

    def _windows(self, meant: np.ndarray) -> Int[np.ndarray, "S T1"]:
        """The last tokens in whole windows, those of one request after those of another."""
        out = []
        for stream in self._texts(meant):
            for end in range(len(stream), WINDOW, -WINDOW):
                out.append(stream[end - WINDOW - 1 : end])
        return np.array(out, np.int32).reshape(-1, WINDOW + 1)

    def _adapt(self, state: State, meant: np.ndarray) -> State:
        """Measure the text and make a plan for it, if there is enough of it."""
        count = sum(max(len(stream) - 1, 0) // WINDOW for stream in self._texts(meant))
        if not self._standing.due(count * WINDOW):
            return state
        windows, lend = self._windows(meant)[: MOST // WINDOW], self._lends and bool(meant.all())
        making, judging = parts(windows[::-1], self._standing.known)
        try:
            if lent(self.host):  # what the baseline loses is measured with all of its pages
                self.host, state = whole(self.host, state)
                self._standing.serves = False
        except recoverable(state.placement) as error:
            self._fail(state, meant, error)
            return state
        standing, host = self._standing, self.host

        def sent() -> Sent:
            seen = [observe_windows(self.model, making, state.placement)]
            if standing.known:
                seen.append(observe_windows(self.model, judging, state.placement))
            before = divergence(self.model, state, judging, seen[-1], 0)
            plan = adapted(self.model, host, state, seen[0], 1, self.batch, self.reads, lend)
            return Sent(begin(host, state, plan, lend=lend), judging, seen, before, standing)

        self._measuring = self._started(sent)
        return state

    def _started(self, work: Callable[[], Any]) -> Future[Any]:
        """The work, under way in the worker, or done where there is none."""
        if self.worker is not None:
            return self.worker.submit(work)
        done: Future[Any] = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done

    def _send(self, state: State, meant: np.ndarray) -> None:
        """The pages of the plan that was made are on their way."""
        assert self._measuring is not None
        done, self._measuring = self._measuring, None
        try:
            sent = done.result()
        except recoverable(state.placement) as error:  # damaged pages, no memory: what runs goes on
            self._fail(state, meant, error)
            return
        self._move = sent if sent.standing is self._standing else None

    def _take(self, state: State, meant: np.ndarray) -> State:
        """Make the plan whose pages have come the variant, beside steps one chunk of them a call, and look whether it
        is better on the windows that it is for."""
        assert self._move is not None
        sent, self._move = self._move, None
        self._standing.serves = False  # until the plan that is there then has proved itself
        rest: Move | None = sent.move
        try:
            while rest is not None:
                self.host, state, rest = advance(self.host, state, rest)
                if rest is not None and self.worker is not None:
                    self._move = sent._replace(move=rest)
                    return state
        except recoverable(state.placement) as error:
            self._fail(state, meant, error)
            return state
        if sent.standing is self._standing:  # else the text that it was for is over
            judging = self.model, state, sent.judging, sent.seen[-1], 1
            self._judging = sent, self._started(lambda: (sent.before - divergence(*judging)) / WINDOW)
        return state

    def _judge(self, state: State, meant: np.ndarray) -> None:
        """The variant serves if it is better on the windows that it is for."""
        assert self._judging is not None
        ((move, _, seen, _, standing), done), self._judging = self._judging, None
        try:
            gains = done.result()
        except recoverable(state.placement) as error:
            self._fail(state, meant, error)
            return
        if standing is not self._standing:
            return
        gains = of_first(state.placement, gains)
        serves = bool(of_first(state.placement, np.asarray(standing.takes(gains))))
        bytes_each = [plan.expert_bytes() for plan in self.host.plans]
        limit = Limit(bytes_each[1], self.reads * bytes_each[0], len(meant) if self.batch is None else self.batch)
        saves = saved_by(self.host.plans[1], self.host.plans[0], self.model.knowledge, seen[0])
        counts, tokens = (np.concatenate(each) for each in zip(*((s.counts, s.tokens) for s in seen)))
        standing.begins(serves, saves, counts, tokens, limit)
        words = ("not sure", "gains") if standing.known else ("not better", "adapted")
        self._note(state, _first(meant), words[serves], gain=float(gains.mean()), moved=move.staged.pages)

    def _fail(self, state: State, meant: np.ndarray, error: Exception) -> None:
        self._note(state, _first(meant), "failed", name=" ".join(str(error).split()))

    def _note(self, state: State, request: int, what: str, name: str = "", **more: Any) -> None:
        assert state.watch is not None
        label, names = int(fetch(state.watch.label)[request]), self.model.knowledge.names
        name = name or (names[label] if 0 <= label < len(names) else "")
        token, text = int(self._length[request]), int(self._text[request])
        score = float(fetch(state.watch.score)[request])
        self.events.append(Event(token, request, text, what, name, score, **more))


def _first(meant: np.ndarray) -> int:
    """The request that an event of all of them is noted at."""
    return int(meant.argmax())
