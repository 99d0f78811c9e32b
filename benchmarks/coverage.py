"""Which published checkpoints are read, and how exactly: a small random folder of each model type and format goes the
whole way.

    python benchmarks/coverage.py --json coverage.json          # about 15 minutes on two idle cores
    python benchmarks/coverage.py --only qwen3_next --quick     # logits and greedy tokens alone

It needs the test extra (transformers, torch), and a working tree: models are those of the tests.

- ``logit_error``: the largest difference from transformers' logits over the largest logit, in float32, with padding
  before and after. ``greedy_equal``: 16 tokens of three prompts through the cache, one batch here.
- ``format_error``: the same against the model whose weights are the packed ones' values; it should be 0.
- ``whole_error``: quantized at 6 bits and exported by the commands, transformers' logits of the export against ours.

The checkpoints are those of a list of recipes of a large serving project (August 2026), with the format that each is
published in first. Their model types are those of their config.json as far as known; none was downloaded. transformers
has no bailing_moe: tests/ling_oracle.py, which is ours, stands for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "models")]
import conftest  # noqa: E402  (first: it sets how many threads there are)
import stored  # noqa: E402
import test_families  # noqa: E402
import test_stored_models  # noqa: E402
import test_wrappers  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from dynamo_jax.commands.app import app  # noqa: E402
from dynamo_jax.files import write_json  # noqa: E402
from dynamo_jax.models.decoder import parameters  # noqa: E402
from dynamo_jax.models.families.table import config_from, text_part  # noqa: E402
from dynamo_jax.models.huggingface import describe, load_decoder  # noqa: E402
from dynamo_jax.runtime.generate import GenerateConfig, LanguageModel, generate  # noqa: E402

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
PROJECTIONS = r"(self_attn|linear_attn|mlp|block_sparse_moe|feed_forward).*(proj|w[123])\.weight$"
PROJECTIONS += r"|\.attention\.(query_key_value|dense)\.weight$"
ROUTED = r"experts\.\d+\..*(proj|w[123])\.weight$"
FORMATS: dict[str, Any] = {  # as published: how a weight is packed, quantization_config, and which tensors are
    "fp8": (lambda w: stored.fp8(w, (16, 16)), BLOCKS, PROJECTIONS),
    "fp8 a tensor": (*stored.FORMATS["fp8, an inverse scale a tensor"][:2], PROJECTIONS),
    "int4": (*stored.FORMATS["int4 in groups"][:2], ROUTED),
}
# model type, format: the checkpoints
CHECKPOINTS: dict[tuple[str, str], list[str]] = {
    ("qwen3_moe", "bf16"): [
        *("Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-Coder-480B-A35B-Instruct"),
    ],
    ("gpt_oss", "mxfp4"): ["openai/gpt-oss-120b", "openai/gpt-oss-20b"],
    ("deepseek_v3", "fp8"): ["deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3.1"],
    ("kimi_k2", "fp8"): ["moonshotai/Kimi-K2-Instruct"],
    ("kimi_k2", "int4"): ["moonshotai/Kimi-K2-Thinking"],
    ("minimax_m2", "fp8"): [f"MiniMaxAI/MiniMax-M2{v}" for v in ("", ".1", ".5", ".7")],
    ("qwen3_vl_moe", "bf16"): ["Qwen/Qwen3-VL-235B-A22B-Instruct"],
    ("interns1", "bf16"): ["internlm/Intern-S1"],
    ("mistral3", "fp8 a tensor"): ["mistralai/Mistral-Small-4-119B-2603"],
    ("kimi_k25", "int4"): [f"moonshotai/Kimi-K2.{v}" for v in ("5", "6", "7-Code")],
    ("hy_v3", "bf16"): ["tencent/Hy3", "tencent/Hy3-preview"],
    ("glm4_moe", "bf16"): ["zai-org/GLM-4.5", "zai-org/GLM-4.6", "zai-org/GLM-4.7"],
    ("minimax_m3_vl", "bf16"): ["MiniMaxAI/MiniMax-M3"],
    ("deepseek_v32", "fp8"): ["deepseek-ai/DeepSeek-V3.2", "deepseek-ai/DeepSeek-V3.2-Exp"],
    ("glm_moe_dsa", "bf16"): ["mindlab-research/Macaron-V1-Coding-Venti", "zai-org/GLM-5", "zai-org/GLM-5.1"],
    ("glm_moe_dsa", "fp8"): ["zai-org/GLM-5.2"],
    ("qwen3_next", "bf16"): ["Qwen/Qwen3-Next-80B-A3B-Instruct"],
    ("qwen3_5_moe", "bf16"): [
        *(f"Qwen/Qwen3.5-{v}" for v in ("122B-A10B", "35B-A3B", "397B-A17B")),
        *("Qwen/Qwen3.6-35B-A3B", "Qwen/Qwen3.8-2.4T-A95B", "internlm/Intern-S2-Preview"),
    ],
    ("mellum", "bf16"): [f"JetBrains/Mellum2-12B-A2.5B-{v}" for v in ("Instruct", "Thinking")],
    ("lfm2_moe", "bf16"): ["LiquidAI/LFM2.5-8B-A1B"],
    ("mimo_v2_flash", "fp8"): [f"XiaomiMiMo/MiMo-V2{v}" for v in ("-Flash", ".5", ".5-Pro")],
    ("afmoe", "bf16"): ["arcee-ai/Trinity-Large-Thinking"],
    ("ernie4_5_moe", "bf16"): ["baidu/ERNIE-4.5-21B-A3B-PT"],
    ("ernie4_5_vl_moe", "bf16"): ["baidu/ERNIE-4.5-VL-28B-A3B-PT"],
    ("gemma4", "bf16"): ["google/gemma-4-26B-A4B-it"],
    ("bailing_moe", "fp8"): ["inclusionAI/Ring-1T-FP8"],
    ("bailing_hybrid", "bf16"): ["inclusionAI/Ling-3.0-flash"],
    ("kimi_linear", "bf16"): ["moonshotai/Kimi-Linear-48B-A3B-Instruct"],
    ("laguna", "bf16"): [f"poolside/Laguna-{v}" for v in ("M.1", "S-2.1", "XS-2.1", "XS.2")],
    ("step3p7", "bf16"): ["stepfun-ai/Step-3.5-Flash", "stepfun-ai/Step-3.7-Flash"],
    ("hunyuan_v1_moe", "bf16"): ["tencent/Hunyuan-A13B-Instruct"],
    ("glm4v_moe", "bf16"): ["zai-org/GLM-4.5V", "zai-org/GLM-4.6V"],
    ("exaone_moe", "bf16"): [],
}
UNREAD = {  # why
    "deepseek-ai/DeepSeek-V4-Flash": "hyper-connections, compressed attention",
    "deepseek-ai/DeepSeek-V4-Pro": "hyper-connections, compressed attention",
    "dots-studio/dots3-note-prev": "not looked at",
    "inclusionAI/Ling-2.6-1T": "lightning attention in most layers",
    "inclusionAI/Ling-2.6-flash": "lightning attention in most layers",
    "inclusionAI/Ring-2.6-1T": "lightning attention in most layers",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": "a gate multiplies the expert's input",
    "mistralai/Mistral-Large-3-675B-Instruct-2512": "files in Mistral's own layout",
    "moonshotai/Kimi-K3": "gated latent attention, attention residuals",
    **dict.fromkeys(
        (
            *("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"),
            *("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16"),
            "nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16",
        ),
        "experts without a gate, Mamba layers",
    ),
    "thinkingmachines/Inkling-NVFP4": "relative positions by convolution",
    "thinkingmachines/Inkling-Small-NVFP4": "relative positions by convolution",
}


OTHER_NAMES = {  # types that transformers, or our oracle, has under another
    **{"kimi_k2": "deepseek_v3", "interns1": "qwen3_moe", "bailing_moe": "bailing_moe_v2"},
}
PROMPTS = [[5, 9, 33, 7, 50, 12, 8, 3, 21, 44, 17, 29], [40, 6], [11, 12, 13, 14, 15, 16, 17]]


class Found(NamedTuple):
    """Of a model type in a format. exact_to: positions up to which it is exact, 0: as many as it has."""

    logit_error: float
    greedy_equal: bool
    format_error: float | None
    whole_error: float | None
    exact_to: int
    words: str


def relative(got: Any, want: Any) -> float:
    want = np.asarray(want)
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def saved(kind: str, folder: Path) -> Any:
    """A random model of transformers, and its folder written."""
    if kind in test_wrappers.MODELS:
        return test_wrappers.made(kind, folder)
    sizes = {"intermediate_size": 64} if kind == "gpt_oss" else {}  # groups of 32 are whole
    model = conftest.transformers_model(OTHER_NAMES.get(kind, kind), **sizes)
    model.save_pretrained(folder)
    if kind in OTHER_NAMES:
        raw = json.loads((folder / "config.json").read_text())
        raw = {"model_type": kind, "text_config": raw} if kind == "interns1" else raw | {"model_type": kind}
        (folder / "config.json").write_text(json.dumps(raw))
    return model


def logits(folder: Path) -> np.ndarray:
    tokens, mask = jnp.asarray(test_families.TOKENS), jnp.asarray(test_families.MASK)
    return np.asarray(load_decoder(folder)(tokens, mask)[0])[test_families.MASK]


def logits_of(model: Any) -> np.ndarray:
    """Of transformers."""
    mask = torch.tensor(test_families.MASK)
    given = {"input_ids": torch.tensor(test_families.TOKENS), "attention_mask": mask.long()}
    if not hasattr(model.config, "text_config"):  # else it makes positions of its own, of more than text
        given["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**given)
    return out.logits.float().numpy()[test_families.MASK]


def greedy_of(model: Any, new: int) -> list[list[int]]:
    """Of transformers, each prompt alone: in a batch with padding, 5.24's MiniMax-M3 writes something else."""
    rows = []
    for prompt in PROMPTS:
        given = {"attention_mask": torch.ones(1, len(prompt), dtype=torch.long), "pad_token_id": 0, "eos_token_id": 1}
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, **given)
        row = out[0, len(prompt) :].tolist()
        rows.append(row[: row.index(1)] if 1 in row else row)
    return rows


def exact_to(kind: str) -> int:
    """Positions up to which a model of published sizes is exact, by its keys' defaults; 0: all."""
    kind = test_wrappers.MODELS[kind][1] if kind in test_wrappers.MODELS else OTHER_NAMES.get(kind, kind)
    text = transformers.AutoConfig.for_model(kind).to_dict()
    if kind == "minimax_m3_vl_text":  # the published file has an index in its layers
        text["layer_types"] = ["minimax_m3_sparse"] * text["num_hidden_layers"]
    try:
        config = config_from(text | {"num_experts_per_tok": text.get("num_experts_per_tok") or 2})
    except ValueError:  # a size without a default
        return 0
    return config.max_position_embeddings if config.capped else 0


def covered(kind: str, fmt: str, work: Path, whole: bool) -> Found:
    """A model type in a format, all the way."""
    folder = work / "hub"
    model = saved(kind, folder)
    error = relative(logits(folder), logits_of(model))
    decoder = load_decoder(folder)
    ours = LanguageModel(config=decoder.config, parameters=parameters(decoder))
    settings = GenerateConfig(max_tokens=16, stop=(1,))
    greedy = generate(ours, PROMPTS, settings) == greedy_of(model, 16)
    format_error, source = None, folder
    if fmt == "mxfp4":
        source, values = mxfp4_folders(folder, work)
        format_error = relative(logits(source), logits(values))
    elif fmt != "bf16":
        make, config, wanted = FORMATS[fmt]
        source, values = test_stored_models.packed_folders(folder, work, make, config, wanted)
        format_error = relative(logits(source), logits(values))
    words = str(describe(source)["source"])
    whole_error = through(model, source, work) if whole else None
    return Found(error, greedy, format_error, whole_error, exact_to(kind), words)


def mxfp4_folders(folder: Path, work: Path) -> tuple[Path, Path]:
    """gpt-oss' experts packed as published, and the same with the values that they mean."""
    packed, values = (dict(test_stored_models.tensors_of(folder)) for _ in range(2))
    for name in [n for n in packed if n.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, value = test_families.to_mxfp4(np.ascontiguousarray(packed.pop(name).swapaxes(1, 2)))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = np.ascontiguousarray(value.swapaxes(1, 2))
    said = {"quantization_config": {"quant_method": "mxfp4"}}
    one = test_stored_models.rewritten(folder, work / "packed", packed, **said)
    return one, test_stored_models.rewritten(folder, work / "values", values)


def through(model: Any, folder: Path, work: Path) -> float:
    """Quantized and exported by the commands: transformers' logits of the export against ours."""
    words = {f"w{i}": i for i in range(61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = work / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(3, 61, 4000)))
    common = ["--bits", "6", "--windows", "4", "--window", "32", "--channel-block", "8", "--group-size", "8"]
    run(["quantize", "--model", str(folder), "--known", f"a={text}", "--out", str(work / "quantized"), *common])
    run(["export", "--model", str(work / "quantized"), "--out", str(work / "export")])
    ours = logits(work / "export")
    path = work / "export" / "config.json"
    raw = json.loads(path.read_text())
    raw = raw if hasattr(model.config, "text_config") else text_part(raw)
    path.write_text(json.dumps(raw | {"model_type": model.config.model_type}))
    exported = type(model).from_pretrained(work / "export", dtype=torch.float32).eval()
    return relative(ours, logits_of(exported))


def run(arguments: list[str]) -> None:
    app(arguments, standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="a model type; repeatable")
    parser.add_argument("--quick", action="store_true", help="without quantization and export")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for (kind, fmt), names in CHECKPOINTS.items():
        if arguments.only and kind not in arguments.only:
            continue
        begin, found, why = time.perf_counter(), None, ""
        try:
            with tempfile.TemporaryDirectory() as work:
                found = covered(kind, fmt, Path(work), not arguments.quick)
        except Exception as error:  # whatever one model type does, the others are to be covered
            why = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            traceback.print_exc()
        read = found is not None and found.logit_error < 1e-4
        of = found._asdict() if found else {"words": why}
        rows += [{"checkpoint": n, "model_type": kind, "format": fmt, "read": read, **of} for n in names]
        print(f"{kind:20} {fmt:12} {len(names)} {of} {time.perf_counter() - begin:.0f} s", flush=True)
    if not arguments.only:
        rows += [{"checkpoint": n, "read": False, "words": why} for n, why in UNREAD.items()]
    print(table(rows))
    print(f"{sum(row['read'] for row in rows)} of {len(rows)} read")
    if arguments.json:
        write_json(arguments.json, {"results": rows, "jax": jax.__version__})


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/checkpoints.md has them: what is read, and what is not and why."""
    unread = ["| checkpoint | why it is not read |", "| --- | --- |"]
    lines = [
        "| checkpoint | model_type | format | exact to | logits | greedy |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        if "logit_error" in row:
            to = f"{row['exact_to']:,}" if row["exact_to"] else "all"
            own = f"{to} | {row['logit_error']:.0e} | {'equal' if row['greedy_equal'] else 'differ'}"
            lines.append(f"| {row['checkpoint']} | {row['model_type']} | {row['format']} | {own} |")
        else:
            unread.append(f"| {row['checkpoint']} | {row['words']} |")
    return "\n".join([*lines, "", *unread])


if __name__ == "__main__":
    main()
