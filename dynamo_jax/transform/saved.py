"""A quantized NNX model on disk, and back into a model that has never had float experts.

    SHA256SUMS                    the files of the result and their digests
    dynamo_jax_nnx.json           format version, layers, sizes, plans' settings, datasets
    part-000.safetensors          planes, plans and knowledge of the layers whose experts are alike
    state/                        the model's other variables, by Orbax

How the folder becomes a result, whole or not at all, is ``storage.results``'. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from dynamo_jax.files import read_json, shown, sync, write_text
from dynamo_jax.kernels.layout import LEVELS
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.quantized import Knowledge, QuantizedExperts
from dynamo_jax.settings import from_dict
from dynamo_jax.storage.bundles import (
    Bundle,
    Expected,
    check_arrays,
    layer_planes,
    planes_bundle,
    planes_expected,
    read_bundle,
)
from dynamo_jax.storage.checkpoint import knowledge_arrays, knowledge_from
from dynamo_jax.storage.results import Making, Result, digest_of, located
from dynamo_jax.transform.found import Part, parts_of
from dynamo_jax.transform.served import LayerNumber, Plane, Served
from dynamo_jax.transform.serving import ModelHost, PartHost, pair, placed

M = TypeVar("M", bound=nnx.Module)

FORMAT = 1
NAME = "dynamo_jax quantized NNX model"
META, STATE = "dynamo_jax_nnx.json", "state"
SAVING = {"command": "transform.save"}
PLAIN = "planes"  # the arrangement that gradients go through
KNOWN = "knowledge/"  # before the names of what calibration left behind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartMeta:
    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    channel_block: int
    group_size: int
    apart: bool
    max_width: int
    spare: float
    plans: int
    slots: tuple[int, ...]
    arrangement: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta:
    name: str
    format: int
    requests: int
    datasets: tuple[str, ...]
    tokens: int
    calibrated: dict[str, tuple[str, int]]
    odd: dict[str, tuple[int, ...]]
    parts: tuple[PartMeta, ...]


def save(folder: str | Path, model: nnx.Module, host: ModelHost, overwrite: bool = False) -> None:
    """Write a quantized model into ``folder``, which is missing or empty, or with ``overwrite`` an earlier one.

    It holds all planes, the plans of all variants, what calibration left behind, and the model's variables that are not
    experts'. ValueError: the experts are not quantized, or ``folder`` holds something else. OSError: it cannot be
    written.
    """
    served = pair(model, host)
    with Making(Path(folder).resolve(), META, SAVING, overwrite=overwrite, resumes=False) as making:
        out = making.folder
        for index, part in enumerate(host.parts):
            write_tensors(out / _part_name(index), _part_bundle(part))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((out / STATE).absolute(), _others(model))
        known = host.parts[0].experts.knowledge
        meta = {
            "name": NAME,
            "format": FORMAT,
            "requests": int(served[0].state().number.shape[0]),
            "datasets": list(host.datasets),
            "tokens": 0 if known is None else known.tokens,
            "calibrated": {} if known is None else {n: list(v) for n, v in known.calibrated.items()},
            "odd": {} if known is None else {n: list(v) for n, v in known.odd.items()},
            "parts": [_part_meta(part, own) for part, own in zip(host.parts, served)],
        }
        write_text(out / META, json.dumps(meta, indent=2) + "\n")
        files = [p for p in out.rglob("*") if p.is_file() and p.parent != out]
        for path in files:
            sync(path)
        files += [out / META, *(out / _part_name(i) for i in range(len(host.parts)))]
        making.publish({str(p.relative_to(out)): digest_of(p) for p in files})


def load(folder: str | Path, model: M) -> tuple[M, ModelHost]:
    """The quantized model in ``folder``, and what stays in host memory.

    model: one of the same structure whose variables do not matter, abstract ones (``nnx.eval_shape``) included: its
    float experts are never made. All requests begin at the baseline, with monitors that have seen nothing.
    ValueError, which names it: a file is missing, damaged or of another format, or the model is another one.
    """
    folder = Path(folder).absolute()
    result, meta = _described(folder)
    hosts, states = [], []
    for index, part in enumerate(meta.parts):
        experts, plans = _part(result, meta, index)
        slots = dict(zip(LEVELS, part.slots, strict=True))
        kind = part.arrangement if part.arrangement == PLAIN else None  # a kernel's is chosen by the device
        here, state = serving.init(experts, meta.requests, len(plans), slots, kind, plans[1:])
        if index:
            state = state._replace(watch=None, signatures=None)
        found = _matching(folder, part, parts_of(model))
        hosts.append(PartHost(layers=part.layers, sizes=found.sizes, experts=experts, here=here))
        states.append(state)
    out = placed(model, tuple(part.layers for part in meta.parts), states)
    for name in (n for n in result.sums if n.startswith(f"{STATE}/")):
        result.path(name)
    where = located(folder, next(n for n in result.sums if n.startswith(f"{STATE}/")))
    while where.name != STATE:
        where = where.parent
    target = _others(out)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(where, target)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / STATE}: does not fit the model: {' '.join(str(error).split())[:500]}") from error
    _put_others(out, restored)
    return out, ModelHost(hosts)


def _part_name(index: int) -> str:
    return f"part-{index:03d}.safetensors"


def _part_bundle(part: PartHost) -> Bundle:
    plans = {f"widths/{index}": plan.widths for index, plan in enumerate(_plans(part))}
    known = part.experts.knowledge
    own = {} if known is None else {KNOWN + name: a for name, a in knowledge_arrays(known).items()}
    return planes_bundle(part.experts.store) | plans | own


def _plans(part: PartHost) -> tuple[Plan, ...]:
    """Of the variants; of one that has the baseline's slots, the baseline: both do not fit."""
    here = part.here
    return (here.plans[0],) * len(here.plans) if serving.lent(here) else here.plans


def _part_meta(part: PartHost, served: Served) -> dict[str, Any]:
    plan = part.experts.plan
    return {
        "layers": list(part.layers),
        "sizes": list(part.sizes),
        "channel_block": plan.channel_block,
        "group_size": plan.group_size,
        "apart": plan.apart,
        "max_width": part.experts.store.widths[-1],
        "spare": part.experts.spare,
        "plans": len(part.here.plans),
        "slots": [served.state().resident.pages[level].codes.shape[0] for level in LEVELS],
        "arrangement": part.here.pages.arrangement,
    }


def _described(folder: Path) -> tuple[Result, Meta]:
    if not located(folder, META).is_file():
        raise ValueError(f"{folder}: not a {NAME} (no {META})")
    raw = read_json(located(folder, META))
    if raw.get("name") != NAME or raw.get("format") != FORMAT:
        found = f"format {shown(raw.get('format'))} of {shown(raw.get('name'))}"
        raise ValueError(f"{folder / META}: {found}; this version reads format {FORMAT} of {NAME!r}")
    result = Result(folder)
    result.path(META)
    try:
        for key in ("calibrated", "odd"):
            raw[key] = {name: tuple(v) for name, v in raw[key].items()}
        raw["parts"] = tuple(from_dict(PartMeta, each, "part") for each in raw["parts"])
        meta = Meta(**{**raw, "datasets": tuple(raw["datasets"])})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / META}: damaged: {error}") from error
    return result, meta


def _part(result: Result, meta: Meta, index: int) -> tuple[QuantizedExperts, list[Plan]]:
    part, path = meta.parts[index], result.path(_part_name(index))
    bundle = read_bundle(path)
    _, _, channels, hidden = part.sizes

    def plan_of(number: int) -> Plan:
        name = f"widths/{number}"
        if name not in bundle:
            raise ValueError(f"{path}: {name} is missing")
        return Plan(
            widths=bundle[name],
            channel_block=part.channel_block,
            group_size=part.group_size,
            hidden_size=hidden,
            apart=part.apart,
            channels=channels,
        )

    plans = [plan_of(number) for number in range(part.plans)]
    layers = part.sizes[0]
    planes = {n: Expected((layers, *e.shape), e.kind) for n, e in planes_expected(plans[0], part.max_width).items()}
    own = {name: a for name, a in bundle.items() if name.startswith("planes/")}
    check_arrays(path, own, planes)
    known: Knowledge | None = None
    if meta.datasets:
        arrays = {n.removeprefix(KNOWN): a for n, a in bundle.items() if n.startswith(KNOWN)}
        try:
            known = knowledge_from(arrays, meta.datasets, meta.tokens, meta.calibrated, meta.odd)
        except KeyError as error:
            raise ValueError(f"{path}: {KNOWN}{error.args[0]} is missing") from error
    experts = QuantizedExperts(store=layer_planes(own), plan=plans[0], knowledge=known, spare=part.spare)
    return experts, plans


def _matching(folder: Path, meta: PartMeta, parts: tuple[Part, ...]) -> Part:
    for part in parts:
        if part.names == meta.layers:
            if tuple(part.sizes) != meta.sizes:
                raise ValueError(
                    f"{folder}: {part.names[0]} has layers, experts, channels and hidden size {meta.sizes} there; "
                    f"the model has {tuple(part.sizes)}"
                )
            return part
    ours = ", ".join(part.names[0] for part in parts)
    raise ValueError(f"{folder}: is of another model: it has experts at {meta.layers[0]}, this one at {ours}")


def _others(model: nnx.Module) -> dict[str, Any]:
    """The variables that are not of quantized experts, by path; keys of random numbers as their numbers."""
    out = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, (Plane, LayerNumber)):
            value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
            out[".".join(map(str, path))] = jax.tree.map(_plain, value)
    return out


def _plain(value: Any) -> Any:
    if not hasattr(value, "dtype"):
        return np.asarray(value)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.eval_shape(jax.random.key_data, value)
        return jax.random.key_data(value)
    return value


def _put_others(model: nnx.Module, restored: dict[str, Any]) -> None:
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if isinstance(variable, (Plane, LayerNumber)):
            continue
        found = restored[".".join(map(str, path))]
        if isinstance(variable, nnx.Variable):
            value = jax.tree.map(_as_before, variable.get_value(), found)
            flat.append((path, variable.copy(value)))
        else:
            flat.append((path, _as_before(variable, found)))
    nnx.update(model, nnx.from_flat_state(flat))


def _as_before(old: Any, found: Any) -> Any:
    """What ``_plain`` undoes."""
    if not hasattr(old, "dtype"):
        return type(old)(np.asarray(found).item())
    if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(jnp.empty((), old.dtype)))
    return found
