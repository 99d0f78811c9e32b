"""A dense Llama model out of a GGUF file: float32 arrays, configuration, tokenizer.

Linear weights are (in, out), those of the FFN channel-major, (F, D) for gate, up and down, as in `dynamo_jax.models`.
GGUF stores the query and key rows of Llama models in the order of neighbouring pairs; here they are in halves again,
the order of Hugging Face's files. The tokenizer is rebuilt as byte-level BPE with digits one by one, which is what the
entry "smollm" of `tokenizer.ggml.pre` stands for. Nothing else is read: another architecture or tokenizer is an error.

Axes: V vocabulary, D hidden, F channels of the FFN.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

INSTALL = "pip install gguf"
# ours -> GGUF's, of one layer
LAYER = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "experts_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
TURNED = ("q", "k", "v", "o", "down")  # stored (out, in)


@dataclasses.dataclass
class Dense:
    """embed, head (V, D); norm (D,); layers: dictionaries with the keys of ``LAYER``. head is its own array even where
    the file ties it to embed."""

    embed: np.ndarray
    head: np.ndarray
    norm: np.ndarray
    layers: list[dict[str, np.ndarray]]


def read_gguf(path: Path) -> tuple[Dense, dict[str, Any], tokenizers.Tokenizer]:
    """The model, the keys of its config.json that a Llama model and a mixture share, and its tokenizer."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"the package gguf is missing: {INSTALL}") from error
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    reader = gguf.GGUFReader(path)
    field = {name: f.contents() for name, f in reader.fields.items()}
    kind = (field.get("general.architecture"), field.get("tokenizer.ggml.model"), field.get("tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{path}: architecture and tokenizer {kind}, expected ('llama', 'gpt2', 'smollm')")
    stored = {t.name: t for t in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = stored[f"{name}.weight"]
        return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)

    heads = {"q": field["llama.attention.head_count"], "k": field["llama.attention.head_count_kv"]}
    layers = []
    for index in range(field["llama.block_count"]):
        layer = {ours: read(f"blk.{index}.{theirs}") for ours, theirs in LAYER.items()}
        layer |= {name: in_halves(layer[name], count) for name, count in heads.items()}
        layers.append({name: np.ascontiguousarray(a.T) if name in TURNED else a for name, a in layer.items()})
    embed = read("token_embd")
    head = read("output") if "output.weight" in stored else embed.copy()
    return Dense(embed, head, read("output_norm"), layers), _config(field), _tokenizer(field)


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (out, in) of each head from neighbouring pairs to first halves, then second halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _config(field: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": float(f"{field['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(field["llama.rope.freq_base"]),
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(field: dict[str, Any]) -> tokenizers.Tokenizer:
    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    out = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    pre = tokenizers.pre_tokenizers
    out.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    out.decoder = tokenizers.decoders.ByteLevel()
    out.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])  # 3: a control token
    return out
