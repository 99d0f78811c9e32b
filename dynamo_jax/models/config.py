"""The decoder's configuration: the fields of a Hugging Face ``config.json`` that it reads.

Source: the OLMoE paper (arXiv 2409.02060) and the file format that its checkpoints use.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one decoder. Names are those of the checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    norm_topk_prob: bool = False
    tie_word_embeddings: bool = False
    use_qk_norm: bool = True
    clip_qkv: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, part in (
            ("num_attention_heads", self.hidden_size),
            ("num_key_value_heads", self.num_attention_heads),
        ):
            if part % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} does not divide {part}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is not in 1..{self.num_experts}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_expert_weights(self) -> int:
        """Weights in all experts of all layers: gate, up and down."""
        return self.num_hidden_layers * self.num_experts * 3 * self.intermediate_size * self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
