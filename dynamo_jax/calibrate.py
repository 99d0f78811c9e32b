"""Calibration of a model larger than memory: two sweeps over its layers, one expert in memory at a time.

Upwards, each layer's inputs become its outputs; on the way every expert is quantized into planes, and
its statistics and its error at each width are measured. Downwards, the loss gradient goes through the
same layers and gives each layer's sensitivity. Between layers only the residual stream is kept. Every
finished layer is a bundle of ``work``, so that a killed job resumes where it was and ends with the
same bits: a layer's result depends on its bundles and on nothing else.

``analysis/statistics.py`` defines the same sums over whole models in memory; tests compare the two.

Axes: S windows of T tokens, N = S*T, A datasets, D hidden, E experts, k experts a token, R rows of one
expert, F channels, B channel blocks, P = 3 projections, W widths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.analysis.statistics import Statistics
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.experts import activation_of
from dynamo_jax.models.layerwise import (
    Outer,
    dense,
    dense_vjp,
    first_alike,
    loss_gradient_of,
    outer_of,
    outer_vjp,
)
from dynamo_jax.quant.nested_gptq import CHUNK_WEIGHTS, quantize_nested, shrunk
from dynamo_jax.quant.planes import Planes, dequantize, quantize
from dynamo_jax.work import Bundle, Work

Progress = Callable[[str, float, int], None]  # (stage, done, of)
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
QUANTIZERS = ("gptq", "rtn")
PRIOR_ROWS = 256  # what the layer's own Hessian counts for in that of each expert
MAX_INPUTS = 4096  # of one Hessian; more are cut into parts whose correlations with each other are left out
FORWARD, BACKWARD = "calibrate layers", "sensitivity of layers"


class LayerSource(Protocol):
    """A model whose layers and experts can be had one by one, as ``models.huggingface.Source`` gives them."""

    config: ModelConfig

    def top(self) -> Bundle: ...

    def layer(self, layer: int) -> Bundle: ...

    def expert(self, layer: int, expert: int) -> Triple: ...

    def release(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Calibration:
    """One job. tokens: windows of all datasets, those of the first one first; dataset: of each window.

    quantizer: gptq (``quant/nested_gptq.py``: error feedback along the calibration inputs) or rtn
    (``quant/planes.py``). emphasis: what errors at 2, 3 and 4 bits count for gptq, for
    each expert of the layers with experts.
    """

    source: LayerSource
    tokens: Int[np.ndarray, "S T1"]
    dataset: Int[np.ndarray, " S"]
    group_size: int
    channel_block: int
    quantizer: str
    emphasis: Float[np.ndarray, "L E 3"]
    batch_size: int
    work: Work
    progress: Progress

    @property
    def datasets(self) -> int:
        return int(self.dataset.max()) + 1


def calibrate(job: Calibration) -> None:
    """Fill ``job.work`` with layer-NNN (planes and other parameters), stats-NNN and sensitivity-NNN."""
    moe = job.source.config.moe_layers
    if not job.work.has("top"):
        job.work.put("top", job.source.top())
        job.source.release()
    if not all(job.work.has(_sensitivity(layer)) for layer in moe):
        _sweep_up(job)
        _sweep_down(job)
    for layer in range(job.source.config.num_hidden_layers + 1):
        job.work.drop(_hidden(layer))
        job.work.drop(_gradient(layer))


def layer_name(layer: int) -> str:
    return f"layer-{layer:03d}"


def stats_name(layer: int) -> str:
    return f"stats-{layer:03d}"


def _sensitivity(layer: int) -> str:
    return f"sensitivity-{layer:03d}"


def _hidden(layer: int) -> str:
    return f"hidden-{layer:03d}"


def _gradient(layer: int) -> str:
    return f"gradient-{layer:03d}"


def statistics_of(work: Work, config: ModelConfig, fields: tuple[str, ...] = Statistics._fields) -> list[Bundle]:
    """For each layer with experts, the sums of ``fields`` with axes (A, ..), and with them windows (S, E) and
    sensitivity (A,)."""
    out = []
    for layer in config.moe_layers:
        bundle = work.get(stats_name(layer))
        wanted = {name: bundle[name] for name in (*fields, "windows")}
        out.append(wanted | work.get(_sensitivity(layer)))
    return out


# Upwards


def _sweep_up(job: Calibration) -> None:
    config, work = job.source.config, job.work
    if any(work.has(_gradient(layer)) for layer in range(config.num_hidden_layers + 1)):
        return
    if not work.has(_hidden(0)):
        embedded = job.source.top()["embed"][job.tokens[:, :-1]].astype(np.float32)
        work.put(_hidden(0), {"x": embedded * np.float32(config.embedding_multiplier)})
    for layer in range(config.num_hidden_layers):
        if not work.has(_hidden(layer + 1)):
            _layer_up(job, layer)
        job.source.release()
        job.progress(FORWARD, layer + 1, config.num_hidden_layers)


def _layer_up(job: Calibration, layer: int) -> None:
    config = job.source.config
    rest = job.source.layer(layer)
    x = job.work.get(_hidden(layer))["x"]
    if layer in config.dense_layers:
        out = _batched(job, lambda part: dense(config, first_alike(config, layer), rest, part), x)
        job.work.put(layer_name(layer), _parameters(rest))
        job.work.put(_hidden(layer + 1), {"x": out})
        return
    outer = _outer_of(job, layer, rest, x)
    del x
    added, planes, stats = _experts_up(job, layer, rest, outer)
    job.work.put(layer_name(layer), _parameters(rest) | planes_bundle(planes))
    job.work.put(stats_name(layer), stats)
    out = np.asarray(outer.residual) + added.reshape(outer.residual.shape) * np.float32(config.residual_multiplier)
    job.work.put(_hidden(layer + 1), {"x": out})


def _parameters(rest: Bundle) -> Bundle:
    return {f"parameters/{name}": a for name, a in rest.items()}


def planes_bundle(planes: Planes) -> Bundle:
    codes = {f"planes/codes{b}": a for b, a in planes.codes.items()}
    return codes | {"planes/scales": planes.scales, "planes/ratios": planes.ratios}


def _outer_of(job: Calibration, layer: int, rest: Bundle, x: Float[np.ndarray, "S T D"]) -> Outer:
    config = job.source.config
    parts = _batched(job, lambda part: outer_of(config, first_alike(config, layer), rest, part), x)
    return Outer(parts.residual, *(a.reshape(-1, a.shape[-1]) for a in parts[1:]))


def _experts_up(
    job: Calibration, layer: int, rest: Bundle, outer: Outer
) -> tuple[Float[np.ndarray, "N D"], Planes, Bundle]:
    """What the routed experts add, their planes (E, P, F, ..) and the layer's statistics."""
    config = job.source.config
    owner = np.repeat(job.dataset, job.tokens.shape[1] - 1)
    out = np.zeros(outer.normed.shape, np.float32)
    sums, errors, block_errors, quantized = [], [], [], []
    for together in expert_chunks(config):
        weights = [_finite_expert(job, layer, expert) for expert in together]
        rows = [_rows_of(outer, expert)[2] for expert in together]
        biases = [_biases(rest, expert) for expert in together]
        emphasis = job.emphasis[config.moe_layers.index(layer), together]
        planes = _planes_of(job, np.stack(weights), rows, biases, outer, emphasis)
        quantized.append(planes)
        for i, expert in enumerate(together):
            token = _rows_of(outer, expert)[0]
            member = np.zeros((job.datasets, len(rows[i].x)), np.float32)
            member[owner[token], np.arange(len(token))] = 1
            own = jax.tree.map(lambda a, i=i: a[i], planes)
            measured = (rows[i].x, rows[i].gates, member)
            h, y, total = _run_expert(config, *measured, weights[i], biases[i])
            out[token] += np.asarray(y)[: len(token)] * rows[i].gates[: len(token), None]
            widths = [
                _at_width(config, job.channel_block, width, *measured, h, y, weights[i], own, biases[i])
                for width in WIDTHS
            ]
            sums.append(jax.tree.map(np.asarray, total))
            errors.append(np.stack([np.asarray(e) for e, _ in widths], axis=-1))
            block_errors.append(np.stack([np.asarray(b) for _, b in widths], axis=-1))
            job.progress(FORWARD, layer + (expert + 1) / (config.num_experts + 1), config.num_hidden_layers)
    stats = {name: np.stack([s[name] for s in sums], axis=1) for name in sums[0]}
    stats["errors"] = np.stack(errors, axis=1)
    stats["tokens"] = np.bincount(owner, minlength=job.datasets).astype(np.float32)
    stats["block_errors"] = np.stack(block_errors, axis=1)
    routed = outer.experts.reshape(len(job.tokens), -1)
    stats["windows"] = np.stack([np.bincount(r, minlength=config.num_experts) for r in routed]).astype(np.float32)
    return out, jax.tree.map(lambda *a: np.concatenate(a), *quantized), stats


def expert_chunks(config: ModelConfig) -> list[list[int]]:
    """Experts that are quantized together: small ones many at a time, large ones alone."""
    count = config.num_experts
    size = max(1, CHUNK_WEIGHTS // (3 * config.intermediate_size * config.hidden_size))
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _finite_expert(job: Calibration, layer: int, expert: int) -> Float[np.ndarray, "P F D"]:
    weights = np.stack(job.source.expert(layer, expert))
    job.source.release()
    if not np.isfinite(np.asarray(weights, np.float32)).all():
        raise ValueError(f"layer {layer}, expert {expert}: weights to quantize hold NaN or infinity")
    return weights


def _planes_of(
    job: Calibration,
    weights: Float[np.ndarray, "X P F D"],
    rows: list[Rows],
    biases: list[Triple | None],
    outer: Outer,
    emphasis: Float[np.ndarray, "X 3"],
) -> Planes:
    """Planes (X, P, F, ..) of some experts, by the job's quantizer."""
    if job.quantizer == "rtn":
        return quantize(weights, job.group_size)
    config, (count, _, channels, hidden_size) = job.source.config, weights.shape
    squared = [r.gates**2 for r in rows]
    shares = (np.asarray(outer.gates) ** 2).sum(axis=1)
    typical = float(shares.sum()) / max(1, outer.experts.size)  # of one row
    inputs = [r.x for r in rows]

    def layer_hessian(part: slice) -> np.ndarray:
        x = np.asarray(outer.normed)[:, part]
        return (x * (shares / max(float(shares.sum()), 1e-30))[:, None]).T @ x

    gate_up = weights[:, :2].reshape(count, 2 * channels, hidden_size)
    first = _feedback_planes(job, gate_up, inputs, squared, typical, 2, layer_hessian, emphasis)
    hidden = [np.asarray(_hidden_channels(config, r.x, w, b)) for r, w, b in zip(rows, weights, biases)]
    energy = sum(float(s @ np.square(h).mean(axis=1)) for s, h in zip(squared, hidden))
    spread = energy / max(sum(float(s.sum()) for s in squared), 1e-30)

    def own_scale(part: slice) -> np.ndarray:  # hidden channels of different experts have nothing in common
        return np.eye(part.stop - part.start, dtype=np.float32) * np.float32(spread)

    down = _feedback_planes(job, weights[:, 2], hidden, squared, typical, 1, own_scale, emphasis)
    return jax.tree.map(
        lambda a, b: np.concatenate([a.reshape(count, 2, channels, -1), b[:, None]], axis=1), first, down
    )


def _feedback_planes(
    job: Calibration,
    w: np.ndarray,
    inputs: list[np.ndarray],
    squared: list[np.ndarray],
    typical: float,
    input_axis: int,
    prior: Callable[[slice], np.ndarray],
    emphasis: np.ndarray,
) -> Planes:
    """GPTQ planes of one projection. inputs: rows (R, C) of each expert; squared: their squared gates."""
    size = w.shape[input_axis]
    step = size if size <= MAX_INPUTS else MAX_INPUTS // job.group_size * job.group_size
    parts = []
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        common = prior(part)
        hessians = [
            shrunk((x[:, part] * s[:, None]).T @ x[:, part], float(s.sum()), common, PRIOR_ROWS * typical)
            for x, s in zip(inputs, squared)
        ]
        own = w[:, part] if input_axis == 1 else w[:, :, part]
        parts.append(quantize_nested(own, np.stack(hessians), job.group_size, input_axis, emphasis))
    return jax.tree.map(lambda *a: np.concatenate(a, axis=input_axis), *parts)


@functools.partial(jax.jit, static_argnames="config")
def _hidden_channels(config, x, weights, biases):
    return _expert(config, x, weights, biases)[0]


class Rows(NamedTuple):
    """One expert's rows, filled up with zeros to one of a few sizes, so that few programs serve all experts."""

    x: Float[np.ndarray, "R D"]
    gates: Float[np.ndarray, " R"]


def _rows_of(outer: Outer, expert: int) -> tuple[np.ndarray, np.ndarray, Rows]:
    token, slot = np.nonzero(np.asarray(outer.experts) == expert)
    size = padded_rows(len(token))
    x = np.zeros((size, outer.normed.shape[1]), np.float32)
    x[: len(token)] = outer.normed[token]
    gates = np.zeros(size, np.float32)
    gates[: len(token)] = outer.gates[token, slot]
    return token, slot, Rows(x, gates)


def padded_rows(rows: int) -> int:
    """The next of 32, 48, 64, 96, 128, ..: at most half is padding."""
    size = 32
    while size < rows:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def _biases(rest: Bundle, expert: int) -> Triple | None:
    names = ("gate_bias", "up_bias", "down_bias")
    return tuple(rest[name][expert] for name in names) if names[0] in rest else None  # type: ignore[return-value]


def _expert(config: ModelConfig, x: Array, weights: Any, biases: Any) -> tuple[Array, Array]:
    """Hidden channels (R, F) and output (R, D) of one expert."""
    gate, up, down = (w.astype(x.dtype) for w in weights)
    a, u = x @ gate.T, x @ up.T
    if biases is not None:
        a, u = a + biases[0].astype(x.dtype), u + biases[1].astype(x.dtype)
    h = activation_of(config)(a, u)
    y = h @ down
    return h, y if biases is None else y + biases[2].astype(x.dtype)


@functools.partial(jax.jit, static_argnames="config")
def _run_expert(config, x, gates, member, weights, biases):
    """Hidden channels (R, F), output (R, D) and, by dataset, the sums that need no quantized weights."""
    h, y = _expert(config, x, weights, biases)
    squared = member * gates**2
    return (
        h,
        y,
        {
            "counts": member.sum(axis=1),
            "gate": member @ gates,
            "gate_sq": squared.sum(axis=1),
            "hidden_energy": squared @ h**2,
            "output_energy": squared @ jnp.sum(y**2, axis=1),
        },
    )


@functools.partial(jax.jit, static_argnames=("config", "channel_block", "width"))
def _at_width(config, channel_block, width, x, gates, member, h, y, weights, planes, biases):
    """By dataset, the summed squared output error at ``width`` of the whole expert (A,) and of its blocks (A, B)."""
    rounded = dequantize(planes, width).astype(jnp.bfloat16).astype(jnp.float32)
    squared = member * gates**2
    h_at, y_at = _expert(config, x, rounded, biases)
    down = weights[2].astype(jnp.float32)

    def block(start):
        def cut(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, start, channel_block, axis)

        error = cut(h_at, 1) @ cut(rounded[2], 0) - cut(h, 1) @ cut(down, 0)
        return squared @ jnp.sum(error**2, axis=1)

    blocks = jax.lax.map(block, jnp.arange(0, down.shape[0], channel_block))
    return squared @ jnp.sum((y_at - y) ** 2, axis=1), blocks.T


# Downwards


def _sweep_down(job: Calibration) -> None:
    config, work = job.source.config, job.work
    layers, lowest = config.num_hidden_layers, config.moe_layers[0]
    reached = [layer for layer in range(layers + 1) if work.has(_gradient(layer))]
    if not reached:
        gradient = loss_gradient_of(config, job.source.top())
        job.source.release()
        x = work.get(_hidden(layers))["x"]
        work.put(_gradient(layers), {"d": _batched(job, gradient, x, job.tokens[:, 1:])})
        del gradient, x
        work.drop(_hidden(layers))
    for layer in range(min([layers, *reached]) - 1, lowest - 1, -1):
        d_out = work.get(_gradient(layer + 1))["d"]
        if layer in config.moe_layers:
            work.put(_sensitivity(layer), {"sensitivity": _squared_by_dataset(job, d_out)})
        if layer > lowest:
            work.put(_gradient(layer), {"d": _layer_down(job, layer, d_out)})
        work.drop(_hidden(layer))
        work.drop(_gradient(layer + 1))
        job.source.release()
        job.progress(BACKWARD, layers - layer, layers - lowest)


def _squared_by_dataset(job: Calibration, d_out: Float[np.ndarray, "S T D"]) -> Float[np.ndarray, " A"]:
    scale = job.source.config.residual_multiplier
    per_window = np.square(d_out * np.float32(scale), dtype=np.float32).sum(axis=(1, 2), dtype=np.float64)
    return np.bincount(job.dataset, weights=per_window, minlength=job.datasets)


def _layer_down(job: Calibration, layer: int, d_out: Float[np.ndarray, "S T D"]) -> Float[np.ndarray, "S T D"]:
    """The loss gradient by the layer's input from that by its output."""
    config = job.source.config
    rest = job.source.layer(layer)
    like = first_alike(config, layer)
    x = job.work.get(_hidden(layer))["x"]
    if layer in config.dense_layers:
        return _batched(job, lambda a, d: dense_vjp(config, like, rest, a, d), x, d_out)
    outer = _outer_of(job, layer, rest, x)
    scaled = d_out.reshape(outer.normed.shape) * np.float32(config.residual_multiplier)
    d_normed = np.zeros(outer.normed.shape, np.float32)
    d_gates = np.zeros(outer.gates.shape, np.float32)
    for expert in range(config.num_experts):
        token, slot, rows = _rows_of(outer, expert)
        if len(token) == 0:
            continue
        weights = np.stack(job.source.expert(layer, expert))
        job.source.release()
        d_rows = np.zeros_like(rows.x)
        d_rows[: len(token)] = scaled[token]
        d_x, d_gate = _expert_vjp(config, rows.x, rows.gates, weights, _biases(rest, expert), d_rows)
        d_normed[token] += np.asarray(d_x)[: len(token)]
        d_gates[token, slot] = np.asarray(d_gate)[: len(token)]
        done = config.num_hidden_layers - layer - 1 + (expert + 1) / (config.num_experts + 1)
        job.progress(BACKWARD, done, config.num_hidden_layers - config.moe_layers[0])
    shape = x.shape[:2]
    parts = (a.reshape(*shape, -1) for a in (d_normed, d_gates))
    return _batched(job, lambda *part: outer_vjp(config, like, rest, *part), x, d_out, *parts)


@functools.partial(jax.jit, static_argnames="config")
def _expert_vjp(config, x, gates, weights, biases, d_out):
    def weighted(x, gates):
        return _expert(config, x, weights, biases)[1] * gates[:, None]

    return jax.vjp(weighted, x, gates)[1](d_out)


def _batched(job: Calibration, function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """``function`` over the windows in batches of one size; the last one repeats its first window."""
    size, count = job.batch_size, len(arrays[0])
    out: Any = None
    for start in range(0, count, size):
        real = min(size, count - start)
        parts = [a[start : start + real] for a in arrays]
        parts = [np.concatenate([p, np.repeat(p[:1], size - real, axis=0)]) if real < size else p for p in parts]
        results = function(*parts)
        if out is None:
            out = jax.tree.map(lambda r: np.empty((count, *r.shape[1:]), r.dtype), results)
        for whole, part in zip(jax.tree.leaves(out), jax.tree.leaves(results)):
            whole[start : start + real] = np.asarray(part)[:real]
    return out
