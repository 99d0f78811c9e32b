"""How expert weights lie in files: one tensor an expert, gate and up in one, or MXFP4.

Here they are channel-major, (F, D) for gate, up and down of one expert. Reading takes one expert at a
time, so that one expert is all that has to be in memory. Which tensors a family has is ``families/names.py``'s.

Axes: E experts, F channels, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.formats.mxfp4 import FP4_GROUP, from_mxfp4
from dynamo_jax.models.formats.tensor_files import TensorFiles

Shapes = dict[str, tuple[int, ...]]
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExpertTensors:
    """The tensors that hold the experts of one layer.

    kind: ``split``, a tensor an expert and projection, three names with ``{e}`` for the expert's number;
    ``concatenated``, gate before up in one tensor of all experts, and down in another; ``interleaved``, the same with
    gate and up channel by channel, and biases, in bfloat16 or MXFP4.
    """

    kind: str
    names: tuple[str, ...]

    def each(self, expert: int) -> list[str]:
        """Of one expert where they are split: gate, up, down."""
        return [name.format(e=expert) for name in self.names]


def expert_shapes(config: ModelConfig, of: ExpertTensors, mxfp4: bool) -> Shapes:
    """The tensors of one layer's experts, with their shapes."""
    experts, channels, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    if of.kind == "split":
        each = [(channels, hidden), (channels, hidden), (hidden, channels)]
        return {name: shape for e in range(experts) for name, shape in zip(of.each(e), each)}
    gate_up, down = of.names
    if of.kind == "concatenated":
        return {gate_up: (experts, 2 * channels, hidden), down: (experts, hidden, channels)}
    shapes: Shapes = {f"{gate_up}_bias": (experts, 2 * channels), f"{down}_bias": (experts, hidden)}
    if not mxfp4:
        return shapes | {gate_up: (experts, hidden, 2 * channels), down: (experts, channels, hidden)}
    for name, rows, columns in ((gate_up, 2 * channels, hidden), (down, hidden, channels)):
        groups = (experts, rows, columns // FP4_GROUP)
        shapes |= {f"{name}_blocks": (*groups, FP4_GROUP // 2), f"{name}_scales": groups}
    return shapes


def is_mxfp4(tensors: TensorFiles, of: ExpertTensors) -> bool:
    return of.kind == "interleaved" and f"{of.names[0]}_blocks" in tensors


def read_expert(tensors: TensorFiles, of: ExpertTensors, expert: int) -> Triple:
    """Gate, up and down of one expert, each (F, D), in the file's dtype (bfloat16 from MXFP4)."""
    if of.kind == "split":
        gate, up, down = (tensors.read(name) for name in of.each(expert))
        return gate, up, down.T
    fused, last = of.names
    at = slice(expert, expert + 1)
    if of.kind == "concatenated":
        both, out = tensors.read(fused, at)[0], tensors.read(last, at)[0]
        return both[: len(both) // 2], both[len(both) // 2 :], out.T
    if is_mxfp4(tensors, of):  # rows are outputs here
        both, out = (
            from_mxfp4(tensors.read(f"{name}_blocks", at)[0], tensors.read(f"{name}_scales", at)[0])
            for name in (fused, last)
        )
        return both[::2], both[1::2], out.T
    both, out = tensors.read(fused, at)[0].T, tensors.read(last, at)[0]
    return both[::2], both[1::2], out


def read_biases(tensors: TensorFiles, of: ExpertTensors) -> dict[str, np.ndarray]:
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
    gate_up, down = of.names
    gate, up, out = (np.stack([triple[i] for triple in experts]) for i in range(3))
    if of.kind == "concatenated":
        return {gate_up: np.concatenate([gate, up], axis=1), down: np.ascontiguousarray(out.swapaxes(1, 2))}
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
