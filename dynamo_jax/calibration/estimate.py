"""What a quantization will take, before any of it is done: bytes that follow from sizes, and time that is measured on
experts of the model's sizes, whose weights are drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dynamo_jax.calibration.analyses import known_windows
from dynamo_jax.calibration.config import UNSEEN, QuantizeConfig, check_shapes, settled
from dynamo_jax.calibration.experts import PORTIONS, Routed, portions
from dynamo_jax.calibration.layers import LayerJob, outputs_and_drafts, quantized_and_measured
from dynamo_jax.models.config import ExpertSizes, ModelConfig
from dynamo_jax.models.experts import activation_of
from dynamo_jax.models.huggingface import Source, side_files
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.precision.plan import expert_plan
from dynamo_jax.quant.nested_gptq import PRIOR_ROWS

BACKWARD = 3  # times the forward pass, with the pass that is taken again
PASSES = 2 + BACKWARD  # of what is not an expert: up, down and once more for what experts are given
ENOUGH_ROWS = PRIOR_ROWS  # of an expert, from which on its own inputs count for more than its layer's


class Estimate(NamedTuple):
    """Bytes: device, of experts that the plan may hold there; others, of all else as it is stored; host, of all planes;
    result, of the folder; work, most that lies in it while it is made. tokens: of calibration; drawn: those of them
    that the model draws itself; rows: of an expert, on the mean; seconds: on this machine, without the drawing."""

    before: int
    device: int
    others: int
    host: int
    result: int
    work: int
    tokens: int
    drawn: int
    rows: float
    seconds: float


def estimate(folder: str | Path, known: dict[str, str], config: QuantizeConfig | None = None) -> Estimate:
    """Of ``quantize_folder`` with the same arguments. It reads the folder's headers and the texts, and takes some
    seconds to time experts of these sizes. ValueError: as ``quantize_folder``, but for what lies in the weights."""
    source, config = Source(Path(folder)), config or QuantizeConfig()
    model = source.config
    check_shapes(model, config)
    others = source.other_bytes(config.rest)
    config = settled(config, [model.expert_sizes], others, list(known))
    windows = known_windows(known, load_tokenizer(Path(folder)), config, model.vocab_size)
    tokens = sum(w[:, 1:].size for w in windows.values())
    drawn = 0 if UNSEEN in windows else config.drawn_count(len(windows), source.expert_bytes() + source.other_bytes())
    tokens += drawn * config.window
    sizes = model.expert_sizes
    group_size = config.group(sizes.hidden_size)
    widest = expert_plan(
        np.full((sizes.layers, sizes.experts), config.max_width, np.int8),
        *(sizes.channels, config.channel_block, group_size, sizes.hidden_size),
    )
    host, before = widest.stored_bytes(), source.other_bytes()
    result = host + others + sum(map(len, side_files(Path(folder)).values()))
    streams = (model.num_hidden_layers + 2) * tokens * model.hidden_size * 4
    rows = tokens * model.num_experts_per_tok / sizes.experts
    return Estimate(
        before=source.expert_bytes() + before,
        device=int(config.bytes_for(sizes.weights)),
        others=others,
        host=host,
        result=result,
        work=max(streams, result),
        tokens=tokens,
        drawn=drawn * config.window,
        rows=rows,
        seconds=_seconds(model, config, tokens, rows, before / 2),
    )


def _seconds(model: ModelConfig, config: QuantizeConfig, tokens: int, rows: float, others: float) -> float:
    """others: weights of what is no expert, which take as long a product as experts' do."""
    sizes = model.expert_sizes
    together = len(portions(sizes)[0].experts)
    # a layer whose portions are as large as the model's
    count = min(sizes.experts, PORTIONS * together) if together > 1 else 1
    job, routed = _drawn(model, sizes._replace(layers=1, experts=count), config, max(1, round(rows)))
    emphasis = np.broadcast_to(np.array(config.emphasis, np.float32), (count, 2 if job.apart else 1, 3))
    importance = np.ones(len(routed.x), np.float32)
    planes, starting = _timed(lambda: quantized_and_measured(job, routed, importance, emphasis))
    drafted, more = _timed(lambda: outputs_and_drafts(job, routed, config.quantizer == "gptq"))
    forward, _ = _timed(lambda: outputs_and_drafts(job, routed, False))
    experts = sizes.layers * sizes.experts / count * (planes + drafted + BACKWARD * forward)
    a_second = count * rows * sizes.weights / (sizes.layers * sizes.experts) / forward  # weights times tokens
    return starting + more + experts + PASSES * tokens * others / a_second


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a run, and what the first one took longer, which compiles."""
    took = []
    for _ in range(2):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - begin)
    return took[1], max(0.0, took[0] - took[1])


def _drawn(model: ModelConfig, sizes: ExpertSizes, config: QuantizeConfig, rows: int) -> tuple[LayerJob, Routed]:
    """A layer of drawn experts, each of which is given so many rows."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, sizes.channels, sizes.hidden_size), np.float32) * sizes.hidden_size**-0.5
    x = rng.standard_normal((rows * sizes.experts, sizes.hidden_size), np.float32)
    chosen = np.repeat(np.arange(sizes.experts), rows)[:, None]
    job = LayerJob(
        name="a drawn layer",
        sizes=sizes,
        activation=activation_of(model.mixture_of(model.moe_layers[0])),
        weights=lambda _: weights,
        biases=lambda _: None,
        dataset=np.zeros(len(x), int),
        datasets=1,
        group_size=config.group(sizes.hidden_size),
        channel_block=config.channel_block,
        apart=config.per_projection,
        quantizer=config.quantizer,
        asymmetric=config.asymmetric,
        done=lambda _: None,
    )
    return job, Routed(x, chosen, np.full(chosen.shape, 0.5, np.float32))
