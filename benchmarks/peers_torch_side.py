"""One method of another project, run by that project's own package: the torch half of peers_torch.py.

    PYTHON benchmarks/peers_torch_side.py --model FOLDER --windows FILE.npy --method gptq-4-sym --out FOLDER

PYTHON is that of an environment with torch, which has no dynamo_jax (peers_torch.txt); this file imports nothing of
the project. Methods are NAME-BITS-sym or NAME-BITS-asym. NAME is gptq (llm-compressor's GPTQModifier), rtn (its
QuantizationModifier: rounding to nearest, no data) or autoround (auto-round's AutoRound), at their defaults; AutoRound
with so many ``--iterations``. Groups are of 128 weights where that divides the inputs of a projection, else one group
is all its inputs. The model is loaded in float32, in which GPTQ takes less time and memory on a CPU than in bfloat16;
transformers must give it a Linear module for each projection of an expert, with ``.experts.`` in its name. Only these
are quantized. FILE.npy: token ids (S, T).

OUT gets model.safetensors, the dequantized weights of all experts by their names in the checkpoint, bfloat16, and
found.json: method, bits a weight (codes, a scale of 16 bits and, if asymmetric, a zero point of as many bits as a code
for each group), processor seconds and wall seconds of the quantization alone, without imports and loading, peak memory
of the process in bytes, a digest of the windows, versions, modules, those that changed, those that are all zero, the
most levels of a group. One thread computes, on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

GROUP = 128
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "auto-round")


def expert_modules(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if ".experts." in n and isinstance(m, torch.nn.Linear)}


def group_of(inputs: int) -> int:
    return GROUP if inputs % GROUP == 0 else inputs


def by_group(modules: dict[str, torch.nn.Linear]) -> dict[int, list[str]]:
    """The modules' names by the size of their groups."""
    found: dict[int, list[str]] = {}
    for name, module in modules.items():
        found.setdefault(group_of(module.in_features), []).append(name)
    return found


def bits_of(modules: dict[str, torch.nn.Linear], bits: int, symmetric: bool) -> float:
    """Stored bits a weight."""
    more = 16 if symmetric else 16 + bits
    sizes = np.array([m.weight.numel() for m in modules.values()], float)
    each = np.array([bits + more / group_of(m.in_features) for m in modules.values()])
    return float((sizes * each).sum() / sizes.sum())


def llm_compressor(
    name: str, model: Any, tokenizer: Any, windows: np.ndarray, bits: int, symmetric: bool
) -> torch.nn.Module:
    """GPTQModifier or QuantizationModifier by ``oneshot``."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    def scheme(group: int, names: list[str]) -> QuantizationScheme:
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group)
        return QuantizationScheme(targets=names, weights=args)

    groups = {f"group_{g}": scheme(g, names) for g, names in by_group(expert_modules(model)).items()}
    modifier = (GPTQModifier if name == "gptq" else QuantizationModifier)(config_groups=groups)
    ids = windows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    return oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data if name == "gptq" else None,
        recipe=[modifier],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
    )


def auto_round(
    model: Any, tokenizer: Any, windows: np.ndarray, bits: int, symmetric: bool, iterations: int
) -> torch.nn.Module:
    from auto_round import AutoRound

    wanted = {name: group for group, names in by_group(expert_modules(model)).items() for name in names}
    own = {name: {"bits": bits, "group_size": group, "sym": symmetric} for name, group in wanted.items()}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    own |= {name: {"bits": 16} for name in linear if name not in wanted}
    worker = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=bits,
        group_size=GROUP,
        sym=symmetric,
        layer_config=own,
        dataset=[{"input_ids": torch.as_tensor(w)[None]} for w in windows],
        iters=iterations,
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    return worker.quantize()[0]


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """Dequantized, (outputs, inputs), float32."""
    scheme = getattr(module, "quantization_scheme", None)
    weight = module.weight.detach().float()
    if scheme is None:
        return weight
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    order = getattr(module, "weight_g_idx", None)
    return fake_quantize(weight, module.weight_scale, module.weight_zero_point, scheme.weights, order).detach().float()


def levels_of(weight: torch.Tensor) -> int:
    """The most distinct values of a row's group."""
    group = group_of(weight.shape[1])
    return max(len(torch.unique(g)) for g in weight[:16].reshape(-1, group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder that transformers loads")
    parser.add_argument("--windows", type=Path, required=True, help="token ids (S, T), .npy")
    parser.add_argument("--method", required=True, help="NAME-BITS-sym or NAME-BITS-asym")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    name, bits, kind = a.method.split("-")
    if name not in ("gptq", "rtn", "autoround") or kind not in ("sym", "asym"):
        raise SystemExit(f"error: --method {a.method}: expected gptq, rtn or autoround, bits, and sym or asym")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    windows = np.load(a.windows)
    model = AutoModelForCausalLM.from_pretrained(a.model, torch_dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(a.model / "tokenizer.json"))
    modules = expert_modules(model)
    if not modules:
        raise SystemExit(f"error: {a.model}: no Linear module whose name has .experts.")
    before = {n: m.weight.detach().float().clone() for n, m in modules.items()}
    cpu, wall = time.process_time(), time.perf_counter()
    fixed = model, tokenizer, windows, int(bits), kind == "sym"
    model = auto_round(*fixed, a.iterations) if name == "autoround" else llm_compressor(name, *fixed)
    found: dict[str, Any] = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    after = {n: weight_of(m) for n, m in model.named_modules() if n in before}
    if after.keys() != before.keys():
        raise SystemExit(f"error: {len(before)} projections of experts went in, {len(after)} came out")
    found |= {
        "method": a.method,
        "windows": hashlib.sha256(windows.astype(np.int32).tobytes()).hexdigest(),
        "bits": bits_of(modules, int(bits), kind == "sym"),
        "modules": len(after),
        "changed": sum(not torch.equal(before[n], w) for n, w in after.items()),
        "zero": sum(not w.any() for w in after.values()),
        "levels": max(levels_of(w) for w in after.values()),
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }
    a.out.mkdir(parents=True, exist_ok=True)
    weights = {f"{n}.weight": w.to(torch.bfloat16).contiguous() for n, w in after.items()}
    save_file(weights, a.out / "model.safetensors")
    (a.out / "found.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
