"""How likely a model finds continuations of contexts: what zero-shot tasks are scored by.

Sequences run in batches of few shapes, a power of two of tokens each, so that nothing compiles once each length was
met. A context that several continuations share runs once (``contexts.py``). The longest run first, so that what does
not fit the memory fails at once; where the run time follows the texts they run whole, in their own order instead.

Axes: B sequences, T tokens of a bucket (T1 = T + 1).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.evaluation.contexts import Group, of_one_request, scored
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.loss import next_token_scores
from dynamo_jax.models.stacked import any_decoder
from dynamo_jax.models.tokenizer import check_ids, encode
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.generate import Between, LanguageModel, bucket
from dynamo_jax.runtime.monitor import Watch
from dynamo_jax.runtime.serving import State, observe

TOGETHER = 4096  # tokens of a batch


class Pair(NamedTuple):
    """A context and what may follow it, as ids; neither is empty."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """Of a continuation. nats: its log-probability; greedy: whether each of its tokens is the likeliest; cut: tokens
    of the context, from its beginning, that the model has no positions for."""

    nats: float
    greedy: bool
    cut: int


def pair_of(tokenizer: tokenizers.Tokenizer, context: str, continuation: str, prefix: int | None) -> Pair:
    """The ids of both as those of one text: blanks at the context's end are the continuation's.

    prefix: the token that stands before a text, which an empty context has alone. ValueError: a continuation of no
    tokens, or an empty context without a prefix.
    """
    kept = context.rstrip()
    whole = encode(tokenizer, context + continuation, special=False)
    before = encode(tokenizer, kept, special=False) if kept else []
    if not before:
        if prefix is None:
            raise ValueError("an empty context, and the model has no token that begins a text")
        before, whole = [prefix], [prefix, *whole]
    if len(whole) <= len(before):
        raise ValueError(f"the continuation {continuation[:80]!r} has no tokens of its own")
    return Pair(before, whole[len(before) :])


def likelihoods(
    model: LanguageModel,
    pairs: Sequence[Pair],
    between: Between | None = None,
    progress: Progress = no_progress,
    together: int = TOGETHER,
) -> list[Likelihood]:
    """Of each continuation, in the order given.

    between: as ``runtime.generate.stream`` takes it, of a model whose state is of one request: it sees the sequences in
    their order, a batch at a time, and the next batch runs at what it returns. together: tokens of a batch, as many
    as a sequence at least. A sequence past the model's positions loses the beginning of its context, of a continuation
    that is longer by itself its own beginning is not predicted. ValueError: an id that the model does not have.
    """
    limit = model.config.max_position_embeddings
    for number, pair in enumerate(pairs):
        check_ids([*pair.context, *pair.continuation], model.config.vocab_size, f"sequence {number}")
    lengths = [min(len(p.context) + len(p.continuation) - 1, limit) for p in pairs]
    out: list[Likelihood | None] = [None] * len(pairs)
    shared = [] if between else _shared(pairs, limit)
    groups = [Group(pairs[some[0]].context, [pairs[i].continuation for i in some]) for some in shared]
    for done, (number, place, nats, greedy) in enumerate(scored(model, groups, together), 1):
        out[shared[number][place]] = Likelihood(nats, greedy, 0)
        progress("likelihoods", done, len(pairs))
    left = [i for i, one in enumerate(out) if one is None]
    order = left if between else sorted(left, key=lambda i: -lengths[i])
    state, done = model.state, len(pairs) - len(left)
    for some in _batches(order, lengths, together):
        size = bucket(max(lengths[i] for i in some))
        tokens, counted, real, cuts = _arrays([pairs[i] for i in some], size, max(1, together // size), limit)
        nats, greedy, watch = _scored(
            model.config, model.dtype, model.parameters, state, *map(jnp.asarray, (tokens, counted, real))
        )
        for row, number in enumerate(some):
            out[number] = Likelihood(-float(nats[row]), bool(greedy[row]), cuts[row])
        if between is not None and state is not None:
            texts = [int(t) for i in some for t in (*pairs[i].context, *pairs[i].continuation)]
            state = between(state._replace(watch=watch), [texts])
        done += len(some)
        progress("likelihoods", done, len(pairs))
    return [one for one in out if one is not None]


def _shared(pairs: Sequence[Pair], limit: int) -> list[list[int]]:
    """Pairs that have a context in common which need not be cut, context by context."""
    of: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if len(context) + len(continuation) - 1 <= limit:
            of.setdefault(tuple(context), []).append(number)
    return [some for some in of.values() if len(some) > 1]


def _batches(order: list[int], lengths: list[int], together: int) -> Iterator[list[int]]:
    """Neighbours in ``order`` that fit one batch, padded to the longest."""
    some: list[int] = []
    for number in order:
        size = bucket(max(lengths[i] for i in (*some, number)))
        if some and (len(some) + 1) * size > together:
            yield some
            some = []
        some.append(number)
    if some:
        yield some


def _arrays(
    pairs: list[Pair], size: int, rows: int, limit: int
) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T"], Bool[np.ndarray, "B T"], list[int]]:
    """Token ids with padding behind them, which predictions count, which tokens are there, and how many were cut."""
    tokens = np.zeros((rows, size + 1), np.int32)
    counted, real = np.zeros((rows, size), bool), np.zeros((rows, size), bool)
    cuts = []
    for row, (context, continuation) in enumerate(pairs):
        whole = [*context, *continuation][-(limit + 1) :]
        length = len(whole) - 1
        tokens[row, : length + 1] = whole
        real[row, :length] = True
        counted[row, max(0, length - len(continuation)) : length] = True
        cuts.append(max(0, len(context) + len(continuation) - limit - 1))
    return tokens, counted, real, cuts


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _scored(
    config: ModelConfig,
    dtype: Any,
    parameters: dict[str, Array],
    state: State | None,
    tokens: Int[Array, "B T1"],
    counted: Bool[Array, "B T"],
    real: Bool[Array, "B T"],
) -> tuple[Float[Array, " B"], Bool[Array, " B"], Watch | None]:
    """Summed nats of the tokens that count, whether all of them are the likeliest, and the monitor, which takes all
    sequences, one after the other, for one request's text."""
    model = any_decoder(config, parameters)
    hidden, routings = model.hidden_states(tokens[:, :-1], experts=of_one_request(state, real), dtype=dtype)
    nll, right = next_token_scores(hidden, model.head_weights(), tokens[:, 1:], *model.logit_form())
    watch = state and observe(state, routings, real.reshape(1, -1)).watch
    return jnp.where(counted, nll, 0).sum(axis=1), (right | ~counted).all(axis=1), watch
