"""dynamo_jax in a process of its own: what peers_torch.py compares with the other projects' packages.

    python benchmarks/peers_own.py --model FOLDER --windows FILE.npz --bits 3.0 --out FOLDER

FILE.npz: windows of token ids (S, T1), `known/NAME` to calibrate on and `first/NAME` to adapt to. The model is
quantized at the defaults of `dynamo-jax quantize`. Then each text of `first` is met as `dynamo-jax eval --variant
auto` meets it: the run time adapts where it does so there, else it keeps the baseline.

OUT gets model.safetensors, the experts' dequantized weights at the baseline's plan by their names in the checkpoint,
bfloat16; NAME/model.safetensors for each text that was adapted to; and found.json: bits a weight that the device holds,
those of the plan, processor seconds and wall seconds of the quantization alone, without imports and loading, peak
memory of the process until then in bytes, whether there were compiled programs at the start, and what was said of each
text: whether it was called novel, whether a plan for it was taken, and its gain on the windows seen, nats a token.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from deployments import at_widths, quantized_model, weights_of

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.evaluation.switched import Device, choose_plan
from dynamo_jax.files import write_json
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families.names import expert_names
from dynamo_jax.models.formats.expert_files import expert_tensors
from dynamo_jax.models.formats.tensor_files import SINGLE, write_tensors
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.runtime.memory import device_bits
from dynamo_jax.storage.work import MemoryWork

FOUND = "found.json"


def digest_of(windows: np.ndarray) -> str:
    """Of input ids (S, T), which both halves compute alike."""
    return hashlib.sha256(np.ascontiguousarray(windows, np.int32).tobytes()).hexdigest()


def write_experts(folder: Path, config: ModelConfig, weights: np.ndarray) -> None:
    """weights: (L, E, P, F, D)."""
    tensors = {}
    for layer, experts in zip(config.moe_layers, weights):
        triples = [tuple(np.asarray(jnp.asarray(part).astype(jnp.bfloat16)) for part in expert) for expert in experts]
        tensors |= expert_tensors(expert_names(config, layer), triples, {})
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SINGLE, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    texts = dict(np.load(a.windows))
    known, first = (
        {n.removeprefix(kind): w for n, w in texts.items() if n.startswith(kind)} for kind in ("known/", "first/")
    )
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    compiled = bool(cache) and any(Path(cache).glob("*"))
    decoder, tokenizer = load_decoder(a.model), load_tokenizer(a.model)
    count, length = next(iter(known.values())).shape
    settings = QuantizeConfig(bits=a.bits, window=length - 1, calibration_windows=count)
    cpu, wall = time.process_time(), time.perf_counter()
    model, _ = quantized_model(decoder, tokenizer, known, settings, MemoryWork())
    found: dict[str, Any] = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found |= {"method": "dynamo", "budget": a.bits, "bits": device_bits(model.plan, model.spare)}
    found |= {"plan_bits": model.plan.bits_per_weight(), "compiled": compiled, "jax": jax.__version__}
    found |= {"windows": digest_of(np.concatenate(list(known.values()))[:, :-1]), "texts": {}}
    options = at_widths(model.config, model.store)
    write_experts(a.out, model.config, weights_of(options, model.plan))
    device = Device(model)
    for name, windows in first.items():
        chosen = choose_plan(device, windows, EvalConfig(window=length - 1, adaptation_windows=len(windows)))
        taken = chosen.plan is not model.plan
        about = {"novel": chosen.verdict.novel, "score": chosen.verdict.score, "taken": taken, "gain": chosen.gain}
        found["texts"][name] = about
        if taken:
            write_experts(a.out / name, model.config, weights_of(options, chosen.plan))
        print(name, found["texts"][name], flush=True)
    write_json(a.out / FOUND, found)


if __name__ == "__main__":
    main()
