"""Generation: token for token what transformers generates, no compilation too many, honest samples."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FAMILY_MODELS
from later import Later

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.commands.console import describe_event
from dynamo_jax.generation import (
    continuations,
    continued,
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
from dynamo_jax.runtime import online, serving
from dynamo_jax.runtime.generate import (
    GenerateConfig,
    LanguageModel,
    Sampling,
    bucket,
    choose,
    generate,
    stream,
)
from dynamo_jax.runtime.memory import slots
from dynamo_jax.runtime.monitor import start
from dynamo_jax.runtime.standing import FIRST, RECENT, TRIED, Standing
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


@pytest.fixture(scope="module")
def quantized(shallow, texts):
    settings = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=64, quantizer="rtn")
    return quantize(*shallow, {"code": texts["code"]}, settings)[0]


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
def test_layers_in_loops_generate_the_same_tokens_and_are_watched_alike(quantized):
    model, _ = quantized_language_model(quantized, adaptive=True)
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


def test_switching_the_variant_while_decoding_compiles_nothing(quantized, compilations):
    model, _ = quantized_language_model(quantized)
    plan = quantized.plan
    other = dataclasses.replace(plan, widths=plan.widths[:, ::-1])
    host, state = serving.init(quantized, slots={n: 2 * c for n, c in page_counts(plan).items()})
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


def followed(quantized, texts, prompts=3):
    """A client's prompts, 200 tokens of verse each, where the monitor takes everything for novel; all new tokens."""
    model, follower = quantized_language_model(quantized, adaptive=True)
    strict = model.state.signatures._replace(limit=jnp.full(1, 1e-3))
    model = dataclasses.replace(model, state=model.state._replace(signatures=strict))
    ids = quantized.tokenizer.encode(texts["verse"]).ids
    out = []
    for index in range(prompts):
        prompt = ids[200 * index : 200 * (index + 1)]
        out += [list(stream(model, [prompt], GenerateConfig(max_tokens=3), between=follower))]
        model = continued(model, follower)
    return follower, out


def test_a_text_that_turns_novel_is_adapted_to_between_two_steps(quantized, texts):
    follower, out = followed(quantized, texts)
    assert [len(steps) for steps in out] == [3] * 3
    first, second = follower.events
    assert (first.what, first.text, first.token, first.request) == (
        "novel",
        2,
        201,
        0,
    )  # in the second prompt, at 256 tokens
    assert second.what in ("adapted", "not better") and (second.gain > 0) == (second.what == "adapted")
    assert second.moved > 0 and "text 2, token 20" in describe_event(second) and "novel" in describe_event(first)
    there = slots(quantized.plan, quantized.spare)  # the baseline's and the spare ones
    assert all(count <= there[level] for level, count in page_counts(follower.host.plans[1]).items())
    assert follower.state.number.tolist() == [int(second.what == "adapted")]


def follower_of(quantized, requests=1):
    model, follower = quantized_language_model(quantized, adaptive=True)
    return follower, model.state._replace(
        number=jnp.zeros(requests, jnp.int32), watch=start(model.state.signatures, requests)
    )


def labelled(state, *labels):
    return state._replace(watch=state.watch._replace(label=jnp.asarray(labels, jnp.int32)))


def test_the_follower_adapts_to_the_last_novel_tokens_of_all_texts(quantized, monkeypatch):
    """Windows end with the text, whatever came before it turned novel; short texts count together."""
    seen = []
    monkeypatch.setattr(online, "observe_windows", lambda _, windows, *__: seen.append(windows) or 1 / 0)
    follower, state = follower_of(quantized)
    known, novel = list(range(1000, 2000)), list(range(300))
    state = follower(labelled(state, 0), [known])
    with pytest.raises(ZeroDivisionError):
        follower(labelled(state, 1), [known + novel])
    assert seen[0].shape[0] * online.WINDOW >= FIRST and seen[0][-1, -1] == 299
    assert seen[0].min() >= 0 and (seen[0] >= 1000).sum() < FIRST

    seen.clear()
    follower, state = follower_of(quantized)
    state = labelled(state, 1)
    for begin in (0, 100):
        state = labelled(follower(state, [list(range(begin, begin + 100))]), 1)
    assert seen == []
    with pytest.raises(ZeroDivisionError):
        follower(state, [list(range(200, 300))])
    np.testing.assert_array_equal(seen[0], [np.arange(43, 172), np.arange(171, 300)])


def test_a_plan_that_could_not_prove_itself_does_not_serve(quantized, monkeypatch):
    """Its pages are there when the comparison fails; the variant of before is gone."""

    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(online, "divergence", fails)
    follower, state = follower_of(quantized)
    state, follower._standing = labelled(state, 1), Standing(online.HOP, serves=True)
    move = serving.begin(follower.host, state, quantized.plan)
    follower._move = online.Sent(move, np.zeros((1, 3), int), [None], np.zeros(1), follower._standing)
    assert follower(state, [[1, 2, 3]]).number.tolist() == [0]
    assert (follower.events[-1].what, follower.events[-1].name) == ("failed", "no memory")


def test_known_text_forgets_the_variant_and_other_requests_begin_anew(quantized):
    follower, state = follower_of(quantized)
    follower._standing = Standing(online.HOP, serves=True, wanted=4096)
    assert follower(labelled(state, 1), [[1, 2, 3]]).number.tolist() == [1]
    assert follower(labelled(state, 0), [[1, 2, 3, 4]]).number.tolist() == [0]
    assert follower._standing == Standing(online.HOP, known=True)
    follower._standing.serves = True
    _, two = follower_of(quantized, 2)
    assert follower(labelled(two, 1, 0), [[1], [2]]).number.tolist() == [0, 0]
    assert [(e.request, e.text, e.what) for e in follower.events[-2:]] == [(0, 1, "novel"), (1, 1, "known")]


def test_a_variant_is_left_when_the_router_says_that_it_no_longer_pays(quantized, monkeypatch):
    """From the counts of hops alone; another is adapted to the last tokens, later each time."""
    seen = []
    monkeypatch.setattr(online, "observe_windows", lambda _, windows, *__: seen.append(windows) or fails())
    follower, state = follower_of(quantized)
    shape = state.watch.older.shape[1:]

    def fails():
        raise ValueError("not now")

    def hop(state, number, share):
        """The next hop of one text, whose rows went to expert 0 to the given share, else to expert 1."""
        counts = np.zeros((1, *shape), np.float32)
        counts[..., 0], counts[..., 1] = 128 * share, 128 * (1 - share)
        watch = state.watch._replace(older=jnp.asarray(counts), older_tokens=jnp.full(1, 128.0))
        text = list(range(online.HOP * (number + 1)))
        return follower(labelled(state._replace(watch=watch), 1), [text])

    hops = RECENT // online.HOP
    follower._standing = Standing(online.HOP, serves=True, wanted=10**6)
    follower._standing.saves = saves = np.zeros(shape)
    saves[0, :2] = 1.0, -1.0  # nats a row, in one layer
    for number in range(hops):
        state = hop(state, number, 0.75)
        assert state.number.tolist() == [1]
    assert follower._standing.saved == [0.5] * hops
    for number in range(hops, hops + hops // 2 - 1):  # as much the other way, but not for as long
        state = hop(state, number, 0.25)
        assert state.number.tolist() == [1]
    state = hop(state, hops + hops // 2 - 1, 0.25)
    assert state.number.tolist() == [0] and [e.what for e in follower.events] == ["novel", "left", "failed"]
    assert "no longer suits" in describe_event(follower.events[1])
    assert seen[0].size // (online.WINDOW + 1) * online.WINDOW == RECENT  # the last ones, at once
    assert follower._standing.least == 2 * FIRST and follower._standing.wanted > RECENT
    state = hop(state, 2 * hops, 0.25)
    assert state.number.tolist() == [0] and len(seen) == 1


@pytest.mark.parametrize("certain", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_known_text_is_served_by_a_variant_where_the_gain_is_sure(quantized, monkeypatch, certain):
    """On the newer half of its windows, from which the plan was not made; and left when the text is novel."""
    follower, state = follower_of(quantized)
    text = [int(t) for t in np.random.default_rng(0).integers(3, 60, TRIED + 1)]
    made, judged, count = [], [], TRIED // online.WINDOW
    gains = np.full(count // 2, 1.0) if certain else np.resize([3.0, -2.0], count // 2)
    observe = online.observe_windows

    def divergence(model, state, w, seen, variant):
        judged.append((w, seen))
        return np.zeros(len(w)) if variant else gains * online.WINDOW

    monkeypatch.setattr(online, "observe_windows", lambda model, w, *__: made.append(w) or observe(model, w))
    monkeypatch.setattr(online, "divergence", divergence)
    state = follower(labelled(state, 0), [text[:TRIED]])
    assert follower.events[0].what == "known" and follower._move is None
    for _ in range(100):
        state = follower(labelled(state, 0), [text])
        if len(follower.events) > 1:
            break
        time.sleep(0.1)
    (windows, _), tokens = judged[0], np.array(text)
    assert [w.shape for w in (made[0], windows)] == [(count // 2, online.WINDOW + 1)] * 2
    np.testing.assert_array_equal(np.concatenate([made[0], windows])[:, 1:].reshape(-1), tokens[1:])
    np.testing.assert_array_equal(made[1], windows)
    event = follower.events[1]
    assert event.what == ("gains" if certain else "not sure") and event.gain == pytest.approx(gains.mean())
    assert state.number.tolist() == [int(certain)]
    assert ("the gain is sure" if certain else "no gain is sure") in describe_event(event)
    monkeypatch.setattr(online, "divergence", lambda *given: gains * given[-1])
    assert follower(labelled(state, 1), [text]).number.tolist() == [0]


def test_pages_that_come_for_text_that_is_over_serve_nobody(quantized, monkeypatch):
    follower, state = follower_of(quantized)
    monkeypatch.setattr(online, "divergence", lambda *_: 1 / 0)
    state = follower(labelled(state, 1), [list(range(10))])
    move = serving.begin(follower.host, state, quantized.plan)
    follower._move = online.Sent(move, np.zeros((1, 3), int), None, np.zeros(1), follower._standing)
    state = follower(labelled(state, 0), [list(range(11))])
    assert follower._move is None and state.number.tolist() == [0]


def beside(quantized, requests=2):
    follower, state = follower_of(quantized, requests)
    slower = online.Follower(quantized, follower.host, state, worker=Later())
    return slower, state


def until(follower, state, labels, what):
    """Steps without new tokens until pages have come."""
    for _ in range(100):
        state = follower.told(labelled(state, *labels), {})
        if what():
            return state
        time.sleep(0.1)
    raise AssertionError("nothing happened")


def test_a_worker_measures_and_judges_while_steps_go_on(quantized):
    """The same plan and the same event as without one, later; no slot is lent, and the variant serves when it is
    judged."""
    text = [int(t) for t in np.random.default_rng(0).integers(3, 60, FIRST + 1)]
    alone, state = follower_of(quantized, 2)
    until(alone, alone.told(labelled(state, 1, 0), {0: text, 1: text[:9]}), [1, 0], lambda: len(alone.events) > 2)
    follower, late = beside(quantized)
    late = follower.told(labelled(late, 1, 0), {0: text, 1: text[:9]})
    for _ in range(3):
        late = follower.told(labelled(late, 1, 0), {0: [3], 1: [3]})
        assert len(follower.worker.waiting) == 1 and late.number.tolist() == [0, 0]
    follower.worker.work()
    late = until(follower, late, [1, 0], lambda: follower.worker.waiting)
    assert late.number.tolist() == [0, 0] and (follower.host.plans[1].widths == alone.host.plans[1].widths).all()
    follower.worker.work()
    late = follower.told(labelled(late, 1, 0), {})
    (judged,) = [e for e in follower.events if e.what in ("adapted", "not better")]
    assert judged[3:] == alone.events[-1][3:] and not serving.lent(follower.host)
    assert late.number.tolist() == [int(judged.what == "adapted"), 0]


def test_what_a_worker_made_for_text_that_is_over_serves_nobody(quantized, monkeypatch):
    follower, state = beside(quantized)
    state = follower.told(labelled(state, 1, 0), {0: list(range(FIRST + 1))})
    state = follower.told(labelled(state, 0, 0), {})
    follower.worker.work()
    state = follower.told(labelled(state, 0, 0), {})
    assert follower._move is None and follower._measuring is None
    assert [e.what for e in follower.events] == ["novel", "known", "known"]


def test_a_worker_that_fails_leaves_the_baseline_running(quantized, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(online, "observe_windows", fails)
    follower, state = beside(quantized)
    state = follower.told(labelled(state, 1, 0), {0: list(range(FIRST + 1))})
    follower.worker.work()
    state = follower.told(labelled(state, 1, 0), {})
    assert state.number.tolist() == [0, 0]
    assert (follower.events[-1].what, follower.events[-1].name) == ("failed", "no memory")


def test_a_request_that_takes_the_place_of_another_begins_anew(quantized):
    """Its tokens are not those of the one before; and a client's monitor may go on with it."""
    follower, state = beside(quantized)
    state = follower.told(labelled(state, 1, 0), {0: list(range(100)), 1: list(range(100, 200))})
    follower._standing.serves = True
    state = follower.told(state, {})
    assert state.number.tolist() == [1, 0]
    state = follower.renewed(state, [0])
    assert state.number.tolist() == [0, 0] and state.watch.label.tolist() == [-1, 0]
    state = follower.told(labelled(state, 1, 0), {0: list(range(200, 250))})
    assert follower._windows(np.array([True, False])).size == 0
    assert [(e.request, e.text, e.token) for e in follower.events] == [(0, 0, 100), (1, 0, 100), (0, 1, 50)]
    state = follower.renewed(state, [1], monitors=jax.tree.map(lambda a: a[::-1], state.watch))
    assert state.watch.label.tolist() == [1, 1]


def test_a_request_that_has_ended_is_not_watched(quantized):
    model, _ = quantized_language_model(quantized, adaptive=True)
    first = generate(model, [[5] * 20], GenerateConfig(max_tokens=1))[0][0]
    states = []
    list(
        stream(
            model,
            [[5] * 20, [9] * 12],
            GenerateConfig(max_tokens=5, stop=(first,)),
            between=lambda s, _: states.append(s.watch.newer_tokens.tolist()) or s,
        )
    )
    assert states[0] == [20, 12] and states[-1][0] == 20 and states[-1][1] > 12


def test_texts_that_are_too_short_say_nothing(quantized):
    model, follower = quantized_language_model(quantized, adaptive=True)
    list(stream(model, [[5] * 20, [9] * 12], GenerateConfig(max_tokens=3), between=follower))
    assert follower.events == [] and follower.state.number.tolist() == [0, 0]


def test_adapting_that_fails_leaves_the_baseline_running(quantized, texts, monkeypatch):
    def damaged(*_, **__):
        raise ValueError("the 3-bit page of layer 0, expert 1, block 2 is damaged in host memory")

    monkeypatch.setattr(online, "begin", damaged)
    follower, out = followed(quantized, texts)
    assert follower.events[1].what == "failed" and "expert 1, block 2 is damaged" in describe_event(follower.events[1])
    plain, _ = quantized_language_model(quantized)
    ids = quantized.tokenizer.encode(texts["verse"]).ids
    for index, steps in enumerate(out):
        prompt = ids[200 * index : 200 * (index + 1)]
        assert [t[0] for t in steps] == generate(plain, [prompt], GenerateConfig(max_tokens=3))[0]


def test_a_quantized_model_generates_what_its_dequantized_weights_generate(quantized):
    """Prefill goes through all experts of a layer, decoding through those that the tokens chose."""
    model, _ = quantized_language_model(quantized)
    arrays = dict(model.parameters)
    plan = quantized.plan
    wide = plan.channel_widths()[..., None]
    values = {w: np.asarray(dequantize(quantized.store, w).astype(jnp.bfloat16)) for w in (2, 3, 4, 8)}
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
