"""A small quantization: its settings, which several test files and the fixtures of conftest share, and its files."""

from __future__ import annotations

import json

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.storage import results

SETTINGS = QuantizeConfig(
    bits=3.0,
    per_projection=False,
    calibration_windows=4,
    window=64,
    batch_size=4,
    unseen_windows=0,
    quantizer="rtn",
)
FAST = ("--windows", "4", "--window", "64")  # options of commands
GREEDY = ("--max-tokens", "12", "--dtype", "float32")
EVAL = EvalConfig(window=64, batch_size=4, adaptation_windows=4, limit=4)


def signed(folder, *names):
    """Sizes and digests for files that were made anew, so that only what is in them can be wrong."""
    if "dynamo_jax.json" not in names:
        meta = json.loads((folder / "dynamo_jax.json").read_text())
        meta["sizes"] |= {name: (folder / name).stat().st_size for name in names}
        (folder / "dynamo_jax.json").write_text(json.dumps(meta))
        names = (*names, "dynamo_jax.json")
    sums = results.read_sums(folder / "SHA256SUMS") | {name: results.digest_of(folder / name) for name in names}
    (folder / "SHA256SUMS").write_text(results.sums_text(sums))
