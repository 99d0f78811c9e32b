"""The decoder's layers in loops: a program that grows with the kinds of layers, not with their number.

Layers that run the same program, one after the other or in turns, have their parameters and caches stacked, and
``lax.scan`` goes through them; the number of a layer is data to its experts. What takes long to compile, such as the
TPU kernel, is then compiled once for each kind of layer. Numbers are those of ``Decoder``.

Parameters are stacked once, when they are loaded: stacking them inside a jitted function would copy them in each call.

Axes: B batch, T tokens, S cached tokens, D hidden, V vocabulary; lead axis: the turns of a loop.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynamo_jax.models.attention import Places
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import (
    Cache,
    Decoder,
    ForwardPass,
    Layer,
    filled,
    layer_with_parameters,
    new_cache,
    with_parameters,
)
from dynamo_jax.models.experts import ExpertsFn
from dynamo_jax.models.mixers import LayerCache
from dynamo_jax.models.rest import Packed


class Loop(NamedTuple):
    """``turns`` turns of ``period`` layers each, from layer ``first`` on."""

    first: int
    period: int
    turns: int

    def layers(self, place: int) -> range:
        """Those at one place of the turns."""
        return range(self.first + place, self.first + self.period * self.turns, self.period)


@functools.lru_cache(maxsize=64)
def loops(config: ModelConfig) -> tuple[Loop, ...]:
    """All layers in order, in the loops that have the fewest layers in their turns: so many are compiled."""
    kinds = config.kinds
    best: dict[int, tuple[int, tuple[Loop, ...]]] = {len(kinds): (0, ())}  # from a layer on: compiled, loops
    for first in reversed(range(len(kinds))):
        found = []
        for period in range(1, len(kinds) - first + 1):
            turns = 1
            while kinds[first : first + period] == kinds[first + period * turns :][:period]:
                turns += 1
            if turns == 1 and period > 1:
                continue
            compiled, rest = best[first + period * turns]
            found.append((compiled + period, (Loop(first, period, turns), *rest)))
        best[first] = min(found, key=lambda one: (one[0], len(one[1]), -one[1][0].period * one[1][0].turns))
    return best[0][1]


def stacked(config: ModelConfig, arrays: dict[str, Array]) -> dict[str, Array]:
    """Parameters by dotted name as ``stacked_decoder`` takes them: ``loops.0.1.router`` is of the second layer of each
    turn of the first loop."""
    out = {name: a for name, a in arrays.items() if not name.startswith("layers.")}
    for number, loop in enumerate(loops(config)):
        for place in range(loop.period):
            prefixes = [f"layers.{layer}." for layer in loop.layers(place)]
            for name in (n.removeprefix(prefixes[0]) for n in arrays if n.startswith(prefixes[0])):
                own: list[Any] = [arrays[prefix + name] for prefix in prefixes]
                on_host = isinstance(own[0], np.ndarray)  # where they stay, for whoever puts them on several devices
                together: Any = np.stack(own) if on_host else jnp.stack(own)
                out[f"loops.{number}.{place}.{name}"] = together
    return out


def is_stacked(arrays: dict[str, Array]) -> bool:
    """Whether these parameters are those of ``stacked_decoder``, not of ``Decoder``."""
    return any(name.startswith("loops.") for name in arrays)


def any_decoder(config: ModelConfig, arrays: dict[str, Array]) -> Decoder | StackedDecoder:
    """The decoder that has these parameters, stacked or not."""
    return (stacked_decoder if is_stacked(arrays) else with_parameters)(config, arrays)


@functools.partial(jax.jit, static_argnames=("config", "batch", "capacity", "dtype"))
def new_stacked_cache(config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for ``capacity`` tokens a sequence."""
    return stacked_cache(config, new_cache(config, batch, capacity, dtype))


def stacked_cache(config: ModelConfig, cache: Cache) -> Cache:
    """A cache of ``Decoder`` as ``StackedDecoder`` takes it."""
    layers = [
        jax.tree.map(lambda *a: jnp.stack(a), *(cache.layers[layer] for layer in loop.layers(place)))
        for loop in loops(config)
        for place in range(loop.period)
    ]
    return cache._replace(layers=tuple(layers))


@dataclasses.dataclass(frozen=True)
class StackedDecoder(ForwardPass):
    """``Decoder`` with its layers in loops. around: all but the layers; arrays: theirs, by dotted name."""

    config: ModelConfig
    around: Decoder
    arrays: dict[str, Array]

    def embedded(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        return self.around.embedded(tokens, dtype)

    def run(
        self, x: Float[Array, "B T D"], experts: ExpertsFn, places: Places, caches: tuple[LayerCache, ...] | None
    ) -> tuple[Float[Array, "B T D"], list[Any], tuple[LayerCache, ...]]:
        """As that of ``Decoder``, with stacked caches."""
        all_caches: tuple[Any, ...] = caches or (None,) * sum(loop.period for loop in loops(self.config))
        extras: dict[int, Any] = {}
        after: list[LayerCache] = []
        begin = 0
        for number, loop in enumerate(loops(self.config)):
            own = [self._parameters(number, place) for place in range(loop.period)]
            of_loop = all_caches[begin : begin + loop.period]
            begin += loop.period

            def turn(carry: Any, of: Any, loop: Loop = loop) -> tuple[Any, Any]:
                x, caches = carry  # carried, so that the one cache that there is is written to
                index, own = of
                seen, left = [], []
                for place in range(loop.period):
                    layer = layer_with_parameters(self.config, loop.first + place, own[place])
                    cache = jax.tree.map(
                        lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), caches[place]
                    )
                    x, extra, new = layer(x, _numbered(experts, layer, loop, index), places, cache)
                    seen.append(extra)
                    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
                    left.append(jax.tree.map(put, caches[place], new))
                return (x, left), seen

            (x, left), seen = jax.lax.scan(turn, (x, list(of_loop)), (jnp.arange(loop.turns), own))
            after += left
            for place in range(loop.period):
                for index, layer in enumerate(loop.layers(place)):
                    extras[layer] = jax.tree.map(lambda a, index=index: a[index], seen[place])
        found = [extras[layer] for layer in self.config.moe_layers]
        return self.around.finish(x), found, tuple(after)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.around.logits(x)

    def head_weights(self) -> Float[Array, "V D"] | Packed:
        return self.around.head_weights()

    def logit_form(self) -> tuple[Float[Array, " V"] | None, float]:
        return self.around.logit_form()

    def _parameters(self, number: int, place: int) -> dict[str, Array]:
        prefix = f"loops.{number}.{place}."
        return {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}


def _numbered(experts: ExpertsFn, layer: Layer, loop: Loop, turn: Array) -> ExpertsFn:
    """``experts`` called with the number that the layer has in this turn among those with experts."""
    of_turn = sum(loop.first + place in layer.config.moe_layers for place in range(loop.period))

    def run(number: Any, *rest: Any) -> Any:
        return experts(number + of_turn * turn, *rest)

    return run


def stacked_decoder(config: ModelConfig, arrays: dict[str, Array]) -> StackedDecoder:
    """The decoder that has exactly these parameters, from ``stacked``; usable under jit."""
    layers = {name: a for name, a in arrays.items() if name.startswith("loops.")}
    around = filled(lambda: _around(config), {name: a for name, a in arrays.items() if name not in layers})
    return StackedDecoder(config, around, layers)


def _around(config: ModelConfig) -> Decoder:
    """A decoder without layers."""
    model = Decoder(config, rngs=nnx.Rngs(0), with_experts=False)
    model.layers = nnx.List([])
    return model
