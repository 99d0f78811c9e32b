"""A quantized model as one value: parameters, planes, plan, and what calibration knew.

Axes: S known datasets, L layers, E experts, M widths of an expert (``runtime.adapt``), W widths.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes
from dynamo_jax.runtime.memory import SPARE
from dynamo_jax.runtime.monitor import Signatures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What calibration on the known datasets left behind for run time.

    counts: routed tokens a dataset, layer and expert: the signatures that the monitor compares with.
    centre, inverse, limit: how windows of each dataset scatter around them (``monitor.Signatures``).
    threshold: divergence in bits above which data is novel.
    loss_per_error: nats a token for each unit of mean squared expert-output error, by layer.
    block_errors: nats a token that each of an expert's widths loses, mean over all calibration tokens.
    correction: for each expert and width, its measured error over the sum of its blocks'.
    calibrated: each dataset's text digest and the number of windows that calibration used.
    tokens: calibration tokens of all datasets together.
    """

    names: tuple[str, ...]
    counts: Float[np.ndarray, "S L E"]
    centre: Float[np.ndarray, "S S"]
    inverse: Float[np.ndarray, "S S S"]
    limit: Float[np.ndarray, " S"]
    threshold: float
    loss_per_error: Float[np.ndarray, " L"]
    block_errors: Float[np.ndarray, "L E M W"]
    correction: Float[np.ndarray, "L E W"]
    calibrated: dict[str, tuple[str, int]]
    tokens: int

    def losses(self, errors: Float[np.ndarray, "L E M W"]) -> Float[np.ndarray, "L E M W"]:
        """Nats that measured errors of experts' outputs cost."""
        return errors * self.correction[:, :, None, :] * self.loss_per_error[:, None, None, None]

    def signatures(self) -> dict[str, Float[np.ndarray, "L E"]]:
        return dict(zip(self.names, self.counts))

    def monitor(self) -> Signatures:
        """What a stream is compared with, on the device."""
        shares = self.counts / self.counts.sum(axis=-1, keepdims=True)
        arrays = (shares, self.centre, self.inverse, self.limit)
        return Signatures(*(jnp.asarray(a, jnp.float32) for a in arrays))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """Everything that ``dynamo-jax quantize`` writes and ``eval`` loads.

    parameters: all but the expert weights, by dotted name. store: planes of all experts, (L, E, P, F, ..) for P = 3
    projections and F channels, in host memory. plan: the baseline. window: tokens of a calibration window. knowledge:
    what calibration left behind for run time. spare: slots beside the baseline's, as a share of its pages. files: the
    small files of the model that was quantized, config.json and
    tokenizer.json among them.
    """

    config: ModelConfig
    parameters: dict[str, Array]
    tokenizer: tokenizers.Tokenizer
    store: Planes
    plan: Plan
    window: int
    knowledge: Knowledge
    files: dict[str, bytes]
    spare: float = SPARE

    def device_parameters(self, dtype: Any = jnp.float32) -> dict[str, Array]:
        """The parameters on the device, in one dtype."""
        return {name: jnp.asarray(np.asarray(a), dtype) for name, a in self.parameters.items()}
