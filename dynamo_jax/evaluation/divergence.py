"""What quantized experts change, against the unquantized model: loss, accuracy and divergence of the next token.

Divergence is KL(unquantized, quantized) in nats a token: 0 where both predict the same. It tells of two models with
equal loss which one predicts as the original does.

Axes: B, S windows, T tokens (T1 = T + 1), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.evaluation.switched import calibrated_windows
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters, with_parameters
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import State, experts, init
from dynamo_jax.runtime.store import page_counts
from dynamo_jax.texts.windows import batches, token_windows

BATCH = 8


class Changed(NamedTuple):
    """Means over each window: nll and accuracy of the next token, divergence from the reference."""

    nll: Float[Array, " B"]
    accuracy: Float[Array, " B"]
    divergence: Float[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """Of one text, means over its tokens. divergence: nats a token, and its standard error by window (None of one)."""

    dataset: str
    tokens: int
    nll: float
    nll_unquantized: float
    accuracy: float
    accuracy_unquantized: float
    divergence: float
    standard_error: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def divergence(
    model: Decoder,
    quantized: QuantizedModel,
    texts: Mapping[str, str],
    config: EvalConfig | None = None,
    progress: Progress = no_progress,
) -> list[Divergence]:
    """How far the baseline of ``quantized`` is from ``model``, which it was quantized from, on each text (by name).

    All windows of a text count but those that calibration used, ``config.limit`` at most. ValueError: a text of less
    than a window, another model.
    """
    config = config or EvalConfig()
    if model.config != quantized.config:
        raise ValueError("the quantized model is of another configuration than the model that it is compared with")
    _, state = init(quantized, variants=1, slots=page_counts(quantized.plan))
    exact = {name: a.astype(jnp.float32) for name, a in parameters(model).items()}
    own = quantized.device_parameters()
    rows = []
    for index, (name, text) in enumerate(texts.items()):
        used = calibrated_windows(quantized, name, text, config)
        windows = token_windows(text, quantized.tokenizer, config.window, name)[used:][: config.limit]
        if not len(windows):
            raise ValueError(f"{name}: no window of {config.window} tokens is left after {used} used in calibration")
        found = []
        for tokens, mask in batches(windows, config.batch_size):
            part = jnp.asarray(tokens)
            reference = log_probabilities(model.config, exact, part)
            both = (_against_itself(part, reference), _quantized_against(model.config, own, state, part, reference))
            found.append(np.stack([*both[0][:2], *both[1]], axis=-1)[mask[:, 0] > 0])
        each = np.concatenate(found).astype(np.float64)
        mean, count = each.mean(axis=0), len(each)
        rows.append(
            Divergence(
                dataset=name,
                tokens=windows[:, 1:].size,
                nll=float(mean[2]),
                nll_unquantized=float(mean[0]),
                accuracy=float(mean[3]),
                accuracy_unquantized=float(mean[1]),
                divergence=float(mean[4]),
                standard_error=float(each[:, 4].std(ddof=1) / math.sqrt(count)) if count > 1 else None,
            )
        )
        progress("divergence", index + 1, len(texts))
    return rows


def changed(own: Float[Array, "B T V"], reference: Float[Array, "B T V"], tokens: Int[Array, "B T1"]) -> Changed:
    """What log-probabilities ``own`` predict of each next token, and how far they are from ``reference``."""
    targets = tokens[:, 1:]
    nll = -jnp.take_along_axis(own, targets[..., None], axis=-1)[..., 0]
    right = own.argmax(axis=-1) == targets
    apart = jnp.sum(jnp.exp(reference) * (reference - own), axis=-1)
    return Changed(nll.mean(axis=1), right.mean(axis=1), apart.mean(axis=1))


_against_itself = jax.jit(lambda tokens, reference: changed(reference, reference, tokens))


@functools.partial(jax.jit, static_argnames="config")
def _quantized_against(config: ModelConfig, params: dict[str, Array], state: State, tokens: Array, reference: Array):
    model = with_parameters(config, params)
    hidden, _ = model.hidden_states(tokens[:, :-1], experts=experts(state))
    return changed(jax.nn.log_softmax(model.logits(hidden)), reference, tokens)


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(
    config: ModelConfig, params: dict[str, Array], tokens: Int[Array, "B T1"]
) -> Float[Array, "B T V"]:
    """Of each next token, by a model with float experts."""
    model = with_parameters(config, params)
    hidden, _ = model.hidden_states(tokens[:, :-1])
    return jax.nn.log_softmax(model.logits(hidden))


@functools.partial(jax.jit, static_argnames="config")
def _float_against(config: ModelConfig, params: dict[str, Array], tokens: Array, reference: Array) -> Changed:
    return changed(log_probabilities(config, params, tokens), reference.astype(jnp.float32), tokens)


def predictions(config: ModelConfig, params: dict[str, Any], windows: np.ndarray) -> np.ndarray:
    """Log-probabilities (S, T, V), float16, in a temporary file: they are larger than all else together."""
    shape = (len(windows), windows.shape[1] - 1, config.vocab_size)
    with tempfile.TemporaryFile() as file:
        out = np.memmap(file, np.float16, "w+", shape=shape)
    for start in range(0, len(windows), BATCH):
        part = jnp.asarray(windows[start : start + BATCH])
        out[start : start + BATCH] = log_probabilities(config, params, part).astype(jnp.float16)
    return out


def changes(config: ModelConfig, params: dict[str, Any], windows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Loss, accuracy and divergence of each window, (3, S); ``reference``: ``predictions`` on the same windows."""
    parts = [
        np.stack(_float_against(config, params, *(jnp.asarray(a[i : i + BATCH]) for a in (windows, reference))))
        for i in range(0, len(windows), BATCH)
    ]
    return np.concatenate(parts, axis=1).astype(np.float64)
