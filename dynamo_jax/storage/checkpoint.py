"""A quantized model on disk: a folder of safetensors files and JSON, a file a layer.

    SHA256SUMS               the files of the result and their digests
    dynamo_jax.json          format version, configuration, names, sizes, the job that made it
    plan.safetensors         plan, page tables, and what calibration knew
    top.safetensors          embeddings, last norm, head
    layer-000.safetensors    a layer's planes and its unquantized parameters
    config.json, ..          configuration, tokenizer and chat template of the model that was quantized, as they were

A file a layer, so that a model larger than memory can be written and read in parts. Engines find configuration and
tokenizer where any model folder has them. How the folder
becomes a result, whole or not at all, is ``results.py``'s. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamo_jax.files import check_readable, read_json, shortened, shown, write_bytes, write_text
from dynamo_jax.kernels.layout import WIDTHS, num_blocks
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.models.huggingface import top_shapes
from dynamo_jax.models.rest import FLOAT, bits_of, check_rest, rest_words
from dynamo_jax.models.specs import LayerSpec
from dynamo_jax.models.tokenizer import TOKENIZER, tokenizer_from
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime.mesh import Placement, check_same, on_all, own_experts, spans_processes
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel
from dynamo_jax.runtime.signatures import Signatures
from dynamo_jax.runtime.store import page_tables, places
from dynamo_jax.settings import from_dict
from dynamo_jax.storage.bundles import (
    Bundle,
    Expected,
    Experts,
    check_arrays,
    layer_expected,
    layer_name,
    parameters_expected,
    planes_bundle,
    read_bundle,
    stacked_planes,
)
from dynamo_jax.storage.results import SUMS, Making, Result, check_free, digest_of, located
from dynamo_jax.storage.work import FolderWork

FORMAT = 9
NAME = "dynamo_jax quantized model"
META, PLAN, TOP = "dynamo_jax.json", "plan.safetensors", "top.safetensors"
KNOWLEDGE = ("counts", "unseen", "loss_per_error", "block_errors", "correction")
SAVING = {"command": "save"}
MONITOR = "monitor/"  # before the names of the signatures' arrays


def is_checkpoint(folder: Path) -> bool:
    return located(folder, META).is_file()


def save(folder: str | Path, model: QuantizedModel, overwrite: bool = False) -> None:
    """Write the checkpoint into ``folder``, which is missing or empty, or with ``overwrite`` an earlier checkpoint.

    What the folder holds: docs/checkpoints.md. It is larger than the plan's bytes, since all planes up to 8 bits are
    kept for switching. ValueError: ``folder`` holds something else, or the model is one of several processes' part.
    OSError: it cannot be written.
    """
    places(model.config.num_experts, model.held, np.arange(model.config.num_experts))
    with Making(Path(folder).resolve(), META, SAVING, overwrite=overwrite, resumes=False) as making:
        work = FolderWork(making.folder)
        arrays = {name: np.asarray(a) for name, a in model.parameters.items()}
        work.put(Path(TOP).stem, {name: a for name, a in arrays.items() if not name.startswith("layers.")})
        for layer in range(model.config.num_hidden_layers):
            work.put(layer_name(layer), _layer_bundle(model, arrays, layer))
        facts = Facts(model.window, model.spare, model.store.widths[-1])
        facts = facts._replace(rest=bits_of(arrays), rest_bytes=sum(a.nbytes for a in arrays.values()))
        publish(making, work, model.config, model.plan, facts, model.knowledge, model.files)


def check_free_to_save(folder: Path, overwrite: bool = False) -> None:
    """ValueError, as of ``save``, if ``folder`` holds what that would not replace."""
    check_free(folder, META, SAVING, overwrite)


def _layer_bundle(model: QuantizedModel, arrays: Bundle, layer: int) -> Bundle:
    prefix = f"layers.{layer}."
    own = {f"parameters/{n.removeprefix(prefix)}": a for n, a in arrays.items() if n.startswith(prefix)}
    if layer in model.config.dense_layers:
        return own
    index = model.config.moe_layers.index(layer)
    return own | planes_bundle(jax.tree.map(lambda a: a[index], model.store))


class Facts(NamedTuple):
    """Of a quantized model. window: tokens of a calibration window; spare: slots beside the baseline's, as a share of
    its pages; max_width: of the planes; expert_bytes, other_bytes: of what was quantized and of all else that was read,
    0 where that is not known; not_read: tensors of the model that the decoder has no use for; job: what made it, None
    where that cannot be made again; expert_format: what the experts were stored in, where that is known; fused: where
    they were in two tensors a layer though their family has them apart, whether each was turned; rest: bits of the
    matrices that are no experts' (``models.rest``); rest_bytes: of all but the experts' weights as it is stored, 0
    where that is not known."""

    window: int
    spare: float
    max_width: int
    expert_bytes: int = 0
    other_bytes: int = 0
    not_read: tuple[str, ...] = ()
    job: dict[str, Any] | None = None
    expert_format: str = ""
    fused: tuple[bool, ...] = ()
    rest: int = FLOAT
    rest_bytes: int = 0


def publish(
    making: Making,
    work: FolderWork,
    config: ModelConfig,
    plan: Plan,
    facts: Facts,
    knowledge: Knowledge,
    files: dict[str, bytes],
) -> None:
    """Write what goes beside the layers and the top, which ``work`` has, and make all of it the result."""
    known, folder = knowledge, making.folder
    arrays = knowledge_arrays(known)
    tables = {f"page_table{level}": table for level, table in page_tables(plan).items()}
    write_tensors(folder / PLAN, arrays | tables | {"widths": plan.widths})
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)
    sums = work.sums([Path(TOP).stem, *map(layer_name, range(config.num_hidden_layers))])
    sums |= {name: digest_of(folder / name) for name in (PLAN, *files)}
    meta = {
        "name": NAME,
        "format": FORMAT,
        "config": config.to_dict(),
        "unquantized": rest_words(facts.rest),
        **facts._asdict(),
        "channel_block": plan.channel_block,
        "group_size": plan.group_size,
        "per_projection": plan.apart,
        "names": list(known.names),
        "tokens": known.tokens,
        "calibrated": {name: list(v) for name, v in known.calibrated.items()},
        "odd": {name: list(v) for name, v in known.odd.items()},
        "sizes": {name: (folder / name).stat().st_size for name in sorted(sums)},
    }
    write_text(folder / META, json.dumps(meta, indent=2) + "\n")
    making.publish(sums | {META: digest_of(folder / META)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta:
    """What dynamo_jax.json holds beside the configuration."""

    name: str
    format: int
    unquantized: str
    window: int
    spare: float
    max_width: int
    expert_bytes: int
    other_bytes: int
    not_read: tuple[str, ...]
    job: dict[str, Any] | None
    expert_format: str = ""
    fused: tuple[bool, ...] = ()
    rest: int = FLOAT
    rest_bytes: int = 0
    channel_block: int
    group_size: int
    per_projection: bool
    names: tuple[str, ...]
    tokens: int
    calibrated: dict[str, tuple[str, int]]
    odd: dict[str, tuple[int, ...]]
    sizes: dict[str, int]

    def __post_init__(self) -> None:
        for name in ("window", "tokens", "channel_block", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.max_width not in WIDTHS:
            raise ValueError(f"max_width {self.max_width} is none of {WIDTHS}")
        if not (math.isfinite(self.spare) and self.spare >= 0):
            raise ValueError(f"spare {self.spare} is no share")
        check_rest(self.rest)
        if len(self.fused) not in (0, 2):
            raise ValueError(f"fused {self.fused} is not of two tensors")
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"names {self.names} are not those of datasets")
        for key, found in (("calibrated", self.calibrated), ("odd", self.odd)):
            if set(found) != set(self.names):
                raise ValueError(f"{key} is not of the datasets {', '.join(self.names)}")


class Description(NamedTuple):
    """All of a checkpoint but its layers."""

    result: Result
    meta: Meta
    config: ModelConfig
    plan: Plan
    arrays: Bundle


def knowledge_of(description: Description) -> Knowledge:
    """What calibration left behind for run time."""
    meta = description.meta
    return knowledge_from(description.arrays, meta.names, meta.tokens, meta.calibrated, meta.odd)


def read_description(folder: Path) -> Description:
    """The checkpoint's JSON and plan; ValueError where they are missing, damaged or of another format."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not is_checkpoint(folder):
        raise ValueError(f"{folder}: not a {NAME} (no {META})")
    raw = read_json(located(folder, META))
    if raw.get("name") != NAME or raw.get("format") != FORMAT:
        found = f"format {shown(raw.get('format'))} of {shown(raw.get('name'))}"
        raise ValueError(f"{folder / META}: {found}; this version reads format {FORMAT} of {NAME!r}")
    result = Result(folder)
    result.path(META)
    try:
        config = _config(raw.pop("config", {}))
        meta = from_dict(Meta, _tuples(raw), META)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / META}: damaged: {shortened(str(error), 500)}") from error
    own, there = _own_files(config), set(result.sums)
    if wrong := sorted(own - there) + sorted(name for name in there - own if name.endswith(".safetensors")):
        raise ValueError(
            f"{folder / SUMS}: damaged: {wrong[0]} is {'no' if wrong[0] in there else 'a'} file of this model"
        )
    _check_sizes(result, meta)
    path = result.path(PLAN)
    arrays = read_bundle(path)
    units = num_blocks(config.intermediate_size, meta.channel_block) * (2 if meta.per_projection else 1)
    widths = Expected((config.num_moe_layers, config.num_experts, units), "int8")
    check_arrays(path, {name: a for name, a in arrays.items() if name == "widths"}, {"widths": widths})
    try:
        plan = Plan(
            widths=arrays["widths"],
            channel_block=meta.channel_block,
            group_size=meta.group_size,
            hidden_size=config.hidden_size,
            apart=meta.per_projection,
            channels=config.intermediate_size,
        )
    except ValueError as error:
        raise ValueError(f"{path}: does not fit {META}: {error}") from error
    check_arrays(path, arrays, _plan_expected(config, plan, meta, arrays))
    for level, table in page_tables(plan).items():
        if not np.array_equal(table, arrays[f"page_table{level}"]):
            raise ValueError(f"{path}: the page table of level {level} does not fit the widths")
    return Description(result, meta, config, plan, arrays)


def _own_files(config: ModelConfig) -> set[str]:
    layers = (f"{layer_name(layer)}.safetensors" for layer in range(config.num_hidden_layers))
    return {META, PLAN, TOP, *layers}


def side_names(description: Description) -> list[str]:
    """The files that are as they were in the folder that was quantized."""
    own = _own_files(description.config)
    return [name for name in description.result.sums if name not in own]


def _config(raw: Any) -> ModelConfig:
    """What ``ModelConfig.to_dict`` wrote."""
    raw = dict(raw) if isinstance(raw, dict) else {}
    specs, layers = raw.pop("specs", []), raw.pop("layers", [])
    if not isinstance(specs, list) or not isinstance(layers, list) or not set(layers) <= set(range(len(specs))):
        raise ValueError("config: layers are not numbers of specs")
    read = [from_dict(LayerSpec, spec, "config [specs]") for spec in specs]
    return from_dict(ModelConfig, raw | {"layers": tuple(read[number] for number in layers)}, "config")


def _check_sizes(result: Result, meta: Meta) -> None:
    """ValueError for a file that is missing or of another size: long before its digest would tell."""
    if wrong := sorted((result.sums.keys() - {META}) ^ meta.sizes.keys()):
        raise ValueError(f"{result.folder / META}: does not fit {SUMS}: {shortened(wrong[0])} is in one of them alone")
    for name, size in meta.sizes.items():
        path = located(result.folder, name)
        check_readable(path)
        if (found := path.stat().st_size) != size:
            raise ValueError(f"{path}: damaged: {found:,} bytes, expected {size:,}")


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """Lists inside of the objects "calibrated" and "odd" as tuples, as the fields have them."""
    inner = {key: raw.get(key) for key in ("calibrated", "odd")}
    return raw | {
        key: {n: tuple(v) if isinstance(v, list) else v for n, v in value.items()}
        for key, value in inner.items()
        if isinstance(value, dict)
    }


def _plan_expected(config: ModelConfig, plan: Plan, meta: Meta, arrays: Bundle) -> dict[str, Expected]:
    names, layers, experts = len(meta.names), config.num_moe_layers, config.num_experts
    pages = {f"page_table{level}": Expected(table.shape, "int32") for level, table in page_tables(plan).items()}
    directions = arrays[MONITOR + "damping"].size if MONITOR + "damping" in arrays else 0
    monitor = Signatures(
        shares=Expected((names, layers, experts)),  # type: ignore[arg-type]
        weight=Expected((layers, experts)),  # type: ignore[arg-type]
        directions=Expected((directions, layers, experts)),  # type: ignore[arg-type]
        damping=Expected((directions,)),  # type: ignore[arg-type]
        place=Expected((names,)),  # type: ignore[arg-type]
        limit=Expected((names,), "any float"),  # type: ignore[arg-type]
    )
    return {
        "widths": Expected(plan.widths.shape, "int8"),
        **pages,
        "counts": Expected((names, layers, experts)),
        **({"unseen": Expected((layers, experts))} if "unseen" in arrays else {}),  # folders without were made before
        "loss_per_error": Expected((layers,)),
        "block_errors": Expected((*plan.widths.shape, len(WIDTHS))),
        "correction": Expected((layers, experts, len(WIDTHS))),
        **{MONITOR + name: expected for name, expected in monitor._asdict().items()},
    }


def load(folder: str | Path, mesh: Mesh | None = None) -> QuantizedModel:
    """The quantized model in ``folder``, planes in host memory. mesh: of several processes, of which each holds the
    planes of its own devices' experts alone.

    Every file is compared with its digest, every array with what the description asks for. ValueError, which names the
    file: something is missing, damaged, or of another format, on one of the processes, or not the same on all.
    """
    folder = Path(folder).absolute()
    model, sums = on_all(mesh, lambda: _loaded(folder, mesh))
    check_same(mesh, f"{folder}: files", np.frombuffer(repr(sorted(sums.items())).encode(), np.uint8))
    return model


def _loaded(folder: Path, mesh: Mesh | None) -> tuple[QuantizedModel, dict[str, str]]:
    """The model, and the digests of its files."""
    description = read_description(folder)
    result, meta, config, plan, _ = description
    files = {name: result.path(name).read_bytes() for name in side_names(description)}
    if TOKENIZER not in files:
        raise ValueError(f"{folder / TOKENIZER}: no such file")
    tokenizer = tokenizer_from(files[TOKENIZER], folder / TOKENIZER)
    kept: Bundle = dict(top_bundle(result, config, meta.rest))
    placement = None if mesh is None else Placement.of(mesh, config.num_experts, plan.blocks)
    held = own_experts(placement, config.num_experts) if spans_processes(placement) else None

    def planes(name: str) -> Bundle:
        layer = int(name.removeprefix("layer-"))
        bundle = layer_bundle(result, config, plan, meta, layer, held)
        for key in [k for k in bundle if k.startswith("parameters/")]:
            kept[f"layers.{layer}.{key.removeprefix('parameters/')}"] = bundle.pop(key)
        return bundle

    for layer in config.dense_layers:
        planes(layer_name(layer))
    store = stacked_planes(planes, config)
    model = QuantizedModel(
        config=config,
        parameters={n: a if placement else jnp.asarray(a) for n, a in kept.items()},  # type: ignore[misc]
        tokenizer=tokenizer,
        store=store,
        plan=plan,
        window=meta.window,
        knowledge=knowledge_of(description),
        files=files,
        spare=meta.spare,
        held=held,
    )
    return model, result.sums


def knowledge_arrays(known: Knowledge) -> Bundle:
    """What calibration left behind, by the names that it has in files."""
    arrays = {name: np.asarray(getattr(known, name)) for name in KNOWLEDGE}
    return arrays | {MONITOR + name: np.asarray(a) for name, a in known.signatures._asdict().items()}


def knowledge_from(
    arrays: Bundle,
    names: tuple[str, ...],
    tokens: int,
    calibrated: dict[str, tuple[str, int]],
    odd: dict[str, tuple[int, ...]],
) -> Knowledge:
    """What ``knowledge_arrays`` undoes, with what is no array of it."""
    arrays = {"unseen": np.zeros(arrays["counts"].shape[1:], np.float32)} | arrays
    return Knowledge(
        names=names,
        signatures=Signatures(*(jnp.asarray(arrays[MONITOR + name]) for name in Signatures._fields)),
        odd=odd,
        calibrated=calibrated,
        tokens=tokens,
        **{name: arrays[name] for name in KNOWLEDGE},
    )


def top_bundle(result: Result, config: ModelConfig, rest: int = FLOAT) -> Bundle:
    """Embeddings, last norm and head. ValueError: the file is missing, damaged or of another model."""
    path = result.path(TOP)
    bundle = read_bundle(path)
    check_arrays(path, bundle, parameters_expected(top_shapes(config), rest))
    return bundle


def layer_bundle(
    result: Result, config: ModelConfig, plan: Plan, meta: Meta, layer: int, experts: Experts = None
) -> Bundle:
    """A layer's planes, of some experts or of all, and parameters. ValueError: the file is missing, damaged or of
    another layer or model."""
    path = result.path(f"{layer_name(layer)}.safetensors")
    bundle = read_bundle(path, experts)
    check_arrays(path, bundle, layer_expected(config, plan, meta.max_width, layer, experts, meta.rest))
    return bundle


def check(folder: Path) -> int:
    """Read every file of the quantized model in ``folder``; the bytes read. ValueError: one is missing or damaged."""
    description = read_description(folder)
    result, meta, config, plan, _ = description
    for name in side_names(description):  # of the others, those who read them compare the digests
        result.path(name)
    top_bundle(result, config, meta.rest)
    for layer in range(config.num_hidden_layers):
        layer_bundle(result, config, plan, meta, layer)
    return result.size()
