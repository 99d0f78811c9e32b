"""Codes and scales that are trained: what changes, what must not, and what a run does that was killed meanwhile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_runs import SETTINGS

from dynamo_jax.calibration import distil as module
from dynamo_jax.calibration import pipeline
from dynamo_jax.calibration.distil import distil
from dynamo_jax.calibration.pipeline import quantize, quantize_folder
from dynamo_jax.calibration.unseen import DISTILLATION, distil_windows, drawn_windows
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.decoder import expert_parameter_names, parameters
from dynamo_jax.quant.planes import dequantize, narrowed
from dynamo_jax.storage import checkpoint
from dynamo_jax.storage.work import FolderWork
from dynamo_jax.texts.windows import token_windows

pytestmark = pytest.mark.usefixtures("quick_compilation")

DISTIL = dataclasses.replace(SETTINGS, bits=2.6, per_projection=True, distil=2048)


def shallow_known(shallow, texts):
    model, tokenizer = shallow
    return model, {"code": texts["code"], "sums": texts["sums"]}, tokenizer


@pytest.fixture(scope="module")
def before(shallow, texts):
    """Rounded planes, of which some rows are read at each width, and windows of the known texts."""
    _, known, _ = shallow_known(shallow, texts)
    model = quantize(*shallow, known, dataclasses.replace(DISTIL, distil=0))[0]
    widths = model.plan.widths.copy()
    widths[0, :4] = WIDTHS[-1]
    plan = dataclasses.replace(model.plan, widths=widths)
    return model.store, plan, distil_windows(*shallow_known(shallow, texts), DISTIL)


@pytest.fixture(scope="module")
def after(shallow, before):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CODE_RATE", 0.003)  # so that codes change in few steps
        return distil(shallow[0], *before, DISTIL.distil, DISTIL.batch_size)


def places(planes, plan):
    student = module._student(planes, plan)
    return student, np.asarray(module._value(student))


def test_the_model_comes_nearer_to_the_unquantized_one(after):
    assert len(after.divergences) == 1 + module.CHECKS
    assert min(after.divergences) < 0.9 * after.divergences[0]
    assert after.words().startswith("distilled: divergence 0.")


def test_planes_keep_their_form_and_mean_what_was_trained(shallow, before, after):
    """What the planes say is what the last check measured, up to scales that are rounded to bfloat16."""
    planes, plan, windows = before
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after.planes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), planes
    )
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(planes), jax.tree.leaves(after.planes)))
    again = distil(shallow[0], after.planes, plan, windows, DISTIL.distil, DISTIL.batch_size)
    assert again.divergences[0] == pytest.approx(min(after.divergences), rel=0.01)


def test_eight_bits_stay_what_they_were(shallow, before, after):
    """Everywhere as near to the float weights; where the plan reads 8 bits, the very same planes."""
    names, arrays = expert_parameter_names(shallow[0].config), parameters(shallow[0])
    weights = np.stack([np.asarray(arrays[n], np.float32) for n in names])
    weights = weights.reshape(2, 3, *weights.shape[1:]).swapaxes(1, 2)

    def error(planes):
        return float(jnp.square(dequantize(planes, 8) - weights).mean())

    assert error(after.planes) < 1.1 * error(before[0])
    for a, b in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after.planes)):
        np.testing.assert_array_equal(a[0, :4], b[0, :4])


def test_a_code_that_changes_goes_to_a_neighbouring_cell(before, after):
    (student, old), (_, new) = places(before[0], before[1]), places(after.planes, before[1])
    moved = np.abs(new - old) / student.step
    assert 0 < (moved > 0).mean() < 0.1
    assert moved.max() <= 1.0


@pytest.mark.parametrize("most", [2, 3, 4, 8])
def test_weights_begin_in_the_cells_of_their_codes(shallow, before, most):
    """Also where planes were left out."""
    planes, plan, _ = before
    planes, plan = narrowed(planes, most), dataclasses.replace(plan, widths=np.minimum(plan.widths, most))
    student, value = places(planes, plan)
    names, arrays = expert_parameter_names(shallow[0].config), parameters(shallow[0])
    weights = np.stack([np.asarray(arrays[n], np.float32) for n in names])
    weights = weights.reshape(2, 3, *weights.shape[1:]).swapaxes(1, 2)
    rounded = np.asarray(module._rounded(student, module._places(weights, student)))
    trained = np.broadcast_to(student.trained, value.shape)
    np.testing.assert_array_equal(rounded[trained], value[trained])


def test_training_that_does_harm_is_not_kept(shallow, before, monkeypatch):
    monkeypatch.setattr(module, "SCALE_RATE", 3.0)
    monkeypatch.setattr(module, "CODE_RATE", 3.0)
    found = distil(shallow[0], *before, 1024, DISTIL.batch_size)
    assert found.planes is before[0] and "no better" in found.words()


def test_windows_of_a_short_text_are_passed_over_again(shallow, before):
    planes, plan, windows = before
    found = distil(shallow[0], planes, plan, windows[:9], 1024, DISTIL.batch_size)
    assert len(found.divergences) == 1 + module.CHECKS
    with pytest.raises(ValueError, match="7 windows and 1,024 tokens are too few; it takes 8 windows, and 256 tokens"):
        distil(shallow[0], planes, plan, windows[:7], 1024, DISTIL.batch_size)
    with pytest.raises(ValueError, match="100 tokens are too few"):
        distil(shallow[0], planes, plan, windows, 100, DISTIL.batch_size)


def test_half_of_the_windows_lie_behind_those_of_calibration_and_half_are_drawn(shallow, texts):
    model, known, tokenizer = shallow_known(shallow, texts)
    few = dataclasses.replace(DISTIL, distil=1024)
    calibrated = {w[:-1].tobytes() for k in pipeline.known_windows(known, tokenizer, few).values() for w in k}
    every = {w.tobytes() for text in known.values() for w in token_windows(text, tokenizer, 64, "")[:, :-1]}
    mixed = {w.tobytes() for w in distil_windows(model, known, tokenizer, few)}
    assert len(mixed) == 16 and len(mixed & every) == 8 and not calibrated & mixed
    assert mixed - every == {w.tobytes() for w in drawn_windows(model, 8, 64, DISTILLATION)}
    known_alone = distil_windows(model, known, tokenizer, dataclasses.replace(few, novelty_weight=0.0))
    assert len(known_alone) == 16 and {w.tobytes() for w in known_alone} <= every


def test_texts_too_short_to_train_on_are_said_before_any_work(shallow, texts, monkeypatch):
    model, known, tokenizer = shallow_known(shallow, texts)
    monkeypatch.setattr(pipeline, "analyze_layers", None)
    short = {name: text[:600] for name, text in known.items()}
    with pytest.raises(ValueError, match=r"distil 2048: the texts have . windows of 64 tokens, fewer than 8"):
        quantize(model, tokenizer, short, dataclasses.replace(DISTIL, novelty_weight=0.0))
    with pytest.raises(ValueError, match=r"distil 511: expected 512 tokens or more, or 0 for none"):
        dataclasses.replace(DISTIL, distil=511)


def test_a_text_that_is_short_gives_what_it_has(shallow, texts):
    model, known, tokenizer = shallow_known(shallow, texts)
    own = dataclasses.replace(DISTIL, distil=10**6, novelty_weight=0.0)
    count = sum(len(token_windows(text, tokenizer, 64, "")) for text in known.values())
    assert len(distil_windows(model, known, tokenizer, own)) == count


@pytest.mark.slow
def test_a_run_that_is_stopped_while_planes_are_replaced_ends_with_the_same(
    shallow_folder, texts, tmp_path, monkeypatch
):
    """The second layer's are not there yet; nothing is trained again."""
    known, said = {"code": texts["code"], "sums": texts["sums"]}, []
    quantize_folder(shallow_folder, tmp_path / "whole", known, DISTIL, log=said.append)
    assert any("distilled: divergence" in line for line in said)
    put = FolderWork.put

    def stopped(self, name, bundle):
        if name == "layer-001" and self.has("distilled"):
            raise KeyboardInterrupt
        put(self, name, bundle)

    monkeypatch.setattr(FolderWork, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(shallow_folder, tmp_path / "stopped", known, DISTIL)
    monkeypatch.undo()
    monkeypatch.setattr(module, "distil", None)
    quantize_folder(shallow_folder, tmp_path / "stopped", known, DISTIL)
    a, b = (checkpoint.load(tmp_path / name) for name in ("whole", "stopped"))
    for one, other in zip(jax.tree.leaves(a.store), jax.tree.leaves(b.store)):
        np.testing.assert_array_equal(one, other)
