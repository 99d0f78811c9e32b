"""``lm-evaluation-harness`` (package ``lm-eval``) on our models: its model ``dynamo_jax``.

    dynamo-jax lm-eval --model dynamo_jax --model_args model=FOLDER,variant=auto --tasks arc_easy,piqa

The harness takes models that are registered when it begins. Importing this module registers ours, which is what
``dynamo-jax lm-eval`` does before it hands over; from Python, import it and call ``lm_eval.simple_evaluate``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import lm_eval.models  # noqa: F401 (registers the harness's own)
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from dynamo_jax.evaluation.likelihood import TOGETHER, Pair, likelihoods
from dynamo_jax.evaluation.switched import VARIANTS
from dynamo_jax.generation import continuations, continued, load_text_model
from dynamo_jax.models.chat import chat_template as chat_template_of
from dynamo_jax.models.chat import chat_text, prefix_token, stop_tokens
from dynamo_jax.models.hub import model_folder
from dynamo_jax.models.tokenizer import encode
from dynamo_jax.runtime.generate import GenerateConfig, LanguageModel

NEW_TOKENS = 256  # where a task says nothing
SEQUENCES = 8  # that are generated together
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLES = {"temperature", "top_k", "top_p"}


@register_model("dynamo_jax")
class DynamoJax(TemplateLM):
    """A model folder as the harness takes models.

    model: tiny-moe, a Hugging Face folder or name, or a folder that ``quantize`` wrote. variant: of a quantized one,
    ``baseline`` or ``auto``; adapt=True means ``auto``: the run time follows the requests in their order, as one
    client's text. What it did is in the results (``model_info``). dtype: of all but quantized experts. batch, reads:
    as ``generate --adapt`` takes them. batch_size: sequences that are generated together; tokens: of a batch that is
    scored. ValueError: a model that cannot be read, or adapt for one that is not quantized.
    """

    def __init__(
        self,
        model: str,
        variant: str = "",
        adapt: bool = False,
        dtype: str = "float32",
        batch: int = 1,
        reads: float = 1.0,
        batch_size: int | str | None = None,
        tokens: int = TOGETHER,
        **unused: Any,
    ):
        super().__init__()
        if variant not in ("", *VARIANTS):
            raise ValueError(f"variant={variant}: known are {', '.join(VARIANTS)}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype}: known are float32, bfloat16")
        self.name, self.variant = model, "auto" if adapt else variant or "baseline"
        self._text = load_text_model(
            model_folder(model), jnp.dtype(dtype), self.variant == "auto", int(batch), float(reads)
        )
        self.tokenizer = self._text.tokenizer
        self._together = int(tokens)
        self._sequences = 1 if self.variant == "auto" else _count(batch_size)  # one client's text after another

    @property
    def max_length(self) -> int:
        return self._text.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        ends = stop_tokens(self._text.files)
        if not ends:
            raise ValueError(f"{self.name}: names no token that ends a text (eos_token_id), which this task needs")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        found = prefix_token(self._text.files)
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return encode(self.tokenizer, string, special=bool(add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(list(context), list(continuation)) for _, context, continuation in requests]
        found = likelihoods(self._model(), pairs, self._text.follower, together=self._together)
        for (asked, _, _), one in zip(requests, found):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, (one.nats, one.greedy))
        return [(one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            parts = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in parts:
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[number] += nats
        for request, nats in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        out: list[str] = []
        for some in _alike(requests, self._sequences):
            config, until = _settings(some[0].args[1], stop_tokens(self._text.files))
            room = self.max_length - config.max_tokens
            if room < 1:
                raise ValueError(f"{config.max_tokens} new tokens: the model has {self.max_length} positions in all")
            prompts = [(self.tok_encode(r.args[0]) or [self.prefix_token_id])[-room:] for r in some]
            texts = self._continued(prompts, config, until)
            for request, text in zip(some, texts):
                self.cache_hook.add_partial("generate_until", request.args, text)
            out += texts
        return out

    def _continued(self, prompts: list[list[int]], config: GenerateConfig, until: list[str]) -> list[str]:
        """The continuations, up to what ends them; all stop when each has ended."""
        texts = [""] * len(prompts)
        for pieces in continuations(self._model(), self.tokenizer, prompts, config, self._text.follower):
            texts = [text + piece for text, piece in zip(texts, pieces)]
            if all(any(word in text for word in until) for text in texts):
                break
        return [_ended(text, until) for text in texts]

    def _model(self) -> LanguageModel:
        """The model where the follower left it."""
        return continued(self._text.model, self._text.follower) if self._text.follower else self._text.model

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, which the harness writes into its results. ValueError: it has none, and one is asked
        for, or one of several by name."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise ValueError(f"--apply_chat_template {chat_template}: names are not known here, only the default one")
        found = chat_template_of(self._text.files)
        if found is None:
            raise ValueError(f"{self.name}: the model has no chat template")
        return found.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(self._text.files, chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results: the variant, and what the run time saw and did."""
        events = self._text.follower.events if self._text.follower else []
        return {"model": self.name, "variant": self.variant, "events": [event._asdict() for event in events]}


def _count(batch_size: int | str | None) -> int:
    words = str(batch_size or SEQUENCES)
    if words.startswith("auto"):
        return SEQUENCES
    if not words.isdecimal() or int(words) < 1:
        raise ValueError(f"batch_size={words}: expected a number above 0, or auto")
    return int(words)


def _alike(requests: list[Instance], most: int) -> Iterator[list[Instance]]:
    """Neighbours that are generated in the same way, so many at a time."""
    some: list[Instance] = []
    for request in requests:
        if some and (len(some) == most or request.args[1] != some[0].args[1]):
            yield some
            some = []
        some.append(request)
    if some:
        yield some


def _settings(asked: dict[str, Any], ends: tuple[int, ...]) -> tuple[GenerateConfig, list[str]]:
    """How a task wants texts to go on, and the texts that end them."""
    until = asked.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    count = next((asked[name] for name in LENGTHS if name in asked), NEW_TOKENS)
    config = GenerateConfig(max_tokens=int(count), stop=ends)
    if asked.get("do_sample"):
        config = dataclasses.replace(config, **{name: asked[name] for name in SAMPLES & asked.keys()})
    return config, [word for word in until if word]


def _ended(text: str, until: list[str]) -> str:
    for word in until:
        text = text.split(word)[0]
    return text
