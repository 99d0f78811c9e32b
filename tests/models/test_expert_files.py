"""Experts written in each way in which families hold them, and read back."""

from __future__ import annotations

import numpy as np
import pytest
from small_decoders import decoder_config

from dynamo_jax.models.formats.declared import declared
from dynamo_jax.models.formats.expert_files import ExpertTensors, expert_shapes, expert_tensors, read_expert
from dynamo_jax.models.formats.stored import StoredTensors
from dynamo_jax.models.formats.tensor_files import SINGLE, write_tensors

CONFIG = decoder_config(
    vocab_size=9, hidden_size=6, num_experts=3, num_experts_per_tok=1, intermediate_size=4, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=8,
)  # fmt: skip
WAYS = [
    ExpertTensors("split", ("e.{e}.gate", "e.{e}.up", "e.{e}.down")),
    ExpertTensors("stacked", ("gate", "up", "down")),
    ExpertTensors("concatenated", ("gate_up", "down")),
    ExpertTensors("concatenated", ("gate_up", "down"), (True, True)),
    ExpertTensors("concatenated", ("gate_up", "down"), (False, True)),
    ExpertTensors("interleaved", ("gate_up", "down")),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.kind}, {way.turned}")
def test_experts_are_read_as_they_were_written(way, tmp_path):
    rng = np.random.default_rng(0)
    experts = [tuple(rng.normal(size=(4, 6)).astype(np.float32) for _ in range(3)) for _ in range(3)]
    biases = {"gate_bias": np.ones((3, 4)), "up_bias": np.ones((3, 4)), "down_bias": np.ones((3, 6))}
    tensors = expert_tensors(way, experts, biases)
    assert {name: a.shape for name, a in tensors.items()} == expert_shapes(CONFIG, way)
    write_tensors(tmp_path / SINGLE, tensors)
    files = StoredTensors(tmp_path, declared({}))
    for expert, triple in enumerate(experts):
        for found, want in zip(read_expert(files, way, expert), triple, strict=True):
            np.testing.assert_array_equal(found, want)
