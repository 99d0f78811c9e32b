"""Text generation: prefill and decode as two jitted functions over a key/value cache of fixed capacity.

Prompts of one batch are padded before their first token, so that all of them end in the same slot.
A prompt's length is rounded up to a bucket: prefill compiles once a bucket, decode once. Sampling
settings, the variant's number and the position are arrays, so changing them compiles nothing.

Axes: B prompts, T tokens of a bucket, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Cache, new_cache
from dynamo_jax.models.experts import ExpertsFn, float_experts
from dynamo_jax.models.stacked import any_decoder, is_stacked, new_stacked_cache
from dynamo_jax.models.tokenizer import check_ids
from dynamo_jax.runtime.mesh import Placement, cache_specs, check_same, constrained, fetch, put
from dynamo_jax.runtime.monitor import Watch
from dynamo_jax.runtime.serving import State, experts, for_requests, observe

Between = Callable[[State, list[list[int]]], State]
HOTTEST = 1e30  # a temperature past which float32 ends
SMALLEST_BUCKET = 16
SMALLEST_CAPACITY = 1024  # slots of the cache, unless the caller or a longer text asks for others


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """What generation needs. parameters: by dotted name, stacked (``models.stacked``) or not; state: of quantized
    experts, None where ``parameters`` hold the experts in float."""

    config: ModelConfig
    parameters: dict[str, Array]
    state: State | None = None
    dtype: Any = jnp.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to continue. temperature 0 takes the likeliest token; top_k 0 and top_p 1 leave all tokens in.

    max_tokens: new ones at most; stop: ids that end a text; seed: of the samples, below 2^32. ValueError: a value that
    is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            if not isinstance(value := getattr(self, name), (int, np.integer)) or isinstance(value, bool):
                raise ValueError(f"{name} {value}: expected a whole number")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}: expected 0 to {2**32 - 1}")
        for name, value, fits in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1),
            ("temperature", self.temperature, 0 <= self.temperature <= HOTTEST),
            ("top_k", self.top_k, self.top_k >= 0),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
        ):
            if not fits:
                raise ValueError(f"{name} {value} cannot be: temperature and top_k are 0 or more, top_p is in (0, 1]")


class Sampling(NamedTuple):
    """The sampling settings as arrays, and the key of this call."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    key: Array


def choose(logits: Float[Array, "B V"], sampling: Sampling, step: Int[Array, ""]) -> Int[Array, " B"]:
    """The next token of each sequence. top_k first, then the fewest likeliest tokens whose probability
    reaches top_p (arXiv 1904.09751); a sequence's draw depends on its own row only."""

    def greedy() -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(ranked: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(sampling.key, step), logits.shape[0])
        return jax.vmap(jax.random.categorical)(keys, ranked).astype(jnp.int32)

    def of_all() -> Array:
        return drawn(logits / jnp.maximum(sampling.temperature, 1e-6))

    def of_likeliest() -> Array:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / jnp.maximum(sampling.temperature, 1e-6)
        rank = jnp.arange(logits.shape[-1])
        ranked = jnp.where((sampling.top_k == 0) | (rank < sampling.top_k), ranked, -jnp.inf)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        ranked = jnp.where((before < sampling.top_p) | (rank == 0), ranked, -jnp.inf)
        return jnp.take_along_axis(order, drawn(ranked)[:, None], axis=-1)[:, 0].astype(jnp.int32)

    every = (sampling.top_k == 0) & (sampling.top_p >= 1)  # then nothing need be sorted
    return jax.lax.switch(jnp.where(sampling.temperature == 0, 0, 2 - every), (greedy, of_all, of_likeliest))


def _next(
    config: ModelConfig,
    dtype: Any,
    parameters: dict[str, Array],
    state: State | None,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    cache: Cache,
    sampling: Sampling,
    watched: Bool[Array, "B T"],
) -> tuple[Int[Array, " B"], Cache, Watch | None]:
    model = any_decoder(config, parameters)
    run: ExpertsFn = float_experts
    if state is not None:
        run = experts(state, request_of=jnp.where(watched, jnp.arange(len(tokens))[:, None], -1).reshape(-1))
    placement = state and state.placement
    spread = None if placement is None else placement.spread(len(tokens))
    hidden, routings, cache = model.cached_states(tokens, mask, cache, experts=run, dtype=dtype, spread=spread)
    logits = model.logits(hidden[:, -1:])[:, 0]
    token = choose(logits, sampling, cache.used)
    if placement is not None:  # each step gives what the next one takes
        token = constrained(placement, token, P(placement.rows(len(tokens))))
        cache = constrained(placement, cache, cache_specs(placement, cache, is_stacked(parameters)))
    return token, cache, state and observe(state, routings, watched).watch


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="cache")
def prefill(config, dtype, parameters, state, tokens, mask, cache, sampling):
    """Run the prompts (B, T), padding first, into an empty cache; their next tokens (B,), the cache, the monitor."""
    return _next(config, dtype, parameters, state, tokens, mask, cache, sampling, mask)


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="cache")
def decode(config, dtype, parameters, state, token, alive, cache, sampling):
    """One token (B,) more; the next ones, the cache, the monitor. Those not ``alive`` (B,) go to no expert and are not
    watched."""
    tokens = token[:, None]
    mask = jnp.ones_like(tokens, bool)
    return _next(config, dtype, parameters, state, tokens, mask, cache, sampling, alive[:, None])


@functools.partial(jax.jit, static_argnames=("config", "dtype", "steps"), donate_argnames="cache")
def decode_on(config, dtype, parameters, token, cache, sampling, steps):
    """``steps`` tokens (steps, B) more of every sequence, none of which ends, in one program, and the cache. What a
    step does to the weights alone, such as to convert them, is done once; their copies lie in memory meanwhile."""

    def step(before: tuple[Array, Cache], _: Any) -> tuple[tuple[Array, Cache], Array]:
        tokens = before[0][:, None]
        every = jnp.ones_like(tokens, bool)
        token, after, _ = _next(config, dtype, parameters, None, tokens, every, before[1], sampling, every)
        return (token, after), token

    (_, cache), tokens = jax.lax.scan(step, (token, cache), length=steps)
    return tokens, cache


def bucket(length: int) -> int:
    """The power of two, at least ``SMALLEST_BUCKET``, that a prompt's length is rounded up to."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def check_prompts(config: ModelConfig, prompts: list[list[int]]) -> None:
    """ValueError that names the first prompt that the model cannot take."""
    limit = config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no tokens")
        if len(prompt) >= limit:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens; the model has {limit} positions")
        check_ids(prompt, config.vocab_size, f"prompt {number}")


def stream(
    model: LanguageModel,
    prompts: list[list[int]],
    config: GenerateConfig,
    capacity: int | None = None,
    between: Between | None = None,
) -> Iterator[list[int | None]]:
    """Continue all prompts together: at each step one token for each, None for one that has ended.

    A sequence ends at a stop token (which is not given out), after ``max_tokens``, or at the model's last
    position. ``capacity`` is the number of the cache's slots; by default 1,024, or the power of two that the
    call needs, so that calls of different lengths share one decoding program. ``between``, for a quantized model, is
    called after each step with the state and all tokens of each prompt so far; the next step takes the state that
    it returns.
    """
    check_prompts(model.config, prompts)
    limit = model.config.max_position_embeddings
    if not prompts:
        return
    length = bucket(max(map(len, prompts)))
    room = np.array([min(config.max_tokens, limit - len(p)) for p in prompts])
    needed = length + int(room.max()) - 1
    if capacity is not None and capacity < needed:
        raise ValueError(f"capacity {capacity} is less than {needed}: a bucket of {length} and max_tokens less one")
    slots = capacity or max(SMALLEST_CAPACITY, bucket(needed))

    tokens: Any = np.zeros((len(prompts), length), np.int32)
    mask: Any = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    sampling = Sampling(
        jnp.float32(config.temperature),
        jnp.int32(min(config.top_k, model.config.vocab_size)),
        jnp.float32(config.top_p),
        jax.random.key(np.uint32(config.seed)),
    )
    fixed = (model.config, model.dtype, model.parameters)
    state = model.state and for_requests(model.state, len(prompts))
    placement = state and state.placement
    check_same(placement, "prompts and settings", np.frombuffer(repr((prompts, config, slots)).encode(), np.uint8))
    cache = _empty_cache(model, placement, len(prompts), slots)
    if placement is not None:
        rows = placement.rows(len(prompts))
        tokens, mask = (put(placement, a, rows) for a in (tokens, mask))
        sampling = jax.tree.map(lambda a: put(placement, a), sampling)
    token, cache, seen = prefill(*fixed, state, tokens, mask, cache, sampling)
    texts = [list(prompt) for prompt in prompts]
    for step in range(int(room.max())):
        found = fetch(token)
        room = np.where(np.isin(found, config.stop), 0, room)
        new = [int(t) if left > step else None for t, left in zip(found, room)]
        if state is not None:
            state = state._replace(watch=seen)
            if between:
                texts = [text if t is None else [*text, t] for text, t in zip(texts, new)]
                state = between(state, texts)
        if not (room > step).any():
            return
        yield new
        if not (room > step + 1).any():
            return
        alive: Any = room > step + 1
        alive = alive if placement is None else put(placement, alive, rows)
        token, cache, seen = decode(*fixed, state, token, alive, cache, sampling)


def _empty_cache(model: LanguageModel, placement: Placement | None, batch: int, slots: int) -> Cache:
    stacked = is_stacked(model.parameters)
    empty = functools.partial(new_stacked_cache if stacked else new_cache, model.config, batch, slots, model.dtype)
    if placement is None:
        return empty()
    specs = cache_specs(placement, jax.eval_shape(empty), stacked)
    shardings = jax.tree.map(placement.sharding, specs, is_leaf=lambda spec: isinstance(spec, P))
    return jax.jit(empty, out_shardings=shardings)()


def generate(
    model: LanguageModel, prompts: list[list[int]], config: GenerateConfig, capacity: int | None = None
) -> list[list[int]]:
    """``stream``, collected: the new tokens of each prompt."""
    out: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, config, capacity):
        for tokens, token in zip(out, step):
            if token is not None:
                tokens.append(token)
    return out
