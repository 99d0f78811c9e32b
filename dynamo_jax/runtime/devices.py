"""How many devices a model takes, and what lies on each, by arithmetic from its sizes alone.

Planes of experts are counted as they lie there: base planes, slots for the baseline's pages and spare ones, pages on
their way, page tables. The rest is attention, embeddings, routers, shared and dense parts, in bfloat16 or at 8 or 4
bits (``models.rest``), and a cache for so many requests of so many tokens. Both are split as ``mesh.py`` splits them.
What a step computes with comes beside it: a share of the device's memory is left for that.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ExpertSizes, ModelConfig
from dynamo_jax.models.decoder import new_cache
from dynamo_jax.models.rest import FLOAT, stored
from dynamo_jax.precision.plan import Plan, expert_plan
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.mesh import DATA, MODEL, Placement, cache_specs, parameter_specs

GIB = 2**30
MEMORY = {  # GiB of what JAX calls a device: a chip, or a core of TPU7x, which has two
    **{"v5e": 16.0, "v5p": 95.0, "v6e": 32.0, "tpu7x": 96.0},
    **{"h100": 80.0, "h200": 141.0, "b200": 180.0},
}
ROOM = 0.15  # of a device's memory: what a step computes with, and what the compiler keeps
MOST = 4096  # devices


def size_words(count: float) -> str:
    """Bytes, for a reader."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


class Share(NamedTuple):
    """Bytes on one device."""

    planes: int
    spare: int
    rest: int
    cache: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """data, model: of the mesh. experts, blocks: how many ways experts, and their channel blocks, are split."""

    data: int
    model: int
    experts: int
    blocks: int
    share: Share


def least_devices(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    plan: Plan,
    gib: float,
    batch: int,
    length: int,
    spare: float = memory.SPARE,
    room: float = ROOM,
    rest: int = FLOAT,
) -> DevicePlan:
    """The smallest mesh, of a power of two of devices, on which the model fits; of those of one size the one that needs
    least a device.

    shapes: of all parameters but the routed experts' weights. plan: any of the model's sizes that has the bits a weight
    in question. gib: a device's memory. rest: bits of all else (``models.rest``). ValueError: a batch or length that
    cannot be, or no mesh that does.
    """
    if batch < 1 or not 1 <= length <= config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"batch {batch}, length {length}: expected one or more, and at most {most:,} tokens")
    limit = gib * GIB * (1 - room)
    nearest: DevicePlan | None = None
    for count in (1 << power for power in range(MOST.bit_length())):
        fitting = []
        for data in (1 << power for power in range(count.bit_length())):
            try:
                found = on_mesh(config, shapes, plan, (data, count // data), batch, length, spare, rest)
            except ValueError:  # experts do not divide
                continue
            fitting.append(found)
        if not fitting:
            continue
        best = min(fitting, key=lambda one: (one.share.total, one.data))
        nearest = best if nearest is None or best.share.total < nearest.share.total else nearest
        if best.share.total <= limit:
            return best
    least = "no mesh splits it" if nearest is None else f"{size_words(nearest.share.total)} on one device"
    raise ValueError(f"no mesh of up to {MOST:,} devices of {gib:g} GiB holds the model: {least}")


def on_mesh(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    plan: Plan,
    shape: tuple[int, int],
    batch: int,
    length: int,
    spare: float = memory.SPARE,
    rest: int = FLOAT,
) -> DevicePlan:
    """What lies on each device of a mesh. ValueError: the experts do not divide over it."""
    mesh = AbstractMesh(shape, (DATA, MODEL))
    placement = Placement.of(mesh, config.num_experts, plan.blocks)
    arrays = stored(shapes, rest)
    cache = jax.eval_shape(lambda: new_cache(config, batch, length, jnp.bfloat16))
    of_parameters: Any = {name: PartitionSpec() for name in arrays}
    of_cache: Any = jax.tree.map(lambda _: PartitionSpec(), cache)
    if placement is not None:
        of_parameters = parameter_specs(placement, config, arrays)
        of_cache = cache_specs(placement, cache, stacked=False)
    held = memory.device_bytes(plan, spare, placement)
    share = Share(
        planes=held.plan + held.tables,
        spare=held.spare + held.staged,
        rest=_bytes_of(mesh, arrays, of_parameters),
        cache=_bytes_of(mesh, cache, of_cache),
    )
    ways = (1, 1) if placement is None else (placement.expert_shards, placement.block_shards)
    return DevicePlan(data=shape[0], model=shape[1], experts=ways[0], blocks=ways[1], share=share)


def _bytes_of(mesh: AbstractMesh, arrays: Any, specs: Any) -> int:
    """Of one device's parts."""
    leaves, parts = jax.tree.leaves(arrays), jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    total = 0
    for array, spec in zip(leaves, parts, strict=True):
        names = [name for part in spec for name in ((part,) if isinstance(part, str) else part or ())]
        split = math.prod(mesh.shape[name] for name in names)
        total += math.ceil(math.prod(array.shape) / split) * array.dtype.itemsize
    return total


HALVINGS = 12  # of the share of experts that have the larger width
BLOCK = 128  # channels and weights of a group: what the kernels of TPUs and GPUs take


def plan_of_bits(sizes: ExpertSizes, bits: float, spare: float = memory.SPARE) -> Plan:
    """A plan of two neighbouring widths, evenly over all experts, that takes ``bits`` a weight on the device, as
    ``quantize`` counts them. ValueError: no plan takes as few, or as many."""
    block, group = (min(BLOCK, 8 * (size // 8)) for size in (sizes.channels, sizes.hidden_size))
    rank = np.arange(sizes.layers * sizes.experts).reshape(sizes.layers, sizes.experts)

    def mixed(low: int, high: int, share: float) -> Plan:
        more = np.floor((rank + 1) * share) > np.floor(rank * share)
        widths = np.where(more, high, low).astype(np.int8)
        return expert_plan(widths, sizes.channels, block, group, sizes.hidden_size)

    of_width = {width: memory.device_bits(mixed(width, width, 0.0), spare) for width in WIDTHS}
    if not of_width[WIDTHS[0]] <= bits <= of_width[WIDTHS[-1]]:
        raise ValueError(f"{bits:g} bits: plans take {of_width[WIDTHS[0]]:.2f} to {of_width[WIDTHS[-1]]:.2f}")
    low, high = next(pair for pair in itertools.pairwise(WIDTHS) if bits <= of_width[pair[1]])
    share = [0.0, 1.0]
    for _ in range(HALVINGS):
        middle = sum(share) / 2
        share[memory.device_bits(mixed(low, high, middle), spare) > bits] = middle
    return mixed(low, high, share[0])
