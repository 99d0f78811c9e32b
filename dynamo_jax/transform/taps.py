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
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.transform.experts import Experts, Shift, Taken
from dynamo_jax.transform.found import modules_of

PROGRAMS = 16  # functions of the user that passes stay compiled for
Loss = Callable[[Any, Any], Any]  # (model, batch) -> summed nats
Mask = Callable[[Any], Any]  # batch -> which of its tokens count, (S, T)
Forward = Callable[[Any, Any], Any]  # (model, batch) -> anything


class Tapped(NamedTuple):
    """What one layer was given in a pass of a batch, in host memory. ids: (S, T, k) of S sequences, -1 for none and
    where a token does not count; kept: of S * T tokens, which the other fields are of; importance: of each token, nats
    for each unit of squared error there (``statistics.token_importance``), None where nobody asked."""

    x: Float[np.ndarray, "N D"] | None
    ids: Int[np.ndarray, "S T k"]
    gates: Float[np.ndarray, "N k"]
    importance: Float[np.ndarray, " N"] | None
    kept: Bool[np.ndarray, " ST"]


def listening(model: nnx.Module, on: bool = True) -> None:
    """Whether calls of the model's experts leave what they were given, as variables ``Tap``."""
    for path, module in modules_of(model).items():
        module.listening = path if on else None


def taken(model: nnx.Module) -> dict[str, Taken]:
    """What the experts were given in the pass that has been run; the taps are gone then. ValueError, which names it: a
    module was not called, or layers that are stacked were not run along the first axis."""
    found: dict[str, Taken] = {}
    modules = modules_of(model)
    for path, module in modules.items():
        if hasattr(module, "tap"):
            found[path] = module.tap.get_value()
    forget(model)
    for path, module in modules.items():
        if path not in found:
            raise ValueError(
                f"{path}: these experts were not called in a pass of the model (calls in a jax.lax.scan, jax.vmap or "
                "jax.checkpoint are not seen; those in nnx.scan and nnx.remat are)"
            )
        if module.layers is not None and found[path].x.shape[0] != module.layers:
            raise ValueError(
                f"{path}: {module.layers} layers are stacked here, and what they were given is {found[path].x.shape}; "
                "nnx.scan must have 0 for all but the Params: StateAxes({Plane: None, nnx.Param: .., ...: 0})"
            )
    return found


def forget(model: nnx.Module) -> None:
    """Remove what a pass has left."""
    for module in modules_of(model).values():
        if hasattr(module, "tap"):
            del module.tap


class Listener:
    """A model's passes with taps. It keeps the model as it is at that time."""

    def __init__(self, model: nnx.Module):
        self.model = nnx.clone(model)
        listening(self.model)
        self._shapes: dict[Any, dict[str, tuple[int, ...]]] = {}  # of what the experts are given, by batch shapes

    def forward(self, function: Forward, batch: Any) -> dict[str, Taken]:
        """What the experts are given where ``function(model, batch)`` runs the model."""
        found: dict[str, Taken] = _forward(function)(nnx.clone(self.model), batch)
        return found

    def backward(self, loss: Loss, batch: Any) -> tuple[Array, dict[str, Taken], dict[str, Array]]:
        """The loss, what the experts are given, and the importance of an error at each token (.., N)."""
        leaves, tree = jax.tree.flatten(batch)
        key = (loss, str(tree), *((np.shape(a), str(getattr(a, "dtype", type(a)))) for a in leaves))
        if key not in self._shapes:
            graph, state = nnx.split(self.model)
            value, found = jax.eval_shape(lambda state, batch: _run(graph, loss, state, batch), state, batch)
            if len(jax.tree.leaves(value)) != 1 or not hasattr(value, "shape"):
                raise ValueError(
                    "the loss returns something else than one number: expected the summed nats of the batch"
                )
            self._shapes[key] = {path: one.x.shape for path, one in found.items()}
        zeros = {path: jnp.zeros(shape, jnp.float32) for path, shape in self._shapes[key].items()}
        out: tuple[Array, dict[str, Taken], dict[str, Array]] = _backward(loss)(nnx.clone(self.model), zeros, batch)
        return out


def _run(graph: Any, function: Forward, state: Any, batch: Any) -> tuple[Any, dict[str, Taken]]:
    model = nnx.merge(graph, state, copy=True)
    value = function(model, batch)
    return value, taken(model)


@functools.lru_cache(maxsize=PROGRAMS)  # of the user's functions: nnx.jit compares models, which need not be hashable
def _forward(function: Forward) -> Callable[..., Any]:
    @nnx.jit
    def run(model: nnx.Module, batch: Any) -> dict[str, Taken]:
        graph, state = nnx.split(model)
        return _run(graph, function, state, batch)[1]

    return run


@functools.lru_cache(maxsize=PROGRAMS)
def _backward(loss: Loss) -> Callable[..., Any]:
    @nnx.jit
    def run(model: nnx.Module, shifts: dict[str, Array], batch: Any) -> Any:
        graph, state = nnx.split(model)

        def shifted(shifts: dict[str, Array]) -> tuple[Array, dict[str, Taken]]:
            model = nnx.merge(graph, state, copy=True)
            for path, module in modules_of(model).items():
                module.shift, module.shifted = Shift(shifts[path]), True
            value, found = loss(model, batch), taken(model)
            return jnp.asarray(value, jnp.float32).sum(), found

        (value, found), gradients = jax.value_and_grad(shifted, has_aux=True)(shifts)
        importance = {path: jnp.square(g).sum(axis=-1) / (2 * g.shape[-1]) for path, g in gradients.items()}
        return value, found, importance

    return run


def by_layer(
    modules: dict[str, Experts],
    found: dict[str, Taken],
    importance: dict[str, Array] | None = None,
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
                np.asarray(one.x, np.float32).reshape(len(gates), -1),
                ids,
                gates,
                None if weight is None else np.asarray(weight, np.float32).reshape(-1),
                np.ones(len(gates), bool),
            )
    return out


def counted(
    tapped: dict[tuple[str, int | None], Tapped], mask: Mask | None, batch: Any
) -> dict[tuple[str, int | None], Tapped]:
    """Without the tokens that ``mask`` leaves out, and those that no layer has an expert for. ValueError: a mask of
    another shape."""
    kept = np.logical_or.reduce([(one.ids >= 0).any(axis=-1).reshape(-1) for one in tapped.values()])
    if mask is not None:
        own = np.asarray(mask(batch))
        if own.dtype != bool or own.size != kept.size:
            raise ValueError(f"the mask is {own.dtype} {own.shape} of a batch of {kept.size} tokens: expected bool")
        kept &= own.reshape(-1)
    if kept.all():
        return tapped
    out = {}
    for key, one in tapped.items():
        ids = np.where(kept.reshape(one.ids.shape[:2])[..., None], one.ids, -1)
        x, importance = (a if a is None else a[kept] for a in (one.x, one.importance))
        out[key] = Tapped(x, ids, one.gates[kept], importance, kept)
    return out
