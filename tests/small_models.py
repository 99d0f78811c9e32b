"""Random models of a few families at mixed widths, and what our own generation gives for them at each variant."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.engines.variants import variants_of
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.families.table import config_from
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.generate import GenerateConfig, LanguageModel, generate
from dynamo_jax.storage import checkpoint

SMALL = {
    "vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "norm_topk_prob": True, "hidden_act": "silu",
    "initializer_range": 0.2, "attention_bias": False, "eos_token_id": 0, "intermediate_size": 32,
}  # fmt: skip
CONFIGS = {
    "olmoe": {"architectures": ["OlmoeForCausalLM"], "tie_word_embeddings": False},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False, "head_dim": 32,
        "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    },
    "gpt_oss": {  # windows and sinks, and heads of 64, for which engines have kernels of their own
        "architectures": ["GptOssForCausalLM"], "tie_word_embeddings": False, "head_dim": 64, "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"], "attention_bias": True, "num_local_experts": 8,
        "swiglu_limit": 7.0, "rope_scaling": None,
    },
}  # fmt: skip
SETTINGS = QuantizeConfig(
    bits=3.5,
    group_size=32,
    channel_block=8,
    window=64,
    calibration_windows=16,
    quantizer="rtn",
    unseen_windows=0,
)
PROMPTS = [np.random.default_rng(n).integers(10, 8000, n).tolist() for n in (5, 40, 17, 100)]


def quantized_folders(family, texts, folder, all_novel=False):
    """A random model at mixed widths, and it with some experts at 8 bits and all others at 2. all_novel: whatever its
    monitor sees is unlike what it knows."""
    raw = {"model_type": family, **SMALL, **CONFIGS[family]}
    if "num_local_experts" in raw:
        del raw["num_experts"], raw["norm_topk_prob"]
    decoder = Decoder(config_from(raw), rngs=nnx.Rngs(0))
    model, _ = quantize(decoder, load_tokenizer(BUNDLED), {n: texts[n] for n in ("code", "sums")}, SETTINGS)
    model = dataclasses.replace(model, files={**model.files, "config.json": json.dumps(raw).encode()})
    if all_novel:
        known = model.knowledge.signatures
        never = known._replace(place=np.full_like(known.place, -50.0), limit=np.ones_like(known.limit))
        model = dataclasses.replace(model, knowledge=dataclasses.replace(model.knowledge, signatures=never))
    widths = np.full_like(model.plan.widths, 2)
    widths[:, :3] = 8
    other = dataclasses.replace(model, plan=dataclasses.replace(model.plan, widths=widths))
    assert len(np.unique(model.plan.widths)) > 1
    for name, one in (("base", model), ("other", other)):
        checkpoint.save(folder / name, one)
    return folder / "base", folder / "other"


def own_texts(base, other, tokens, prompts=PROMPTS):
    """What our own generation gives for each prompt, at each of the variants that a request can name."""
    model, variants = checkpoint.load(base), variants_of(base, [other], adapts=False)
    slots, others = variants.slots(model.plan, model.spare), variants.others
    _, state = serving.init(model, len(prompts), slots=slots, others=others)
    own = LanguageModel(config=model.config, parameters=model.device_parameters(jnp.float32), state=state)
    out = []
    for number in range(2):
        at = dataclasses.replace(own, state=serving.switch(state, number))
        out.append([model.tokenizer.decode(t) for t in generate(at, prompts, GenerateConfig(max_tokens=tokens))])
    return out
