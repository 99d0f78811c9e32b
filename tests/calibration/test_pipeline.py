"""From texts to a plan: budgets that are met, objectives, settings that cannot work."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from quantized_runs import SETTINGS

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.calibration.plans import UNSEEN_COST, UNSEEN_PRIOR_ROWS, expecting, plan
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.sources import DecoderSource
from dynamo_jax.precision.allocate import allocate_known
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.memory import device_bits, device_bytes
from dynamo_jax.storage import checkpoint, facts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_baseline_meets_its_budget_and_gives_each_expert_one_width(quantized):
    assert device_bits(quantized.plan) <= SETTINGS.bits
    assert (quantized.plan.widths == quantized.plan.widths[:, :, :1]).all()


def test_a_plan_by_projection_meets_its_budget_and_gives_down_widths_of_its_own(apart):
    widths, blocks = apart.plan.widths, apart.plan.blocks
    assert 0.985 * SETTINGS.bits < device_bits(apart.plan) <= SETTINGS.bits
    assert (widths[:, :, :blocks] == widths[:, :, :1]).all() and (widths[:, :, blocks:] == widths[:, :, -1:]).all()
    assert (widths[:, :, 0] != widths[:, :, -1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1.9}, "too small: the least is 2.125"),
        ({"bits": 2.1}, "too small"),
        ({"bits": None, "budget_bytes": 1000}, "3,760,128 bytes, or"),
        ({"bits": None, "fits_gib": 0.001}, "GiB with the 6,712,320 bytes that are no experts'"),
        ({"spare": -0.1}, "spare -0.1: expected a share"),
        ({"max_width": 5}, "max_width 5: known are 2, 3, 4, 8"),
        ({"reserve_gib": 0.1}, "reserve_gib: it is a part of fits_gib, which is not given"),
        ({"bits": None, "fits_gib": 1.0, "reserve_gib": math.inf}, "reserve_gib inf"),
        ({"bits": None, "fits_gib": 1.0, "reserve_gib": 0.999}, "and a reserve of 0.999 GiB"),
        ({"fits_gib": 1.0}, "bits and fits_gib: a budget is given one way only"),
        ({"bits": math.nan}, "bits nan: expected a positive number"),
        ({"weights": {"prose": 2.0}}, "prose is none of the known datasets, code"),
        ({"weights": {"code": -1.0}}, "code = -1.0"),
        ({"weights": {"code": 0.0}}, "no known dataset counts"),
        ({"objective": "worst", "weights": {"code": 2.0}}, "the objective worst takes none"),
        ({"objective": "best"}, "known are sum, worst"),
        ({"novelty_weight": 1.5}, "novelty_weight 1.5: expected a share of the text to come, 0 to 1"),
        ({"novelty_weight": -0.1}, "novelty_weight -0.1"),
        ({"novelty_weight": math.nan}, "novelty_weight nan"),
        ({"channel_block": 100}, r"channel_block 100 is not in 1\.\.64"),
        ({"group_size": 264}, "group_size 264 is no multiple of 8 up to the hidden size 256"),
        ({"group_size": 100}, "group_size 100"),
        ({"window": 100_000}, "positions"),
    ],
)
def test_settings_that_cannot_work_are_named(bundled, texts, change, message):
    model, tokenizer = bundled
    with pytest.raises(ValueError, match=message):
        settings = QuantizeConfig(**{**SETTINGS.__dict__, **change})
        quantize(model, tokenizer, {"code": texts["code"]}, settings)


def test_a_budget_in_bytes_or_gib_is_met_and_used(shallow, texts):
    model, tokenizer = shallow
    source = DecoderSource(model)
    for given in ({"budget_bytes": 1_700_000}, {"fits_gib": 0.0078}, {"fits_gib": 0.0075, "reserve_gib": 0.0004}):
        settings = dataclasses.replace(SETTINGS, bits=None, quantizer="rtn", **given)
        plan = quantize(model, tokenizer, {"code": texts["code"]}, settings)[0].plan
        gib = given.get("fits_gib", 0)
        left = int((gib - given.get("reserve_gib", 0.1 * gib)) * 2**30) - source.other_bytes()
        budget = given.get("budget_bytes") or left
        assert 0.985 * budget < device_bytes(plan).total <= budget


def test_what_serves_fits_the_device_with_the_reserve_left(shallow, texts):
    """Allocated: the state of two variants and all parameters, as the file has them."""
    model, tokenizer = shallow
    settings = dataclasses.replace(SETTINGS, bits=None, fits_gib=0.0078)
    found = quantize(model, tokenizer, {"code": texts["code"]}, settings)[0]
    _, state = serving.init(found)
    arrays = (state.resident, state.tables, found.device_parameters())
    held = sum(a.nbytes for a in jax.tree.leaves(arrays))
    assert settings.reserve == pytest.approx(0.00078)
    assert 0.98 * (0.0078 - settings.reserve) * 2**30 < held <= (0.0078 - settings.reserve) * 2**30


def test_without_spare_slots_the_plan_gets_what_they_would_take(shallow, texts):
    model, tokenizer = shallow
    settings = dataclasses.replace(SETTINGS, spare=0.0)
    found = quantize(model, tokenizer, {"code": texts["code"]}, settings)[0]
    held = device_bytes(found.plan, found.spare)
    assert held.spare == 0 and held.plan > 0.97 * held.total
    assert 0.985 * SETTINGS.bits < device_bits(found.plan, found.spare) <= SETTINGS.bits


@pytest.mark.parametrize("width", [2, 4])
def test_planes_that_nobody_will_read_are_left_out(shallow, texts, novel, tmp_path, width):
    model, tokenizer = shallow
    settings = dataclasses.replace(SETTINGS, max_width=width)
    found = quantize(model, tokenizer, {"code": texts["code"]}, settings)[0]
    assert found.plan.widths.max() <= width and max(found.store.codes) == width and found.store.ratios is None
    checkpoint.save(tmp_path / "narrow", found)
    loaded = checkpoint.load(tmp_path / "narrow")
    np.testing.assert_array_equal(loaded.store.codes[width], found.store.codes[width])
    assert f"up to {width} bits" in facts.describe(tmp_path / "narrow")["experts in host memory"]
    host, _ = serving.adapt(loaded, *serving.init(loaded), novel.first)
    assert host.plans[1].widths.max() <= width


class Losses(NamedTuple):
    """One dataset's significance, where a plan needs nothing else of an analysis."""

    values: np.ndarray
    counts: np.ndarray

    @property
    def stats(self):
        return SimpleNamespace(counts=self.counts, tokens=np.full(len(self.counts), 1000.0))

    def expert_significance(self):
        return self.values


def test_the_objective_decides_which_datasets_a_plan_serves(bundled):
    """Two datasets that need different experts, one of them with a hundredth of the other's loss."""
    config = bundled[0].config
    rng = np.random.default_rng(0)
    own = rng.lognormal(0, 2, (2, config.num_moe_layers, config.num_experts, 1)) * np.array([1, 0.25, 0.06, 0.0003])
    counts = rng.lognormal(0, 1, (2, config.num_moe_layers, config.num_experts))
    analyses = {"a": Losses(own[0], counts[0]), "b": Losses(own[1] / 100, counts[1])}

    def losses(objective, known, weights=None, share=0.0):
        settings = dataclasses.replace(SETTINGS, objective=objective, weights=weights, novelty_weight=share)
        widths = plan(known, config, settings).widths[:, :, 0]
        chosen = np.searchsorted(WIDTHS, widths)[..., None]
        return np.array([np.take_along_axis(a.values, chosen, axis=-1).sum() for a in analyses.values()])

    alone = np.array([losses("sum", {name: a})[i] for i, (name, a) in enumerate(analyses.items())])
    summed, worst = (losses(objective, analyses) for objective in ("sum", "worst"))
    assert summed.sum() < worst.sum()
    assert (worst / alone).max() < 0.7 * (summed / alone).max()
    weighted = losses("sum", analyses, {"b": 100.0})
    assert weighted[1] < summed[1] and weighted[0] > summed[0]
    for share in (0.0, 0.5):
        without = losses("sum", {"a": analyses["a"]}, share=share)
        assert losses("sum", analyses, {"b": 0.0}, share).tolist() == without.tolist()


@pytest.mark.parametrize("objective", ["sum", pytest.param("worst", marks=pytest.mark.slow)])
def test_the_more_text_is_expected_that_nobody_has_seen_the_less_it_loses(bundled, objective):
    """Two datasets that use few experts each; a row costs what its expert's do, whoever sends it."""
    config = bundled[0].config
    rng = np.random.default_rng(0)
    shape = config.num_moe_layers, config.num_experts
    a_row = rng.lognormal(0, 0.5, (*shape, 1)) * np.array([1, 0.25, 0.06, 0.0003])
    counts = rng.lognormal(3, 2, (2, *shape))
    counts *= 4000 / counts.sum(axis=2, keepdims=True)
    analyses = {name: Losses(own[..., None] / 1000 * a_row, own) for name, own in zip("ab", counts)}

    def lost(share):
        settings = dataclasses.replace(SETTINGS, bits=3.5, objective=objective, novelty_weight=share)
        at = np.searchsorted(WIDTHS, plan(analyses, config, settings).widths[:, :, :1])
        each = 4 / config.num_experts * a_row, *(a.values for a in analyses.values())
        return [float(np.take_along_axis(values, at, axis=-1).sum()) for values in each]

    found = np.array([lost(share) for share in (0.0, 0.1, 0.4, 1.0)])
    unseen, known = found[:, 0], found[:, 1:].sum(axis=1)
    assert (np.diff(unseen) < 0).all() and (np.diff(known) > 0).all()
    assert unseen[-1] < 0.8 * unseen[0]


def test_where_nothing_unseen_is_expected_the_known_datasets_alone_decide(bundled):
    config = bundled[0].config
    rng = np.random.default_rng(1)
    shape = config.num_moe_layers, config.num_experts
    own = rng.lognormal(0, 2, (2, *shape, 1)) * np.array([1, 0.25, 0.06, 0.0003])
    counts = rng.lognormal(0, 2, (2, *shape))
    settings = dataclasses.replace(SETTINGS, novelty_weight=0.0, spare=0.0)
    found = plan({n: Losses(*parts) for n, *parts in zip("ab", own, counts)}, config, settings)
    costs = np.tile(found.costs().sum(axis=0), (own[0, ..., 0].size, 1))
    want = allocate_known(own.reshape(2, -1, len(WIDTHS)), costs, float(found.stored_bytes()))
    np.testing.assert_array_equal(found.widths[:, :, 0].reshape(-1), want)


def test_what_is_expected_of_text_that_nobody_has_seen():
    """One layer of three experts, one of them without a row: by hand."""
    losses = np.array([[[[[0.08]], [[0.0]], [[0.04]]]], [[[[0.02]], [[0.0]], [[0.0]]]]])  # nats a token, one width
    counts = np.array([[[80.0, 0.0, 120.0]], [[40.0, 0.0, 60.0]]])
    tokens = np.array([100.0, 50.0])  # two rows each
    of_layer = (8 + 1 + 4) / 300  # nats a row
    prior = UNSEEN_PRIOR_ROWS
    rows = np.array([(9 + prior * of_layer) / (120 + prior), of_layer, (4 + prior * of_layer) / (180 + prior)])
    for share in (0.0, 0.25, 1.0):
        found = expecting(losses, counts, tokens, np.ones(2), share)[:, 0, :, 0, 0]
        np.testing.assert_allclose(
            found, (1 - share) * losses[:, 0, :, 0, 0] + share * UNSEEN_COST * 2 / 3 * rows, rtol=1e-12
        )
    alone = expecting(losses, counts, tokens, np.array([3.0, 0.0]), 1.0)
    np.testing.assert_allclose(alone[:1], expecting(losses[:1], counts[:1], tokens[:1], np.ones(1), 1.0), rtol=1e-12)


def test_no_known_dataset_is_an_error(bundled):
    with pytest.raises(ValueError, match="no known dataset"):
        quantize(*bundled, {}, SETTINGS)
