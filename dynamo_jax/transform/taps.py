"""What the experts of somebody else's model are given, and what an error there costs: taps in the model's own pass.

Nothing is asked of the model but that it calls its ``Experts``. A pass is a pure function of the model's state, so
that whatever the model would change in itself, caches or counters of dropout, stays as it was.

Axes: N tokens, D hidden, k experts a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynamo_jax.transform.experts import Experts, Shift, Taken
from dynamo_jax.transform.found import modules_of

Loss = Callable[[Any, Any], Any]  # (model, batch) -> summed nats
Forward = Callable[[Any, Any], Any]  # (model, batch) -> anything


class Tapped(NamedTuple):
    """What one layer was given in a pass of a batch, in host memory. ids: (S, T, k) of S sequences; importance: of each
    token, nats for each unit of squared error there (``statistics.token_importance``), None where nobody asked."""

    x: Float[np.ndarray, "N D"] | None
    ids: Int[np.ndarray, "S T k"]
    gates: Float[np.ndarray, "N k"]
    importance: Float[np.ndarray, " N"] | None


def listening(model: nnx.Module, on: bool = True) -> None:
    """Whether calls of the model's experts leave what they were given, as variables ``Tap``."""
    for module in modules_of(model).values():
        module.listening = on


def taken(model: nnx.Module) -> dict[str, Taken]:
    """What the experts were given in the pass that has been run; the taps are gone then. ValueError, which names it: a
    module was not called."""
    found: dict[str, Taken] = {}
    for path, module in modules_of(model).items():
        if not hasattr(module, "tap"):
            raise ValueError(f"{path}: these experts were not called in a pass of the model")
        found[path] = module.tap.get_value()
        del module.tap
    return found


class Listener:
    """A model's passes with taps. It keeps the model as it is at that time."""

    def __init__(self, model: nnx.Module):
        self.model = nnx.clone(model)
        listening(self.model)
        self._plain = nnx.split(self.model)
        self._shapes: dict[Any, Any] = {}

    def forward(self, function: Forward, batch: Any) -> dict[str, Taken]:
        """What the experts are given where ``function(model, batch)`` runs the model."""
        graph, state = self._plain
        found: dict[str, Taken] = _forward(graph, function, state, batch)
        return found

    def backward(self, loss: Loss, batch: Any) -> tuple[Array, dict[str, Taken], dict[str, Array]]:
        """The loss, what the experts are given, and the importance of an error at each token (.., N)."""
        graph, state = self._plain
        _, shapes = jax.eval_shape(functools.partial(_run, graph, loss), state, batch)
        zeros = {path: jnp.zeros(one.x.shape, jnp.float32) for path, one in shapes.items()}
        return _backward(graph, loss, state, zeros, batch)


def _run(graph: Any, function: Forward, state: Any, batch: Any) -> tuple[Any, dict[str, Taken]]:
    model = nnx.merge(graph, state, copy=True)
    value = function(model, batch)
    return value, taken(model)


@functools.partial(jax.jit, static_argnames=("graph", "function"))
def _forward(graph: Any, function: Forward, state: Any, batch: Any) -> dict[str, Taken]:
    found: dict[str, Taken] = _run(graph, function, state, batch)[1]
    return found


@functools.partial(jax.jit, static_argnames=("graph", "loss"))
def _backward(graph: Any, loss: Loss, state: Any, shifts: dict[str, Array], batch: Any) -> Any:
    def shifted(shifts: dict[str, Array]) -> tuple[Array, dict[str, Taken]]:
        model = nnx.merge(graph, state, copy=True)
        for path, module in modules_of(model).items():
            module.shift, module.shifted = Shift(shifts[path]), True
        value, found = loss(model, batch), taken(model)
        return jnp.asarray(value, jnp.float32).sum(), found

    (value, found), gradients = jax.value_and_grad(shifted, has_aux=True)(shifts)
    importance = {path: jnp.square(g).sum(axis=-1) / (2 * g.shape[-1]) for path, g in gradients.items()}
    return value, found, importance


def by_layer(
    modules: dict[str, Experts],
    found: dict[str, Taken],
    importance: dict[str, Array] | None = None,
    inputs: bool = True,
) -> dict[tuple[str, int | None], Tapped]:
    """The taps of each layer, by path and its place in a module of stacked layers, in host memory."""
    out: dict[tuple[str, int | None], Tapped] = {}
    for path, module in modules.items():
        for index in [None] if module.layers is None else range(module.layers):
            one = found[path] if index is None else jax.tree.map(lambda a, i=index: a[i], found[path])
            weight = None if importance is None else importance[path] if index is None else importance[path][index]
            ids = np.asarray(one.ids, np.int32)
            ids = ids.reshape(1, *ids.shape) if ids.ndim == 2 else ids.reshape(-1, *ids.shape[-2:])
            gates = np.asarray(one.gates, np.float32).reshape(-1, ids.shape[-1])
            gates = np.where(ids.reshape(gates.shape) >= 0, gates, 0)
            out[path, index] = Tapped(
                np.asarray(one.x, np.float32).reshape(len(gates), -1) if inputs else None,
                ids,
                gates,
                None if weight is None else np.asarray(weight, np.float32).reshape(-1),
            )
    return out
