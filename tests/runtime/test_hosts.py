"""What processes tell each other; how several do is tested where they work: ``test_mesh.py``, ``tests/calibration``."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.runtime.hosts import ALONE, Hosts, packed, unpacked


def test_a_message_arrives_as_it_was():
    rng = np.random.default_rng(0)
    message = {
        "none": np.zeros((2, 0, 3), jnp.bfloat16),
        "scales": rng.standard_normal((3, 5)).astype(jnp.bfloat16),
        "number": np.array(3, np.int64),
        "planes/codes2": rng.integers(0, 256, (2, 7), np.uint8),
        "turned": rng.standard_normal((2, 3)).T,
        "signs": np.array([-0.0, np.nan, np.inf], np.float32),
        "flags": np.array([True, False]),
    }
    got = unpacked(packed(message))
    assert list(got) == list(message)
    for name, array in message.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes()
    assert unpacked(packed({})) == {}


def test_pieces_are_the_whole_and_few_lengths():
    data = np.arange(1_000_003).astype(np.uint8)
    hosts = Hosts(2**14, 0)  # so many that each sends little at a time
    whole, lengths = np.empty(len(data), np.uint8), set()
    for start, piece in hosts._pieces(data, len(data)):
        part = piece[: len(data) - start]
        whole[start : start + len(part)] = part
        lengths.add(len(piece))
    np.testing.assert_array_equal(whole, data)
    assert len(lengths) <= 2 and all(length & (length - 1) == 0 for length in lengths)


def test_one_process_does_all_and_its_errors_are_its_own():
    with ALONE.together(), ALONE.together():
        found = list(ALONE.shared(range(3), lambda i: {"i": np.array(i)}))
        assert [(item, int(message["i"])) for item, message in found] == [(0, 0), (1, 1), (2, 2)]
        assert ALONE.of_first(lambda: {"a": np.array(7)})["a"] == 7
        ALONE.check_same({"texts": "some"})
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError
