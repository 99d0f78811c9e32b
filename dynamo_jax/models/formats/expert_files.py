"""How expert weights lie in files: one tensor an expert, or all experts of a layer in one, gate and up together.

Here they are channel-major, (F, D) for gate, up and down of one expert. Reading takes one expert at a
time, so that one expert is all that has to be in memory. Which tensors a family has is ``families/names.py``'s, and
what they are stored in ``stored.py``'s.

Axes: E experts, F channels, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.formats.stored import StoredTensors
from dynamo_jax.models.formats.tensor_files import Header

Shapes = dict[str, tuple[int, ...]]
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExpertTensors:
    """The tensors that hold the experts of one layer.

    kind: ``split``, a tensor an expert and projection, three names with ``{e}`` for the expert's number;
    ``stacked``, a tensor a projection, of all experts, (E, F, D), (E, F, D) and (E, D, F);
    ``concatenated``, gate before up in one tensor of all experts, (E, 2F, D), and down in another, (E, D, F);
    ``interleaved``, (E, D, 2F) with gate and up channel by channel, (E, F, D), and biases.
    turned: of concatenated ones, whether the first is (E, D, 2F), and whether the second is (E, F, D).
    """

    kind: str
    names: tuple[str, ...]
    turned: tuple[bool, bool] = (False, False)

    def each(self, expert: int) -> list[str]:
        """Of one expert where they are split: gate, up, down."""
        return [name.format(e=expert) for name in self.names]


def as_found(
    config: ModelConfig, of: ExpertTensors, fused: tuple[str, str], headers: Mapping[str, Header]
) -> ExpertTensors:
    """How a layer's experts lie in the files at hand, where a family has them split, or fused under other names.

    Fused ones are (E, outputs, inputs), as transformers 5 writes them, or turned, as in Qwen3-VL's files; their shapes
    say which, and where one of both is square, the other's.
    """
    if of.kind != "split" or fused[0] not in headers:
        return of
    channels, hidden = config.intermediate_size, config.hidden_size
    turned: list[bool | None] = []
    for name, rows, columns in ((fused[0], 2 * channels, hidden), (fused[1], hidden, channels)):
        shape = headers[name].shape[1:] if name in headers else ()
        if rows != columns and shape in ((rows, columns), (columns, rows)):
            turned.append(shape == (columns, rows))
        else:
            turned.append(None)
    gate_up, down = turned
    return ExpertTensors(
        "concatenated", fused, (bool(down if gate_up is None else gate_up), bool(gate_up if down is None else down))
    )


def expert_shapes(config: ModelConfig, of: ExpertTensors) -> Shapes:
    """The tensors of one layer's experts, with their shapes."""
    experts, channels, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    if of.kind == "split":
        each = [(channels, hidden), (channels, hidden), (hidden, channels)]
        return {name: shape for e in range(experts) for name, shape in zip(of.each(e), each)}
    if of.kind == "stacked":
        return dict(zip(of.names, [(experts, channels, hidden)] * 2 + [(experts, hidden, channels)]))
    gate_up, down = of.names
    if of.kind == "concatenated":
        rows = ((2 * channels, hidden), (hidden, channels))
        return {name: (experts, *(r[::-1] if t else r)) for name, r, t in zip(of.names, rows, of.turned)}
    shapes: Shapes = {f"{gate_up}_bias": (experts, 2 * channels), f"{down}_bias": (experts, hidden)}
    return shapes | {gate_up: (experts, hidden, 2 * channels), down: (experts, channels, hidden)}


def read_expert(tensors: StoredTensors, of: ExpertTensors, expert: int) -> Triple:
    """Gate, up and down of one expert, each (F, D), in the file's dtype (bfloat16 where it is packed)."""
    if of.kind == "split":
        gate, up, down = (tensors.read(name) for name in of.each(expert))
        return gate, up, down.T
    at = slice(expert, expert + 1)
    if of.kind == "stacked":
        gate, up, down = (tensors.read(name, at)[0] for name in of.names)
        return gate, up, down.T
    both, out = (tensors.read(name, at)[0] for name in of.names)
    if of.kind == "concatenated":
        both, out = (array.T if turned else array for array, turned in zip((both, out), of.turned))
        return both[: len(both) // 2], both[len(both) // 2 :], out.T
    return both.T[::2], both.T[1::2], out


def read_biases(tensors: StoredTensors, of: ExpertTensors) -> dict[str, np.ndarray]:
    """gate_bias, up_bias (E, F) and down_bias (E, D), where there are some."""
    if of.kind != "interleaved":
        return {}
    gate_up, down = (tensors.read(f"{name}_bias") for name in of.names)
    return {"gate_bias": gate_up[:, ::2], "up_bias": gate_up[:, 1::2], "down_bias": down}


def expert_tensors(of: ExpertTensors, experts: list[Triple], biases: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The file's tensors from one layer's experts: what ``read_expert`` and ``read_biases`` undo."""
    if of.kind == "split":
        parts = [part for e, triple in enumerate(experts) for part in zip(of.each(e), _rows_are_outputs(triple))]
        return {name: np.ascontiguousarray(w) for name, w in parts}
    gate, up, out = (np.stack([triple[i] for triple in experts]) for i in range(3))
    if of.kind == "stacked":
        return dict(zip(of.names, (gate, up, np.ascontiguousarray(out.swapaxes(1, 2)))))
    gate_up, down = of.names
    if of.kind == "concatenated":
        pairs = zip(of.names, (np.concatenate([gate, up], axis=1), out.swapaxes(1, 2)), of.turned)
        return {name: np.ascontiguousarray(w.swapaxes(1, 2) if turned else w) for name, w, turned in pairs}
    both = _interleave(gate, up)
    return {
        gate_up: np.ascontiguousarray(both.swapaxes(1, 2)),
        down: out,
        f"{gate_up}_bias": _interleave(biases["gate_bias"], biases["up_bias"]),
        f"{down}_bias": biases["down_bias"],
    }


def _rows_are_outputs(triple: Triple) -> Triple:
    gate, up, down = triple
    return gate, up, down.T


def _interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Along axis 1: gate, up, gate, up, .."""
    return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
