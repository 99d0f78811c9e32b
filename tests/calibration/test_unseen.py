"""Text that stands for what nobody has seen: what the model draws, and what calibration and the plan do with it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_runs import SETTINGS

from dynamo_jax.calibration import config as settings_module
from dynamo_jax.calibration import pipeline
from dynamo_jax.calibration.analyses import known_windows
from dynamo_jax.calibration.config import UNSEEN
from dynamo_jax.calibration.estimate import estimate
from dynamo_jax.calibration.knowledge import knowledge_of
from dynamo_jax.calibration.pipeline import analyze, quantize, quantize_folder
from dynamo_jax.calibration.plans import plan
from dynamo_jax.calibration.summary import analyses_json
from dynamo_jax.calibration.unseen import CALIBRATION, DISTILLATION, DRAW, drawn_windows
from dynamo_jax.models.decoder import expert_parameter_names, parameters, with_parameters
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.quant.nested_gptq import PRIOR_ROWS
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.storage import checkpoint, facts

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWING = dataclasses.replace(SETTINGS, unseen_windows=6)


@pytest.fixture(scope="module")
def narrow(narrow_folder):
    """Two layers of eight experts, and their tokenizer."""
    return load_decoder(narrow_folder), load_tokenizer(narrow_folder)


@pytest.fixture(scope="module")
def known(texts):
    return {"code": texts["code"], "sums": texts["sums"]}


@pytest.fixture(scope="module")
def drawn(narrow, known):
    return analyze(*narrow, known, DRAWING)


def surprise_and_entropy(model, windows):
    """Of each token but the first, in nats: of what was drawn, and of what the model expects there."""
    logs = jax.nn.log_softmax(model(jnp.asarray(windows))[0][:, :-1])
    surprise = -jnp.take_along_axis(logs, jnp.asarray(windows)[:, 1:, None], axis=-1)[..., 0]
    return np.asarray(surprise), np.asarray(-(jnp.exp(logs) * logs).sum(axis=-1))


def test_drawn_text_follows_the_model(narrow):
    """Its own text surprises it no more than it expects to be surprised: by the entropy of its predictions."""
    told = []
    windows = drawn_windows(narrow[0], 70, 48, progress=lambda *a: told.append(a))
    assert windows.shape == (70, 48) and told[-1][0] == DRAW and told[-1][1] == told[-1][2] == 2
    surprise, entropy = surprise_and_entropy(narrow[0], windows)
    error = (surprise - entropy).std() / surprise.size**0.5
    assert abs((surprise - entropy).mean()) < 4 * error
    assert len(np.unique(windows[:, 0])) > 50
    assert len({w.tobytes() for w in windows}) == 70


def test_a_window_may_fill_all_positions_and_have_the_token_behind_them(narrow):
    """Calibration compares what the last position predicts with that token."""
    model, _ = narrow
    short = with_parameters(dataclasses.replace(model.config, max_position_embeddings=12), parameters(model))
    surprise, entropy = surprise_and_entropy(model, drawn_windows(short, 128, 13))
    last = surprise[:, -1] - entropy[:, -1]
    assert abs(last.mean()) < 4 * last.std() / len(last) ** 0.5
    np.testing.assert_array_equal(drawn_windows(short, 128, 12), drawn_windows(short, 128, 13)[:, :12])
    with pytest.raises(ValueError, match="windows of 14 tokens: the model, of 12 positions, draws 1 to 13"):
        drawn_windows(short, 2, 14)


def test_no_window_is_drawn_for_two_purposes(narrow):
    one, other = (drawn_windows(narrow[0], 4, 32, purpose) for purpose in (CALIBRATION, DISTILLATION))
    assert not (one[:, None] == other[None]).all(axis=-1).any()


def test_calibration_measures_what_the_model_draws(narrow, known, drawn):
    assert list(drawn) == ["code", "sums", UNSEEN]
    assert drawn[UNSEEN].stats.tokens[0] == 6 * 64 and len(drawn[UNSEEN].windows) == 6
    model, tokenizer = narrow
    words = tokenizer.decode(np.concatenate(drawn_windows(model, 6, 65)).tolist())
    given = known_windows({"code": known["code"], UNSEEN: words * 9}, tokenizer, DRAWING)
    assert len(given[UNSEEN]) == 6 and len(given["code"]) == 4
    by_default = dataclasses.replace(DRAWING, unseen_windows=None)
    assert len(known_windows(known | {UNSEEN: words * 9}, tokenizer, by_default)[UNSEEN]) == 8


def test_the_plan_takes_the_share_from_what_was_measured(narrow, drawn):
    """The plan of share s is that of the known datasets' losses, (1 - s) of each, with s of the unseen one's."""
    known = {name: a for name, a in drawn.items() if name != UNSEEN}
    none, half, all_of_it = (
        plan(drawn, narrow[0], dataclasses.replace(DRAWING, novelty_weight=share, unseen_windows=1)).widths
        for share in (1e-9, 0.5, 1.0)
    )
    alone = plan(known, narrow[0], dataclasses.replace(DRAWING, novelty_weight=0.0)).widths
    np.testing.assert_array_equal(none, alone)
    as_if_known = plan({"x": drawn[UNSEEN]}, narrow[0], dataclasses.replace(DRAWING, novelty_weight=0.0)).widths
    np.testing.assert_array_equal(all_of_it, as_if_known)
    both = {**known, "x": drawn[UNSEEN], "y": drawn[UNSEEN]}
    mixed = plan(both, narrow[0], dataclasses.replace(DRAWING, novelty_weight=0.0)).widths
    np.testing.assert_array_equal(half, mixed)
    assert (half != alone).any() and (half != all_of_it).any()


def test_the_run_time_knows_nothing_of_it(drawn):
    knowledge = knowledge_of(drawn, DRAWING, {name: ("digest", 4) for name in drawn})
    assert knowledge.names == ("code", "sums") and list(knowledge.calibrated) == ["code", "sums"]
    np.testing.assert_array_equal(knowledge.unseen, drawn[UNSEEN].stats.counts)
    assert knowledge.tokens == 2 * 4 * 64 and list(knowledge.odd) == ["code", "sums"]
    told = analyses_json(drawn, DRAWING.window)
    assert told["datasets"][UNSEEN]["odd"] == [] and told["datasets"][UNSEEN]["windows"] == 6


@pytest.mark.slow
def test_planes_are_made_for_it_too(narrow, known):
    """What gptq minimizes on text that no dataset is like falls when the model draws such text."""
    settings = dataclasses.replace(DRAWING, quantizer="gptq", favour=1.0, unseen_windows=12)
    later = {UNSEEN: drawn_windows(narrow[0], 8, 65, DISTILLATION)}
    model = narrow[0]

    def divergence(settings):
        made = quantize(*narrow, known, settings)[0]
        exact = jax.nn.log_softmax(model(later[UNSEEN])[0])
        found = jax.nn.log_softmax(dequantized(made)(later[UNSEEN])[0])
        return float((jnp.exp(exact) * (exact - found)).sum(axis=-1).mean())

    assert divergence(settings) < 0.97 * divergence(dataclasses.replace(settings, unseen_windows=0))


def dequantized(made):
    """The float model of what the planes say at the plan's widths."""
    widths = made.plan.channel_widths()[..., None]
    values = {w: np.asarray(dequantize(made.store, w)) for w in made.store.widths}
    weights = sum(np.where(widths == w, value, 0) for w, value in values.items())
    names = expert_parameter_names(made.config)
    own = {name: jnp.asarray(weights[i // 3, :, i % 3]) for i, name in enumerate(names)}
    return with_parameters(made.config, made.device_parameters() | own)


def test_a_folder_gives_what_the_model_in_memory_gives_and_draws_once(
    narrow, narrow_folder, known, tmp_path, monkeypatch
):
    made = quantize(*narrow, known, DRAWING)[0]
    calls = []

    def killed(*arguments, **named):
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "analyze_layers", killed)
        quantize_folder(narrow_folder, tmp_path / "out", known, DRAWING)
    assert calls
    monkeypatch.setattr(pipeline, "drawn_windows", None)
    quantize_folder(narrow_folder, tmp_path / "out", known, DRAWING)
    loaded = checkpoint.load(tmp_path / "out")
    np.testing.assert_array_equal(loaded.plan.widths, made.plan.widths)
    jax.tree.map(np.testing.assert_array_equal, loaded.store, made.store)
    assert loaded.knowledge.names == ("code", "sums")
    np.testing.assert_array_equal(loaded.knowledge.unseen, made.knowledge.unseen)
    told = facts.describe(tmp_path / "out")
    assert told["known"] == {"code": 4, "sums": 4} and told["unseen"].startswith("384 tokens that stand for")
    reached = (loaded.knowledge.counts.sum(axis=0) + loaded.knowledge.unseen < PRIOR_ROWS).sum()
    assert told["fewer than 256 calibration tokens"].startswith(f"{reached} of 16 experts")
    assert reached < (loaded.knowledge.counts.sum(axis=0) < PRIOR_ROWS).sum()


def test_a_large_model_is_not_loaded_to_draw_unless_asked(narrow_folder, known, tmp_path, monkeypatch):
    monkeypatch.setattr(settings_module, "DRAWING_BYTES", 1000)
    said = []
    monkeypatch.setattr(pipeline, "load_decoder", None)
    by_default = dataclasses.replace(DRAWING, unseen_windows=None)
    quantize_folder(narrow_folder, tmp_path / "out", known, by_default, log=said.append)
    assert any("it draws no text; --unseen-windows makes it" in line for line in said)
    assert estimate(narrow_folder, known, by_default).drawn == 0
    assert estimate(narrow_folder, known, DRAWING).drawn == 6 * 64
    with pytest.raises(TypeError):
        quantize_folder(narrow_folder, tmp_path / "other", known, DRAWING)


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ((UNSEEN,), {}, "no known dataset"),
        (("code", UNSEEN), {"novelty_weight": 0.0}, "unseen: this dataset stands for text to come, of which the sett"),
        (("code", UNSEEN), {"unseen_windows": 0}, "unseen: this dataset stands for text to come"),
        (("code", UNSEEN), {"weights": {UNSEEN: 2.0}}, "weights: unseen counts as novelty_weight says"),
        (("code",), {"weights": {UNSEEN: 2.0}}, "weights: unseen is none of the known datasets, code"),
        (("code",), {"unseen_windows": -1}, "unseen_windows -1: expected 0 or more"),
    ],
)
def test_what_cannot_stand_for_it_is_named(narrow, texts, names, change, message):
    with pytest.raises(ValueError, match=message):
        quantize(*narrow, {name: texts["code"] for name in names}, dataclasses.replace(DRAWING, **change))
