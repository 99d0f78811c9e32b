"""Where a model's arrays lie on several devices: one placement, and the specifications that follow from it.

A mesh has two axes. ``data``: requests are split over it. ``model``: attention's heads, the channels of dense parts and
the vocabulary are. Routed experts are split over both; where there are fewer experts than devices, or a number that
does not divide, an axis splits each expert's channel blocks instead.

    placement = Placement.of(mesh, config.num_experts, blocks)
    host, state = init(model, requests=8, placement=placement)

A shard is what one device has of the experts. Shards are counted by expert first, then by block. A shard's slots for
pages are its own, and page tables on the devices count them from zero; on the host slots are counted through, shard
after shard.

One device is no placement at all (None), and nothing here runs then.

Axes: L layers, E experts, UN pages of an expert and level, Q slots, n shards.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dynamo_jax.kernels.layout import Resident
from dynamo_jax.models.attention import KeyValues, Spread
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Cache
from dynamo_jax.models.experts import ExpertBiases
from dynamo_jax.models.rest import CODES, SCALES, is_codes, unpacked
from dynamo_jax.models.specs import Grouped, Latent
from dynamo_jax.models.stacked import loops
from dynamo_jax.runtime.hosts import agreed

P = PartitionSpec
DATA, MODEL = "data", "model"
Result = TypeVar("Result")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Placement:
    """experts, blocks: the axes of ``mesh`` that split the experts, and each expert's channel blocks."""

    mesh: Mesh | AbstractMesh
    experts: tuple[str, ...]
    blocks: tuple[str, ...]

    @staticmethod
    def of(mesh: Mesh | AbstractMesh, num_experts: int, num_blocks: int) -> Placement | None:
        """What a mesh with the axes ``data`` and ``model`` makes of so many experts of so many channel blocks; None for
        one device. ValueError: other axes, no way to split them evenly, or devices of some of several processes. Axes
        of any type serve: the program is divided as the specifications here say. A mesh without devices serves for
        shapes."""
        if set(mesh.axis_names) != {DATA, MODEL}:
            raise ValueError(f"the mesh has the axes {', '.join(mesh.axis_names)}: expected {DATA} and {MODEL}")
        if mesh.size == 1:
            return None
        _check_processes(mesh)
        names = mesh.axis_names
        if isinstance(mesh, Mesh):
            mesh = Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        for count in range(len(names), -1, -1):
            for experts in itertools.combinations((DATA, MODEL), count):
                blocks = tuple(name for name in (DATA, MODEL) if name not in experts)
                found = Placement(mesh, experts, blocks)
                if num_experts % found.expert_shards == 0 and num_blocks % found.block_shards == 0:
                    return found
        raise ValueError(
            f"{num_experts} experts of {num_blocks} channel blocks do not divide over a mesh of "
            f"{mesh.shape[DATA]} x {mesh.shape[MODEL]}"
        )

    @property
    def expert_shards(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.experts)

    @property
    def block_shards(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.blocks)

    @property
    def shards(self) -> int:
        return self.mesh.size

    @property
    def both(self) -> tuple[str, ...]:
        """The axes that split experts, then those that split blocks."""
        return self.experts + self.blocks

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def rows(self, count: int) -> str | None:
        """The axis that splits so many requests: none where they do not divide."""
        size = self.mesh.shape[DATA]
        return DATA if size > 1 and count % size == 0 else None

    def spread(self, requests: int) -> Spread:
        """How attention is spread."""
        return Spread(self.mesh, self.rows(requests), MODEL if self.mesh.shape[MODEL] > 1 else None)

    def base_specs(self, base: Any, arrangement: type) -> Any:
        """Of base planes (L, E, ..)."""
        before = (None, self.experts, None) if arrangement is Resident else (None, self.experts)  # channels, or blocks
        return jax.tree.map(lambda _: P(*before, self.blocks), base)

    def resident_specs(self, resident: Any) -> Any:
        """Of the planes on the devices."""
        pages = jax.tree.map(lambda _: P(self.both), resident.pages)
        return resident._replace(base=self.base_specs(resident.base, type(resident)), pages=pages)

    @property
    def bias_specs(self) -> Any:
        """Of experts' biases, of gate and up (E, F) and of down (E, D)."""
        channels: Any = P(self.experts, self.blocks)
        outputs: Any = P(self.experts)
        return ExpertBiases(channels, channels, outputs)

    @property
    def table_spec(self) -> PartitionSpec:
        """Of a page table (L, E, UN), whose last axis has the blocks of one shard after those of another."""
        return P(None, self.experts, self.blocks)

    def owners(self, shape: tuple[int, ...], units: int) -> Int[np.ndarray, "E UN"]:
        """The shard of each page of an expert. shape: (.., E, UN); units: U."""
        *_, experts, pages = shape
        expert = np.arange(experts) // (experts // self.expert_shards)
        each = pages // units
        block = np.tile(np.arange(each) // (each // self.block_shards), units)
        return expert[:, None] * self.block_shards + block

    def by_shard(self, table: Int[np.ndarray, "L E UN"], units: int) -> Int[np.ndarray, "L E UN"]:
        """A table with the pages of an expert in the order of their shards."""
        layers, experts, pages = table.shape
        parts = table.reshape(layers, experts, units, self.block_shards, pages // units // self.block_shards)
        return np.ascontiguousarray(parts.swapaxes(2, 3)).reshape(table.shape)


def mesh_of(words: str) -> Mesh:
    """The mesh of all devices, of all processes, that "2x4" means: data 2, model 4. ValueError: other words, or other
    devices than that."""
    parts = words.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"mesh {words!r}: expected DATAxMODEL, such as 2x4")
    shape, devices = (int(parts[0]), int(parts[1])), jax.devices()
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh {words}: there are {len(devices)} devices")
    return Mesh(np.array(devices).reshape(shape), (DATA, MODEL))


def _check_processes(mesh: Mesh | AbstractMesh) -> None:
    """ValueError for devices of some of the processes: what one fails at it tells all, and waits for their answer."""
    if isinstance(mesh, Mesh):
        there = {device.process_index for device in mesh.devices.flat}
        if there not in ({jax.process_index()}, set(range(jax.process_count()))):
            numbers = ", ".join(map(str, sorted(there)))
            raise ValueError(
                f"the mesh has devices of processes {numbers} of {jax.process_count()}, on process "
                f"{jax.process_index()}: expected those of all, or of this one alone"
            )


def spans_processes(over: Placement | Mesh | None) -> bool:
    """Whether devices of other processes are among those of the mesh."""
    mesh = over.mesh if isinstance(over, Placement) else over
    return isinstance(mesh, Mesh) and mesh.is_multi_process


class OnAllError(ValueError):
    """An error that every process has, at the same point: all may go on from it."""


def recoverable(placement: Placement | None) -> tuple[type[Exception], ...]:
    """The errors that a loop may go on after: on several processes those that all of them have."""
    return (OnAllError,) if spans_processes(placement) else (ValueError, RuntimeError)


def own_experts(placement: Placement | None, experts: int) -> Int[np.ndarray, " O"]:
    """Of so many, those that this process's devices have, in ascending order; all on one process."""
    if placement is None or not spans_processes(placement):
        return np.arange(experts)
    mesh = cast(Mesh, placement.mesh)
    mine = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    at = np.argwhere(mine)[:, [mesh.axis_names.index(name) for name in placement.experts]]
    sizes = [mesh.shape[name] for name in placement.experts]
    shards = np.ravel_multi_index(tuple(at.T), sizes) if sizes else np.zeros(1, int)
    each = experts // placement.expert_shards
    return (np.unique(shards)[:, None] * each + np.arange(each)).reshape(-1)


def on_all(over: Placement | Mesh | None, run: Callable[[], Result]) -> Result:
    """What ``run`` gives, if it gives something on every process of the mesh. OnAllError on all of them where it fails
    on one: that one's words, and on the others its number before them. A process that is gone is an error too, within
    seconds."""
    if not spans_processes(over):
        return run()
    out, error = None, None
    try:
        out = run()
    except Exception as raised:
        error = raised
    try:
        agreed(error)
    except Exception as told:
        if told is error or isinstance(told, ValueError):
            raise OnAllError(str(told) or type(told).__name__) from told
        raise  # another process is gone
    return cast(Result, out)


def all_agree(placement: Placement | None, flag: bool) -> bool:
    """Whether every process of the mesh says yes."""
    if not spans_processes(placement):
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.asarray(flag))).all())


def of_first(placement: Placement | None, array: np.ndarray) -> np.ndarray:
    """The array of process 0, for all."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if spans_processes(placement) else array


def check_same(over: Placement | Mesh | None, what: str, *arrays: np.ndarray) -> None:
    """OnAllError unless every process of the mesh has the same: numbers that differ would be wrong without a word."""
    if not spans_processes(over):
        return
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).digest()
    each = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))).reshape(-1, len(digest))
    if (differ := (each != each[0]).any(axis=1)).any():
        raise OnAllError(f"{what} of process {int(differ.argmax())} are not those of process 0")


def in_order(placement: Placement | None, array: Any, units: int) -> Any:
    """(E, UN, ..) with the blocks of one shard after those of another, in the order of the blocks."""
    if placement is None or placement.block_shards == 1:
        return array
    experts, count, *rest = array.shape
    shards = placement.block_shards
    parts = array.reshape(experts, shards, units, count // units // shards, *rest)
    return parts.swapaxes(1, 2).reshape(array.shape)


def put(placement: Placement | None, array: Any, *spec: Any) -> Array:
    """An array of the host, or of one device, on the devices by ``spec``: each gets its own part alone."""
    if placement is None:
        return jnp.asarray(array)
    return put_by(placement, array, P(*spec))


def put_experts(placement: Placement | None, array: Any, place: Int[np.ndarray, " E"], *after: Any) -> Array:
    """An array (O, ..) of some experts on the devices as one (E, ..) of all. place: where in it each expert is, -1 for
    one that no device of this process has; after: how the axes behind the first are split."""
    if placement is None:
        return jnp.asarray(array)

    def part(index: Any) -> Any:
        return array[as_slice(place[index[0]])][:, *index[1:]]

    sharding = placement.sharding(P(placement.experts, *after))
    return jax.make_array_from_callback((len(place), *array.shape[1:]), sharding, part)


def as_slice(indices: Int[np.ndarray, " n"]) -> Any:
    """Ascending neighbours as a slice, which copies nothing; others as they are."""
    run = len(indices) > 0 and np.array_equal(indices, indices[0] + np.arange(len(indices)))
    return slice(int(indices[0]), int(indices[0]) + len(indices)) if run else indices


def put_by(placement: Placement, array: Any, spec: PartitionSpec) -> Array:
    sharding = placement.sharding(spec)
    if isinstance(array, jax.Array):
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            bits = put_by(placement, jax.random.key_data(array), spec)
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(array))
        if not array.is_fully_addressable:
            there = array.sharding.is_equivalent_to(sharding, array.ndim)
            return array if there else _moved(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@functools.partial(jax.jit, static_argnums=1)
def _moved(array: Array, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(array, sharding)


def fetch(array: Any) -> np.ndarray:
    """A whole array on this host, whichever devices and hosts have parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def parameter_specs(placement: Placement, config: ModelConfig, arrays: dict[str, Any]) -> dict[str, PartitionSpec]:
    """Of parameters by dotted name, stacked (``models.stacked``) or not: what ``model`` divides is split over it, the
    rest is whole on every device."""
    specs = {name: _parameter_spec(placement, config, name, a.shape) for name, a in arrays.items()}
    for codes, scales in ((n, n.removesuffix(CODES) + SCALES) for n in arrays if is_codes(n)):
        groups = arrays[scales].shape[-2] > 1 or arrays[codes].dtype == np.uint8  # which has two rows of a group in one
        if groups and specs[scales] == P():
            specs[codes] = P()  # they would be split
    return specs


def _parameter_spec(placement: Placement, config: ModelConfig, name: str, shape: Sequence[int]) -> PartitionSpec:
    size, tail = placement.mesh.shape[MODEL], name.split(".")
    if tail[0] in ("embed", "head", "head_bias"):
        over = MODEL if size > 1 else DATA
        return P(over) if shape[0] % placement.mesh.shape[over] == 0 else P()
    if tail[0] not in ("layers", "loops") or size == 1:
        return P()
    lead = 1 if tail[0] == "loops" else 0
    layer = _first_layer(config, tail) if lead else int(tail[1])
    axis = _split_axis(config, layer, tail[2 + lead :], size)
    if axis is None:
        return P()
    axis += lead
    return P(*[None] * axis, MODEL) if shape[axis] % size == 0 else P()


def _first_layer(config: ModelConfig, tail: list[str]) -> int:
    return loops(config)[int(tail[1])].first + int(tail[2])


COLUMNS = ("q", "k", "v", "q_up", "kv_up", "gate")  # of attention: (in, heads times numbers)
BIASES = ("q_bias", "k_bias", "v_bias", "sinks")


def _split_axis(config: ModelConfig, layer: int, name: list[str], size: int) -> int | None:
    """The axis of one of a layer's parameters that ``model`` splits."""
    if name[0] in ("dense", "shared"):
        return 0  # channels
    if name[0] != "attention" or not splits_heads(config, layer, size):
        return None
    if name[1] in COLUMNS:
        return 1
    return 0 if name[1] in (*BIASES, "o") else None


def splits_heads(config: ModelConfig, layer: int, size: int) -> bool:
    """Whether a layer's heads, of queries and of keys, divide over so many devices."""
    mixer = config.layers[layer].mixer
    if isinstance(mixer, Grouped):
        return mixer.num_key_value_heads % size == 0 and not mixer.fused_projections
    return isinstance(mixer, Latent) and mixer.num_attention_heads % size == 0


def placed_parameters(
    placement: Placement | None, config: ModelConfig, arrays: dict[str, Any], dtype: Any = None
) -> dict[str, Array]:
    """Parameters on the devices, in one dtype if it is given, all but codes of a quantized rest, which TPUs take as
    int4."""
    kinds = {jax.default_backend()} if placement is None else {d.platform for d in _devices(placement)}
    arrays = unpacked(arrays) if kinds == {"tpu"} else arrays
    if placement is None:
        return {name: jnp.asarray(a, None if is_codes(name) else dtype) for name, a in arrays.items()}
    specs = parameter_specs(placement, config, arrays)

    def cast(name: str, array: Any) -> Any:
        return array if dtype is None or is_codes(name) else array.astype(dtype)

    return {name: put_by(placement, cast(name, a), specs[name]) for name, a in arrays.items()}


def _devices(placement: Placement) -> list[Any]:
    return list(cast(Mesh, placement.mesh).devices.flat)


def cache_specs(placement: Placement, cache: Cache, stacked: bool) -> Any:
    """Of a key/value cache, its layers stacked or not: requests over ``data``, heads of keys over ``model``."""
    size, lead = placement.mesh.shape[MODEL], [None] * stacked
    rows = placement.rows(cache.key_positions.shape[0])

    def spec(heads: str | None) -> PartitionSpec:
        return P(*lead, rows, *([None, heads] if heads else []))

    def of(layer: Any) -> Any:
        heads = layer.keys.shape[len(lead) + 2] if isinstance(layer, KeyValues) else 0
        own = spec(MODEL if size > 1 and heads > 1 and heads % size == 0 else None)
        return jax.tree.map(lambda _: own, layer)

    specs: dict[str, Any] = {"layers": tuple(map(of, cache.layers)), "key_positions": P(rows), "used": P()}
    return cache._replace(**specs)


def constrained(placement: Placement | None, tree: Any, specs: Any) -> Any:
    """For use inside jit: the arrays by their specifications, which they then keep from step to step."""
    if placement is None:
        return tree
    shardings = jax.tree.map(placement.sharding, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.lax.with_sharding_constraint(tree, shardings)
