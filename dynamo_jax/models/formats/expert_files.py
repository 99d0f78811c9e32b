"""How families lay out expert weights in files: one tensor an expert, gate and up in one, or MXFP4.

Here they are channel-major, (F, D) for gate, up and down of one expert. Reading takes one expert at a
time, so that one expert is all that has to be in memory.

Axes: E experts, F channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families.table import FAMILIES
from dynamo_jax.models.formats.tensor_files import TensorFiles

Shapes = dict[str, tuple[int, ...]]
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1, by code
FP4_GROUP = 32


def expert_shapes(config: ModelConfig, layer: int, mxfp4: bool) -> Shapes:
    """The file's tensors that hold the experts of one layer, with their shapes."""
    experts, channels, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    gate_up, down = _names(config, layer)
    kind = FAMILIES[config.family].experts
    if kind == "concatenated":
        return {gate_up: (experts, 2 * channels, hidden), down: (experts, hidden, channels)}
    if kind != "interleaved":
        names = _split_names(config, layer)
        each = [(channels, hidden), (channels, hidden), (hidden, channels)]
        return {name.format(e=e): shape for e in range(experts) for name, shape in zip(names, each)}
    shapes: Shapes = {f"{gate_up}_bias": (experts, 2 * channels), f"{down}_bias": (experts, hidden)}
    if not mxfp4:
        return shapes | {gate_up: (experts, hidden, 2 * channels), down: (experts, channels, hidden)}
    for name, rows, columns in ((gate_up, 2 * channels, hidden), (down, hidden, channels)):
        groups = (experts, rows, columns // FP4_GROUP)
        shapes |= {f"{name}_blocks": (*groups, FP4_GROUP // 2), f"{name}_scales": groups}
    return shapes


def is_mxfp4(config: ModelConfig, tensors: TensorFiles) -> bool:
    return f"{_names(config, config.moe_layers[0])[0]}_blocks" in tensors


def read_expert(tensors: TensorFiles, config: ModelConfig, layer: int, expert: int) -> Triple:
    """Gate, up and down of one expert, each (F, D), in the file's dtype (bfloat16 from MXFP4)."""
    kind = FAMILIES[config.family].experts
    if kind not in ("concatenated", "interleaved"):
        gate, up, down = (tensors.read(name.format(e=expert)) for name in _split_names(config, layer))
        return gate, up, down.T
    fused, last = _names(config, layer)
    at = slice(expert, expert + 1)
    if kind == "concatenated":
        both, out = tensors.read(fused, at)[0], tensors.read(last, at)[0]
        return both[: len(both) // 2], both[len(both) // 2 :], out.T
    if f"{fused}_blocks" in tensors:  # rows are outputs here
        both, out = (
            from_mxfp4(tensors.read(f"{name}_blocks", at)[0], tensors.read(f"{name}_scales", at)[0])
            for name in (fused, last)
        )
        return both[::2], both[1::2], out.T
    both, out = tensors.read(fused, at)[0].T, tensors.read(last, at)[0]
    return both[::2], both[1::2], out


def read_biases(tensors: TensorFiles, config: ModelConfig, layer: int) -> dict[str, np.ndarray]:
    """gate_bias, up_bias (E, F) and down_bias (E, D), where the family has them."""
    if not config.expert_bias:
        return {}
    gate_up, down = (tensors.read(f"{name}_bias") for name in _names(config, layer))
    return {"gate_bias": gate_up[:, ::2], "up_bias": gate_up[:, 1::2], "down_bias": down}


def expert_tensors(
    config: ModelConfig, layer: int, experts: list[Triple], biases: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The file's tensors from one layer's experts: what ``read_expert`` and ``read_biases`` undo."""
    kind = FAMILIES[config.family].experts
    if kind not in ("concatenated", "interleaved"):
        names = _split_names(config, layer)
        parts = {n.format(e=e): w for e, triple in enumerate(experts) for n, w in zip(names, triple)}
        down = names[2].split(".")[-2]
        return {n: np.ascontiguousarray(w.T if n.split(".")[-2] == down else w) for n, w in parts.items()}
    gate_up, down = _names(config, layer)
    gate, up, out = (np.stack([triple[i] for triple in experts]) for i in range(3))
    if kind == "concatenated":
        return {gate_up: np.concatenate([gate, up], axis=1), down: np.ascontiguousarray(out.swapaxes(1, 2))}
    both = _interleave(gate, up)
    return {
        gate_up: np.ascontiguousarray(both.swapaxes(1, 2)),
        down: out,
        f"{gate_up}_bias": _interleave(biases["gate_bias"], biases["up_bias"]),
        f"{down}_bias": biases["down_bias"],
    }


def from_mxfp4(blocks: UInt8[np.ndarray, "*S G 16"], scales: UInt8[np.ndarray, "*S G"]) -> Float[np.ndarray, "*S D"]:
    """bfloat16 weights from 32 four-bit floats a group, low nibble first, and a power of two (OCP MX v1.0)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, FP4_GROUP)
    values = np.ldexp(FP4[codes], scales[..., None].astype(np.int32) - 127)
    return values.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)


def _interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Along axis 1: gate, up, gate, up, .."""
    return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


def _prefix(config: ModelConfig, layer: int) -> str:
    return f"model.layers.{layer}.{FAMILIES[config.family].moe}"


def _names(config: ModelConfig, layer: int) -> tuple[str, str]:
    """The two fused tensors: gate with up, and down."""
    prefix = _prefix(config, layer)
    if FAMILIES[config.family].experts == "concatenated":
        return f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight"
    return f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"


def _split_names(config: ModelConfig, layer: int) -> list[str]:
    parts = FAMILIES[config.family].experts.split()
    return [f"{_prefix(config, layer)}.experts.{{e}}.{part}.weight" for part in parts]
