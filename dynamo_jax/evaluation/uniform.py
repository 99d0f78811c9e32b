"""Rows of an unquantized model, and of all its experts rounded to nearest."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dynamo_jax.evaluation.perplexity import Dataset, EvalConfig, Losses, Reference, Row, make_row, run_windows
from dynamo_jax.evaluation.reference import Exact, Likeliest, head_of
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.rtn import round_to_nearest
from dynamo_jax.runtime.switch import float_step


def float_parameters(model: Decoder, rounding: GridSpec | None = None) -> dict[str, Array]:
    """Float32 parameters, the experts rounded to nearest if ``rounding`` says how."""
    params = {name: a.astype(jnp.float32) for name, a in parameters(model).items()}
    if rounding is not None:
        for name in expert_parameter_names(model.config):
            params[name] = round_to_nearest(params[name], rounding)
    return params


def uniform_parameters(model: Decoder, variant: str, group_size: int = 64) -> dict[str, Array]:
    """Of one of ``UNIFORM``."""
    return float_parameters(model, rounding_of(variant, group_size))


def rounding_of(variant: str, group_size: int = 64) -> GridSpec | None:
    """How one of ``UNIFORM`` rounds experts; None where it does not."""
    bits = UNIFORM[variant]
    return None if bits is None else GridSpec(bits, group_size)


def evaluate_float(
    config: ModelConfig,
    params: dict[str, Array],
    data: Dataset,
    batch_size: int,
    exact: Exact | Likeliest | None = None,
) -> Losses:
    """exact: as ``run_windows`` takes it."""
    step = functools.partial(float_step, config, params)
    return run_windows(step, data.rest, batch_size, exact, head_of(config, params))


def reference_row(data: Dataset, exact: Exact | Likeliest, batch: int) -> tuple[Row, Reference]:
    """The row of a reference model, in 16 bits, and what others are compared with."""
    losses = Losses(exact.nll.astype(np.float64).sum(axis=1), exact.counts)
    shape = exact.counts.shape[2:]
    each = np.full(shape, 2 * exact.expert_weights / math.prod(shape))
    return make_row(data, "reference", losses, 16.0, each, None, batch), ("reference", losses)


def float_row(
    config: ModelConfig,
    data: Dataset,
    variant: str,
    losses: Losses,
    bits: float,
    reference: Reference | None,
    batch: int = 1,
) -> Row:
    """A row of a model whose experts all have ``bits`` bits a weight."""
    shape = config.num_moe_layers, config.num_experts
    each = np.full(shape, config.num_expert_weights / math.prod(shape) * bits / 8)
    return make_row(data, variant, losses, bits, each, reference, batch)


UNIFORM = {"bf16": None, "rtn4": 4, "rtn3": 3, "rtn2": 2}


def evaluate_uniform(
    model: Decoder,
    data: list[Dataset],
    config: EvalConfig,
    group_size: int = 64,
    names: tuple[str, ...] = tuple(UNIFORM),
    progress: Progress = no_progress,
    exact: Mapping[str, Exact | Likeliest] | None = None,
    references: Mapping[str, Reference] | None = None,
) -> tuple[list[Row], dict[str, Reference]]:
    """Rows of the unquantized model and of all experts rounded to nearest, and each dataset's first losses. exact: of
    datasets by name, what a reference makes of their windows; references: what rows are compared with, by default the
    first of a dataset."""
    rows: list[Row] = []
    first: dict[str, Reference] = dict(references or {})
    for index, name in enumerate(names):
        rounding = rounding_of(name, group_size)
        params = float_parameters(model, rounding)
        bits = 16.0 if rounding is None else rounding.bits_per_weight(model.config.hidden_size)
        for dataset in data:
            own = (exact or {}).get(dataset.name)
            losses = evaluate_float(model.config, params, dataset, config.batch_size, own)
            rows.append(float_row(model.config, dataset, name, losses, bits, first.get(dataset.name), config.batch))
            first.setdefault(dataset.name, (name, losses))
        progress("evaluate uniform", index + 1, len(names))
    return rows, first
