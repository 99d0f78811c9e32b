"""From texts to a plan: budgets that are met, objectives, settings that cannot work."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from quantized_runs import SETTINGS

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.calibration.plans import plan
from dynamo_jax.calibration.sources import DecoderSource
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.memory import device_bits, device_bytes
from dynamo_jax.storage import checkpoint

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
        ({"bits": None, "fits_gib": 0.001}, "GiB with the 6,712,320 bytes that are not quantized"),
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
    assert f"up to {width} bits" in checkpoint.describe(tmp_path / "narrow")["experts in host memory"]
    host, _ = serving.adapt(loaded, *serving.init(loaded), novel.first)
    assert host.plans[1].widths.max() <= width


class Losses(NamedTuple):
    """One dataset's significance, where a plan needs nothing else of an analysis."""

    values: np.ndarray

    def expert_significance(self):
        return self.values


def test_the_objective_decides_which_datasets_a_plan_serves(bundled):
    """Two datasets that need different experts, one of them with a hundredth of the other's loss."""
    config = bundled[0].config
    rng = np.random.default_rng(0)
    own = rng.lognormal(0, 2, (2, config.num_moe_layers, config.num_experts, 1)) * np.array([1, 0.25, 0.06, 0.0003])
    analyses = {"a": Losses(own[0]), "b": Losses(own[1] / 100)}

    def losses(objective, known, weights=None):
        settings = dataclasses.replace(SETTINGS, objective=objective, weights=weights)
        widths = plan(known, config, settings).widths[:, :, 0]
        chosen = np.searchsorted(WIDTHS, widths)[..., None]
        return np.array([np.take_along_axis(a.values, chosen, axis=-1).sum() for a in analyses.values()])

    alone = np.array([losses("sum", {name: a})[i] for i, (name, a) in enumerate(analyses.items())])
    summed, worst = (losses(objective, analyses) for objective in ("sum", "worst"))
    assert summed.sum() < worst.sum()
    assert (worst / alone).max() < 0.7 * (summed / alone).max()
    weighted = losses("sum", analyses, {"b": 100.0})
    assert weighted[1] < summed[1] and weighted[0] > summed[0]
    assert losses("sum", analyses, {"b": 0.0}).tolist() == losses("sum", {"a": analyses["a"]}).tolist()


def test_no_known_dataset_is_an_error(bundled):
    with pytest.raises(ValueError, match="no known dataset"):
        quantize(*bundled, {}, SETTINGS)
