"""What ``dynamo-jax generate`` does: a model folder and prompts to text, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from dynamo_jax import checkpoint
from dynamo_jax.chat import Files, chat_prompt, stop_tokens
from dynamo_jax.models.decoder import parameters
from dynamo_jax.models.huggingface import load_checkpoint, load_tokenizer, side_files
from dynamo_jax.runtime.generate import GenerateConfig, LanguageModel, Quantized, stream
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.residency import levels_of, residency, table_of
from dynamo_jax.runtime.store import host_pages

REPLACEMENT = "\ufffd"  # stands for bytes that are not yet a whole character


def quantized_language_model(model: QuantizedModel, dtype: Any = jnp.float32) -> LanguageModel:
    """The baseline variant of a quantized model, ready to generate; ``quantized.number`` chooses the variant."""
    arrays = {name: jnp.asarray(np.asarray(a), dtype) for name, a in model.parameters.items()}
    here = residency(host_pages(model.store, model.plan), [model.plan])
    quantized = Quantized(here.resident, (table_of(here, model.plan, levels_of(model.plan)),), jnp.int32(0))
    return LanguageModel(config=model.config, parameters=arrays, quantized=quantized, dtype=dtype)


def load_language_model(folder: Path, dtype: Any) -> tuple[LanguageModel, tokenizers.Tokenizer, Files]:
    """A folder that ``quantize`` wrote, or a Hugging Face folder."""
    if checkpoint.is_checkpoint(folder):
        quantized = checkpoint.load(folder)
        return quantized_language_model(quantized, dtype), quantized.tokenizer, quantized.files
    decoder = load_checkpoint(folder)
    arrays = {name: a.astype(dtype) for name, a in parameters(decoder).items()}
    model = LanguageModel(config=decoder.config, parameters=arrays, dtype=dtype)
    return model, load_tokenizer(folder, decoder.config.vocab_size), side_files(folder)


def prompt_tokens(tokenizer: tokenizers.Tokenizer, files: Files, text: str, chat: bool) -> list[int]:
    """The prompt's ids: in the model's chat template where it has one and ``chat`` is set, else as it stands."""
    asked = chat_prompt(files, text) if chat else None
    if asked is not None:
        return tokenizer.encode(asked, add_special_tokens=False).ids
    return tokenizer.encode(text).ids


def continuations(
    model: LanguageModel, tokenizer: tokenizers.Tokenizer, prompts: list[list[int]], config: GenerateConfig
) -> Iterator[list[str]]:
    """At each step the text that each prompt's continuation has grown by; whole characters only."""
    tokens = [list(p) for p in prompts]
    shown = [tokenizer.decode(p) for p in prompts]
    for step in stream(model, prompts, config):
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
