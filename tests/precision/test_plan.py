"""Plans and their bytes, by hand and against the stored arrays."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.precision.plan import Plan, block_costs, expert_plan, num_weights
from dynamo_jax.quant.planes import quantize
from dynamo_jax.runtime.residency import residency
from dynamo_jax.runtime.store import host_pages

# A block of 4 channels of 64, groups of 32: 3 * 4 * 64 = 768 weights in 24 groups.
#   2 bits: 768 * 2 / 8 = 192 bytes of codes and 24 * 2 of bfloat16 scales: 240
#   3 bits: 768 / 8 = 96 more of codes: 336; 4 bits: the same again: 432
#   8 bits: 768 * 4 / 8 = 384 more of codes and 24 of ratios: 840
BY_HAND = {2: 240, 3: 336, 4: 432, 8: 840}


def plan(widths):
    return Plan(widths=np.asarray(widths, np.int8), channel_block=4, group_size=32, hidden_size=64)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_block_costs_what_the_hand_says(width):
    assert plan([[[width]]]).stored_bytes() == BY_HAND[width]
    assert plan([[[width]]]).bits_per_weight() == pytest.approx(BY_HAND[width] * 8 / 768)


def test_block_costs_are_in_the_order_of_the_widths():
    np.testing.assert_array_equal(block_costs(4, 64, 32), list(BY_HAND.values()))


def test_a_group_of_64_stores_the_bits_that_the_documentation_names():
    costs = 8 * block_costs(16, 128, 64) / (3 * 16 * 128)
    np.testing.assert_array_equal(costs, [2.25, 3.25, 4.25, 8.375])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))
def test_a_plans_bytes_are_the_sum_of_its_blocks(layers, experts, blocks, seed):
    widths = np.random.default_rng(seed).choice(WIDTHS, (layers, experts, blocks))
    mixed = plan(widths)
    want = [[sum(BY_HAND[int(w)] for w in expert) for expert in layer] for layer in widths]
    np.testing.assert_array_equal(mixed.expert_bytes(), want)
    assert mixed.stored_bytes() == np.sum(want)
    assert num_weights(mixed) == 768 * widths.size
    assert mixed.bits_per_weight() == pytest.approx(8 * np.sum(want) / (768 * widths.size))


@pytest.mark.parametrize("apart", [False, True])
def test_a_plans_bytes_are_those_of_the_arrays_that_a_variant_holds(apart):
    widths = np.random.default_rng(0).choice(WIDTHS, (2, 3, 4 if apart else 2))
    mixed = dataclasses.replace(plan([[[2, 2]]]), widths=widths, apart=apart)
    store = quantize(jax.random.normal(jax.random.key(0), (2, 3, 3, 8, 64)), 32)
    arrays = jax.tree.leaves(residency(host_pages(store, mixed), [mixed]).resident)
    assert mixed.stored_bytes() == sum(a.nbytes for a in arrays)


def test_gate_and_up_cost_two_thirds_of_a_block_and_down_a_third():
    two = Plan(widths=np.array([[[2, 4, 8, 3]]], np.int8), channel_block=4, group_size=32, hidden_size=64, apart=True)
    want = (BY_HAND[2] + BY_HAND[4]) * 2 / 3 + (BY_HAND[8] + BY_HAND[3]) / 3
    assert two.stored_bytes() == want and two.blocks == 2 and num_weights(two) == 2 * 768
    assert two.page_widths().tolist() == [[[2, 4, 2, 4, 8, 3]]]
    gate_up, down = [2] * 4 + [4] * 4, [8] * 4 + [3] * 4
    assert two.channel_widths().tolist() == [[[gate_up, gate_up, down]]]
    assert plan([[[2, 3]]]).channel_widths().tolist() == [[[[2] * 4 + [3] * 4] * 3]]
    same = expert_plan(np.array([[[3, 3]]]), 8, 4, 32, 64)
    assert same.apart and same.stored_bytes() == plan([[[3, 3]]]).stored_bytes()
    with pytest.raises(ValueError, match="3 widths an expert, expected two for each block"):
        Plan(widths=np.full((1, 1, 3), 2, np.int8), channel_block=4, group_size=32, hidden_size=64, apart=True)


def test_the_bytes_that_a_token_reads_follow_the_routing():
    two = plan([[[2, 3], [8, 8]], [[4, 4], [2, 2]]])  # experts of 576 and 1680, 864 and 480 bytes
    # ten tokens, two experts each in layer 0, one each in layer 1
    counts = np.array([[10.0, 10.0], [7.0, 3.0]])
    assert two.bytes_per_token(counts, 10) == pytest.approx((10 * 576 + 10 * 1680 + 7 * 864 + 3 * 480) / 10)
    assert two.bytes_per_token(np.zeros((2, 2)), 10) == 0


def test_a_uniform_plan_reads_the_same_wherever_tokens_go():
    uniform = plan(np.full((2, 3, 2), 4))
    routings = np.random.default_rng(1).dirichlet(np.ones(3), (5, 2)) * 20  # 20 assignments a layer of 10 tokens
    for counts in routings:
        assert uniform.bytes_per_token(counts, 10) == pytest.approx(2 * 2 * 2 * 432)


def test_an_expert_plan_gives_every_block_the_experts_width():
    full = expert_plan(np.array([[2, 4], [8, 3]]), 12, 4, 32, 64)
    assert full.widths.dtype == np.int8
    assert full.widths.tolist() == [[[2, 2, 2], [4, 4, 4]], [[8, 8, 8], [3, 3, 3]]]
    assert full.stored_bytes() == 3 * (240 + 432 + 840 + 336)


@pytest.mark.parametrize(("widths", "named"), [([2, 5], r"\[5\]"), ([0, 16, 4], r"\[0, 16\]")])
def test_widths_without_planes_are_named(widths, named):
    with pytest.raises(ValueError, match=rf"plan holds widths {named}; known are \(2, 3, 4, 8\)"):
        plan([[widths]])
