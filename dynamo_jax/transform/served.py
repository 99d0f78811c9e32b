"""The run time's state as NNX variables that all experts of a model share, and experts at its precision.

Gradients go through: by inputs, gates and biases, the planes being constants.

Axes: N tokens, D hidden, E experts, B requests, V variants.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.layout import Resident, dequantize_layer
from dynamo_jax.models.experts import Activation, ExpertBiases, ExpertForm, ExpertWeights, expert_outputs
from dynamo_jax.models.routing import Routing
from dynamo_jax.runtime.serving import State, experts


class Plane(nnx.Variable):
    """Arrays of the run time's state: planes, pages, page tables, variants of requests, monitors. They are not
    trained. Where layers are scanned, ``nnx.StateAxes({Plane: None, ...: 0})`` hands them to every layer."""


class LayerNumber(nnx.Variable):
    """Which layers of the state the layers of a stacked module are."""


class Split(NamedTuple):
    """How the experts of a layer are split over devices: the mesh axes of their first axis, and the mesh that they lie
    on, None where that is only an annotation."""

    axes: Any
    mesh: Any


class Served(nnx.Module):
    """A ``serving.State`` in variables. One object for all experts of the same sizes of a model.

    The base planes (L, E, ..) are split over devices as the experts were; pages, which any expert may hold, are not.
    """

    def __init__(self, state: State, split: Split | None = None):
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        self.tree: Any = tree
        self.names = tuple(_name(path) for path, _ in leaves)
        for name, (_, leaf) in zip(self.names, leaves):
            of_experts = split is not None and name.startswith(BASE)
            if split is not None and split.mesh is not None:
                spec = PartitionSpec(None, split.axes) if of_experts else PartitionSpec()
                leaf = jax.device_put(leaf, NamedSharding(split.mesh, spec))
            variable = Plane(leaf)
            if split is not None and of_experts:
                variable.set_metadata(out_sharding=(None, split.axes))
            setattr(self, name, variable)
        self.moves = Plane(jnp.zeros((), jnp.int32))  # of pages, so far: what is in host memory knows as many

    @property
    def requests(self) -> int:
        number: nnx.Variable = getattr(self, "number")  # noqa: B009 (set by name)
        return number.shape[0]

    def state(self) -> State:
        return jax.tree.unflatten(self.tree, [getattr(self, name)[...] for name in self.names])

    def put(self, state: State) -> None:
        """Take in what changed. ValueError: a state of another shape."""
        leaves, tree = jax.tree.flatten(state)
        if tree != self.tree:
            raise ValueError("the state is not of the shape of the one that it would replace")
        for name, leaf in zip(self.names, leaves):
            variable = getattr(self, name)
            old = variable.get_value()
            if old is leaf:
                continue
            if not isinstance(leaf, jax.core.Tracer) and not isinstance(old, jax.core.Tracer):
                if leaf.sharding != old.sharding:  # or the next step would compile for it
                    leaf = jax.device_put(leaf, old.sharding)
            variable.set_value(leaf)


BASE = "resident_base_"  # before the names of the planes that every expert has


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", "")))) for p in path]
    return "_".join(parts)


def served_outputs(
    state: State, layer: Int[Array, ""] | int, x: Float[Array, "N D"], routing: Routing, form: ExpertForm
) -> Float[Array, "N D"]:
    """The experts of one layer at each request's variant. ValueError: a gradient is asked for of planes that lie as a
    kernel takes them."""
    arrays = (state.resident, state.tables, state.number)
    given = (jnp.asarray(layer, jnp.int32), x, routing.experts, routing.gates, form.biases)
    static = layer if isinstance(layer, (int, np.integer)) else None
    return _outputs((form.activation, static), arrays, *given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outputs(
    static: tuple[Activation, int | None],
    arrays: Any,
    layer: Int[Array, ""],
    x: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    biases: ExpertBiases | None,
) -> Float[Array, "N D"]:
    resident, tables, number = arrays
    activation, known = static
    run = experts(State(resident, tables, number, None, None))  # type: ignore[arg-type]
    own: Any = layer if known is None else known
    return run(own, x, Routing(gates, chosen, gates), None, ExpertForm(activation, biases))[0]


def _forward(static, arrays, layer, x, chosen, gates, biases):
    if not isinstance(arrays[0], Resident):
        raise ValueError(
            f"no gradient goes through experts whose planes lie as {type(arrays[0]).__name__}: "
            'quantize with arrangement="planes" to train what is around them'
        )
    return _outputs(static, arrays, layer, x, chosen, gates, biases), (arrays, layer, x, chosen, gates, biases)


def _backward(static, kept, d_out):
    (resident, tables, number), layer, x, chosen, gates, biases = kept
    activation, known = static
    layer = layer if known is None else known
    every = jnp.arange(resident.base.codes.shape[1])
    of_token = jnp.repeat(jnp.clip(number, 0, len(tables) - 1), x.shape[0] // number.shape[0])
    hidden = x.shape[-1]
    found = []
    for variant, table in enumerate(tables):
        weights = [w.astype(x.dtype) for w in dequantize_layer(resident, table, layer, every)]
        weights = ExpertWeights(*(w[..., :hidden] for w in weights))
        if biases is not None:
            more = weights.gate.shape[1] - biases.gate.shape[1]
            wide = ExpertBiases(*(jnp.pad(b, ((0, 0), (0, more))) for b in biases[:2]), biases.down)
        own_rows = (of_token == variant)[:, None]

        def outputs(x, gates, biases, weights=weights, own_rows=own_rows):
            own = jnp.where(own_rows, gates, 0)
            form = ExpertForm(activation, biases)
            return expert_outputs(x, Routing(own, chosen, own), weights, form)

        wide = None if biases is None else wide
        d_x, d_gates, d_biases = jax.vjp(outputs, x, gates, wide)[1](d_out)
        if biases is not None:
            d_biases = ExpertBiases(*(d[..., : b.shape[-1]] for d, b in zip(d_biases, biases)))
        found.append((d_x, d_gates, d_biases))
    d_x, d_gates, d_biases = jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *found)
    return None, None, d_x, None, d_gates, d_biases


_outputs.defvjp(_forward, _backward)
