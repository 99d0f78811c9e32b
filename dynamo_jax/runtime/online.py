"""A batch of running requests, followed: when the monitor calls a text novel, a variant is adapted to it and taken.

An object for the host's loop over decode steps; the state that it hands back is data for the same compiled step.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dynamo_jax.runtime.adapt import adapted_plan, observe_windows
from dynamo_jax.runtime.monitor import UNKNOWN
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import Host, State, begin, finish, is_novel, spare, switch
from dynamo_jax.runtime.switch import switched_step

WINDOW = 128  # tokens that are measured at a time
FIRST = 256  # tokens of novel text, before a variant is adapted to it
AGAIN = 4  # times more tokens of novel text, and the variant is adapted once more


class Event(NamedTuple):
    """What happened after ``token`` tokens of a request's ``text``-th text. gain: nats a token that the adapted plan
    gained on the text that it saw; moved: pages sent to the device."""

    token: int
    request: int
    text: int
    what: str  # known | novel | adapted | not better | failed
    name: str  # the nearest known dataset, or why it failed
    score: float
    gain: float | None = None
    moved: int | None = None


@dataclasses.dataclass
class Follower:
    """Is called ``between`` two steps of ``generate.stream``. Requests whose text is novel share variant 1.

    state: the last one handed back; a call of ``stream`` that begins with it goes on with the monitors and the variant
    of the call before.
    """

    model: QuantizedModel
    host: Host
    state: State
    events: list[Event] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._labels = np.full(self.state.number.shape[0], UNKNOWN)
        self._texts: list[list[list[int]]] = [[] for _ in self._labels]  # of each request, since it is of its label
        self._texts_begun = np.zeros(len(self._labels), int)
        self._next = FIRST
        self._good = False
        self._parameters: dict[str, Array] | None = None

    def __call__(self, state: State, texts: list[list[int]]) -> State:
        assert state.watch is not None
        novel, labels = np.asarray(is_novel(state)), np.asarray(state.watch.label)
        if len(labels) != len(self._labels):
            self._labels, self._texts = np.full(len(labels), UNKNOWN), [[] for _ in labels]
            self._texts_begun = np.zeros(len(labels), int)
        for request, (text, label) in enumerate(zip(texts, labels)):
            own = self._texts[request]
            goes_on = bool(own) and own[-1] == text[: len(own[-1])]
            self._texts_begun[request] += not goes_on
            if label != self._labels[request]:
                self._note(state, texts, request, "novel" if novel[request] else "known")
                del own[: len(own) - goes_on]
            own[len(own) - goes_on :] = [text]
        self._labels = labels
        windows = self._windows([text for own, new in zip(self._texts, novel) if new for text in own])
        if len(windows) * WINDOW >= self._next:
            self._next *= AGAIN
            state = self._adapt(state, texts, int(np.flatnonzero(novel)[0]), windows)
        self.state = switch(state, np.where(novel & self._good, 1, 0))
        return self.state

    def _windows(self, texts: list[list[int]]) -> Int[np.ndarray, "S T1"]:
        """The last tokens of the texts, at most as many as are asked for, in whole windows."""
        out: list[np.ndarray] = []
        for text in reversed(texts):
            count = (len(text) - 1) // WINDOW
            own = np.asarray(text[len(text) - 1 - count * WINDOW :], np.int32)
            out += [own[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)]
        return np.array(out[: self._next // WINDOW], np.int32).reshape(-1, WINDOW + 1)

    def _adapt(self, state: State, texts: list[list[int]], request: int, windows: np.ndarray) -> State:
        model = self.model
        plan = adapted_plan(model.plan, model.knowledge, observe_windows(model, windows), spare(self.host, state))
        try:
            staged = begin(self.host, state, plan)
        except (ValueError, RuntimeError) as error:  # damaged pages, a transfer that failed: the baseline serves on
            self._note(state, texts, request, "failed", name=str(error))
            return state
        moved = staged.pages
        self.host, state = finish(self.host, state, plan, staged)
        gain = self._gain(state, windows)
        self._good = gain > 0
        self._note(state, texts, request, "adapted" if self._good else "not better", gain=gain, moved=moved)
        return state

    def _gain(self, state: State, windows: np.ndarray) -> float:
        """Nats a token that variant 1 predicts the windows' own tokens better by."""
        if self._parameters is None:
            arrays = self.model.parameters.items()
            self._parameters = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in arrays}
        fixed = (self.model.config, self._parameters, state.resident, state.tables)
        losses = [
            [float(switched_step(*fixed, jnp.asarray(number), jnp.asarray(w[None]))[0][0]) for w in windows]
            for number in (0, 1)
        ]
        return (sum(losses[0]) - sum(losses[1])) / windows[:, 1:].size

    def _note(self, state: State, texts: list[list[int]], request: int, what: str, name: str = "", **more: Any) -> None:
        assert state.watch is not None
        label = int(state.watch.label[request])
        names = self.model.knowledge.names
        name = name or (names[label] if 0 <= label < len(names) else "")
        score, text = float(state.watch.score[request]), int(self._texts_begun[request])
        self.events.append(Event(len(texts[request]), request, text, what, name, score, **more))
