"""Ling 2.0 and Ring-1T in plain PyTorch, for comparison: transformers has no such model, so this oracle is our own.

Written from what the models' own modeling file computes (BailingMoeV2ForCausalLM, github.com/inclusionAI/Ling-V2),
without a cache: each step of ``generate`` is a whole pass. Rotary positions that are stretched are transformers'.
"""

from __future__ import annotations

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@strict
class BailingMoeV2Config(transformers.PreTrainedConfig):
    model_type = "bailing_moe_v2"
    default_theta = 600000.0

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1
    moe_intermediate_size: int = 512
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 1.0
    moe_router_enable_expert_bias: bool = True
    score_function: str = "sigmoid"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def turned(x, angles, factor):
    """x (B, T, H, C), its first numbers turned, halves against each other, by angles (B, T, K)."""
    size = angles.shape[-1]
    cos, sin = factor * angles.cos()[:, :, None], factor * angles.sin()[:, :, None]
    one, other, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.counts = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        self.size = c.head_dim or c.hidden_size // c.num_attention_heads
        self.query_key_value = nn.Linear(c.hidden_size, sum(self.counts) * self.size, bias=c.use_qkv_bias)
        self.dense = nn.Linear(self.counts[0] * self.size, c.hidden_size, bias=c.use_bias)
        if c.use_qk_norm:
            self.query_layernorm, self.key_layernorm = (Norm(self.size, c.rms_norm_eps) for _ in range(2))

    def forward(self, x, seen, angles, factor):
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, self.size)).split(self.counts, dim=2)
        if hasattr(self, "query_layernorm"):
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = turned(q, angles, factor), turned(k, angles, factor)
        k, v = (a.repeat_interleave(self.counts[0] // self.counts[1], dim=2) for a in (k, v))
        scores = torch.einsum("bthc,bshc->bhts", q.float(), k.float()) * self.size**-0.5
        weights = scores.masked_fill(~seen[:, None], -1e30).softmax(dim=-1).to(x.dtype)
        return self.dense(torch.einsum("bhts,bshc->bthc", weights, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, c, size):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class TopkRouter(nn.Linear):
    """Logits, gates and experts of each token."""

    def __init__(self, c):
        super().__init__(c.hidden_size, c.num_experts, bias=False)
        self.c = c
        if c.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(c.num_experts))

    def forward(self, x):
        c = self.c
        logits = x.float() @ self.weight.float().T
        scores = logits.sigmoid()
        choice = scores + self.expert_bias.float() if c.moe_router_enable_expert_bias else scores
        groups = choice.unflatten(1, (c.n_group, -1))
        best = groups.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
        out = best < best.sort(dim=-1, descending=True).values[:, c.topk_group - 1, None]
        experts = groups.masked_fill(out[..., None], -torch.inf).flatten(1).topk(c.num_experts_per_tok).indices
        gates = scores.gather(1, experts)
        if c.num_experts_per_tok > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return logits, gates * c.routed_scaling_factor, experts


class Experts(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = TopkRouter(c)
        self.experts = nn.ModuleList(MLP(c, c.moe_intermediate_size) for _ in range(c.num_experts))
        if c.num_shared_experts:
            self.shared_experts = MLP(c, c.moe_intermediate_size * c.num_shared_experts)

    def forward(self, x):
        flat = x.flatten(0, 1)
        _, gates, chosen = self.gate(flat)
        out = self.shared_experts(flat) if hasattr(self, "shared_experts") else torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            share = (gates * (chosen == e)).sum(dim=-1, keepdim=True)
            out = out + (expert(flat) * share).to(x.dtype)
        return out.unflatten(0, x.shape[:2])


class Layer(nn.Module):
    def __init__(self, c, number):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (Norm(c.hidden_size, c.rms_norm_eps) for _ in range(2))
        self.attention = Attention(c)
        self.mlp = MLP(c, c.intermediate_size) if number < c.first_k_dense_replace else Experts(c)

    def forward(self, x, *places):
        x = x + self.attention(self.input_layernorm(x), *places)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class BailingMoeV2ForCausalLM(transformers.PreTrainedModel):
    config_class = BailingMoeV2Config
    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.word_embeddings

    def frequencies(self):
        """Radians a position of each pair that is turned, and the factor of cosines and sines."""
        c, rope = self.config, self.config.rope_parameters
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](c, "cpu")
        size = int((c.head_dim or c.hidden_size // c.num_attention_heads) * rope.get("partial_rotary_factor", 1.0))
        return rope["rope_theta"] ** (-torch.arange(0, size, 2) / size), 1.0

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        at = (there.cumsum(dim=1) - 1).clamp(min=0) if position_ids is None else position_ids
        seen = there.bool()[:, None, :] & torch.ones(2 * (input_ids.shape[1],), dtype=torch.bool).tril()
        radians, factor = self.frequencies()
        x = self.model.word_embeddings(input_ids)
        for layer in self.model.layers:
            x = layer(x, seen, at[..., None] * radians, factor)
        return CausalLMOutput(logits=self.lm_head(self.model.norm(x)).float())

    @torch.no_grad()
    def generate(self, ids, attention_mask, max_new_tokens, **_):
        """Greedy; what stands behind a stop token counts for nothing."""
        for _ in range(max_new_tokens):
            new = self(ids, attention_mask).logits[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)
        return ids


transformers.AutoConfig.register("bailing_moe_v2", BailingMoeV2Config, exist_ok=True)
