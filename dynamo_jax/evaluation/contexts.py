"""Continuations that share a context, as the answers of a question do: the context runs once, and behind its keys and
values each continuation.

Axes: G contexts, T tokens of their bucket, B continuations, U tokens of theirs but the first, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Cache, new_cache
from dynamo_jax.models.experts import ExpertsFn, float_experts
from dynamo_jax.models.loss import next_token_scores
from dynamo_jax.models.stacked import any_decoder, is_stacked, new_stacked_cache
from dynamo_jax.runtime.generate import LanguageModel, bucket
from dynamo_jax.runtime.serving import State, experts

SMALLEST = 4  # tokens that a continuation's length, its first one left out, is rounded up to


class Group(NamedTuple):
    """A context and what may follow it, as ids; none is empty."""

    context: list[int]
    continuations: list[list[int]]


def scored(model: LanguageModel, groups: Sequence[Group], together: int) -> Iterator[tuple[int, int, float, bool]]:
    """Of each continuation its group, its number there, its log-probability in nats, and whether each of its tokens is
    the likeliest. The longest come first. together: tokens of a batch at most, if one context or continuation is no
    longer, of contexts and again of what follows them; none may be longer than the model's positions."""

    def sizes(number: int) -> tuple[int, int]:
        room = _after_first(groups[number])
        return max(bucket(len(groups[number].context)), room), room

    order = sorted(range(len(groups)), key=sizes, reverse=True)
    place = 0
    while place < len(order):
        size, _ = sizes(order[place])
        rows = max(1, together // size)
        some = order[place : place + rows]
        place += rows
        room = max(_after_first(groups[number]) for number in some)
        fixed = model.config, model.dtype, model.parameters, model.state
        tokens = np.zeros((rows, size), np.int32)
        mask = np.zeros((rows, size), bool)
        for row, number in enumerate(some):
            own = groups[number].context
            tokens[row, size - len(own) :], mask[row, size - len(own) :] = own, True
        first, cache = _contexts(*fixed, tokens, mask, room)
        asked = [(row, number, i) for row, number in enumerate(some) for i in range(len(groups[number].continuations))]
        for begin in range(0, len(asked), rows):
            part = asked[begin : begin + rows]
            owners, lengths = np.zeros(rows, np.int32), np.ones(rows, np.int32)
            answers = np.zeros((rows, room + 1), np.int32)
            for at, (row, number, i) in enumerate(part):
                answer = groups[number].continuations[i]
                owners[at], lengths[at], answers[at, : len(answer)] = row, len(answer), answer
            nats, greedy = map(np.asarray, _continuations(*fixed, first, cache, owners, answers, lengths))
            for at, (_, number, i) in enumerate(part):
                yield number, i, float(nats[at]), bool(greedy[at])


def _after_first(group: Group) -> int:
    """Tokens behind the first of its longest continuation, rounded up."""
    most = max(map(len, group.continuations)) - 1
    return most and max(SMALLEST, 1 << (most - 1).bit_length())


def of_one_request(state: State | None, real: Bool[Array, "B T"]) -> ExpertsFn:
    """How experts are multiplied: all tokens that are there are one request's, padding goes to no expert."""
    return float_experts if state is None else experts(state, request_of=jnp.where(real, 0, -1).reshape(-1))


@functools.partial(jax.jit, static_argnames=("config", "dtype", "room"))
def _contexts(
    config: ModelConfig,
    dtype: Any,
    parameters: dict[str, Array],
    state: State | None,
    tokens: Int[Array, "G T"],
    mask: Bool[Array, "G T"],
    room: int,
) -> tuple[Float[Array, "G V"], Cache]:
    """Log-probabilities of the first tokens that follow, and the cache, with room for so many more."""
    model = any_decoder(config, parameters)
    empty = new_stacked_cache if is_stacked(parameters) else new_cache
    cache = empty(config, len(tokens), tokens.shape[1] + room, dtype)
    hidden, _, cache = model.cached_states(tokens, mask, cache, experts=of_one_request(state, mask), dtype=dtype)
    return jax.nn.log_softmax(model.logits(hidden[:, -1:])[:, 0]), cache


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _continuations(
    config: ModelConfig,
    dtype: Any,
    parameters: dict[str, Array],
    state: State | None,
    first: Float[Array, "G V"],
    cache: Cache,
    owners: Int[Array, " B"],
    answers: Int[Array, "B U1"],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Log-probabilities of continuations, and whether each token is the likeliest. owners: their contexts."""
    own = first[owners]
    nats = jnp.take_along_axis(own, answers[:, :1], axis=1)[:, 0]
    greedy = own.argmax(axis=1) == answers[:, 0]
    if answers.shape[1] == 1:
        return nats, greedy
    model, sequences = any_decoder(config, parameters), int(is_stacked(parameters))
    layers = jax.tree.map(lambda a: jnp.take(a, owners, axis=sequences), cache.layers)
    cache = Cache(layers, cache.key_positions[owners], cache.used)
    real = jnp.arange(answers.shape[1] - 1) < lengths[:, None] - 1
    hidden, _, _ = model.cached_states(answers[:, :-1], real, cache, experts=of_one_request(state, real), dtype=dtype)
    nll, right = next_token_scores(hidden, model.head_weights(), answers[:, 1:], *model.logit_form())
    return nats - jnp.where(real, nll, 0).sum(axis=1), greedy & (right | ~real).all(axis=1)
