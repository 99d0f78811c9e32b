"""The decoder's layers in loops: a program that grows with the kinds of layers, not with their number.

Layers that run the same program, one after the other or in turns of two, have their parameters and caches stacked, and
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
from flax import nnx
from jaxtyping import Array, Float, Int

from dynamo_jax.models.attention import LayerCache, Places
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import (
    Cache,
    CachedPass,
    Decoder,
    Layer,
    filled,
    layer_with_parameters,
    new_cache,
    with_parameters,
)
from dynamo_jax.models.experts import ExpertsFn
from dynamo_jax.models.layerwise import first_alike

PERIODS = (1, 2)  # layers of one turn: sparse and dense ones, or long and short windows, alternate


class Loop(NamedTuple):
    """``turns`` turns of ``period`` layers each, from layer ``first`` on."""

    first: int
    period: int
    turns: int

    def layers(self, place: int) -> range:
        """Those at one place of the turns."""
        return range(self.first + place, self.first + self.period * self.turns, self.period)


def loops(config: ModelConfig) -> list[Loop]:
    """All layers in order, each time the loop that takes in most of what is left."""
    kinds = [first_alike(config, layer) for layer in range(config.num_hidden_layers)]
    out: list[Loop] = []
    first = 0
    while first < len(kinds):
        found = []
        for period in PERIODS:
            turns = 1
            while kinds[first : first + period] == kinds[first + period * turns :][:period]:
                turns += 1
            found.append(Loop(first, period if turns > 1 else 1, turns))
        out.append(max(found, key=lambda loop: loop.period * loop.turns))
        first += out[-1].period * out[-1].turns
    return out


def stacked(config: ModelConfig, arrays: dict[str, Array]) -> dict[str, Array]:
    """Parameters by dotted name as ``stacked_decoder`` takes them: ``loops.0.1.router`` is of the second layer of each
    turn of the first loop."""
    out = {name: a for name, a in arrays.items() if not name.startswith("layers.")}
    for number, loop in enumerate(loops(config)):
        for place in range(loop.period):
            prefixes = [f"layers.{layer}." for layer in loop.layers(place)]
            for name in (n.removeprefix(prefixes[0]) for n in arrays if n.startswith(prefixes[0])):
                out[f"loops.{number}.{place}.{name}"] = jnp.stack([arrays[prefix + name] for prefix in prefixes])
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
class StackedDecoder(CachedPass):
    """``Decoder`` with its layers in loops. around: all but the layers; arrays: theirs, by dotted name."""

    config: ModelConfig
    around: Decoder
    arrays: dict[str, Array]

    def embedded(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        return self.around.embedded(tokens, dtype)

    def run(
        self, x: Float[Array, "B T D"], experts: ExpertsFn, places: Places, caches: tuple[LayerCache, ...]
    ) -> tuple[Float[Array, "B T D"], list[Any], tuple[LayerCache, ...]]:
        """As that of ``Decoder``, with stacked caches."""
        extras: dict[int, Any] = {}
        after: list[LayerCache] = []
        begin = 0
        for number, loop in enumerate(loops(self.config)):
            own = [self._parameters(number, place) for place in range(loop.period)]
            of_loop = caches[begin : begin + loop.period]
            begin += loop.period

            def turn(x: Array, of: Any, loop: Loop = loop) -> tuple[Array, Any]:
                index, own, caches = of
                seen, left = [], []
                for place in range(loop.period):
                    layer = layer_with_parameters(self.config, loop.first + place, own[place])
                    x, extra, after = layer(x, _numbered(experts, layer, loop, index), places, caches[place])
                    seen.append(extra)
                    left.append(after)
                return x, (seen, left)

            x, (seen, left) = jax.lax.scan(turn, x, (jnp.arange(loop.turns), own, of_loop))
            after += left
            for place in range(loop.period):
                for index, layer in enumerate(loop.layers(place)):
                    extras[layer] = jax.tree.map(lambda a, index=index: a[index], seen[place])
        found = [extras[layer] for layer in self.config.moe_layers]
        return self.around.finish(x), found, tuple(after)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.around.logits(x)

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
