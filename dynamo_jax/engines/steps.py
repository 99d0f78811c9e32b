"""What is common to the steps of engines: who has which place in a state, and what a step's requests ask for.

Axes: N tokens of a step, R requests of it, B places for requests.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.specs import Grouped
from dynamo_jax.runtime import serving


class Places:
    """Which of ``count`` places in a state each request has, by its name in the engine."""

    def __init__(self, count: int):
        self.free = list(reversed(range(count)))
        self.of: dict[str, int] = {}

    def take(self, present: Sequence[str], alive: Container[str]) -> list[tuple[int, bool]]:
        """Of each request that is ``present`` in a step its place, and whether it takes that anew.

        alive: all that the engine still knows, whose places are kept while they wait. Where places are short, those
        that wait lose theirs.
        """
        for gone in [name for name in self.of if name not in alive]:
            self.free.append(self.of.pop(gone))
        new = [name for name in present if name not in self.of]
        waiting = [name for name in self.of if name not in present]
        for name in waiting[: max(0, len(new) - len(self.free))]:
            self.free.append(self.of.pop(name))
        self.of |= {name: self.free.pop() for name in new}
        return [(self.of[name], name in new) for name in present]


def place_of_tokens(starts: Int[Array, " R+1"], places: Int[Array, " R"], tokens: int) -> Int[Array, " N"]:
    """The place of the request that each of ``tokens`` is of, -1 for padding behind the last one. starts: where the
    tokens of each request begin, and where the last ones end; places: of each request."""
    number = jnp.arange(tokens)
    row = jnp.searchsorted(starts, number, side="right") - 1
    return jnp.where(number < starts[-1], places[jnp.minimum(row, len(places) - 1)], -1)


def asked(
    state: serving.State, place_of: Int[Array, " N"], variant: Int[Array, " N"], comes: Bool[Array, " N"]
) -> tuple[serving.State, Bool[Array, " B"]]:
    """The state in which requests run at the ``variant`` that they ask for, with new monitors where one ``comes``; and
    the places that these take.

    place_of: of each, or of each of their tokens; -1 says nothing.
    """
    places = len(state.number)
    at = jnp.where(place_of < 0, places, place_of)  # past the end
    taken = jnp.zeros(places, bool).at[at].max(comes, mode="drop")
    state = serving.renew(state, taken)
    return serving.switch(state, state.number.at[at].set(variant, mode="drop")), taken


def form_of(config: ModelConfig, engine: str) -> tuple[int, int]:
    """Heads of keys, and their size, of all layers. ValueError where a pool of one form, which the engine has, has no
    place for a layer's keys and values."""
    mixers = [layer.mixer for layer in config.layers]
    for index, mixer in enumerate(mixers):
        if not isinstance(mixer, Grouped):
            raise ValueError(
                f"layer {index} is {type(mixer).__name__}: {engine} serves our decoder with grouped attention alone"
            )
    forms = sorted({(m.num_key_value_heads, m.head_dim) for m in mixers if isinstance(m, Grouped)})
    if len(forms) > 1:
        raise ValueError(f"layers have {forms} heads of keys and their sizes: {engine} serves our decoder with one")
    return forms[0]


def wrap(owner: type, name: str, hook: Callable[..., Any]) -> None:
    """Have a method of an engine's class call ``hook`` with itself before its own arguments; once, however often this
    is called."""
    original = getattr(owner, name)
    if original.__module__ == __name__:
        return

    def method(self: Any, *given: Any, **named: Any) -> Any:
        return hook(original, self, *given, **named)

    setattr(owner, name, method)
