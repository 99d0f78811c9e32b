"""Training: it learns, it resumes exactly, and its losses are what they say."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamo_jax.models.decoder import Routing, parameters
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.training import Sizes, TrainConfig, make_optimizer, router_losses, sample_batch, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = TrainConfig(
    model=Sizes(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    ),
    corpus={"code": 2.0, "sums": 1.0},
    steps=12,
    batch_size=4,
    window=16,
    warmup_steps=2,
    learning_rate=0.02,
    adam_learning_rate=0.01,
    final_learning_rate=0.002,
    weight_decay=0.01,
    balance_loss=0.01,
    z_loss=0.001,
    log_every=1,
    checkpoint_every=4,
)


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for kind in CONFIG.corpus:
        (folder / f"{kind}.train.txt").write_text(texts[kind])
    return folder


class Stop(Exception):
    """Stands for a killed process."""


def test_training_learns_and_a_killed_run_ends_exactly_like_a_whole_one(corpus, tmp_path):
    lines: list[str] = []
    whole = train(CONFIG, corpus, tmp_path / "whole", log=lines.append)
    losses = [json.loads(line)["nll"] for line in lines]
    assert len(losses) == 12 and np.mean(losses[-3:]) < losses[0] - 0.3

    def kill_at_step_6(line: str) -> None:
        if json.loads(line)["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        train(CONFIG, corpus, tmp_path / "killed", log=kill_at_step_6)
    lines.clear()
    resumed = train(CONFIG, corpus, tmp_path / "killed", log=lines.append)
    assert lines[0] == "continuing at step 4"
    a, b = (parameters(load_decoder(folder)) for folder in (whole, resumed))
    assert all((a[name] == b[name]).all() for name in a)


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = [np.arange(500, dtype=np.uint16), np.arange(1000, 1500, dtype=np.uint16)]
    first = sample_batch(CONFIG, tokens, 3)
    assert first.shape == (4, 17) and (np.diff(first, axis=1) == 1).all()
    np.testing.assert_array_equal(first, sample_batch(CONFIG, tokens, 3))
    assert not np.array_equal(first, sample_batch(CONFIG, tokens, 4))
    assert not np.array_equal(first, sample_batch(dataclasses.replace(CONFIG, seed=1), tokens, 3))


def test_balance_is_1_at_uniform_use_and_the_number_of_experts_at_collapse():
    uniform = Routing(jnp.zeros((8, 4)), jnp.arange(8)[:, None] % 4, jnp.ones((8, 1)))
    collapsed = Routing(jnp.zeros((8, 4)).at[:, 1].set(50.0), jnp.ones((8, 1), jnp.int32), jnp.ones((8, 1)))
    assert router_losses(uniform)[0] == pytest.approx(1)
    assert router_losses(collapsed)[0] == pytest.approx(4)
    assert router_losses(uniform)[1] == pytest.approx(np.log(4) ** 2, rel=1e-5)


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*code.train.txt, .*sums.train.txt"):
        train(CONFIG, tmp_path, tmp_path / "run")


def test_a_run_that_starts_at_a_folder_begins_with_its_weights_and_keeps_its_tokenizer(corpus, tmp_path):
    """At a learning rate of 0 a step changes nothing, so the finished model is the one that the run began with."""
    first = train(dataclasses.replace(CONFIG, steps=4), corpus, tmp_path / "first", log=lambda _: None)
    other = dataclasses.replace(
        CONFIG,
        seed=1,
        steps=4,
        warmup_steps=1,
        corpus={"sums": 1.0},
        learning_rate=1e-30,
        adam_learning_rate=1e-30,
        final_learning_rate=1e-30,
    )
    second = train(other, corpus, tmp_path / "second", log=lambda _: None, start=first)
    a, b = (parameters(load_decoder(folder)) for folder in (first, second))
    assert all((a[name] == b[name]).all() for name in a)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert (second / "model.safetensors").stat().st_size == (first / "model.safetensors").stat().st_size


def test_a_start_of_another_size_or_tokenizer_is_named(corpus, tmp_path):
    first = train(dataclasses.replace(CONFIG, steps=4), corpus, tmp_path / "first", log=lambda _: None)
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_experts=8))
    with pytest.raises(ValueError, match=r"differs from the preset's \[model\] in num_experts"):
        train(wide, corpus, tmp_path / "wide", start=first)
    (tmp_path / "second").mkdir()
    (tmp_path / "second/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not the tokenizer of"):
        train(CONFIG, corpus, tmp_path / "second", start=first)


def test_an_older_optax_is_named(monkeypatch):
    monkeypatch.setattr(optax.contrib, "muon", lambda learning_rate: None)
    with pytest.raises(ValueError, match=r"training needs optax 0\.2\.8 or later, found .*: pip install"):
        make_optimizer(CONFIG, {})
