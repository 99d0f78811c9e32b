"""Adaptation: what a text shows, what is expected of the text to come, and the plan that follows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.analysis.statistics import observe
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.experts import ExpertWeights, expert_outputs
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.adapt import (
    LAYER_COST_ROWS,
    PRIOR_COST_ROWS,
    PRIOR_TOKENS,
    Observation,
    adapted_plan,
    expected,
    observe_windows,
    saved_by,
)
from dynamo_jax.runtime.memory import measuring_bytes, spare_slots
from dynamo_jax.runtime.quantized import Knowledge
from dynamo_jax.runtime.signatures import learn
from dynamo_jax.runtime.store import page_counts, pages_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


def adapt(model, windows):
    return adapted_plan(model.plan, model.knowledge, observe_windows(model, windows))


@pytest.mark.parametrize("kind", ["quantized", "apart"])
def test_adaptation_keeps_the_stored_bytes_and_the_bytes_that_it_expects_to_read(request, kind, novel):
    model = request.getfixturevalue(kind)
    seen = observe_windows(model, novel.first)
    plan = adapted_plan(model.plan, model.knowledge, seen)
    before, after = page_counts(model.plan), page_counts(plan)
    assert all(after[level] <= before[level] for level in before)
    assert plan.stored_bytes() <= model.plan.stored_bytes()
    assert plan.apart == model.plan.apart and not (plan.widths == model.plan.widths).all()
    use = expected(model.knowledge, seen).use
    assert plan.bytes_per_token(use, 1) <= model.plan.bytes_per_token(use, 1) * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["quantized", "apart"])
@pytest.mark.parametrize(("batch", "reads"), [(1, 1.0), (1, 1.3), (4, 1.0), (64, 1.15)])
def test_a_step_of_the_batch_reads_no_more_than_it_may_and_slots_are_not_passed(request, kind, batch, reads, novel):
    model = request.getfixturevalue(kind)
    seen, spare = observe_windows(model, novel.first), spare_slots(model.plan, 0.2)
    plan = adapted_plan(model.plan, model.knowledge, seen, spare, batch, reads)
    use = expected(model.knowledge, seen).use
    assert plan.bytes_per_step(use, batch) <= reads * model.plan.bytes_per_step(use, batch) * (1 + 1e-6)
    before, after = pages_of(model.plan), pages_of(plan)
    for level, count in spare.items():
        assert (after[level] & ~before[level]).sum() <= count


def test_more_may_be_read_and_less_is_lost(apart, novel):
    """By what the plan expects: with more reads, and with a larger batch, whose step reads idle experts less often."""
    seen, known = observe_windows(apart, novel.first), apart.knowledge
    spare, errors = spare_slots(apart.plan, 0.5), expected(known, seen).errors

    def lost(**limit):
        return adapted_plan(apart.plan, known, seen, spare, **limit).chosen(errors).sum()

    by_reads = [lost(reads=reads) for reads in (1.0, 1.1, 1.3, 10.0)]
    assert by_reads[0] > by_reads[1] > by_reads[2] >= by_reads[3]
    by_batch = [lost(batch=batch) for batch in (1, 4, 1000)]
    assert by_batch[0] > by_batch[1] > by_batch[2]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"batch": 0}, "batch 0: expected 1 or more"),
        ({"reads": 0.0}, "reads 0.0: expected a number above 0"),
        ({"reads": np.nan}, "reads nan"),
        ({"reads": 0.01}, "no plan fits the pages and the read budget"),
    ],
)
def test_a_limit_that_cannot_be_is_named(quantized, novel, limit, message):
    with pytest.raises(ValueError, match=message):
        adapted_plan(quantized.plan, quantized.knowledge, observe_windows(quantized, novel.first), **limit)


def test_experts_measured_in_parts_are_measured_as_all_at_once(apart, novel, monkeypatch):
    whole = observe_windows(apart, novel.first)
    jax.clear_caches()
    layer = sum(a.nbytes for a in jax.tree.leaves(apart.store)) // 2
    whole_bytes = measuring_bytes(apart.config, layer, 4)
    monkeypatch.setattr(memory, "UNPACKED_WEIGHTS", 8 * 3 * 64 * 256)
    parts = observe_windows(apart, novel.first)
    assert measuring_bytes(apart.config, layer, 4) < whole_bytes / 3
    jax.clear_caches()
    np.testing.assert_array_equal(parts.counts, whole.counts)
    np.testing.assert_allclose(parts.errors, whole.errors, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(parts.exact, whole.exact, rtol=1e-4, atol=1e-4)


def known_of(counts, tokens, block_errors, correction, loss_per_error):
    """One known dataset, with a monitor that knows nothing."""
    return Knowledge(
        names=("a",),
        counts=counts[None],
        unseen=np.zeros_like(counts),
        signatures=learn([counts[None] + 1.0])[0],
        odd={},
        loss_per_error=np.array(loss_per_error),
        block_errors=block_errors,
        correction=correction,
        calibrated={},
        tokens=tokens,
    )


def test_what_is_expected_by_hand():
    """Two experts, 64 tokens known and 128 seen. The first had 128 known rows and 256 new ones that cost three times as
    much; the second none, so that a row costs what the layer's do, and its share is what is left."""
    block_errors = np.array([[[[4.0, 2.0, 1.0, 0.0]], [[0.0] * 4]]])
    known = known_of(np.array([[128.0, 0.0]]), 64, block_errors, np.full((1, 2, 4), 2.0), [0.5])
    # 4 nats a token on 64 tokens are 2 nats a row of 128; seen: 256 rows of 6
    errors = np.array([[[[1536.0, 768.0, 384.0, 0.0]], [[0.0] * 4]]])
    seen = Observation(errors, np.array([[[256.0, 0.0]]]), np.array([128.0]), np.zeros((1, 128, 1)))
    found = expected(known, seen)
    assert (PRIOR_TOKENS, PRIOR_COST_ROWS, LAYER_COST_ROWS) == (128, 32, 1024)
    cost = (1536 + 32 * 2) / (256 + 32)  # the layer's rows are the first expert's
    np.testing.assert_allclose(found.use, [[2.0, 0.0]])
    np.testing.assert_allclose(found.errors[0, 0, 0], [2 * cost, cost, cost / 2, 0])
    new = seen._replace(counts=np.array([[[192.0, 64.0]]]))
    found = expected(known, new)
    np.testing.assert_allclose(found.use, [[(192 + 256) / 256, 64 / 256]])
    np.testing.assert_allclose(found.errors[0, 0, 0, 0], (192 + 256) / 256 * (1536 + 32 * 2) / (192 + 32))
    np.testing.assert_allclose(found.errors[0, 1, 0, 0], 64 / 256 * 32 * 2 / (64 + 32))


def test_what_a_plan_saves_follows_the_router(quantized, novel):
    """On rows as the plan was expected to have them, it saves what it was expected to; the baseline saves nothing."""
    model, known = quantized, quantized.knowledge
    seen = observe_windows(model, novel.first)
    plan, found = adapted_plan(model.plan, known, seen), expected(known, seen)
    saves = saved_by(plan, model.plan, known, seen)
    assert saves.shape == seen.counts.shape[1:] and (saved_by(model.plan, model.plan, known, seen) == 0).all()
    before, after = (p.chosen(found.errors).sum() for p in (model.plan, plan))
    assert (found.use * saves).sum() == pytest.approx(before - after, rel=1e-9) and before > after


@pytest.mark.parametrize(("tokens", "most"), [(2048, 0.01), (512, 0.02)])
def test_later_text_reads_no_more_bytes_though_the_plan_follows_the_text_it_saw(tokens, most):
    """Where a few rows make an expert look busy, pages would go there; over many texts that must not cost bytes."""
    layers, experts, blocks, chosen, ratios = 3, 48, 4, 4, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        share = rng.dirichlet(np.full(experts, 2.0), layers)
        novel = rng.dirichlet(np.full(experts, 2.0), layers) / 2 + share / 2
        cost = rng.lognormal(0, 0.5, (layers, experts, blocks, 1)) * np.array([4.0, 1.0, 0.25, 0.0])
        widths = np.array(rng.choice([2, 2, 3, 4], (layers, experts, 1)).repeat(blocks, 2), np.int8)
        plan = Plan(widths=widths, channel_block=16, group_size=64, hidden_size=64)
        calibrated = 24576
        counts = np.stack([rng.multinomial(calibrated * chosen, p) for p in share]).astype(float)
        errors = counts[:, :, None, None] / calibrated * cost
        known = known_of(counts, calibrated, errors, np.ones((layers, experts, 4)), [1.0] * layers)
        routed = np.stack([rng.multinomial(tokens * chosen, p) for p in novel]).astype(float)
        noise = rng.gamma(np.maximum(routed, 1e-9))[:, :, None, None]
        seen = Observation(noise * cost, routed[None], np.array([float(tokens)]), np.zeros((1, 1, 1)))
        found = adapted_plan(plan, known, seen)
        assert not (found.widths == plan.widths).all()
        ratios.append(found.bytes_per_token(chosen * novel, 1) / plan.bytes_per_token(chosen * novel, 1))
    assert np.mean(ratios) <= 1 + most


@pytest.mark.parametrize(("kind", "window"), [("quantized", [5, 9]), ("apart", [5] * 17)])
def test_one_token_and_one_repeated_token_make_a_plan(request, kind, window):
    model = request.getfixturevalue(kind)
    plan = adapt(model, np.array([window], np.int32))
    before, after = page_counts(model.plan), page_counts(plan)
    assert all(after[level] <= before[level] for level in before)


def times(seen, factor):
    return Observation(seen.errors * factor, seen.counts * factor, seen.tokens * factor, seen.exact)


def test_much_text_is_believed_and_little_text_is_not(quantized, novel):
    """As the same text goes on, what is expected goes from the known datasets' means to its own."""
    known, seen = quantized.knowledge, observe_windows(quantized, novel.first)
    little, much = expected(known, times(seen, 1e-9)), expected(known, times(seen, 1e9))
    rows, tokens = known.counts.sum(axis=0), known.tokens
    np.testing.assert_allclose(little.use, rows / tokens, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(much.use, seen.counts.sum(axis=0) / seen.tokens.sum(), rtol=1e-4, atol=1e-6)
    scale = known.correction[:, :, None, :] * known.loss_per_error[:, None, None, None]
    np.testing.assert_allclose(much.errors, seen.errors / seen.tokens.sum() * scale, rtol=1e-4, atol=1e-12)
    sums = known.block_errors * tokens
    of_layer = sums.sum(axis=1, keepdims=True) / rows.sum(axis=1)[:, None, None, None]
    a_row = (sums + LAYER_COST_ROWS * of_layer) / (rows + LAYER_COST_ROWS)[:, :, None, None]
    np.testing.assert_allclose(little.errors, (rows / tokens)[:, :, None, None] * a_row, rtol=1e-6, atol=1e-12)


def test_an_expert_without_rows_costs_what_the_known_datasets_say_a_row_costs(quantized, novel):
    """At the share of tokens that is left for it; one that they did not reach either, what its layer's experts cost."""
    known, seen = quantized.knowledge, observe_windows(quantized, novel.first)
    errors, counts, known_counts, block_errors = (
        np.array(a) for a in (seen.errors, seen.counts, known.counts, known.block_errors)
    )
    errors[:, 3], counts[:, :, 3] = 0, 0
    block_errors[:, 3], known_counts[:, :, 3] = 0, 0
    unknown = dataclasses.replace(known, counts=known_counts, block_errors=block_errors)
    alone = expected(known, seen._replace(errors=errors, counts=counts))
    share = known.counts.sum(axis=0)[:, 3] / known.tokens
    left = PRIOR_TOKENS / (seen.tokens.sum() + PRIOR_TOKENS)
    np.testing.assert_allclose(alone.use[:, 3], share * left)
    before = expected(known, times(seen, 0.0))
    np.testing.assert_allclose(alone.errors[:, 3], before.errors[:, 3] * left)
    never = expected(unknown, seen._replace(errors=errors, counts=counts))
    assert (never.use[:, 3] == 0).all() and (never.errors[:, 3] == 0).all()
    counts[:, :, 3] = 1
    once = expected(unknown, seen._replace(errors=errors, counts=counts))
    of_layer = (block_errors * known.tokens).sum(axis=1) / known_counts.sum(axis=(0, 2))[:, None, None]
    rows = len(counts)
    a_row = of_layer * PRIOR_COST_ROWS / (rows + PRIOR_COST_ROWS)
    np.testing.assert_allclose(once.errors[:, 3], rows / (seen.tokens.sum() + PRIOR_TOKENS) * a_row)


def test_adaptation_is_a_function_of_the_window(quantized, novel):
    np.testing.assert_array_equal(adapt(quantized, novel.first).widths, adapt(quantized, novel.first).widths)


def test_adaptation_to_no_tokens_is_an_error(quantized, novel):
    with pytest.raises(ValueError, match="no tokens"):
        adapt(quantized, novel.first[:0])


def test_what_is_observed_is_what_the_whole_model_shows(quantized, novel):
    """Layer after layer, window after window, against ``statistics.observe`` of all at once."""
    planes = jax.tree.map(jnp.asarray, quantized.store)

    def at(width):
        weights = dequantize(planes, width).astype(jnp.bfloat16).astype(jnp.float32)
        return [ExpertWeights(*layer.swapaxes(0, 1)) for layer in weights]

    full, *others = (at(width) for width in sorted(WIDTHS, reverse=True))
    model = with_parameters(quantized.config, quantized.device_parameters())
    tokens = jnp.asarray(novel.first[:, :-1])
    candidates = [list(layer) for layer in zip(*others[::-1])]
    observed = jax.jit(observe, static_argnames="channel_block")
    given = (model, tokens, jnp.ones(tokens.shape), full, candidates)
    sums, counts = observed(*given, channel_block=quantized.plan.channel_block)
    seen = observe_windows(quantized, novel.first)
    np.testing.assert_allclose(seen.errors[..., :-1], sums.block_errors, rtol=2e-3, atol=1e-7)
    assert (seen.errors[..., -1] == 0).all() and seen.tokens.tolist() == [64.0] * len(novel.first)
    np.testing.assert_array_equal(seen.counts, counts)
    exact = lambda layer, x, routing, _, form: (expert_outputs(x, routing, full[layer], form), None)  # noqa: E731
    np.testing.assert_allclose(seen.exact, model.hidden_states(tokens, experts=exact)[0], rtol=2e-3, atol=1e-3)
