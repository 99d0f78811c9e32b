"""Damaged config.json files: a field at a time, the rotary scaling's fields, and several at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.judge import Case, count, seeded
from fuzz.values import ABSENT, ODD, dumps, near, words

# Keys that a config.json may have beside those that transformers writes.
MORE_KEYS = (
    *("rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "layer_types"),
    *("quantization_config", "num_experts", "num_local_experts", "n_routed_experts", "hidden_act", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "decoder_sparse_step", "mlp_only_layers", "n_shared_experts"),
    *("shared_expert_intermediate_size", "topk_method", "clip_qkv", "qkv_bias", "lm_head_bias", "attention_bias"),
    *("num_nextn_predict_layers", "swiglu_limit", "router_jitter_noise", "attention_multiplier", "head_dim"),
)
ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale", "partial_rotary_factor", "full_attention"),
)
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.0},
    "longrope": {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [2.0] * 4, "original_max_position_embeddings": 32,
                 "short_mscale": 1.2, "long_mscale": 1.3},
}  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "config.json").write_text(dumps({key: value for key, value in raw.items() if value is not ABSENT}))


def setting(values: dict[str, Any], inside: str = "") -> Case:
    """Set keys, at the top or in the object ``inside``."""

    def change(folder: Path) -> None:
        raw = read(folder)
        if inside:
            old = raw.get(inside)
            merged = (old if isinstance(old, dict) else {}) | values
            write(folder, raw | {inside: {key: v for key, v in merged.items() if v is not ABSENT}})
        else:
            write(folder, raw | values)

    return Case(f"{inside or 'config'} " + ", ".join(f"{k}={words(v)}" for k, v in values.items()), change)


def rope(kind: str, values: dict[str, Any], older: bool = False) -> Case:
    """A rotary scaling of a kind with some of its values changed; older: under the names of earlier versions."""

    def change(folder: Path) -> None:
        scaling = {"type" if older else "rope_type": kind} | ROPES[kind] | values
        scaling = {key: v for key, v in scaling.items() if v is not ABSENT}
        theta = {} if older else {"rope_theta": 10000.0}
        raw = {key: v for key, v in read(folder).items() if key not in ("rope_parameters", "rope_scaling")}
        write(folder, raw | {"rope_scaling" if older else "rope_parameters": theta | scaling})

    said = ", ".join(f"{k}={words(v)}" for k, v in values.items())
    return Case(f"{'rope_scaling' if older else 'rope_parameters'} {kind} {said}", change)


def config_cases(folder: Path, name: str) -> Iterator[Case]:
    """``folder``: a good one; its keys are changed."""
    raw, chance = read(folder), seeded("config", name)
    keys = sorted({*raw, *MORE_KEYS})
    for _ in range(count(270)):
        key = chance.choice(keys)
        yield setting({key: near(raw[key], chance) if key in raw and chance.random() < 0.3 else chance.choice(ODD)})
    for _ in range(count(30)):
        yield setting({key: chance.choice(ODD) for key in chance.sample(keys, 3)})


def rope_cases(name: str, kinds: tuple[str, ...]) -> Iterator[Case]:
    chance = seeded("rope", name)
    for _ in range(count(110)):
        kind = chance.choice(kinds)
        key = chance.choice(ROPE_KEYS)
        old = ROPES[kind].get(key)
        value = near(old, chance) if old is not None and chance.random() < 0.3 else chance.choice(ODD)
        yield rope(kind, {key: value}, older=chance.random() < 0.4)
