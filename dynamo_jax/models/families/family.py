"""What sets a family of models apart, and words that several families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

Raw = dict[str, Any]  # what a config.json holds
EPS5: Raw = {"rms_norm_eps": 1e-5}
EPS6: Raw = {"rms_norm_eps": 1e-6}
SPARSE = "block_sparse_moe"
W123 = "w1 w3 w2"  # gate, up and down


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart. moe: its name for the mixture module. experts: how expert weights lie in the
    file (``formats/expert_files.py``). fields: what its config.json means beyond the keys that all families share."""

    architecture: str
    fields: Callable[[Raw], Raw]
    moe: str = "mlp"
    router: str = "gate"
    experts: str = "gate_proj up_proj down_proj"
    shared: str = "shared_experts"
    defaults: Raw = dataclasses.field(default_factory=dict)


def biased(raw: Raw) -> Raw:
    """Attention's biases, which one key says for all of its projections."""
    return {"qkv_bias": raw.get("attention_bias", False), "output_bias": raw.get("attention_bias", False)}


def windows_of(raw: Raw, window: int | None, slides: list[bool] | None = None) -> tuple[int, ...]:
    """The window of each layer, 0 where attention sees all; slides: in which layers there is one, all by default."""
    if not window:
        return ()
    slides = slides or [True] * raw.get("num_hidden_layers", 0)
    return tuple(window if s else 0 for s in slides) if any(slides) else ()
