"""What a step takes, by shapes alone: no array is made, so that it can be compiled for devices that are not here.

    state = state_shapes(plan, requests=64, placement=placement)
    arrays = parameter_shapes(config, shapes, jnp.bfloat16, placement)
    cache = cache_shapes(config, 64, 4096, jnp.bfloat16, placement)
    tokens = of((64,), jnp.int32, placement, placement.rows(64))

They are those of ``serving.init`` and ``generate.stream``, and lie where those lie.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dynamo_jax.kernels.arrangements import ARRANGEMENTS
from dynamo_jax.kernels.layout import PLANE_BITS, PROJECTIONS, BasePlanes, Resident, filled
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Cache
from dynamo_jax.models.rest import FLOAT, stored
from dynamo_jax.models.stacked import new_stacked_cache, stacked
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.generate import Sampling
from dynamo_jax.runtime.mesh import Placement, cache_specs, parameter_specs
from dynamo_jax.runtime.monitor import start
from dynamo_jax.runtime.residency import levels_of, shards_of
from dynamo_jax.runtime.serving import State
from dynamo_jax.runtime.signatures import DIRECTIONS, Signatures


def of(shape: tuple[int, ...], dtype: Any, placement: Placement | None = None, *spec: Any) -> Any:
    """A ``jax.ShapeDtypeStruct`` of an array on the devices by ``spec``."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement and placement.sharding(P(*spec)))


def _lying(placement: Placement | None, tree: Any, specs: Any = None) -> Any:
    """Shapes that lie by their specifications, whole on every device without any."""
    if placement is None:
        return tree
    if specs is None:
        specs = jax.tree.map(lambda _: P(), tree)
    return jax.tree.map(lambda a, spec: of(a.shape, a.dtype, placement, *spec), tree, specs)


def state_shapes(
    plan: Plan,
    requests: int = 1,
    variants: int = 2,
    slots: dict[int, int] | None = None,
    known: int = 1,
    directions: int = DIRECTIONS,
    arrangement: str = "tiles",
    placement: Placement | None = None,
) -> State:
    """The state that ``serving.init`` makes of a model with this baseline, all variants at the baseline.

    slots: of each level, those of one device where there are several; by default the baseline's and the default share
    of spare ones. known: datasets that monitors compare with, 0 where nobody watches; directions: of their signatures.
    """
    kind, (layers, experts, pages) = ARRANGEMENTS[arrangement], plan.page_widths().shape
    hidden, together = filled(plan.hidden_size, plan.group_size), 1 if plan.apart else PROJECTIONS
    groups = hidden // plan.group_size
    one = (1, 1, PROJECTIONS, plan.channel_block)
    planes: Any = np.zeros((*one, hidden * PLANE_BITS[2] // 8), np.uint8), np.zeros((*one, groups), jnp.bfloat16)
    block = kind.base(BasePlanes(*planes))
    by_channel = kind.resident is Resident
    each = plan.blocks * (plan.channel_block if by_channel else 1)

    def whole(a: Any) -> Any:
        between = a.shape[2:3] if by_channel else ()
        return of((layers, experts, *between, each, *a.shape[3 + by_channel :]), a.dtype)

    base = jax.tree.map(whole, block)
    base = base if placement is None else _lying(placement, base, placement.base_specs(base, kind.resident))
    there: dict[int, Any] = {}
    for level, count in (memory.slots(plan, placement=placement) if slots is None else slots).items():
        sizes = (count * shards_of(placement), together, level, hidden, plan.channel_block, groups)
        empty = jax.eval_shape(functools.partial(kind.empty, *sizes))
        over = P(placement.both) if placement is not None and count else P()
        there[level] = _lying(placement, empty, jax.tree.map(lambda _, over=over: over, empty))
    spec = () if placement is None else placement.table_spec
    table = {level: of((layers, experts, pages), jnp.int32, placement, *spec) for level in levels_of(plan)}
    rows = None if placement is None else placement.rows(requests)
    state = State(
        kind.resident(base, there),
        (table,) * variants,
        of((requests,), jnp.int32, placement, rows),
        signatures=None,
        watch=None,
        placement=placement,
    )
    if not known:
        return state
    each_expert = (layers, experts)
    of_each = ((known, *each_expert), each_expert, (directions, *each_expert), (directions,), (known,), (known,))
    signatures = Signatures(*(of(size, jnp.float32, placement) for size in of_each))
    watch = jax.eval_shape(functools.partial(start, requests=requests), signatures)
    watch = _lying(placement, watch, jax.tree.map(lambda _: P(rows), watch))
    return state._replace(signatures=signatures, watch=watch)


def parameter_shapes(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    dtype: Any,
    placement: Placement | None = None,
    rest: int = FLOAT,
    tpu: bool = True,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters in one dtype, but for what is quantized where the rest has 8 or 4 bits, with layers stacked. shapes:
    of all but the routed experts' weights, by name; tpu: whether they are for one, which takes codes as int4."""
    arrays = jax.eval_shape(functools.partial(stacked, config), stored(shapes, rest, dtype, in_bytes=not tpu))
    return _lying(placement, arrays, placement and parameter_specs(placement, config, arrays))


def cache_shapes(
    config: ModelConfig, batch: int, capacity: int, dtype: Any, placement: Placement | None = None
) -> Cache:
    """A cache for ``capacity`` tokens of each of ``batch`` sequences, with layers stacked."""
    cache = jax.eval_shape(functools.partial(new_stacked_cache, config, batch, capacity, dtype))
    return _lying(placement, cache, placement and cache_specs(placement, cache, stacked=True))


def sampling_shapes(placement: Placement | None = None) -> Sampling:
    """The settings of ``generate.choose``."""
    number = jnp.float32(0)
    made = jax.eval_shape(lambda: Sampling(number, jnp.int32(0), number, jax.random.key(0)))
    return _lying(placement, made)
