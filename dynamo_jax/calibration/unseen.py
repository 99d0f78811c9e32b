"""Text that stands for what nobody has seen, and what a model is distilled on.

A model was trained on far more kinds of text than a deployment knows. What it draws by its own probabilities, from any
first token on, is of all of these (as in data-free quantization: LLM-QAT, arXiv 2305.17888). So it stands for text to
come that is like none of the known datasets. Calibration measures on it what experts lose that the known datasets
hardly use, and distillation trains on it. Neither needs labels, so it does not matter that such text makes little
sense.

Axes: S windows of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Int

from dynamo_jax.calibration.config import DISTIL_UNSEEN, DISTIL_WINDOWS, UNSEEN, QuantizeConfig
from dynamo_jax.models.decoder import Decoder, new_cache, parameters
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.generate import SMALLEST_BUCKET, Sampling, decode_on, prefill
from dynamo_jax.texts.windows import token_windows

DRAW = "draw text"
TOGETHER = 64  # windows at most that are drawn as one batch
STEPS = 64  # tokens of a window that one program draws at most
COPIED_BYTES = 2**29  # of a model's weights at most for which that program may keep copies in floats
CALIBRATION, DISTILLATION = 0, 1  # what text is drawn for: one does not get what the other got


def with_unseen(
    windows: dict[str, Int[np.ndarray, "S T1"]],
    draw: Callable[[int], Int[np.ndarray, "S T1"]],
    config: QuantizeConfig,
    model_bytes: int,
) -> dict[str, Int[np.ndarray, "S T1"]]:
    """The windows of calibration by dataset, and with them those of ``unseen``, unless they have some or none are
    wanted. draw: makes so many; model_bytes: of the model that draws them."""
    if UNSEEN in windows or not (count := config.drawn_count(len(windows), model_bytes)):
        return windows
    return windows | {UNSEEN: draw(count)}


def distil_windows(
    model: Decoder,
    known: dict[str, str],
    tokenizer: tokenizers.Tokenizer,
    config: QuantizeConfig,
    progress: Progress = no_progress,
) -> Int[np.ndarray, "S T"]:
    """Windows to train on, mixed: ``config.distil`` tokens, half of them of text that nobody has seen, drawn by the
    model where no dataset is it, and the rest of the known texts, as much of each. Of these alone where
    ``novelty_weight`` is 0. Fewer where a text is short."""
    parts = given_to_distil(known, tokenizer, config)
    if UNSEEN not in known and (count := _unseen_to_distil(config)):
        parts.append(drawn_windows(model, count, config.window, DISTILLATION, progress))
    return np.random.default_rng(0).permutation(np.concatenate(parts))


def given_to_distil(
    known: dict[str, str], tokenizer: tokenizers.Tokenizer, config: QuantizeConfig
) -> list[Int[np.ndarray, "S T"]]:
    """Of each text the windows behind those that calibration takes; where there are too few of them, those too.

    ValueError: with what the model will draw they are too few to train on.
    """
    unseen, others = _unseen_to_distil(config), len(known) - (UNSEEN in known)
    of_each = -(-(_to_distil(config) - unseen) // others)
    found = []
    for name, text in known.items():
        wanted, before = of_each, config.calibration_windows
        if name == UNSEEN:
            wanted, before = unseen, config.unseen_count(others)
        if wanted:
            found.append(token_windows(text, tokenizer, config.window, name, before + wanted)[-wanted:, :-1])
    count = sum(map(len, found)) + (0 if UNSEEN in known else unseen)
    if count < DISTIL_WINDOWS:
        raise ValueError(
            f"distil {config.distil}: the texts have {count} windows of {config.window} tokens, "
            f"fewer than {DISTIL_WINDOWS}"
        )
    return found


def _to_distil(config: QuantizeConfig) -> int:
    return -(-config.distil // config.window)


def _unseen_to_distil(config: QuantizeConfig) -> int:
    """Of the windows to train on, those of text that nobody has seen."""
    return round(DISTIL_UNSEEN * _to_distil(config)) if config.novelty_weight else 0


def drawn_windows(
    model: Decoder, count: int, length: int, purpose: int = CALIBRATION, progress: Progress = no_progress
) -> Int[np.ndarray, "S T"]:
    """Text that the model draws by its own probabilities, each window after a first token that may be any. length:
    tokens of a window, at most one more than the model has positions: no token comes after the last one."""
    positions = model.config.max_position_embeddings
    if not 1 <= length <= positions + 1:
        raise ValueError(f"windows of {length} tokens: the model, of {positions} positions, draws 1 to {positions + 1}")
    batches = -(-count // TOGETHER)
    together = -(-count // batches)
    seeds = np.random.SeedSequence(purpose).generate_state(batches + 1)
    first = np.random.default_rng(seeds[0]).integers(0, model.config.vocab_size, batches * together)
    out = np.empty((len(first), length), np.int32)
    out[:, 0] = first
    progress(DRAW, 0, batches)
    for batch, seed in enumerate(seeds[1:]):
        own = out[batch * together : (batch + 1) * together]
        place = 1
        for tokens in _continued(model, own, int(seed)):
            own[:, place : place + len(tokens)] = tokens.T
            place += len(tokens)
            progress(DRAW, batch + place / length, batches)
    return out[:count]


def _continued(model: Decoder, windows: Int[np.ndarray, "B T"], seed: int) -> Iterator[Int[np.ndarray, "steps B"]]:
    """Tokens for all places of the windows but the first, which has its tokens, some steps at a time; those of the
    last place are drawn when the others are in place."""
    batch, length = windows.shape
    positions, weights = model.config.max_position_embeddings, parameters(model)
    fixed = model.config, jnp.float32, weights
    sampling = Sampling(jnp.float32(1), jnp.int32(0), jnp.float32(1), jax.random.key(np.uint32(seed)))
    most = min(length, positions) - 1
    if most:
        small = sum(a.nbytes for a in weights.values()) <= COPIED_BYTES
        steps = max(1, min(STEPS, most - 1)) if small else 1
        calls = -(-(most - 1) // steps)
        first = np.zeros((batch, SMALLEST_BUCKET), np.int32)
        first[:, -1] = windows[:, 0]
        mask = np.arange(SMALLEST_BUCKET) == SMALLEST_BUCKET - 1
        cache = new_cache(model.config, batch, SMALLEST_BUCKET + calls * steps)
        token, cache, _ = prefill(*fixed, None, first, np.tile(mask, (batch, 1)), cache, sampling)
        yield np.asarray(token)[None]
        for call in range(calls):
            tokens, cache = decode_on(*fixed, token, cache, sampling, steps)
            token = tokens[-1]
            yield np.asarray(tokens)[: most - 1 - call * steps]
    if length > positions:  # generation ends with a text that fills all positions
        tokens = jnp.asarray(windows[:, :positions])
        cache = new_cache(model.config, batch, positions)
        token, _, _ = prefill(*fixed, None, tokens, jnp.ones_like(tokens, bool), cache, sampling)
        yield np.asarray(token)[None]
