"""What the bundle of a layer is called and holds: its planes and its parameters that are not quantized.

Calibration writes these bundles, and so does ``checkpoint.save``; a checkpoint is made of them.

Axes: L layers, E experts, P projections, F channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Int

from dynamo_jax.files import check_readable, shortened
from dynamo_jax.kernels.layout import PLANE_BITS, PROJECTIONS, WIDTHS, filled
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.huggingface import layer_shapes
from dynamo_jax.models.rest import FLOAT, is_codes, stored
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes

Bundle = dict[str, np.ndarray]  # the arrays of one file, by name
Experts = Int[np.ndarray, " O"] | None  # some of a layer's, in ascending order, or all


def layer_name(layer: int) -> str:
    return f"layer-{layer:03d}"


def planes_bundle(planes: Planes) -> Bundle:
    """One layer's planes by the names that they have in files: what ``layer_planes`` undoes."""
    ratios = {} if planes.ratios is None else {"planes/ratios": planes.ratios}
    return {f"planes/codes{b}": a for b, a in planes.codes.items()} | {"planes/scales": planes.scales} | ratios


class Expected(NamedTuple):
    """Of an array in a file. kind: "float", which must be finite, "any float", or the name of a dtype."""

    shape: tuple[int, ...]
    kind: str = "float"


def check_arrays(path: Path, bundle: Bundle, expected: dict[str, Expected]) -> None:
    """ValueError, which names the file and an array, if ``path`` does not hold just what it should."""
    for name in sorted(bundle.keys() | expected.keys()):
        if name not in bundle:
            raise ValueError(f"{path}: {name} is missing")
        if name not in expected:
            raise ValueError(f"{path}: {shortened(name)} is not expected in it")
        array, (shape, kind) = bundle[name], expected[name]
        if array.shape != shape:
            raise ValueError(f"{path}: {name} is {array.shape}, expected {shape}")
        if not (jnp.issubdtype(array.dtype, jnp.floating) if "float" in kind else array.dtype == kind):
            raise ValueError(f"{path}: {name} is {array.dtype}, expected {kind}")
        if kind == "float" and not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")


def planes_expected(plan: Plan, max_width: int, experts: Experts = None) -> dict[str, Expected]:
    """One layer's planes up to ``max_width``, of some experts or of all."""
    count = plan.widths.shape[1] if experts is None else len(experts)
    shape = (count, PROJECTIONS, plan.blocks * plan.channel_block)
    hidden = filled(plan.hidden_size, plan.group_size)
    groups = (*shape, hidden // plan.group_size)
    codes = {
        f"planes/codes{b}": Expected((*shape, hidden * PLANE_BITS[b] // 8), "uint8") for b in WIDTHS if b <= max_width
    }
    ratios = {"planes/ratios": Expected(groups, "uint8")} if max_width == WIDTHS[-1] else {}
    return codes | {"planes/scales": Expected(groups)} | ratios


def parameters_expected(shapes: dict[str, tuple[int, ...]], rest: int) -> dict[str, Expected]:
    """Parameters as they are stored when the rest has so many bits (``models.rest``)."""
    return {
        name: Expected(a.shape, a.dtype.name) if is_codes(name) else Expected(a.shape)
        for name, a in stored(shapes, rest).items()
    }


def layer_expected(
    config: ModelConfig, plan: Plan, max_width: int, layer: int, experts: Experts = None, rest: int = FLOAT
) -> dict[str, Expected]:
    """A layer's file: its parameters but the experts' weights and, if it has experts, their planes."""
    expected = parameters_expected(layer_shapes(config, layer), rest)
    own = {f"parameters/{name}": each for name, each in expected.items()}
    return own if layer in config.dense_layers else own | planes_expected(plan, max_width, experts)


def layer_planes(bundle: Bundle) -> Planes:
    """One layer's planes (E, P, F, ..) from its bundle."""
    codes = {b: bundle[name] for b in WIDTHS if (name := f"planes/codes{b}") in bundle}
    return Planes(codes, bundle["planes/scales"], bundle.get("planes/ratios"))


def stacked_planes(get: Callable[[str], Bundle], config: ModelConfig) -> Planes:
    """The planes of all layers (L, E, P, F, ..), a layer's bundle in memory at a time beside them; of as many experts
    as the bundles hold."""
    out: Any = None
    for index, layer in enumerate(config.moe_layers):
        planes = layer_planes(get(layer_name(layer)))
        if out is None:
            out = jax.tree.map(lambda a: np.empty((config.num_moe_layers, *a.shape), a.dtype), planes)
        for whole, part in zip(jax.tree.leaves(out), jax.tree.leaves(planes)):
            whole[index] = part
    return out


def read_bundle(path: Path, experts: Experts = None) -> Bundle:
    """The arrays of one file, of planes those of some experts; ValueError if it is missing, unreadable or damaged."""
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            if experts is None:
                return {name: file.get_tensor(name) for name in file.keys()}
            runs = np.split(experts, np.flatnonzero(np.diff(experts) > 1) + 1)  # slices is all that the format reads

            def some(name: str) -> np.ndarray:
                whole = file.get_slice(name)
                return np.concatenate([whole[int(run[0]) : int(run[-1]) + 1] for run in runs])

            return {name: (some if name.startswith("planes/") else file.get_tensor)(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from error
