"""What quantized experts change, against the unquantized model: loss, accuracy and divergence of the next token.

Divergence is KL(unquantized, quantized) in nats a token: 0 where both predict the same. It tells of two models with
equal loss which one predicts as the original does.

Axes: B windows, T tokens (T1 = T + 1), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.evaluation.errors import mean_and_error
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.evaluation.switched import calibrated_windows
from dynamo_jax.evaluation.uniform import float_parameters
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, with_parameters
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import State, experts, init
from dynamo_jax.runtime.store import page_counts
from dynamo_jax.texts.windows import batches, token_windows


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
    than a window, windows past the model's positions, a model of another configuration. Source: docs/method.md.
    progress: is called with (stage, done, of).
    """
    config = config or EvalConfig()
    config.check(model.config)
    if model.config != quantized.config:
        raise ValueError("the quantized model is of another configuration than the model that it is compared with")
    _, state = init(quantized, variants=1, slots=page_counts(quantized.plan))
    exact = float_parameters(model)
    own = quantized.device_parameters()
    rows = []
    for index, (name, text) in enumerate(texts.items()):
        used = calibrated_windows(quantized, name, text, config)
        most = None if config.limit is None else used + config.limit
        vocabulary = model.config.vocab_size
        windows = token_windows(text, quantized.tokenizer, config.window, name, most, vocabulary)[used:]
        if not len(windows):
            raise ValueError(f"{name}: no window of {config.window} tokens is left after {used} used in calibration")
        found = []
        for tokens, mask in batches(windows, config.batch_size):
            part = jnp.asarray(tokens)
            reference = log_probabilities(model.config, exact, part)
            both = (_against_itself(part, reference), _quantized_against(model.config, own, state, part, reference))
            found.append(np.stack([*both[0][:2], *both[1]], axis=-1)[mask[:, 0] > 0])
        each = np.concatenate(found).astype(np.float64)
        mean = each.mean(axis=0)
        rows.append(
            Divergence(
                dataset=name,
                tokens=windows[:, 1:].size,
                nll=float(mean[2]),
                nll_unquantized=float(mean[0]),
                accuracy=float(mean[3]),
                accuracy_unquantized=float(mean[1]),
                divergence=float(mean[4]),
                standard_error=mean_and_error(each[:, 4])[1],
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
