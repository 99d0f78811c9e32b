"""What a model is distilled on: known texts, and text that the model draws itself.

A model was trained on far more kinds of text than a deployment knows. What it draws, from any first token on, is of all
of these, so it stands for text to come that is like none of the known datasets (data-free distillation: LLM-QAT, arXiv
2305.17888). Distillation needs no labels, so it does not matter that such text makes little sense.

Axes: S windows of T tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Int

from dynamo_jax.calibration.config import DISTIL_WINDOWS, QuantizeConfig
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.generate import GenerateConfig, LanguageModel, stream
from dynamo_jax.texts.windows import token_windows

DRAW = "draw text"
TOGETHER = 64  # windows at most that are drawn as one batch


def distil_windows(
    model: Decoder,
    known: dict[str, str],
    tokenizer: tokenizers.Tokenizer,
    config: QuantizeConfig,
    progress: Progress = no_progress,
) -> Int[np.ndarray, "S T"]:
    """Windows to train on, mixed: ``config.distil`` tokens, of which ``novelty_weight`` is drawn by the model and the
    rest is of the known texts, as much of each. Fewer where a text is short."""
    parts = known_to_distil(known, tokenizer, config)
    if drawn := _drawn(config):
        parts.append(drawn_windows(model, drawn, config.window, progress))
    return np.random.default_rng(0).permutation(np.concatenate(parts))


def known_to_distil(
    known: dict[str, str], tokenizer: tokenizers.Tokenizer, config: QuantizeConfig
) -> list[Int[np.ndarray, "S T"]]:
    """Of each text the windows behind those that calibration takes; where there are too few of them, those too.

    ValueError: with what the model will draw they are too few to train on.
    """
    drawn = _drawn(config)
    each = -(-(-(-config.distil // config.window) - drawn) // len(known))
    most = config.calibration_windows + each
    found = [token_windows(t, tokenizer, config.window, n, most)[-each:, :-1] for n, t in known.items()] if each else []
    if (count := drawn + sum(map(len, found))) < DISTIL_WINDOWS:
        raise ValueError(
            f"distil {config.distil}: the known texts have {count} windows of {config.window} tokens, "
            f"fewer than {DISTIL_WINDOWS}"
        )
    return found


def _drawn(config: QuantizeConfig) -> int:
    """Windows that the model draws."""
    return round(config.novelty_weight * -(-config.distil // config.window))


def drawn_windows(model: Decoder, count: int, window: int, progress: Progress = no_progress) -> Int[np.ndarray, "S T"]:
    """Text that the model draws by its own probabilities, each window after a first token that may be any."""
    language_model = LanguageModel(config=model.config, parameters=dict(parameters(model)), dtype=jnp.float32)
    together = min(TOGETHER, count)
    first = np.random.default_rng(0).integers(0, model.config.vocab_size, -(-count // together) * together)
    out = np.empty((len(first), window), np.int32)
    out[:, 0] = first
    batches = len(first) // together
    progress(DRAW, 0, batches)
    for batch in range(batches):
        own = out[batch * together : (batch + 1) * together]
        settings = GenerateConfig(max_tokens=window - 1, temperature=1.0, seed=batch)
        for place, tokens in enumerate(stream(language_model, own[:, :1].tolist(), settings)):
            own[:, place + 1] = np.array(tokens, np.int32)
            progress(DRAW, batch + (place + 2) / window, batches)
    return out[:count]
