"""Analysis of somebody else's model on several datasets: what its own passes show, taken by taps.

The sums, the significance and the planes are those of ``dynamo_jax.calibration``; only where a layer's inputs come from
differs. Passes repeat where the inputs of all layers are more than memory should hold.

Axes: S sequences, T tokens, N tokens of all datasets, A datasets, L layers of a part, E experts, F channels, M widths
of an expert, W widths, K pieces.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from dynamo_jax.analysis.dynamics import Dynamics
from dynamo_jax.analysis.significance import channel_significance
from dynamo_jax.analysis.statistics import Statistics
from dynamo_jax.calibration.analyses import Analysis, dynamics_of, whole
from dynamo_jax.calibration.config import UNSEEN, QuantizeConfig, settled
from dynamo_jax.calibration.experts import Routed
from dynamo_jax.calibration.layers import (
    LayerJob,
    outputs_and_drafts,
    quantized_and_measured,
    routed_pieces,
    whole_layer,
)
from dynamo_jax.calibration.plans import favoured
from dynamo_jax.calibration.sweeps import Draft
from dynamo_jax.files import shortened
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.rest import FLOAT
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.quant.planes import Planes, narrowed
from dynamo_jax.transform.found import Layer, Part, float_parts_of, modules_of
from dynamo_jax.transform.taps import Listener, Loss, Mask, Tapped, by_layer, counted

LOOK, DRAFT, QUANTIZE = "pass over the data", "draft layers", "quantize layers"


class Significance(NamedTuple):
    """Of one layer, on one dataset. experts, blocks: nats a token that a width (2, 3, 4, 8 bits) loses, predicted;
    channels: output energy that goes through each channel."""

    experts: Float[np.ndarray, "E W"]
    blocks: Float[np.ndarray, "E M W"]
    channels: Float[np.ndarray, "E F"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartAnalysis:
    """Of the layers whose experts are alike. names: of the layers; sizes: of all of them; analyses: by dataset; planes:
    of all experts (L, E, P, F, ..), for any plan; down_norms: squared norm of each channel's down projection."""

    names: tuple[str, ...]
    sizes: ExpertSizes
    analyses: dict[str, Analysis]
    planes: Planes
    down_norms: Float[np.ndarray, "L E F"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAnalysis:
    """What ``analyze`` found. parts: of the layers with experts, those of the same sizes together. datasets: their
    names; config: what it was made with; piece: tokens of a window of ``Analysis.windows``, about; calibrated: digest
    of each dataset's routing and the number of its sequences; other_bytes: of the model's arrays that are no
    expert's."""

    parts: tuple[PartAnalysis, ...]
    datasets: tuple[str, ...]
    config: QuantizeConfig
    piece: int
    calibrated: dict[str, tuple[str, int]]
    other_bytes: int

    def significance(self, dataset: str) -> dict[str, Significance]:
        """By layer, in a pytree. KeyError: no such dataset."""
        found: dict[str, Significance] = {}
        for part in self.parts:
            own = part.analyses[dataset]
            channels = channel_significance(own.stats, np.sqrt(part.down_norms)[..., None])
            experts, blocks = own.expert_significance(), own.block_significance()
            found |= {name: Significance(*each) for name, *each in zip(part.names, experts, blocks, channels)}
        return found

    def dynamics(self) -> tuple[Dynamics, ...]:
        """Of each part, how far routing and significance move between the datasets and within them."""
        return tuple(dynamics_of(part.analyses) for part in self.parts)

    def unreached(self) -> dict[str, list[int]]:
        """The experts of each layer that no token of any dataset went to; layers without any are left out. They are
        quantized by what their layer's other experts were given."""
        found = {}
        for part in self.parts:
            counts = sum(np.asarray(a.stats.counts) for a in part.analyses.values())
            for name, own in zip(part.names, np.asarray(counts)):
                if (own == 0).any():
                    found[name] = np.flatnonzero(own == 0).tolist()
        return found


def analyze(
    model: nnx.Module,
    data: dict[str, Iterable[Any]],
    loss: Loss,
    config: QuantizeConfig | None = None,
    *,
    mask: Mask | None = None,
    layers_at_once: int | None = None,
    progress: Progress = no_progress,
) -> ModelAnalysis:
    """What each dataset says of the experts of ``model``: routing, and the significance of experts, channel blocks and
    channels; and planes for any plan, GPTQ's along what the experts were given.

    data: name -> batches, pytrees of arrays as ``loss(model, batch)`` takes them. loss: summed nats of a batch. Where
    the experts' ids are (S, T, k), S counts as sequences; ids (N, k) of a batch count as one. mask: of a batch, which
    tokens (S, T) count; those whose ids are all -1 do not in any case. layers_at_once: layers
    whose inputs are in host memory at a time, 4 bytes for each token and hidden number; all by default. With fewer the
    batches are gone through several times, so that they must be lists, not generators. progress: is called with (stage,
    done, of). The budget of ``config`` decides what the planes favour; ``plan`` may choose another one.

    ValueError, which names what is wrong: no experts, no dataset or batch, a loss that is not finite, experts that are
    not called or called twice, a layer that a dataset routes nothing to, ids that the experts do not have, NaN.
    Source: docs/design.md, "Formulas".
    """
    config = config or QuantizeConfig()
    if config.distil:
        raise ValueError(f"distil {config.distil}: trains models that dynamo_jax loads, no transformed module")
    if config.unseen_windows and UNSEEN not in data:
        raise ValueError(f"unseen_windows {config.unseen_windows}: nothing is drawn here; give the dataset {UNSEEN}")
    if config.rest != FLOAT:
        raise ValueError(f"rest {config.rest}: of models that dynamo_jax loads; a transformed module keeps its own")
    parts = float_parts_of(model)
    if not isinstance(data, Mapping):
        raise ValueError(f"data is a {type(data).__name__}: expected a dict, the name of each dataset and its batches")
    if not data:
        raise ValueError("no known dataset: analysis needs at least one")
    weights = {id(v): v for module in modules_of(model).values() for v in module.weight_variables()}
    whole_model = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)) if hasattr(a, "nbytes"))
    other_bytes = whole_model - sum(v.get_value().nbytes for v in weights.values())
    config = settled(config, [part.sizes for part in parts], other_bytes, list(data))
    if layers_at_once is not None and layers_at_once < 1:
        raise ValueError(f"layers_at_once {layers_at_once}: expected 1 or more")
    taps = _Passes(model, parts, data, loss, mask, layers_at_once, progress)
    seen = taps.first()
    drafts = config.favour != 1 and config.quantizer == "gptq"
    emphasis = _emphasis(parts, taps, seen, config, progress) if drafts else [None] * len(parts)
    found = _measured(parts, taps, seen, config, emphasis, progress)
    out = ModelAnalysis(
        parts=found,
        datasets=tuple(data),
        config=config,
        piece=seen.piece,
        calibrated=seen.calibrated,
        other_bytes=other_bytes,
    )
    for name, unreached in out.unreached().items():
        warnings.warn(
            f"{name}: no token of any dataset went to experts {', '.join(map(str, unreached))}; "
            "they are quantized by what the others of their layer were given",
            stacklevel=2,
        )
    return out


class _Seen(NamedTuple):
    """Of all layers, from the first pass: half: of each token, two for each dataset; importance, ids and gates by
    layer, windows (Z, E) of pieces by layer; half_of_piece."""

    half: Int[np.ndarray, " N"]
    halves: int
    taps: dict[Any, Tapped]
    windows: dict[Any, Float[np.ndarray, "Z E"]]
    half_of_piece: Int[np.ndarray, " Z"]
    piece: int
    calibrated: dict[str, tuple[str, int]]


class _Passes:
    """The inputs of some layers at a time, from passes of the model over all batches."""

    def __init__(
        self,
        model: nnx.Module,
        parts: tuple[Part, ...],
        data: dict[str, Iterable[Any]],
        loss: Loss,
        mask: Mask | None,
        at_once: int | None,
        progress: Progress,
    ):
        self.modules = modules_of(model)
        self.layers: list[tuple[int, int, Layer]] = [
            (p, i, layer) for p, part in enumerate(parts) for i, layer in enumerate(part.layers)
        ]
        self.experts = {_key(layer): part.sizes.experts for part in parts for layer in part.layers}
        size = at_once or len(self.layers)
        self.chunks = [self.layers[i : i + size] for i in range(0, len(self.layers), size)]
        self.data, self.loss, self.mask, self.progress = data, loss, mask, progress
        self.digests: list[bytes] = []  # of the routing of each batch, in order
        self.listener = Listener(model)
        self._inputs: dict[Any, np.ndarray] = {}  # of the chunk that was asked for last
        self._of = -1
        if len(self.chunks) > 1:
            for name, batches in data.items():
                if isinstance(batches, Iterator):
                    raise ValueError(f"{name}: a generator can be read once; layers_at_once needs a list of batches")

    def first(self) -> _Seen:
        """Routing and importance of all layers, and the inputs of the first chunk."""
        keys = [_key(layer) for _, _, layer in self.layers]
        wanted = {_key(layer) for _, _, layer in self.chunks[0]}
        parts: dict[Any, list[Tapped]] = {key: [] for key in keys}
        sizes: list[tuple[int, int, int]] = []  # dataset, sequences, tokens of each
        calibrated = {}
        for number, (name, batches) in enumerate(self.data.items()):
            digest, sequences = hashlib.sha256(), 0
            for index, batch in enumerate(batches):
                try:
                    value, found, importance = self.listener.backward(self.loss, batch)
                except (TypeError, IndexError) as error:
                    what = shortened(str(error).split("\n")[0], 300)
                    raise ValueError(f"{name}, batch {index}: the loss does not take it: {what}") from error
                if not np.isfinite(float(value)):
                    raise ValueError(f"{name}, batch {index}: the loss is {float(value)}")
                tapped = by_layer(self.modules, found, importance)
                shape = tapped[keys[0]].ids.shape[:2]
                for key in keys:
                    self._check(name, index, key, tapped[key], shape, keys[0])
                tapped = counted(tapped, self.mask, batch)
                for key in keys:
                    kept = tapped[key] if key in wanted else tapped[key]._replace(x=None)
                    parts[key].append(kept)
                digest.update(tapped[keys[0]].ids.tobytes())
                self.digests.append(_digest(tapped))
                sequences += shape[0]
                sizes.append((number, *shape))
                self.progress(f"{LOOK} {name}", index + 1, index + 1)
            if not sequences:
                raise ValueError(f"{name}: no batch")
            calibrated[name] = (digest.hexdigest(), sequences)
        return self._seen(parts, sizes, calibrated)

    def _check(self, name: str, index: int, key: Any, tapped: Tapped, shape: tuple[int, int], first: Any) -> None:
        where = f"{name}, batch {index}: {key[0] if key[1] is None else f'{key[0]}, layer {key[1]}'}"
        if int(np.prod(tapped.ids.shape[:2])) != int(np.prod(shape)):
            raise ValueError(f"{where} was given {tapped.ids.shape[:2]} tokens, {first[0]} {shape}")
        if tapped.ids.max() >= self.experts[key] or tapped.ids.min() < -1:
            raise ValueError(
                f"{where}: ids {tapped.ids.min()} to {tapped.ids.max()}; there are experts 0 to "
                f"{self.experts[key] - 1}, and -1 for none"
            )
        if not (np.isfinite(tapped.gates).all() and (tapped.x is None or np.isfinite(tapped.x).all())):
            raise ValueError(f"{where}: inputs or gates hold NaN or infinity")
        if tapped.importance is not None and not np.isfinite(tapped.importance).all():
            raise ValueError(f"{where}: the gradient of the loss holds NaN or infinity")

    def _seen(self, parts: dict[Any, list[Tapped]], sizes: list[tuple[int, int, int]], calibrated: Any) -> _Seen:
        half, half_of_piece, tokens_of_piece = [], [], []
        count = {number: 0 for number, _, _ in sizes}
        total = {number: sum(s for n, s, _ in sizes if n == number) for number in count}
        windows: dict[Any, list[np.ndarray]] = {key: [] for key in parts}
        for batch, (number, sequences, tokens) in enumerate(sizes):
            place = count[number] + np.arange(sequences)
            own = 2 * number + (place >= (total[number] + 1) // 2)
            count[number] += sequences
            first = next(iter(parts.values()))[batch]
            half.append(np.repeat(own, tokens)[first.kept])
            for key, taps in parts.items():
                ids = taps[batch].ids.reshape(sequences, tokens, -1)
                pieces = routed_pieces(ids, self.experts[key])  # (S, K, E)
                windows[key].append(pieces.reshape(-1, pieces.shape[-1]))
            each = pieces.shape[1]
            half_of_piece.append(np.repeat(own, each))
            tokens_of_piece.append(tokens / each)
        self._inputs = {
            key: np.concatenate([t.x for t in taps]) for key, taps in parts.items() if taps[0].x is not None
        }
        self._of = 0
        return _Seen(
            half=np.concatenate(half),
            halves=2 * len(self.data),
            taps={key: _together(taps) for key, taps in parts.items()},
            windows={key: np.concatenate(own) for key, own in windows.items()},
            half_of_piece=np.concatenate(half_of_piece),
            piece=max(1, round(float(np.mean(tokens_of_piece)))),
            calibrated=calibrated,
        )

    def inputs(self, chunk: int) -> dict[Any, Float[np.ndarray, "N D"]]:
        """Of the layers of a chunk; the batches are gone through once more where they are not the last ones."""
        if self._of != chunk:
            self._inputs = {}
            wanted = [_key(layer) for _, _, layer in self.chunks[chunk]]
            parts: dict[Any, list[np.ndarray]] = {key: [] for key in wanted}
            digests = iter(self.digests)
            for name, batches in self.data.items():
                for batch in batches:
                    tapped = counted(by_layer(self.modules, self.listener.forward(self.loss, batch)), self.mask, batch)
                    if next(digests, b"") != _digest(tapped):
                        raise ValueError(f"{name}: batches are others, or in another order, the second time")
                    for key in wanted:
                        parts[key].append(tapped[key].x)  # type: ignore[arg-type]
            self._inputs = {key: np.concatenate(own) for key, own in parts.items()}
            self._of = chunk
        return self._inputs


def _key(layer: Layer) -> tuple[str, int | None]:
    return layer.path, layer.place


def _digest(tapped: dict[Any, Tapped]) -> bytes:
    return hashlib.sha256(b"".join(t.ids.tobytes() for t in tapped.values())).digest()


def _together(taps: list[Tapped]) -> Tapped:
    """Of all batches, the tokens that count one after the other."""
    k = taps[0].ids.shape[-1]
    ids = np.concatenate([t.ids.reshape(-1, k)[t.kept] for t in taps])
    weights = [t.importance for t in taps if t.importance is not None]
    gates = np.concatenate([t.gates for t in taps])
    return Tapped(None, ids, gates, np.concatenate(weights), np.ones(len(ids), bool))


def _routed(seen: _Seen, layer: Layer, x: Float[np.ndarray, "N D"]) -> Routed:
    own = seen.taps[_key(layer)]
    return Routed(x, own.ids, own.gates)


def _job(layer: Layer, part: Part, seen: _Seen, config: QuantizeConfig) -> LayerJob:
    weights, form = layer.module.one_layer(layer.place)
    biases = form.biases
    return LayerJob(
        name=layer.name,
        sizes=part.sizes,
        activation=part.activation,
        weights=lambda expert: np.stack([w[expert] for w in weights]),
        biases=lambda expert: None if biases is None else tuple(np.asarray(b[expert]) for b in biases),  # type: ignore
        dataset=seen.half,
        datasets=seen.halves,
        group_size=config.group(part.sizes.hidden_size),
        channel_block=config.channel_block,
        apart=config.per_projection,
        quantizer=config.quantizer,
        asymmetric=config.asymmetric,
        done=lambda share: None,
    )


def _sensitivity(seen: _Seen, layer: Layer) -> Float[np.ndarray, " A"]:
    importance = seen.taps[_key(layer)].importance
    return np.bincount(seen.half, weights=importance, minlength=seen.halves)


def _emphasis(
    parts: tuple[Part, ...], taps: _Passes, seen: _Seen, config: QuantizeConfig, progress: Progress
) -> list[Any]:
    """Of each part, what its planes shall favour, from a drafted plan."""
    found: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
    for chunk, layers in enumerate(taps.chunks):
        inputs = taps.inputs(chunk)
        for p, _, layer in layers:
            job = _job(layer, parts[p], seen, config)
            _, errors, counts = outputs_and_drafts(job, _routed(seen, layer, inputs[_key(layer)]), True)
            found[_key(layer)] = errors, counts
            progress(DRAFT, len(found), len(taps.layers))
    tokens = np.bincount(seen.half, minlength=seen.halves).astype(np.float32)
    drafts = []
    for part in parts:
        errors, counts = (np.stack(a, axis=1) for a in zip(*(found[_key(layer)] for layer in part.layers)))
        sensitivity = np.stack([_sensitivity(seen, layer) for layer in part.layers], axis=1)
        drafts.append(Draft(errors, counts, sensitivity, tokens))
    return favoured(drafts, list(taps.data), config, [part.sizes for part in parts])


def _measured(
    parts: tuple[Part, ...],
    taps: _Passes,
    seen: _Seen,
    config: QuantizeConfig,
    emphasis: list[Any],
    progress: Progress,
) -> tuple[PartAnalysis, ...]:
    planes: list[list[Planes]] = [[] for _ in parts]
    records: list[list[dict[str, Any]]] = [[] for _ in parts]
    norms: list[list[np.ndarray]] = [[] for _ in parts]
    order = [taps._of, *(c for c in range(len(taps.chunks)) if c != taps._of)]
    done: dict[tuple[int, int], Any] = {}
    for chunk in order:  # first the one whose inputs are here
        inputs = taps.inputs(chunk)
        for p, i, layer in taps.chunks[chunk]:
            job, routed = _job(layer, parts[p], seen, config), _routed(seen, layer, inputs[_key(layer)])
            own = emphasis[p]
            own = np.broadcast_to(np.array(config.emphasis), (job.sizes.experts, 1, 3)) if own is None else own[i]
            importance = seen.taps[_key(layer)].importance
            assert importance is not None
            made, stats = whole_layer(job, quantized_and_measured(job, routed, importance, own))
            if not stats["counts"].any():
                raise ValueError(f"{layer.name}: no token of any dataset goes to its experts")
            down = np.stack([job.weights(e)[2] for e in range(job.sizes.experts)]).astype(np.float32)
            done[p, i] = narrowed(made, config.max_width), stats, np.square(down).sum(axis=-1)
            progress(QUANTIZE, len(done), len(taps.layers))
    for p, i in sorted(done):
        made, stats, norm = done[p, i]
        planes[p].append(made)
        records[p].append(stats)
        norms[p].append(norm)
    out = []
    for p, part in enumerate(parts):
        out.append(
            PartAnalysis(
                names=part.names,
                sizes=part.sizes,
                analyses=_analyses(part, list(taps.data), seen, records[p]),
                planes=jax.tree.map(lambda *a: np.stack(a), *planes[p]),
                down_norms=np.stack(norms[p]),
            )
        )
    return tuple(out)


def _analyses(part: Part, names: list[str], seen: _Seen, records: list[dict[str, Any]]) -> dict[str, Analysis]:
    windows = np.stack([seen.windows[_key(layer)] for layer in part.layers], axis=1)[:, None]  # (Z, 1, L, E)
    sensitivity = np.stack([_sensitivity(seen, layer) for layer in part.layers], axis=1)
    halves = []
    for index in range(seen.halves):
        fields: dict[str, Any] = {f: np.stack([r[f][index] for r in records]) for f in Statistics._fields}
        halves.append(Analysis(Statistics(**fields), sensitivity[index], windows[seen.half_of_piece == index]))
    found = {name: whole(halves[2 * i], halves[2 * i + 1]) for i, name in enumerate(names)}
    for name, analysis in found.items():
        if not analysis.sensitivity.all():
            raise ValueError(
                f"{name}: the loss does not depend on the experts of {part.names[int(analysis.sensitivity.argmin())]}"
            )
        empty = ~np.asarray(analysis.stats.counts).any(axis=1)
        if empty.any():
            raise ValueError(f"{name}: no token goes to the experts of {part.names[int(empty.argmax())]}")
    return found
