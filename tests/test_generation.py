"""Text from prompts: what streams is what is collected, and prompts that no model can take."""

from __future__ import annotations

import pytest

from dynamo_jax.generation import generate, load_text_model, stream, text_model
from dynamo_jax.runtime.generate import GenerateConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHORT = GenerateConfig(max_tokens=4)


def test_a_quantized_model_continues_texts_piece_by_piece(quantized):
    model = text_model(quantized)
    found = generate(model, ["def main(", "King of"], SHORT)
    assert len(found) == 2 and all(found)
    streamed = [*zip(*stream(model, ["def main(", "King of"], SHORT))]
    assert ["".join(pieces) for pieces in streamed] == found


def test_a_model_that_adapts_goes_on_from_call_to_call(quantized):
    model = text_model(quantized, adapt=True)
    seen = []
    for prompt in ("def main(", "King of"):
        generate(model, [prompt], SHORT)
        seen.append(float(model.follower.state.watch.newer_tokens[0]))
    assert 0 < seen[0] < seen[1]


def test_one_text_in_the_place_of_a_list_is_an_error(quantized):
    with pytest.raises(ValueError, match="a list of texts"):
        generate(text_model(quantized), "def main(", SHORT)


def test_only_a_quantized_model_adapts(shallow_folder):
    with pytest.raises(ValueError, match="is not quantized"):
        load_text_model(shallow_folder, adapt=True)
