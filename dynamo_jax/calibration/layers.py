"""What calibration does with the experts of one layer, given what they were given: draft, quantize, measure.

Where a layer's inputs come from is the caller's: ``sweeps.py`` recomputes them layer by layer from a folder or a
decoder, ``dynamo_jax.transform`` taps them in a model of somebody else.

Axes: N tokens, A datasets, D hidden, E experts, k experts a token, F channels, P = 3 projections, W widths, S windows
of K pieces, U = 2 where gate with up and down have widths of their own, else 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from dynamo_jax.calibration.experts import (
    Energy,
    Portion,
    Routed,
    Rows,
    at_width,
    down_planes,
    energy_of,
    errors_at,
    gate_up_planes,
    given_of,
    hidden_channels,
    layer_hessians,
    mean_square,
    portions,
    rows_of,
    run_expert,
    tokens_of,
)
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import Activation
from dynamo_jax.models.formats.expert_files import Triple
from dynamo_jax.quant.planes import Planes, filled_up, quantize
from dynamo_jax.runtime.hosts import ALONE, Hosts, Message
from dynamo_jax.runtime.signatures import SPAN
from dynamo_jax.storage.bundles import layer_planes, planes_bundle

ERRORS = ("errors", "apart_errors", "block_errors")  # of a layer's statistics, what ``errors_at`` measures


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerJob:
    """One layer with experts and how to take it. name: what an error calls it; weights, biases: of an expert, when they
    are needed; dataset: of each token; datasets: how many there are; done: is told the share of the experts that are
    finished; hosts: the processes that share the experts out. The rest as of ``sweeps.Calibration``."""

    name: str
    sizes: ExpertSizes
    activation: Activation
    weights: Callable[[int], Float[np.ndarray, "P F D"]]
    biases: Callable[[int], Triple | None]
    dataset: Int[np.ndarray, " N"]
    datasets: int
    group_size: int
    channel_block: int
    apart: bool
    quantizer: str
    asymmetric: bool
    done: Callable[[float], None]
    hosts: Hosts = ALONE

    def member(self, token: np.ndarray, size: int, weight: ArrayLike = 1.0) -> Float[np.ndarray, "A R"]:
        """The weight of each row in its dataset. A new array each time: jax may still be reading an earlier one."""
        member = np.zeros((self.datasets, size), np.float32)
        member[self.dataset[token], np.arange(len(token))] = weight
        return member

    def finite(self, expert: int) -> Float[np.ndarray, "P F D"]:
        weights = self.weights(expert)
        if not np.isfinite(np.asarray(weights, np.float32)).all():
            raise ValueError(f"{self.name}, expert {expert}: weights to quantize hold NaN or infinity")
        return weights


def outputs_and_drafts(
    job: LayerJob, routed: Routed, drafts: bool
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "A E U W"], Float[np.ndarray, "A E"]]:
    """What the experts add to each token, the squared errors of rounding each of them (zeros without ``drafts``), and
    their rows. On every process of ``job.hosts``."""
    out = np.zeros(routed.x.shape, np.float32)
    errors = np.zeros((job.datasets, job.sizes.experts, 2 if job.apart else 1, len(WIDTHS)), np.float32)
    counts = np.zeros(errors.shape[:2], np.float32)

    def run(portion: Portion) -> Message:
        weights = [job.finite(expert) for expert in portion.experts]
        planes = _rounded(job, weights) if drafts else None
        given = []
        for i, expert in enumerate(portion.experts):
            token, _, rows = rows_of(routed, expert)
            measured = (rows.x, rows.gates, job.member(token, len(rows.x)))
            biases = job.biases(expert)
            h, y, sums = run_expert(job.activation, *measured, weights[i], biases)
            counts[:, expert] = sums["counts"]
            given.append(np.asarray(y)[: len(token)] * rows.gates[: len(token), None])
            if drafts:
                own = jax.tree.map(lambda a, i=i: a[i], planes)
                for w, width in enumerate(WIDTHS):
                    fixed = (job.activation, None, job.apart, width)
                    whole, each, _ = errors_at(*fixed, *measured, h, y, weights[i], own, biases)
                    errors[:, expert, :, w] = each if job.apart else np.asarray(whole)[:, None]
            job.done((expert + 1) / (job.sizes.experts + 1))
        at = portion.experts
        return {"given": np.concatenate(given), "errors": errors[:, at], "counts": counts[:, at]}

    for portion, found in job.hosts.shared(portions(job.sizes), run):
        errors[:, portion.experts], counts[:, portion.experts] = found["errors"], found["counts"]
        for token, _, given in by_expert(routed, portion, found["given"]):
            out[token] += given
    return out, errors, counts


def by_expert(
    routed: Routed, portion: Portion, given: Float[np.ndarray, "R .."]
) -> Iterator[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"], Float[np.ndarray, "_ .."]]]:
    """What the experts of a portion give for their rows, one after the other: by expert its tokens, their slots among
    k, and its rows alone. Sums of all experts are made of these in one order, however many processes there are."""
    start = 0
    for expert in portion.experts:
        token, slot = tokens_of(routed, expert)
        yield token, slot, given[start : start + len(token)]
        start += len(token)


def _rounded(job: LayerJob, weights: list[np.ndarray]) -> Planes:
    return quantize(filled_up(np.stack(weights), job.channel_block, job.group_size), job.group_size)


def quantized_and_measured(
    job: LayerJob, routed: Routed, importance: Float[np.ndarray, " N"], emphasis: Float[np.ndarray, "E U 3"]
) -> list[Message]:
    """The planes of each portion of a layer's experts and its sums, on the first process: what ``whole_layer`` puts
    together. Of several processes the others get nothing."""
    energies: dict[int, Energy] = {}

    def hidden_of(portion: Portion) -> list[Float[np.ndarray, "R F"]]:
        """Of its experts; and the energies of its whole chunk, which every process finds for itself."""
        kept = {}
        for expert in portion.chunk:
            if expert in portion.experts or expert not in energies:
                rows = rows_of(routed, expert)[2]
                gate, up, _ = job.weights(expert)
                hidden = np.asarray(hidden_channels(job.activation, rows.x, gate, up, job.biases(expert)))
                energies[expert] = energy_of(rows, hidden)
                if expert in portion.experts:
                    kept[expert] = hidden
        return list(kept.values())

    @functools.cache
    def hessians_of(size: int) -> list[Float[np.ndarray, "C C"]]:
        """Of the layer, once for all portions."""
        return layer_hessians(routed, size, job.group_size)

    def planes_of(portion: Portion, weights: list[np.ndarray], rows: list[Rows]) -> Planes:
        if job.quantizer == "rtn":
            return _rounded(job, weights)
        whole = filled_up(np.stack(weights), job.channel_block, job.group_size)
        hidden = hidden_of(portion)
        given = given_of(routed, rows, hidden, mean_square([energies[e] for e in portion.chunk]))
        own = emphasis[portion.experts]
        first = gate_up_planes(whole[:, :2], given, hessians_of(whole.shape[-1]), job.group_size, own[:, 0])
        reached = None
        if job.asymmetric:
            reached = [reached_by(expert, rows[i], first, i) for i, expert in enumerate(portion.experts)]
        down = down_planes(whole[:, 2], given, reached, job.group_size, own)
        return jax.tree.map(lambda a, b: np.concatenate([a, b[:, None]], axis=1), first, down)

    def reached_by(expert: int, rows: Rows, gate_up: Planes, i: int) -> Float[np.ndarray, "3 R F"]:
        """What down of the portion's i-th expert gets from quantized gate and up."""
        own, sizes = jax.tree.map(lambda a: a[i], gate_up), (job.sizes.channels, job.sizes.hidden_size)
        ways = [at_width(own, width, sizes) for width in WIDTHS[:3]]
        return np.stack([hidden_channels(job.activation, rows.x, *way, job.biases(expert)) for way in ways])

    def run(portion: Portion) -> Message:
        weights = [job.finite(expert) for expert in portion.experts]
        found = [rows_of(routed, expert) for expert in portion.experts]
        rows = [f[2] for f in found]
        planes = planes_of(portion, weights, rows)
        sums = []
        for i, expert in enumerate(portion.experts):
            own = jax.tree.map(lambda a, i=i: a[i], planes)
            token, (x, gates), biases = found[i][0], rows[i], job.biases(expert)
            h, y, total = run_expert(job.activation, x, gates, job.member(token, len(x)), weights[i], biases)
            weighted = job.member(token, len(x), importance[token])
            measured = (x, gates, weighted, h, y, weights[i], own, biases)
            fixed = (job.activation, job.channel_block, job.apart)
            errors = (np.stack(e, axis=-1) for e in zip(*(errors_at(*fixed, width, *measured) for width in WIDTHS)))
            sums.append(jax.tree.map(np.asarray, total) | dict(zip(ERRORS, errors)))
            job.done((expert + 1) / (job.sizes.experts + 1))
        return planes_bundle(planes) | {name: np.stack([s[name] for s in sums], axis=1) for name in sums[0]}

    return [found for _, found in job.hosts.shared(portions(job.sizes), run, keep=False)]


def whole_layer(job: LayerJob, found: list[Message]) -> tuple[Planes, dict[str, Any]]:
    """The planes of a layer's experts, and by dataset the sums of ``analysis.statistics.Statistics``, from what
    ``quantized_and_measured`` gives on the first process."""
    planes = jax.tree.map(lambda *a: np.concatenate(a), *map(layer_planes, found))
    names = [name for name in found[0] if not name.startswith("planes/")]
    stats = {name: np.concatenate([f[name] for f in found], axis=1) for name in names}
    stats["tokens"] = np.bincount(job.dataset, minlength=job.datasets).astype(np.float32)
    return planes, stats


def routed_pieces(chosen: Int[np.ndarray, "S T k"], experts: int) -> Float[np.ndarray, "S K E"]:
    """Routed tokens of each window, in K pieces of about what the monitor looks at. chosen: experts of its tokens, -1
    for none."""
    pieces = np.array_split(chosen, max(1, round(chosen.shape[1] / SPAN)), axis=1)
    flat = [piece.reshape(len(chosen), -1) for piece in pieces]
    counts = [[np.bincount(own[own >= 0], minlength=experts) for own in window] for window in zip(*flat)]
    return np.array(counts, np.float32)
