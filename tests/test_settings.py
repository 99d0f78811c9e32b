"""Settings in: presets by name or path, and errors that name the key."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import pytest

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.demo import DemoConfig
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.recipes import Recipe
from dynamo_jax.settings import find_preset, load_toml
from dynamo_jax.training import TrainConfig

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quantize]\nbit = 3", r"\[quantize\]: unknown key 'bit', did you mean 'bits'\?"),
        ("[quant]\nbits = 3", "unknown key 'quant', did you mean 'quantize'"),
        ("bits = ", "not a TOML file"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    (tmp_path / "demo.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_toml(DemoConfig, tmp_path / "demo.toml")


def test_missing_settings_are_named(tmp_path):
    (tmp_path / "train.toml").write_text("steps = 1")
    with pytest.raises(ValueError, match="missing key model, corpus"):
        load_toml(TrainConfig, tmp_path / "train.toml")


def test_the_demo_preset_is_the_demos_defaults():
    assert load_toml(DemoConfig, ROOT / "configs/demo.toml") == DemoConfig()


def test_the_training_preset_is_the_bundled_models(bundled):
    assert load_toml(TrainConfig, ROOT / "configs/train/tiny_moe.toml").model.decoder == bundled[0].config


def test_a_preset_is_found_by_its_short_name_and_a_file_by_its_path(tmp_path):
    assert load_toml(DemoConfig, find_preset("demo")) == DemoConfig()
    assert load_toml(TrainConfig, find_preset("tiny_moe", "train")).steps > 0
    (tmp_path / "own.toml").write_text("")
    assert find_preset(str(tmp_path / "own.toml")) == tmp_path / "own.toml"
    with pytest.raises(ValueError, match="dem: no such file, and no preset of that name; presets are demo"):
        find_preset("dem")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.name)
def test_a_presets_header_says_what_it_is_for(path):
    header = path.read_text().split("\n\n")[0]
    assert "# Purpose:" in header and "# Command: dynamo-jax" in header


@pytest.mark.parametrize("config", [TrainConfig, ModelConfig, QuantizeConfig, EvalConfig, DemoConfig, Recipe])
def test_every_setting_is_read_somewhere(config):
    source = "\n".join(p.read_text() for p in (ROOT / "dynamo_jax").rglob("*.py"))
    unread = [f.name for f in dataclasses.fields(config) if not re.search(rf"\.{f.name}\b", source)]
    assert not unread
