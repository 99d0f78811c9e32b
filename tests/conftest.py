"""Fixtures that several test files share. JAX runs on the CPU; no test needs a network or a GPU."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import random
import shutil
import tempfile
import traceback
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one run's workers and the commands that they start share programs
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dynamo_jax-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# A worker for each core needs one thread: more wait for each other. The fusion emitters take most of the time in which
# XLA compiles for a CPU; later XLA has no such flag, and stops at one that it does not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
    + (" --xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest


@pytest.fixture(scope="session")
def bundled():
    """The bundled model and its tokenizer."""
    from dynamo_jax.models.bundled import BUNDLED
    from dynamo_jax.models.huggingface import load_decoder
    from dynamo_jax.models.tokenizer import load_tokenizer

    return load_decoder(BUNDLED), load_tokenizer(BUNDLED)


@pytest.fixture(scope="session")
def shallow(bundled):
    """The bundled model's first two layers and its tokenizer: a third of the time to compile and to quantize."""
    from dynamo_jax.models.decoder import parameters, with_parameters

    decoder, tokenizer = bundled
    config = dataclasses.replace(decoder.config, layers=decoder.config.layers[:2])
    kept = {n: a for n, a in parameters(decoder).items() if not n.startswith("layers.") or int(n.split(".")[1]) < 2}
    return with_parameters(config, kept), tokenizer


@pytest.fixture(scope="session")
def shallow_folder(shallow, tmp_path_factory):
    """The shallow model's checkpoint folder, with its tokenizer."""
    from dynamo_jax.models.bundled import BUNDLED
    from dynamo_jax.models.huggingface import save_checkpoint

    folder = tmp_path_factory.mktemp("shallow") / "hub"
    save_checkpoint(folder, shallow[0], BUNDLED / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def narrow_folder(shallow, tmp_path_factory):
    """The shallow model with its first eight experts alone, as a checkpoint folder: each takes long to quantize."""
    from small_decoders import with_mixture

    from dynamo_jax.models.bundled import BUNDLED
    from dynamo_jax.models.decoder import parameters, with_parameters
    from dynamo_jax.models.huggingface import save_checkpoint

    decoder, _ = shallow
    arrays = parameters(decoder)
    for layer in range(decoder.config.num_hidden_layers):
        for part in ("gate", "up", "down"):
            arrays[f"layers.{layer}.{part}"] = arrays[f"layers.{layer}.{part}"][:8]
        arrays[f"layers.{layer}.router"] = arrays[f"layers.{layer}.router"][:, :8]
    folder = tmp_path_factory.mktemp("narrow") / "hub"
    config = with_mixture(decoder.config, num_experts=8)
    save_checkpoint(folder, with_parameters(config, arrays), BUNDLED / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def texts():
    """Three clearly different kinds of text, made here: code, sums and verse."""
    code = "\n\n".join(
        f"def function_{i}(items, limit={i}):\n    total = 0\n    for item in items[:limit]:\n"
        f"        total += item.size * {i % 7}\n    return total if total > {i} else None"
        for i in range(120)
    )
    sums = "\n".join(
        f"Tom has {i} apples and buys {3 * i + 1} more. He has {i} + {3 * i + 1} = {4 * i + 1} apples."
        for i in range(200)
    )
    verse = "\n\n".join(
        f"And in the {i}th year of the king the people went up unto the city, and they said one to another: "
        "Behold, the river is risen, and the fields of our fathers lie under the water."
        for i in range(120)
    )
    return {"code": code, "sums": sums, "verse": verse}


@pytest.fixture(scope="session")
def quantized(shallow, texts):
    """The shallow model at 3 bits, rounded, one width an expert; code and sums are known."""
    from quantized_runs import SETTINGS

    from dynamo_jax.calibration.pipeline import quantize

    return quantize(*shallow, {"code": texts["code"], "sums": texts["sums"]}, SETTINGS)[0]


@pytest.fixture(scope="session")
def novel(quantized, texts):
    """Verse, as ``evaluate`` takes it apart."""
    from quantized_runs import EVAL

    from dynamo_jax.evaluation.perplexity import make_dataset

    return make_dataset("verse", "novel", texts["verse"], quantized.tokenizer, EVAL)


@pytest.fixture(scope="session")
def apart(shallow, texts, tmp_path_factory):
    """The same with two widths an expert, written and read back."""
    from quantized_runs import SETTINGS

    from dynamo_jax.calibration.pipeline import quantize
    from dynamo_jax.storage import checkpoint, facts

    settings = dataclasses.replace(SETTINGS, per_projection=True)
    here = quantize(*shallow, {"code": texts["code"], "sums": texts["sums"]}, settings)[0]
    folder = tmp_path_factory.mktemp("apart") / "model"
    checkpoint.save(folder, here)
    assert "down blocks by width" in facts.describe(folder)
    loaded = checkpoint.load(folder)
    assert (loaded.plan.widths == here.plan.widths).all()
    return loaded


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A process may hold some ten thousand programs, each in a few pieces of memory, before the kernel refuses more."""
    yield
    jax.clear_caches()


def _quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of tiny models, which mostly compile: what XLA compiles then takes less time and runs slower."""
    yield from _quick()


@pytest.fixture
def quick_compilation_here():
    """The same, for one test of a file."""
    yield from _quick()


class _Counter(logging.Handler):
    """Counts the compilations that JAX logs, but for those of Pallas' interpreter, which computes with arrays of its
    own while a program runs, in one thread or another, and compiles for each."""

    def __init__(self):
        super().__init__()
        self.compiled = 0

    def emit(self, record):
        if record.getMessage().startswith("Compiling "):
            callers = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            self.compiled += not any("/pallas/mosaic/interpret/" in name for name in callers)


@pytest.fixture
def compilations():
    """``with compilations() as count``: count.compiled is the number of programs that XLA compiled inside."""

    @contextlib.contextmanager
    def counting():
        handler = _Counter()
        logger = logging.getLogger("jax")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            with jax.log_compiles():
                yield handler
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    return counting


SMALL = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "n_group": 4, "topk_group": 2,
}  # fmt: skip
CORRECTED = {
    "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
INDEXED = LATENT | {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 8, "routed_scaling_factor": 2.5}
LOCAL = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
SIX = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
SOME_SLIDE = ["sliding_attention", "full_attention", "sliding_attention"]
DELTA = {
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2,
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
}  # fmt: skip
# family -> (prefix of its classes in transformers, the smallest configuration that has all its parts)
FAMILY_MODELS = {
    "mixtral": ("Mixtral", LOCAL | {"sliding_window": 7}),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48,
            "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1], "use_sliding_window": True,
            "sliding_window": 7, "max_window_layers": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2,
            "head_dim": 16, "decoder_sparse_step": 2, "norm_topk_prob": True, "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"n_shared_experts": 1, "routed_scaling_factor": 2.5}),
    "gpt_oss": ("GptOss", LOCAL | {"head_dim": 8, "sliding_window": 7}),
    "granitemoe": (
        "GraniteMoe",
        LOCAL
        | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 4.0},
    ),
    "phimoe": ("Phimoe", LOCAL | {"attention_bias": True, "lm_head_bias": True, "sliding_window": 9}),
    "glm4_moe_lite": (
        "Glm4MoeLite", LATENT | {"first_k_dense_replace": None, "n_shared_experts": 2, "routed_scaling_factor": 1.8},
    ),
    "deepseek_v32": ("DeepseekV32", INDEXED),
    "glm_moe_dsa": ("GlmMoeDsa", INDEXED | {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "mistral4": (
        "Mistral4", LATENT | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "rope_interleave": True},
    ),
    "glm4_moe": ("Glm4Moe", CORRECTED | {"attention_bias": True, "use_qk_norm": True, "head_dim": 16}),
    "solar_open": ("SolarOpen", CORRECTED | {"attention_bias": True, "head_dim": 8}),
    "dots1": ("Dots1", CORRECTED | {"attention_bias": True, "sliding_window": 7, "max_window_layers": 2}),
    "hy_v3": (
        "HYV3",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2,
            "num_shared_experts": 1, "head_dim": 16, "attention_bias": True,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        DELTA | {"intermediate_size": 40, "mlp_only_layers": [2]},
    ),
    "qwen3_5_moe_text": ("Qwen3_5Moe", DELTA),
    "minimax_m2": ("MiniMaxM2", LOCAL | {"head_dim": 8, "rotary_dim": 4}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "moe_num_experts": 6, "moe_k": 2,
            "moe_num_shared_experts": 2, "tie_word_embeddings": False,
        },
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", SIX | {"moe_topk": 2, "intermediate_size": 24, "head_dim": 8}),
    "mellum": ("Mellum", SIX | {"head_dim": 16, "sliding_window": 7, "layer_types": SOME_SLIDE}),
    "mimo_v2_flash": (
        "MiMoV2Flash",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 6, "num_experts_per_tok": 2,
            "head_dim": 12, "v_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 1, "n_group": 3,
            "topk_group": 2, "sliding_window": 7, "layer_types": SOME_SLIDE, "attention_bias": True,
        },
    ),
    "laguna": (
        "Laguna",
        SIX
        | {
            "shared_expert_intermediate_size": 20, "head_dim": 8, "sliding_window": 7, "layer_types": SOME_SLIDE,
            "num_attention_heads_per_layer": [4, 2, 6], "moe_routed_scaling_factor": 1.5,
            "moe_router_logit_softcapping": 2.0,
        },
    ),
    "afmoe": (
        "Afmoe",
        SIX
        | {
            "num_shared_experts": 2, "head_dim": 8, "sliding_window": 7, "layer_types": SOME_SLIDE,
            "num_dense_layers": 1, "route_scale": 1.5, "mup_enabled": True,
        },
    ),
    "gemma4_text": (
        "Gemma4",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "top_k_experts": 2,
            "enable_moe_block": True, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
            "attention_k_eq_v": True, "sliding_window": 7, "layer_types": SOME_SLIDE[:2] + SOME_SLIDE[1:2],
            "final_logit_softcapping": 3.0, "hidden_size_per_layer_input": 0, "tie_word_embeddings": False,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        SIX
        | {
            "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "routed_scaling_factor": 1.5,
            "tie_word_embeddings": False,
        },
    ),
    "kimi_linear": (
        "KimiLinear",
        LATENT
        | {
            "n_routed_experts": None, "num_local_experts": 8, "q_lora_rank": None,
            "linear_num_heads": 2, "linear_head_dim": 8, "routed_scaling_factor": 1.5,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "bailing_hybrid": (
        "BailingHybrid",
        LATENT | {
            "n_routed_experts": None, "num_local_experts": 8, "layer_group_size": 2, "head_dim": 8,
            "routed_scaling_factor": 1.5,
        },
    ),
    "bailing_moe_v2": (  # an oracle of our own: transformers has no such model
        "BailingMoeV2",
        SIX
        | {
            "num_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_shared_experts": 1,
            "first_k_dense_replace": 1, "head_dim": 16, "partial_rotary_factor": 0.5, "use_qkv_bias": True,
        },
    ),
    "exaone_moe": (
        "ExaoneMoe",
        SIX
        | {
            "num_shared_experts": 2, "routed_scaling_factor": 1.5, "n_group": 3, "topk_group": 2, "head_dim": 16,
            "sliding_window": 7, "layer_types": SOME_SLIDE,
        },
    ),
}  # fmt: skip


def transformers_model(family, **changes):
    """A random model of the family as transformers makes it, with no parameter left at zero or one."""
    import ling_oracle
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    prefix, values = FAMILY_MODELS[family]
    kind = getattr(ling_oracle if prefix == "BailingMoeV2" else transformers, f"{prefix}ForCausalLM")
    model = kind(kind.config_class(**{**SMALL, **values, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias", "layer_scalar")):
                buffer.add_(torch.rand_like(buffer) * 0.3)
    return model


@pytest.fixture(scope="session")
def family_model():
    """``family_model(family, **changes)`` -> a random transformers model."""
    return transformers_model


@pytest.fixture(scope="session")
def families():
    return tuple(FAMILY_MODELS)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A tokenizer of 61 tokens, w0 to w60: bytes would not fit the small models' vocabulary."""
    import tokenizers

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words = {f"w{i}": i for i in range(61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def small_folder(tokenizer_file, tmp_path_factory):
    """A bfloat16 checkpoint folder with a tokenizer: OLMoE's kind, six layers of eight experts."""
    import torch

    folder = tmp_path_factory.mktemp("small") / "hub"
    changes = {"num_hidden_layers": 6, "num_experts": 8, "intermediate_size": 32}
    transformers_model("olmoe", **changes).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def words():
    """``words(seed)``: 400 words for the small folder's tokenizer."""
    return lambda seed: " ".join(f"w{i}" for i in random.Random(seed).choices(range(3, 61), k=400))
