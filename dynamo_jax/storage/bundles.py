"""What the bundle of a layer is called and holds: its planes and its parameters that are not quantized.

Calibration writes these bundles, and so does ``checkpoint.save``; a checkpoint is made of them.

Axes: L layers, E experts, P projections, F channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from dynamo_jax.kernels.layout import PLANE_BITS, PROJECTIONS, WIDTHS, filled
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes

Bundle = dict[str, np.ndarray]  # the arrays of one file, by name


def layer_name(layer: int) -> str:
    return f"layer-{layer:03d}"


def planes_bundle(planes: Planes) -> Bundle:
    """One layer's planes by the names that they have in files: what ``layer_planes`` undoes."""
    ratios = {} if planes.ratios is None else {"planes/ratios": planes.ratios}
    return {f"planes/codes{b}": a for b, a in planes.codes.items()} | {"planes/scales": planes.scales} | ratios


def plane_shapes(config: ModelConfig, plan: Plan, max_width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's planes up to ``max_width``."""
    shape = (config.num_experts, PROJECTIONS, plan.blocks * plan.channel_block)
    hidden = filled(config.hidden_size, plan.group_size)
    codes: dict[str, tuple[int, ...]] = {
        f"planes/codes{b}": (*shape, hidden * PLANE_BITS[b] // 8) for b in WIDTHS if b <= max_width
    }
    steps = ("scales", "ratios") if max_width == WIDTHS[-1] else ("scales",)
    return codes | {f"planes/{name}": (*shape, hidden // plan.group_size) for name in steps}


def check_planes(path: Path, bundle: Bundle, config: ModelConfig, plan: Plan, max_width: int) -> None:
    """ValueError if what ``path`` held are not the planes of the layer that the file is named after."""
    found = {name: a.shape for name, a in bundle.items() if name.startswith("planes/")}
    dense = int(path.stem.removeprefix("layer-")) in config.dense_layers
    expected = {} if dense else plane_shapes(config, plan, max_width)
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        name = wrong[0]
        raise ValueError(f"{path}: {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}")


def layer_planes(bundle: Bundle) -> Planes:
    """One layer's planes (E, P, F, ..) from its bundle."""
    codes = {b: bundle[name] for b in WIDTHS if (name := f"planes/codes{b}") in bundle}
    return Planes(codes, bundle["planes/scales"], bundle.get("planes/ratios"))


def stacked_planes(get: Callable[[str], Bundle], config: ModelConfig) -> Planes:
    """The planes of all layers (L, E, P, F, ..), a layer's bundle in memory at a time beside them."""
    out: Any = None
    for index, layer in enumerate(config.moe_layers):
        planes = layer_planes(get(layer_name(layer)))
        if out is None:
            out = jax.tree.map(lambda a: np.empty((config.num_moe_layers, *a.shape), a.dtype), planes)
        for whole, part in zip(jax.tree.leaves(out), jax.tree.leaves(planes)):
            whole[index] = part
    return out


def read_bundle(path: Path) -> Bundle:
    """The arrays of one file; ValueError if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from error
