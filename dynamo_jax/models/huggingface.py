"""Hugging Face checkpoint folders in and out: config.json, safetensors files, tokenizer.json.

A ``Source`` is a folder whose headers have been checked against its configuration; layers and
experts are then read one by one. Only safetensors and JSON are read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from flax import nnx

from dynamo_jax.files import read_json, shortened, shown, write_bytes, write_text
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, Layer, parameters, with_parameters
from dynamo_jax.models.experts import ExpertBiases
from dynamo_jax.models.families.names import (
    Filed,
    embed_name,
    expert_names,
    extra_layers,
    found_prefixes,
    fused_names,
    head_name,
    key_that_would_read,
    names_of,
)
from dynamo_jax.models.families.table import FAMILIES, config_from
from dynamo_jax.models.formats.declared import Declared, declared
from dynamo_jax.models.formats.expert_files import (
    ExpertTensors,
    Shapes,
    Triple,
    as_found,
    expert_shapes,
    expert_tensors,
    read_biases,
    read_expert,
)
from dynamo_jax.models.formats.stored import StoredTensors
from dynamo_jax.models.formats.tensor_files import FLOATS, INDEX, SINGLE, write_tensors
from dynamo_jax.models.rest import FLOAT, rest_words, stored_bytes
from dynamo_jax.models.specs import DeltaNet, Grouped, KimiDelta, Latent, Mixer, ShortConv
from dynamo_jax.models.tokenizer import TOKENIZER

UNREAD_PARTS = 8  # first parts of names that are listed
COMPARED = 1 << 22  # numbers of a head that are compared with the embeddings at a time
SIDE_FILES = (  # what a folder has beside weights, as far as text generation and who publishes need it
    *("config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
SIDE_BYTES = 2**28


def load_config(folder: Path) -> ModelConfig:
    """What config.json says; ValueError, which names the file and the key, if the decoder cannot compute that.

    A tied head is what it says as well, though the tensor files may have another (``Source``).
    """
    return _config(Path(folder), _read_config(Path(folder)))[0]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists() and (inner := sorted(folder.glob("snapshots/*/config.json"))):
        raise ValueError(f"{path}: no such file; {folder} is a cache of the hub: the model is in {inner[-1].parent}")
    return read_json(path)


def _config(folder: Path, raw: dict[str, Any]) -> tuple[ModelConfig, Declared]:
    """The model's configuration, and what config.json says of how its weights are stored."""
    try:
        return config_from(raw), declared(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {shortened(str(error), 500)}") from error


class Source:
    """A checkpoint folder whose tensors are all there, with the shapes that its config.json asks for.

    config: with a head of its own where the files have one that differs from the embeddings, tied or not by
    config.json. ValueError, which names file, tensor and key: a tensor is missing or has another shape or dtype, or is
    there though config.json asks for a model without it.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        raw = _read_config(self.folder)
        self.config, said = _config(self.folder, raw)
        self.files = StoredTensors(self.folder, said, FAMILIES[self.config.family].respelled)
        prefix, head_prefix = found_prefixes(self.config, self.files.headers)
        self.config = dataclasses.replace(self.config, prefix=prefix, head_prefix=head_prefix)
        self._check_counts()
        self.expected = self._expected()
        self._check()
        if self.config.tie_word_embeddings and head_name(self.config) in self.files and not self._head_is_tied():
            self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
            self.expected = self._expected()
        self._check_unread(extra_layers(raw, self.files.headers))

    def _check_counts(self) -> None:
        """Before anything is as large as config.json says: the files hold a tensor for each layer and expert."""
        config, held = self.config, len(self.files.headers)
        of_experts = config.num_experts if self.expert_tensors(config.moe_layers[0]).kind == "split" else 1
        for said, least in (
            (f"num_hidden_layers={config.num_hidden_layers}", config.num_hidden_layers),
            (
                f"{config.num_experts} experts in each of {config.num_moe_layers} layers",
                config.num_moe_layers * of_experts,
            ),
        ):
            if least > held:
                raise ValueError(f"{self.folder / 'config.json'}: {said}, but {self.files.listing} has {held} tensors")
        name = embed_name(config)
        embed = self.files.headers.get(name)
        if embed and embed.shape != (want := (config.vocab_size, config.hidden_size)):
            raise ValueError(f"{embed.file}: {name} is {shown(embed.shape)}, config.json asks for {want}")

    def _check(self) -> None:
        expected = self.expected
        if missing := [name for name in expected if name not in self.files]:
            raise ValueError(f"{self.files.listing}: {len(missing)} tensors missing, the first is {missing[0]}")
        for name, shape in expected.items():
            header = self.files.headers[name]
            if header.shape != shape:
                raise ValueError(f"{header.file}: {name} is {shown(header.shape)}, config.json asks for {shape}")
            if header.dtype not in FLOATS:
                raise ValueError(f"{header.file}: {name} is {header.dtype}, expected a float")

    def _head_is_tied(self) -> bool:
        """Whether the head that is in the files holds the embeddings' values, compared some rows at a time."""
        names = head_name(self.config), embed_name(self.config)
        head, embed = (self.files.headers[name] for name in names)
        if head.shape != embed.shape or head.dtype not in FLOATS:
            said = f"{names[0]} is {shown(head.shape)} in {head.dtype}, config.json asks for {embed.shape}, a float"
            raise ValueError(f"{head.file}: {said}")
        if any(name in self.files.packed for name in names):
            return False
        count, rows = embed.shape[0], max(1, COMPARED // embed.shape[1])
        same = True
        for part in (slice(at, min(at + rows, count)) for at in range(0, count, rows)):
            ours, theirs = (self.files.read(name, part).astype(np.float32) for name in names)
            self.release()
            if not (same := np.array_equal(ours, theirs)):
                break
        return same

    def _check_unread(self, extra: int) -> None:
        for name in self.unread:
            if key := key_that_would_read(self.config, name, extra):
                file = self.files.headers[name].file
                raise ValueError(f"{file}: holds {shortened(name)}, which config.json does not ask for ({key})")

    @functools.cached_property
    def _one_dtype(self) -> bool:
        return len({self.files.headers[name].dtype for name in self.quantized_tensors()}) == 1

    @property
    def unread(self) -> list[str]:
        """Names of the tensors that the decoder has no use for, sorted."""
        return sorted(self.files.headers.keys() - self.expected.keys())

    def _expected(self) -> Shapes:
        config, shapes = self.config, parameter_shapes(self.config)
        expected = {theirs: filed.shape(shapes[ours]) for ours, theirs, filed in tensor_names(config)}
        for layer in config.moe_layers:
            expected |= expert_shapes(config, self.expert_tensors(layer))
        return expected

    def expert_tensors(self, layer: int) -> ExpertTensors:
        """Where the files hold the routed experts of one layer. ``layer`` counts all layers."""
        names = expert_names(self.config, layer), fused_names(self.config, layer)
        return as_found(self.config, *names, self.files.headers)

    def fused(self) -> tuple[bool, ...]:
        """Where experts are in two tensors a layer though their family has them apart, whether each is turned."""
        first = self.config.moe_layers[0]
        found = self.expert_tensors(first)
        return () if found == expert_names(self.config, first) else found.turned

    def expert(self, layer: int, expert: int) -> Triple:
        """Gate, up and down of one expert, each (F, D), in float32 where experts' dtypes differ. ``layer`` counts all
        layers."""
        gate, up, down = read_expert(self.files, self.expert_tensors(layer), expert)
        if self._one_dtype:
            return gate, up, down
        return gate.astype(np.float32), up.astype(np.float32), down.astype(np.float32)

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        """Parameters of one layer but its routed experts' weights, names without the layer's prefix."""
        arrays = {}
        for ours, theirs, filed in layer_tensor_names(self.config, layer):
            arrays[ours] = filed.from_file(self.files.read(f"{self.config.prefix}layers.{layer}.{theirs}"))
        if layer in self.config.moe_layers:
            arrays |= read_biases(self.files, self.expert_tensors(layer))
        return arrays

    def top(self) -> dict[str, np.ndarray]:
        """Embeddings, last norm and head."""
        names = [(a, b) for a, b, _ in tensor_names(self.config) if not a.startswith("layers.")]
        return {ours: self.files.read(theirs) for ours, theirs in names}

    def quantized_tensors(self) -> set[str]:
        """Names of the routed experts' weights; their biases are not quantized."""
        c = self.config
        names = {n for layer in c.moe_layers for n in expert_shapes(c, self.expert_tensors(layer))}
        return {n for n in names if not n.endswith("_bias")}

    def expert_bytes(self) -> int:
        """Of the routed experts' weights, as they are stored, with their scales."""
        return sum(map(self.files.stored_bytes, self.quantized_tensors()))

    def expert_format(self) -> str:
        """What the routed experts' weights are stored in."""
        found = Counter(map(self.files.words, self.quantized_tensors())).most_common()
        return found[0][0] if len(found) == 1 else ", ".join(f"{words} ({n:,} tensors)" for words, n in found)

    def other_bytes(self, rest: int = FLOAT) -> int:
        """Of all that is read but the routed experts' weights, as floats where the rest does not have 8 or 4 bits
        (``models.rest``)."""
        whole = sum(self.files.headers[n].nbytes for n in self.expected.keys() - self.quantized_tensors())
        sizes = {ours: self.files.headers[theirs].nbytes for ours, theirs, _ in tensor_names(self.config)}
        return whole - sum(sizes.values()) + stored_bytes(sizes, parameter_shapes(self.config), rest)

    def release(self) -> None:
        self.files.release()

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of change of every file by its name, by which another state of the folder is told."""
        files = sorted(self.files.files() | {self.folder / "config.json"})
        return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


def _shapes(module: Any) -> Shapes:
    return {".".join(map(str, p)): v.shape for p, v in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def tensor_names(config: ModelConfig) -> Iterator[tuple[str, str, Filed]]:
    """(our name, the file's name, how it lies there) of every parameter but the routed experts' weights and biases."""
    yield "embed", embed_name(config), Filed.PLAIN
    for layer in range(config.num_hidden_layers):
        for ours, theirs, filed in layer_tensor_names(config, layer):
            yield f"layers.{layer}.{ours}", f"{config.prefix}layers.{layer}.{theirs}", filed
    for ours in ("norm.scale", "norm.bias")[: 1 + config.layer_norm]:
        theirs, filed = names_of(config)[ours]
        yield ours, f"{config.prefix}{theirs}", filed
    if not config.tie_word_embeddings:
        yield "head", head_name(config), Filed.PLAIN
    if config.head_bias:
        yield "head_bias", f"{config.head_prefix}lm_head.bias", Filed.PLAIN


def layer_tensor_names(config: ModelConfig, layer: int) -> Iterator[tuple[str, str, Filed]]:
    """As ``tensor_names``, for one layer and without the layer's prefix."""
    names = names_of(config)
    of_experts = {f"{part}_bias" for part in ExpertBiases._fields}
    for ours in layer_shapes(config, layer):
        if ours not in of_experts:
            yield ours, *names[ours]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Shapes of all parameters but the routed experts' weights, by name, from one layer of each kind."""
    shapes = dict(top_shapes(config))
    for layer in range(config.num_hidden_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in layer_shapes(config, layer).items()}
    return shapes


def layer_shapes(config: ModelConfig, layer: int) -> Shapes:
    """Those of one layer, without the layer's prefix."""
    plain = tuple(_plain(config.layers[like]) for like in (layer, config.moe_layers[0]))
    return _layer_shapes(dataclasses.replace(_plain(config), layers=plain))


@functools.lru_cache(maxsize=64)
def _layer_shapes(config: ModelConfig) -> Shapes:
    return _shapes(nnx.eval_shape(lambda: Layer(config, 0, rngs=nnx.Rngs(0), with_experts=False)))


def top_shapes(config: ModelConfig) -> Shapes:
    """Of embeddings, last norm and head."""
    return _top_shapes(dataclasses.replace(_plain(config), layers=(_plain(config.layers[config.moe_layers[0]]),)))


@functools.lru_cache(maxsize=8)
def _top_shapes(config: ModelConfig) -> Shapes:
    shapes = _shapes(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), with_experts=False)))
    return {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}


def _plain(of: Any) -> Any:
    """A configuration or a part of it without what no shape depends on, so that many share their shapes."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(of):
        value = getattr(of, field.name)
        if str(field.type).startswith("float") or field.name in ("scaling", "window"):
            changes[field.name] = field.default
        elif field.name == "max_position_embeddings":
            changes[field.name] = 1
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _plain(value)
    return dataclasses.replace(of, **changes)


def describe(folder: Path) -> dict[str, Any]:
    """What a folder holds and what would be quantized, from headers alone."""
    source = Source(folder)
    config = source.config
    experts, expert_bytes = source.quantized_tensors(), source.expert_bytes()
    dense, shared = len(config.dense_layers), config.mixture.shared_intermediate_size
    weights, bits = f"{config.num_expert_weights:,} weights", 8 * expert_bytes / config.num_expert_weights
    return {
        "family": config.family,
        "layers": f"{config.num_hidden_layers}" + (f", {dense} of them dense" if dense else ""),
        "hidden_size": config.hidden_size,
        "experts": f"{config.num_moe_layers} layers x {config.num_experts}, top {config.num_experts_per_tok}, "
        f"{config.intermediate_size} channels each" + (f"; a shared one of {shared}" if shared else ""),
        "attention": "; ".join(dict.fromkeys(map(_mixer_words, (layer.mixer for layer in config.layers)))),
        "positions": config.positions,
        "vocabulary": config.vocab_size,
        "files": len(source.files.files()),
        "bytes": f"{source.files.nbytes():,}",
        "dtypes": source.files.dtypes(),
        "source": f"experts: {source.expert_format()}, {bits:.2f} bits a weight",
        "quantized": f"{weights} of {len(experts):,} expert tensors, {expert_bytes:,} bytes",
        "not quantized": f"{source.other_bytes():,} bytes: {rest_words(FLOAT)}",
        "not read": unread_words(source.unread),
    }


def _mixer_words(mixer: Mixer) -> str:
    if isinstance(mixer, DeltaNet):
        size = f"{mixer.linear_key_head_dim} x {mixer.linear_value_head_dim}"
        return f"{mixer.linear_num_value_heads} heads of a gated delta net, states of {size}"
    if isinstance(mixer, KimiDelta):
        size = f"{mixer.linear_head_dim} x {mixer.linear_head_dim}"
        return f"{mixer.linear_num_heads} heads of Kimi's delta attention, states of {size}"
    if isinstance(mixer, ShortConv):
        return f"a convolution over {mixer.conv_L_cache} tokens"
    if isinstance(mixer, Latent):
        keys = f"keys and values from {mixer.kv_lora_rank} latent numbers"
    else:
        keys = f"{mixer.num_key_value_heads} of keys and values"
    return f"{mixer.num_attention_heads} heads, {keys}"


def unread_words(names: Sequence[str]) -> str:
    """How many tensors the decoder has no use for, and under which first parts of their names."""
    found = Counter(_top(name) for name in names).most_common()
    parts = [f"{shortened(part, 60)}: {count:,}" for part, count in found[:UNREAD_PARTS]]
    more = [f"and {len(found) - UNREAD_PARTS} more"] if len(found) > UNREAD_PARTS else []
    listed = f" ({', '.join(parts + more)})" if parts else ""
    return f"{len(names):,} tensors that the decoder has no use for{listed}"


def _top(name: str) -> str:
    """The first part of a name, behind "model." and with a layer's number."""
    parts = name.split(".")
    depth = 3 if parts[:2] == ["model", "layers"] else 2 if parts[0] == "model" else 1
    return ".".join(parts[:depth])


def load_decoder(folder: str | Path) -> Decoder:
    """The model in a Hugging Face folder, whole, parameters in the dtypes of the file.

    ``model(tokens)``, tokens (B, T) int32, gives logits (B, T, V) in float32 and the routing of each layer.
    ValueError, which names the file: an unknown family, a key that the decoder cannot compute, a tensor that is missing
    or of another shape, a damaged file, NaN or infinity.
    """
    source = Source(Path(folder))
    config = source.config
    arrays: dict[str, Any] = {name: jnp.asarray(a) for name, a in source.top().items()}
    for layer in range(config.num_hidden_layers):
        arrays |= {f"layers.{layer}.{name}": jnp.asarray(a) for name, a in source.layer(layer).items()}
        if layer in config.moe_layers:
            experts = [source.expert(layer, e) for e in range(config.num_experts)]
            for i, part in enumerate(("gate", "up", "down")):
                arrays[f"layers.{layer}.{part}"] = jnp.asarray(np.stack([e[i] for e in experts]))
        source.release()
    return with_parameters(config, arrays)


def save_checkpoint(folder: Path, model: Decoder, tokenizer: Path, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Write an ``olmoe`` model as a folder with one weight file in ``dtype`` and a copy of the tokenizer file."""
    config = model.config
    if config.family != "olmoe":
        raise ValueError(
            f"a model of family {config.family} is written by export, from the checkpoint that it came from"
        )
    arrays = {name: np.asarray(a).astype(dtype) for name, a in parameters(model).items()}
    tensors = {theirs: filed.to_file(arrays[ours]) for ours, theirs, filed in tensor_names(config)}
    for layer in config.moe_layers:
        parts = [arrays[f"layers.{layer}.{part}"] for part in ("gate", "up", "down")]
        tensors |= expert_tensors(expert_names(config, layer), list(zip(*parts)), {})
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SINGLE, tensors)
    write_text(folder / "config.json", json.dumps(olmoe_json(config, np.dtype(dtype).name), indent=2) + "\n")
    if tokenizer != folder / TOKENIZER:
        write_bytes(folder / TOKENIZER, tokenizer.read_bytes())


def olmoe_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model of family ``olmoe`` with parameters in ``dtype``."""
    mixer, mixture = config.layers[0].mixer, config.mixture
    assert isinstance(mixer, Grouped) and mixer.rope is not None
    of_all = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps")
    of_mixer = ("num_attention_heads", "num_key_value_heads", "clip_qkv")
    of_mixture = ("intermediate_size", "num_experts", "num_experts_per_tok")
    parts = [(config, (*of_all, "tie_word_embeddings", "initializer_range")), (mixer, of_mixer), (mixture, of_mixture)]
    return {key: getattr(part, key) for part, keys in parts for key in keys} | {
        "rope_theta": mixer.rope.rope_theta,
        "norm_topk_prob": mixture.router.norm_topk_prob,
        "model_type": "olmoe",
        "architectures": [FAMILIES["olmoe"].architecture],
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype,
    }


def write_shards(folder: Path, shards: Iterator[dict[str, np.ndarray]], count: int) -> None:
    """Write each of ``count`` dictionaries of tensors as one file, and the index that says which holds what."""
    places: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / file, tensors)
        places |= dict.fromkeys(tensors, file)
        total += sum(a.nbytes for a in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def side_files(folder: Path) -> dict[str, bytes]:
    """Configuration, tokenizer, chat templates, generation settings and licence, as far as the folder has them.

    ValueError: one is too large for what it is, a link that leads away from where config.json is kept, or of a name
    that lists of files cannot hold.
    """
    files = {}
    homes = {folder.resolve(), (folder / "config.json").resolve().parent}
    found = [folder / name for name in SIDE_FILES] + sorted(folder.glob("additional_chat_templates/*.jinja"))
    for path in found:
        if not path.is_file():
            continue
        if not path.name.isprintable() or "\\" in path.name:
            raise ValueError(
                f"{folder}: holds {shown(path.name)}, a name with a backslash or signs that cannot be printed"
            )
        if not homes & set(path.resolve().parents):
            raise ValueError(f"{path}: a link that leads away from the model's folder, to {path.resolve()}")
        if path.stat().st_size > SIDE_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes, more than such a file has ({SIDE_BYTES:,})")
        files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def side_files_of(config: ModelConfig, tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
    """The same of a model in memory: its tokenizer, and for ``olmoe`` its config.json."""
    files = {TOKENIZER: tokenizer.to_str(pretty=True).encode()}
    if config.family == "olmoe":
        files["config.json"] = json.dumps(olmoe_json(config, "bfloat16"), indent=2).encode()
    return files
