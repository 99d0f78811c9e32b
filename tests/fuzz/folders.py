"""Good folders, as small as they can be with all their parts, for cases to damage; made once and then copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from fuzz.configs import ROPES

TYPES, LINEAR = ["sliding_attention", "full_attention"], ["linear_attention", "full_attention"]
# name -> (family, what differs from the smallest model of its family)
GOOD = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "deepseek_v3": ("deepseek_v3", {"n_routed_experts": 4, "n_group": 2, "topk_group": 1}
                    | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **ROPES["yarn"]}}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "mlp_only_layers": [0], "decoder_sparse_step": 1, "head_dim": 8}
                  | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, **ROPES["llama3"]}}),
    "phimoe": ("phimoe", {"num_local_experts": 4}
               | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **ROPES["longrope"]}}),
    "laguna": ("laguna", {"num_attention_heads_per_layer": [4, 2], "layer_types": TYPES, "num_experts": 4}),
    "gemma4_text": ("gemma4_text", {"layer_types": TYPES, "num_experts": 4}),
    "qwen3_next": ("qwen3_next", {"layer_types": LINEAR, "num_experts": 4}),
    "kimi_linear": ("kimi_linear", {"layer_types": LINEAR, "n_group": 2, "topk_group": 1}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_experts": 4}),
}  # fmt: skip
ROPE_KINDS = {
    name: ("longrope",) if name == "phimoe" else tuple(ROPES)
    for name in ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe", "phimoe")
}


def make(family_model, folder: Path, name: str, sharded: bool = False) -> Path:
    """A folder with one weight file, or with two and an index."""
    family, changes = GOOD[name]
    model = family_model(family, num_hidden_layers=2, **changes)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


class Made:
    """Good folders by name, made when they are first asked for."""

    def __init__(self, family_model, folder: Path):
        self.family_model, self.folder = family_model, folder

    def __call__(self, name: str, sharded: bool = False) -> Path:
        path = self.folder / (f"{name}-sharded" if sharded else name)
        if not path.exists():
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(self.family_model, partial, name, sharded).rename(path)
        return path
