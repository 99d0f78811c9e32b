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

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.generate import GenerateConfig, LanguageModel, stream
from dynamo_jax.texts.windows import token_windows

DRAW = "draw text"
TOGETHER = 64  # windows that are drawn as one batch


def distil_windows(
    model: Decoder,
    known: dict[str, str],
    tokenizer: tokenizers.Tokenizer,
    config: QuantizeConfig,
    progress: Progress = no_progress,
) -> Int[np.ndarray, "S T"]:
    """Windows to train on, mixed: ``config.distil`` tokens, of which ``novelty_weight`` is drawn by the model and the
    rest is of the known texts, as much of each. Fewer where a text is short."""
    count = -(-config.distil // config.window)
    drawn = round(config.novelty_weight * count)
    parts = []
    if count > drawn:
        parts += windows_behind(known, tokenizer, config, -(-(count - drawn) // len(known)))
    if drawn:
        parts.append(drawn_windows(model, drawn, config.window, progress))
    return np.random.default_rng(0).permutation(np.concatenate(parts))


def windows_behind(
    known: dict[str, str], tokenizer: tokenizers.Tokenizer, config: QuantizeConfig, each: int
) -> list[Int[np.ndarray, "S T"]]:
    """Of each text the windows behind those that calibration takes; where there are too few of them, those too."""
    most = config.calibration_windows + each
    return [token_windows(text, tokenizer, config.window, name, most)[-each:, :-1] for name, text in known.items()]


def drawn_windows(model: Decoder, count: int, window: int, progress: Progress = no_progress) -> Int[np.ndarray, "S T"]:
    """Text that the model draws by its own probabilities, each window after a first token that may be any."""
    language_model = LanguageModel(config=model.config, parameters=dict(parameters(model)), dtype=jnp.float32)
    first = np.random.default_rng(0).integers(0, model.config.vocab_size, -(-count // TOGETHER) * TOGETHER)
    out = np.empty((len(first), window), np.int32)
    out[:, 0] = first
    for start in range(0, len(first), TOGETHER):
        own = out[start : start + TOGETHER]
        settings = GenerateConfig(max_tokens=window - 1, temperature=1.0, seed=start)
        for place, tokens in enumerate(stream(language_model, own[:, :1].tolist(), settings)):
            own[:, place + 1] = np.array(tokens, np.int32)
            progress(DRAW, start * window + TOGETHER * (place + 2), len(first) * window)
    return out[:count]
