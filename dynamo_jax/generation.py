"""What ``dynamo-jax generate`` does: a model folder and prompts to text, as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import tokenizers

from dynamo_jax.kernels.layout import Resident
from dynamo_jax.models.chat import Files, chat_prompt, stop_tokens
from dynamo_jax.models.decoder import parameters
from dynamo_jax.models.huggingface import load_checkpoint, load_tokenizer, side_files
from dynamo_jax.models.stacked import stacked
from dynamo_jax.runtime.generate import Between, GenerateConfig, LanguageModel, stream
from dynamo_jax.runtime.online import Event, Follower
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import init
from dynamo_jax.runtime.store import page_counts
from dynamo_jax.storage import checkpoint

REPLACEMENT = "\ufffd"  # stands for bytes that are not yet a whole character


def quantized_language_model(
    model: QuantizedModel, dtype: Any = jnp.float32, adaptive: bool = False
) -> tuple[LanguageModel, Follower | None]:
    """The baseline of a quantized model, ready to generate. Adaptive: with a monitor, a second variant, and what
    follows a client's requests; its ``state`` is the one to begin the next call of ``stream`` with."""
    if adaptive:
        host, state = init(model)
    else:
        host, state = init(model, variants=1, slots=page_counts(model.plan))
        state = state._replace(watch=None)
    follower = Follower(model, host, state) if adaptive else None
    parameters = model.device_parameters(dtype)
    if not isinstance(state.resident, Resident):  # a kernel takes long to compile: once for all layers alike
        parameters = stacked(model.config, parameters)
    return LanguageModel(config=model.config, parameters=parameters, state=state, dtype=dtype), follower


class Loaded(NamedTuple):
    """A model with its tokenizer and small files, and what follows its requests, if anything does."""

    model: LanguageModel
    tokenizer: tokenizers.Tokenizer
    files: Files
    follower: Follower | None = None


def load_language_model(folder: Path, dtype: Any, adaptive: bool = False) -> Loaded:
    """A folder that ``quantize`` wrote, or a Hugging Face folder; only the first can be adaptive."""
    if checkpoint.is_checkpoint(folder):
        quantized = checkpoint.load(folder)
        model, follower = quantized_language_model(quantized, dtype, adaptive)
        return Loaded(model, quantized.tokenizer, quantized.files, follower)
    if adaptive:
        raise ValueError(f"{folder}: is not quantized; --adapt switches the precision of a folder that quantize wrote")
    decoder = load_checkpoint(folder)
    arrays = {name: a.astype(dtype) for name, a in parameters(decoder).items()}
    model = LanguageModel(config=decoder.config, parameters=arrays, dtype=dtype)
    return Loaded(model, load_tokenizer(folder, decoder.config.vocab_size), side_files(folder))


def prompt_tokens(tokenizer: tokenizers.Tokenizer, files: Files, text: str, chat: bool) -> list[int]:
    """The prompt's ids: in the model's chat template where it has one and ``chat`` is set, else as it stands."""
    asked = chat_prompt(files, text) if chat else None
    if asked is not None:
        return tokenizer.encode(asked, add_special_tokens=False).ids
    return tokenizer.encode(text).ids


def continuations(
    model: LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompts: list[list[int]],
    config: GenerateConfig,
    between: Between | None = None,
) -> Iterator[list[str]]:
    """At each step the text that each prompt's continuation has grown by; whole characters only."""
    tokens = [list(p) for p in prompts]
    shown = [tokenizer.decode(p) for p in prompts]
    for step in stream(model, prompts, config, between=between):
        pieces = []
        for row, token in enumerate(step):
            tokens[row] += [] if token is None else [token]
            text = tokenizer.decode(tokens[row])
            whole = text.rstrip(REPLACEMENT)
            pieces.append(whole[len(shown[row]) :])
            shown[row] = max(shown[row], whole, key=len)
        yield pieces
    yield [tokenizer.decode(t)[len(s) :] for t, s in zip(tokens, shown)]


def settings(files: Files, **given: Any) -> GenerateConfig:
    """The user's settings with the model's stop tokens."""
    return GenerateConfig(stop=stop_tokens(files), **given)


def continued(model: LanguageModel, follower: Follower) -> LanguageModel:
    """The model with the monitors and the variant that the last call of ``stream`` left."""
    return dataclasses.replace(model, state=follower.state)


def describe(event: Event) -> str:
    """One line of what the follower did."""
    text = {
        "known": f"the text is like {event.name}: baseline",
        "novel": "the text is novel",
        "adapted": f"switched to a variant adapted to it, {event.moved} pages moved",
        "not better": f"adapted, but no better on what was seen, {event.moved} pages moved: baseline",
        "left": "the variant no longer suits the text: baseline",
        "failed": f"adapting failed, no switch: {event.name}",
    }[event.what]
    more = "" if event.gain is None else f", {event.gain:+.4f} nats a token nearer to 8 bits on what was seen"
    return f"text {event.text}, token {event.token}: {text} (score {event.score:.2f}{more})"
