"""``Experts``: what a Flax NNX model calls where its experts are, in float or quantized.

    self.experts = dynamo_jax.Experts(gate, up, down)
    ids, gates = ...                       # routing stays the model's own
    y = self.experts(x, ids, gates)        # and so do shared experts, losses and whatever else it returns

Axes: N tokens (of any leading axes), D hidden, E experts, k experts a token, F channels, S layers that are stacked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import (
    Activation,
    ExpertBiases,
    ExpertForm,
    ExpertWeights,
    expert_outputs,
    silu_gated,
)
from dynamo_jax.models.routing import Routing
from dynamo_jax.transform.served import LayerNumber, Served, Split, served_outputs

BIASES = ("gate_bias", "up_bias", "down_bias")
UNFUSED, FUSED = ("gate", "up", "down"), ("gate_up", "down")
LAYOUTS = {  # names of the weights, and the axes of all but down
    "edf": (UNFUSED, ("e", "d", "f")),
    "efd": (UNFUSED, ("e", "f", "d")),
    "e2fd": (FUSED, ("e", "2", "f", "d")),
    "e2df": (FUSED, ("e", "2", "d", "f")),
    "ed2f": (FUSED, ("e", "d", "2f")),
}


class Tap(nnx.Variable):
    """What experts were given in a call: there only while somebody listens (``dynamo_jax.transform.taps``)."""


class Shift(nnx.Variable):
    """Zeros that are added to what experts put out, so that there is something to take a gradient by."""


class Taken(NamedTuple):
    """What a call of experts was given, as it was given."""

    x: Float[Array, "*N D"]
    ids: Int[Array, "*N k"]
    gates: Float[Array, "*N k"]


class Experts(nnx.Module):
    """Gated experts that a model's own router chooses: y = sum over k of gates * expert(x), 0 for the id -1 and others
    that no expert has.

    weights: three Params or arrays, gate, up and down, or two, gate with up and down. layout says what the first ones
    are: "edf" (E, D, F), "efd" (E, F, D), "e2fd" (E, 2, F, D), "e2df" (E, 2, D, F), or "ed2f" (E, D, 2F) with the gate
    before up. down is (E, F, D) in all of them. A Param stays the very same Param. All may have one more axis where
    layers are stacked (``nnx.vmap``) and run by ``nnx.scan``: the axis ``stacked``.
    activation: (gate, up) -> hidden channels, elementwise, finite where both are 0; SiLU(gate) * up by default.
    biases: of gate (E, F), up (E, F) and down (E, D); they are never quantized.
    ValueError: another layout, or shapes that do not fit it.
    """

    gate: Any
    up: Any
    down: Any
    gate_up: Any
    shift: Any
    served: Any
    number: Any

    def __init__(
        self,
        *weights: Any,
        activation: Activation = silu_gated,
        biases: tuple[Any, Any, Any] | None = None,
        layout: str = "edf",
        stacked: int = 0,
    ):
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r}: known are {', '.join(LAYOUTS)}")
        names = LAYOUTS[layout][0]
        if len(weights) != len(names):
            raise ValueError(f"{len(weights)} weights: the layout {layout} has {', '.join(names)}")
        for name, weight in zip(names, weights):
            setattr(self, name, weight if isinstance(weight, nnx.Variable) else nnx.Param(jnp.asarray(weight)))
        self.layout, self.stacked_axis, self.activation = layout, stacked, activation
        if biases is not None:
            parts = zip(BIASES, biases, strict=True)
            for name, bias in parts:
                setattr(self, name, bias if isinstance(bias, nnx.Variable) else nnx.Param(jnp.asarray(bias)))
        self.has_biases = biases is not None
        self.listening: str | None = None  # the path here, while a call leaves what it was given
        self.shifted = False  # whether a call adds a Shift
        self.sizes = self._checked(weights)

    def _checked(self, weights: tuple[Any, ...]) -> ExpertSizes:
        """The sizes of one layer."""
        names, axes = LAYOUTS[self.layout]
        first, down = tuple(weights[0].shape), tuple(weights[-1].shape)
        stacked = len(first) == len(axes) + 1
        shapes = [tuple(w.shape) for w in weights]
        if stacked:
            axis = self.stacked_axis
            shapes = [s[:axis] + s[axis + 1 :] for s in shapes]
            first, down = shapes[0], shapes[-1]
        found = ", ".join(f"{n} {tuple(w.shape)}" for n, w in zip(names, weights))
        fits = len(first) == len(axes) and len(down) == 3
        if fits:
            experts, channels, hidden = down
            lengths = {"e": experts, "f": channels, "d": hidden, "2": 2, "2f": 2 * channels}
            want = tuple(lengths[axis] for axis in axes)
            fits = all(s == want for s in shapes[:-1]) and 0 not in want
        if not fits:
            raise ValueError(f"{found}: these do not fit the layout {self.layout!r} with down (E, F, D)")
        return ExpertSizes(1, experts, channels, hidden)

    @property
    def layers(self) -> int | None:
        """How many layers are stacked here; None where layers are not. ``nnx.vmap`` stacks what was made of one."""
        if self.is_quantized:
            return None if isinstance(self.number, int) or not self.number.ndim else self.number.shape[0]
        names, axes = LAYOUTS[self.layout]
        first = getattr(self, names[0])
        return first.shape[self.stacked_axis] if first.ndim == len(axes) + 1 else None

    @property
    def is_quantized(self) -> bool:
        return hasattr(self, "served")

    def __call__(self, x: Float[Array, "*N D"], ids: Int[Array, "*N k"], gates: Float[Array, "*N k"]) -> Array:
        """x: inputs. ids: the experts of each token, -1 for none. gates: of each of them. ValueError: shapes that do
        not fit each other or the experts."""
        if x.shape[-1] != self.sizes.hidden_size:
            raise ValueError(f"inputs {x.shape} for experts of hidden size {self.sizes.hidden_size}")
        if ids.shape != gates.shape or ids.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"inputs {x.shape}, ids {ids.shape}, gates {gates.shape}: expected (.., D), (.., k), (.., k)"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids are {ids.dtype}: expected whole numbers, -1 for no expert")
        if self.listening is not None:
            if hasattr(self, "tap"):
                raise ValueError(
                    f"{self.listening}: these experts are called twice in one pass of the model; "
                    "each call needs Experts of its own"
                )
            self.tap = Tap(Taken(x, ids, gates))
        flat, chosen = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
        none = (chosen < 0) | (chosen >= self.sizes.experts)
        real = jnp.where(none, 0, gates.reshape(chosen.shape)).astype(jnp.float32)
        routing = Routing(real, jnp.where(none, 0, chosen).astype(jnp.int32), real)
        if self.is_quantized:
            out = self._quantized(flat, routing, x.shape)
        else:
            out = expert_outputs(flat, routing, self.weights(), self.form())
        out = out.reshape(x.shape)
        return out + self.shift[...].astype(out.dtype) if self.shifted else out

    def _quantized(self, x: Float[Array, "N D"], routing: Routing, shape: tuple[int, ...]) -> Float[Array, "N D"]:
        served: Served = self.served
        requests = served.requests
        if len(shape) > 2 and requests > 1 and np.prod(shape[:-2]) != requests:
            raise ValueError(
                f"inputs {shape} are of {np.prod(shape[:-2])} sequences; the model serves {requests} requests "
                "(dynamo_jax.transform.for_requests changes that)"
            )
        layer: Any = self.number if isinstance(self.number, int) else self.number[...]
        return served_outputs(served.state(), layer, x, routing, self.form())

    def weights(self) -> ExpertWeights:
        """Channel-major weights of one layer, each (E, F, D)."""
        down = self.down[...]
        if self.layout in ("edf", "efd"):
            gate, up = self.gate[...], self.up[...]
            return ExpertWeights(gate, up, down) if self.layout == "efd" else _turned(gate, up, down)
        both = self.gate_up[...]
        if self.layout == "ed2f":
            gate, up = jnp.split(both, 2, axis=2)
            return _turned(gate, up, down)
        gate, up = both[:, 0], both[:, 1]
        return ExpertWeights(gate, up, down) if self.layout == "e2fd" else _turned(gate, up, down)

    def form(self) -> ExpertForm:
        if not self.has_biases:
            return ExpertForm(self.activation)
        return ExpertForm(self.activation, ExpertBiases(*(getattr(self, name)[...] for name in BIASES)))

    def split(self) -> Split | None:
        """How the user split the experts over devices, by their array or else by their annotation."""
        names = LAYOUTS[self.layout][0]
        variable = getattr(self, names[0])
        place = 1 if self.layers is not None and self.stacked_axis == 0 else 0
        own = getattr(variable.get_value(), "sharding", None)
        if isinstance(own, NamedSharding):
            return Split(_at(own.spec, place), own.mesh) if _at(own.spec, place) is not None else None
        told = variable.get_metadata().get("out_sharding")
        return Split(_at(told, place), None) if told and _at(told, place) is not None else None

    def weight_variables(self) -> list[nnx.Variable]:
        """The weights as they are stored, without biases; none once they are quantized."""
        return [getattr(self, name) for name in LAYOUTS[self.layout][0] if hasattr(self, name)]

    def drop_weights(self, served: Served, number: int | LayerNumber) -> None:
        """From here on the experts are those of layer ``number`` of ``served``."""
        for name in LAYOUTS[self.layout][0]:
            delattr(self, name)
        self.served, self.number = served, number

    def one_layer(self, index: int | None) -> tuple[ExpertWeights, ExpertForm]:
        """Weights and form of one of the layers that are stacked, in host memory; None where layers are not."""
        names = LAYOUTS[self.layout][0]
        alone = Experts(
            *(self._of_layer(name, index) for name in names), activation=self.activation, layout=self.layout
        )
        form = ExpertForm(self.activation, self.biases_of_layer(index))
        return ExpertWeights(*(np.asarray(w) for w in alone.weights())), form  # type: ignore[arg-type]

    def biases_of_layer(self, index: int | None) -> ExpertBiases | None:
        """In host memory; None where there are none."""
        if not self.has_biases:
            return None
        own = (np.asarray(self._of_layer(name, index)[...], np.float32) for name in BIASES)
        return ExpertBiases(*own)  # type: ignore[arg-type]

    def _of_layer(self, name: str, index: int | None) -> Any:
        variable = getattr(self, name)
        if index is None:
            return variable
        return nnx.Param(jnp.take(variable[...], index, axis=self.stacked_axis))


def _at(spec: Any, place: int) -> Any:
    return tuple(spec)[place] if place < len(tuple(spec)) else None


def _turned(gate: Array, up: Array, down: Array) -> ExpertWeights:
    return ExpertWeights(gate.swapaxes(1, 2), up.swapaxes(1, 2), down)
