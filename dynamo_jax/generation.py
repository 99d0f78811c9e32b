"""Text from prompts: a model folder or a quantized model, prompts as text, and continuations as they come.

Tokens, caches and sampling are ``runtime/generate.py``'s; here is what a tokenizer and a chat template add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import tokenizers
from jax.sharding import Mesh

from dynamo_jax.kernels.layout import Resident
from dynamo_jax.models.chat import Files, chat_prompts, stop_tokens
from dynamo_jax.models.decoder import parameters
from dynamo_jax.models.huggingface import load_decoder, side_files
from dynamo_jax.models.stacked import stacked
from dynamo_jax.models.template import Chat
from dynamo_jax.models.tokenizer import decode, encode, load_tokenizer, whole_characters
from dynamo_jax.runtime.generate import Between, GenerateConfig, LanguageModel, check_prompts
from dynamo_jax.runtime.generate import stream as token_stream
from dynamo_jax.runtime.mesh import Placement, placed_parameters
from dynamo_jax.runtime.online import Follower
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.residency import largest_shard
from dynamo_jax.runtime.serving import init
from dynamo_jax.storage import checkpoint

REPLACEMENT = "\ufffd"  # stands for bytes that are not yet a whole character


def quantized_language_model(
    model: QuantizedModel,
    dtype: Any = jnp.float32,
    adaptive: bool = False,
    batch: int | None = None,
    reads: float = 1.0,
    mesh: Mesh | None = None,
) -> tuple[LanguageModel, Follower | None]:
    """The baseline of a quantized model, ready to generate.

    Adaptive: with a monitor, a second variant, and what follows a client's requests (batch, reads: as ``Follower``
    takes them); its ``state`` is the one to begin the next call of ``stream`` with. mesh: of several devices, with the
    axes ``data`` and ``model``.
    """
    placement = None if mesh is None else Placement.of(mesh, model.config.num_experts, model.plan.blocks)
    if adaptive:
        host, state = init(model, placement=placement)
    else:
        host, state = init(model, variants=1, slots=largest_shard(placement, [model.plan]), placement=placement)
        state = state._replace(watch=None)
    follower = Follower(model, host, state, batch, reads) if adaptive else None
    arrays: dict[str, Any] = model.parameters
    if not isinstance(state.resident, Resident):  # a kernel takes long to compile: once for all layers alike
        arrays = stacked(model.config, arrays)
    parameters = placed_parameters(placement, model.config, arrays, dtype)
    return LanguageModel(config=model.config, parameters=parameters, state=state, dtype=dtype), follower


class TextModel(NamedTuple):
    """A model ready to generate: tokenizer and small files with it, and what follows its requests, if anything does."""

    model: LanguageModel
    tokenizer: tokenizers.Tokenizer
    files: Files
    follower: Follower | None = None


def text_model(
    model: QuantizedModel,
    dtype: Any = jnp.bfloat16,
    adapt: bool = False,
    batch: int | None = None,
    reads: float = 1.0,
    mesh: Mesh | None = None,
) -> TextModel:
    """A quantized model in memory, ready for ``stream`` and ``generate``.

    dtype: of all but the experts. adapt: watch the text, and switch precision where it is novel; without it the
    baseline runs. batch: requests that a step is taken to serve, by default as many as there are prompts; reads: how
    many times the baseline's bytes a step may read once adapted. mesh: of several devices (docs/scale.md). ValueError:
    batch below 1, reads not above 0.
    """
    language_model, follower = quantized_language_model(model, dtype, adapt, batch, reads, mesh)
    return TextModel(language_model, model.tokenizer, model.files, follower)


def load_text_model(
    folder: str | Path,
    dtype: Any = jnp.bfloat16,
    adapt: bool = False,
    batch: int | None = None,
    reads: float = 1.0,
    mesh: Mesh | None = None,
) -> TextModel:
    """A folder that ``quantize`` wrote, or a Hugging Face folder, ready for ``stream`` and ``generate``.

    dtype, adapt, batch, reads, mesh: as ``text_model`` takes them. ValueError: a folder that is not whole, or adapt or
    a mesh for a model that is not quantized.
    """
    folder = Path(folder)
    if checkpoint.is_checkpoint(folder):
        return text_model(checkpoint.load(folder, mesh), dtype, adapt, batch, reads, mesh)
    if adapt:
        raise ValueError(f"{folder}: is not quantized; --adapt switches the precision of a folder that quantize wrote")
    if mesh is not None:
        raise ValueError(f"{folder}: is not quantized; a mesh splits a folder that quantize wrote")
    decoder = load_decoder(folder)
    arrays = {name: a.astype(dtype) for name, a in parameters(decoder).items()}
    model = LanguageModel(config=decoder.config, parameters=arrays, dtype=dtype)
    return TextModel(model, load_tokenizer(folder), side_files(folder))


def stream(
    model: TextModel, prompts: Sequence[str | Chat], config: GenerateConfig | None = None, chat: bool = True
) -> Iterator[list[str]]:
    """At each step the text that each prompt's continuation has grown by; whole characters only.

    The prompts run as one batch. A prompt is a text, or a chat to be answered: its messages, a list of role and content
    each. chat: texts, too, in the model's chat template, where it has one. The model's stop tokens are
    added to those of ``config``. A model that adapts goes on from call to call: its monitors and its variant are of one
    client's texts (of as many clients as there are prompts). ValueError, at the first step: a prompt without tokens, or
    with too many, or a chat for a model without a template.
    """
    config = config or GenerateConfig()
    config = dataclasses.replace(config, stop=(*config.stop, *stop_tokens(model.files)))
    tokens = prompts_tokens(model, prompts, chat)
    language_model = continued(model.model, model.follower) if model.follower else model.model
    yield from continuations(language_model, model.tokenizer, tokens, config, model.follower)


def generate(
    model: TextModel, prompts: Sequence[str], config: GenerateConfig | None = None, chat: bool = True
) -> list[str]:
    """The continuation of each prompt: ``stream``, collected. ValueError: a prompt that the model cannot take."""
    out = [""] * len(prompts)
    for pieces in stream(model, prompts, config, chat):
        out = [text + piece for text, piece in zip(out, pieces)]
    return out


def prompts_tokens(model: TextModel, prompts: Sequence[str | Chat], chat: bool) -> list[list[int]]:
    """The ids of all prompts, which are checked; ValueError that names the first that the model cannot take."""
    if isinstance(prompts, str):
        raise ValueError("prompts: expected a list of texts, got one text")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    asked = _asked(model.files, prompts) if chat or len(texts) < len(prompts) else None
    if asked is None and len(texts) < len(prompts):
        raise ValueError("prompts: a chat, and the model has no chat template")
    tokens = [encode(model.tokenizer, text, special=asked is None) for text in asked or texts]
    check_prompts(model.model.config, tokens)
    return tokens


def _asked(files: Files, prompts: Sequence[str | Chat]) -> list[str] | None:
    """The prompts in the model's chat template, where it has one."""
    return chat_prompts(files, [whole_characters(p) if isinstance(p, str) else p for p in prompts])


def prompt_tokens(tokenizer: tokenizers.Tokenizer, files: Files, text: str, chat: bool) -> list[int]:
    """The prompt's ids: in the model's chat template where it has one and ``chat`` is set, else as it stands."""
    asked = _asked(files, [text]) if chat else None
    return encode(tokenizer, asked[0] if asked else text, special=asked is None)


def continuations(
    model: LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompts: list[list[int]],
    config: GenerateConfig,
    between: Between | None = None,
) -> Iterator[list[str]]:
    """At each step the text that each prompt's continuation has grown by; whole characters only."""
    tokens = [list(p) for p in prompts]
    shown = [decode(tokenizer, p) for p in prompts]
    for step in token_stream(model, prompts, config, between=between):
        pieces = []
        for row, token in enumerate(step):
            tokens[row] += [] if token is None else [token]
            text = decode(tokenizer, tokens[row])
            whole = text.rstrip(REPLACEMENT)
            pieces.append(whole[len(shown[row]) :])
            shown[row] = max(shown[row], whole, key=len)
        yield pieces
    yield [decode(tokenizer, t)[len(s) :] for t, s in zip(tokens, shown)]


def continued(model: LanguageModel, follower: Follower) -> LanguageModel:
    """The model with the monitors and the variant that the last call of ``stream`` left."""
    return dataclasses.replace(model, state=follower.state)
