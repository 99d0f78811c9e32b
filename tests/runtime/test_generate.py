"""Generation: token for token what transformers generates, no compilation too many, honest samples."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FAMILY_MODELS

from dynamo_jax.generation import (
    continuations,
    load_text_model,
    prompt_tokens,
    quantized_language_model,
)
from dynamo_jax.models import chat
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import parameters
from dynamo_jax.models.huggingface import load_decoder, side_files
from dynamo_jax.models.stacked import stacked
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.generate import (
    GenerateConfig,
    LanguageModel,
    Sampling,
    bucket,
    choose,
    generate,
    stream,
)
from dynamo_jax.runtime.store import page_counts

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 33, 7, 50, 12, 8, 3, 21, 44, 17, 29], [40, 6], [11, 12, 13, 14, 15, 16, 17]]


def float_model(folder):
    decoder = load_decoder(folder)
    return LanguageModel(config=decoder.config, parameters=parameters(decoder))


def theirs(model, prompts, new):
    """Greedy tokens of transformers, the batch padded before the prompts, cut at the end-of-text token."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
    rows = [row[length:].tolist() for row in out]
    return [row[: row.index(1)] if 1 in row else row for row in rows]


OWN_DECODING = (
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
)  # the others' attention and experts are as one of these has them


def family_case(family):
    return pytest.param(family, marks=[] if family in OWN_DECODING else [pytest.mark.slow])


@pytest.mark.parametrize("family", [*map(family_case, FAMILY_MODELS)])
def test_greedy_tokens_equal_those_of_transformers(family_model, family, tmp_path):
    """Beyond every sliding window, with prompts of different lengths in one batch."""
    model = family_model(family)
    model.save_pretrained(tmp_path)
    ours = float_model(tmp_path)
    settings = GenerateConfig(max_tokens=16, stop=(1,))
    assert generate(ours, PROMPTS, settings) == theirs(model, PROMPTS, 16)


def test_a_prompts_tokens_do_not_depend_on_its_neighbours(family_model, tmp_path):
    family_model("gpt_oss").save_pretrained(tmp_path)
    ours, settings = float_model(tmp_path), GenerateConfig(max_tokens=16, stop=(1,))
    assert generate(ours, PROMPTS, settings) == [generate(ours, [p], settings)[0] for p in PROMPTS]


@pytest.fixture(scope="module")
def tiny(shallow):
    decoder, _ = shallow
    return LanguageModel(config=decoder.config, parameters=parameters(decoder))


def test_one_program_a_bucket_and_one_for_decoding(tiny, compilations):
    """Whatever the settings of sampling, the prompts' lengths and the new tokens."""
    generate(tiny, [[5] * 10], GenerateConfig(max_tokens=4))
    with compilations() as count:
        generate(tiny, [[6] * 16], GenerateConfig(max_tokens=99))
        generate(tiny, [[7]], GenerateConfig(max_tokens=5, temperature=0.9, top_k=7, top_p=0.8, seed=3))
    assert count.compiled == 0
    with compilations() as count:
        generate(tiny, [[5] * 17], GenerateConfig(max_tokens=9))
    assert count.compiled == 1


def test_a_capacity_that_is_too_small_is_named(tiny):
    with pytest.raises(ValueError, match="capacity 16 is less than 19: a bucket of 16 and max_tokens less one"):
        generate(tiny, [[5]], GenerateConfig(max_tokens=4), capacity=16)
    assert len(generate(tiny, [[5]], GenerateConfig(max_tokens=4), capacity=19)[0]) == 4


@pytest.mark.slow
def test_layers_in_loops_generate_the_same_tokens_and_are_watched_alike(rounded):
    model, _ = quantized_language_model(rounded, adaptive=True)
    loops = dataclasses.replace(model, parameters=stacked(model.config, model.parameters))
    left = []

    def keep(state, _):
        left.append(state.watch)
        return state

    config = GenerateConfig(max_tokens=5)
    one, other = (list(stream(m, PROMPTS, config, between=keep)) for m in (model, loops))
    assert one == other and len(one) == 5
    for before, after in zip(left[:5], left[5:]):
        np.testing.assert_array_equal(before.newer, after.newer)


def test_switching_the_variant_while_decoding_compiles_nothing(rounded, compilations):
    model, _ = quantized_language_model(rounded)
    plan = rounded.plan
    other = dataclasses.replace(plan, widths=plan.widths[:, ::-1])
    host, state = serving.init(rounded, slots={n: 2 * c for n, c in page_counts(plan).items()})
    host, state = serving.finish(host, state, serving.begin(host, state, other))

    def run(number):
        """Prompts [5] * 10, at the variant that ``number`` says before each step after the first."""
        both = LanguageModel(config=model.config, parameters=model.parameters, state=state)
        switch = lambda s, _: serving.switch(s, number)  # noqa: E731
        return [t[0] for t in stream(both, [[5] * 10], GenerateConfig(max_tokens=4), between=switch)]

    first = run(0)
    with compilations() as count:
        second = run(1)
    assert count.compiled == 0 and [first] == generate(model, [[5] * 10], GenerateConfig(max_tokens=4))
    assert len(second) == 4


def test_a_quantized_model_generates_what_its_dequantized_weights_generate(rounded):
    """Prefill goes through all experts of a layer, decoding through those that the tokens chose."""
    model, _ = quantized_language_model(rounded)
    arrays = dict(model.parameters)
    plan = rounded.plan
    wide = plan.channel_widths()[..., None]
    values = {w: np.asarray(dequantize(rounded.store, w).astype(jnp.bfloat16)) for w in (2, 3, 4, 8)}
    full = sum(np.where(wide == w, value, 0) for w, value in values.items())
    for layer, weights in enumerate(full.astype(np.float32)):
        for index, part in enumerate(("gate", "up", "down")):
            arrays[f"layers.{layer}.{part}"] = jnp.asarray(weights[:, index])
    settings = GenerateConfig(max_tokens=12)
    prompts = [[400, 17, 2000], [9] * 20]
    assert generate(model, prompts, settings) == generate(
        LanguageModel(config=model.config, parameters=arrays), prompts, settings
    )


def draw(count, logits, **changes):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes
    sampling = Sampling(*(jnp.asarray(settings[n]) for n in ("temperature", "top_k", "top_p")), jax.random.key(0))
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    return np.bincount(choose(rows, sampling, jnp.int32(0)), minlength=len(logits)) / count


LOGITS = np.log([0.5, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, [0.5, 0.05, 0.25, 0.2]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([0.25, 0.0025, 0.0625, 0.04]) / 0.355),
        ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0]),
        ({"top_p": 0.7}, [2 / 3, 0, 1 / 3, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [2 / 3, 0, 1 / 3, 0]),  # 0.5 / 0.95 + 0.25 / 0.95 reaches 0.75
    ],
)
def test_samples_have_the_probabilities_that_the_settings_ask_for(changes, want):
    np.testing.assert_allclose(draw(20_000, LOGITS, **changes), want, atol=0.012)


def test_a_seed_repeats_and_another_differs(tiny):
    def sample(seed):
        return generate(tiny, [[100, 200]], GenerateConfig(max_tokens=12, temperature=2.0, seed=seed))

    assert sample(1) == sample(1) != sample(2)


def test_a_stop_token_ends_its_sequence_alone(tiny):
    free = generate(tiny, [[100, 200], [7, 8, 9]], GenerateConfig(max_tokens=8))
    stop = free[0][3]
    held = generate(tiny, [[100, 200], [7, 8, 9]], GenerateConfig(max_tokens=8, stop=(stop,)))
    assert held[0] == free[0][: free[0].index(stop)]
    assert held[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])


def test_generation_ends_at_the_last_position(tiny):
    prompt = [5] * (tiny.config.max_position_embeddings - 3)
    assert len(generate(tiny, [prompt], GenerateConfig(max_tokens=50))[0]) == 3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompt 0 has no tokens"),
        ([[1], [9999]], "prompt 1 has the token id 9999 .* outside the model's vocabulary"),
        ([[1] * 256], "256 positions"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_named(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        list(stream(tiny, prompts, GenerateConfig(max_tokens=2)))


def test_no_prompt_gives_nothing(tiny):
    assert generate(tiny, [], GenerateConfig()) == []


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"temperature": -1},
            {"temperature": math.nan},
            {"top_p": 0},
            {"top_p": math.nan},
            {"top_k": -1},
            {"top_k": 1.5},
        ),
        *({"max_tokens": 0}, {"max_tokens": math.inf}, {"seed": -1}, {"seed": 10**20}, {"seed": 0.5}),
    ],
)
def test_settings_that_cannot_be_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GenerateConfig(**change)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]


def test_streamed_text_adds_up_and_breaks_no_character(tiny, bundled, monkeypatch):
    _, tokenizer = bundled
    prompt = tokenizer.encode("Die Größe der Bücher ist schön, für alle Völker: ä").ids
    settings = GenerateConfig(max_tokens=40, temperature=1.5, seed=3)
    pieces = [p[0] for p in continuations(tiny, tokenizer, [prompt], settings)]
    tokens = generate(tiny, [prompt], settings)[0]
    assert "".join(pieces) == tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    text = " 漢字 and 🙂"  # of characters that take several tokens each
    monkeypatch.setattr(
        "dynamo_jax.generation.token_stream", lambda *_, **__: ([t] for t in tokenizer.encode(text).ids)
    )
    pieces = [p[0] for p in continuations(tiny, tokenizer, [prompt], settings)]
    assert "".join(pieces) == text and "" in pieces[:-1] and all("\ufffd" not in piece for piece in pieces)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_the_chat_template_is_found_wherever_models_keep_it(place, bundled):
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    settings = {"bos_token": {"content": "<s>"}} | ({} if place == "file" else {"chat_template": TEMPLATE})
    if place == "named":
        settings["chat_template"] = named
    files = {"tokenizer_config.json": json.dumps(settings).encode()}
    if place == "file":
        files["chat_template.jinja"] = TEMPLATE.encode()
    assert chat.chat_prompt(files, "hi") == "<s><|user|>hi<|assistant|>"
    _, tokenizer = bundled
    asked = prompt_tokens(tokenizer, files, "hi", chat=True)
    assert asked == tokenizer.encode("<s><|user|>hi<|assistant|>", add_special_tokens=False).ids
    assert prompt_tokens(tokenizer, files, "hi", chat=False) == tokenizer.encode("hi").ids


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{% for %}", "{{ raise_exception('no system') }}"])
def test_a_template_that_fails_or_tries_to_escape_is_an_error(template):
    with pytest.raises(ValueError, match="the chat template fails"):
        chat.chat_prompt({"chat_template.jinja": template.encode()}, "hi")


def test_stop_tokens_come_from_the_generation_settings_first():
    files = {"config.json": b'{"eos_token_id": 7}'}
    assert chat.stop_tokens(files) == (7,)
    assert chat.stop_tokens(files | {"generation_config.json": b'{"eos_token_id": [3, 4]}'}) == (3, 4)
    assert chat.stop_tokens({}) == ()
    assert chat.stop_tokens(side_files(BUNDLED)) == (0,)


def test_a_model_in_bfloat16_generates(shallow_folder):
    model, tokenizer, files, _ = load_text_model(shallow_folder)
    tokens = prompt_tokens(tokenizer, files, "def main():", chat=True)
    assert len(generate(model, [tokens], GenerateConfig(max_tokens=5))[0]) == 5
