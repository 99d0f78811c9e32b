"""Plain GPTQ of all experts, against rounding and against what a grid can hold."""

from __future__ import annotations

import numpy as np
import pytest

from dynamo_jax.calibration.uniform import uniform_bits, uniform_gptq
from dynamo_jax.evaluation.perplexity import Dataset
from dynamo_jax.evaluation.reference import exact_states
from dynamo_jax.evaluation.uniform import evaluate_float, uniform_parameters
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.decoder import expert_parameter_names, parameters
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.sources import DecoderSource
from dynamo_jax.texts.windows import token_windows

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(narrow_folder):
    return load_decoder(narrow_folder)


@pytest.fixture(scope="module")
def windows(shallow, texts):
    return token_windows(texts["code"], shallow[1], 64, "code", 8)


@pytest.fixture(scope="module")
def found(model, windows):
    return uniform_gptq(DecoderSource(model), windows[:6], (2, 8), 64, batch_size=4)


def test_gptq_is_nearer_than_rounding_on_what_it_saw(model, windows, found):
    data = Dataset("code", "known", windows[:1], windows[:6])
    exact = exact_states(DecoderSource(model), data.rest, 3)

    def divergence(params):
        return evaluate_float(model.config, params, data, 3, exact).apart.divergence.mean()

    floats, rounded = uniform_parameters(model, "bf16"), divergence(uniform_parameters(model, "rtn2"))
    at = {bits: divergence(floats | {n: a.astype(np.float32) for n, a in own.items()}) for bits, own in found.items()}
    assert 0 < 20 * at[8] < at[2] < rounded


def test_every_expert_is_on_its_grid(model, found):
    names, exact = expert_parameter_names(model.config), parameters(model)
    assert set(found[2]) == set(found[8]) == set(names)
    for name in names:
        assert found[2][name].shape == exact[name].shape
        lines = found[2][name].swapaxes(1, 2) if name.endswith("down") else found[2][name]
        assert max(len(np.unique(group)) for group in lines[::7].reshape(-1, 64).astype(np.float32)) <= 4


def test_bits_count_scales_and_zero_points_of_groups_that_divide_an_axis():
    assert uniform_bits(3, 256, ExpertSizes(layers=1, experts=2, channels=64, hidden_size=256)) == pytest.approx(
        3 + (2 * 24 / 256 + 24 / 64) / 3
    )
    assert uniform_bits(3, 64, ExpertSizes(layers=1, experts=2, channels=96, hidden_size=576)) == pytest.approx(
        3 + (2 * 24 / 64 + 24 / 32) / 3
    )
