"""Random flipped bits anywhere in a quantized folder: each one is refused, and the file is named."""

from __future__ import annotations

import random
import shutil

import pytest

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize_folder
from dynamo_jax.storage import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_an_error(small_folder, words, tmp_path, flips):
    settings = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=32, bits=3.5, quantizer="rtn")
    quantize_folder(small_folder, tmp_path / "whole", {"words": words(0)}, settings)
    folder = tmp_path / "model"
    shutil.copytree(tmp_path / "whole", folder)
    checkpoint.load(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sizes = [p.stat().st_size for p in files]
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    for number in range(flips):
        path = rng.choices(files, sizes if number % 2 else None)[0]  # half of them in small files
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as found:
            checkpoint.load(folder)
        named = folder if path.name == "SHA256SUMS" else path
        assert str(named) in str(found.value), f"seed {seed}, flip {number}: {found.value}"
        path.write_bytes(content)
    checkpoint.load(folder)
