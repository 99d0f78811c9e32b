"""A key that a config.json leaves out, or sets to null, means what it means in transformers, family by family."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("ling_oracle")  # it makes bailing_moe_v2 known there

from dynamo_jax.models.families.table import FAMILIES, config_from

transformers = pytest.importorskip("transformers")

# Keys that training, generation or the library's own outputs read, and no forward pass without gradients.
UNREAD = {
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "output_router_logits"),
    *("router_aux_loss_coef", "input_jitter_noise", "pretraining_tp", "num_mtp_layers"),
}
# What the classes leave open, and what makes them read a key that they else do not.
VARIANTS = {
    "deepseek_v2": [{"num_experts_per_tok": 6}],
    "glm4v_moe_text": [{"head_dim": 128}],
    "glm4_moe": [{"head_dim": 128}, {"head_dim": 128, "use_qk_norm": True}],
    "dots1": [{"n_routed_experts": 8, "num_experts_per_tok": 2, "max_window_layers": 5}],
    "gemma4_text": [
        {
            **{"enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_experts": 8, "top_k_experts": 2},
            **{"moe_intermediate_size": 64, "attention_k_eq_v": True},
        }
    ],
    "lfm2_moe": [{"layer_types": ["conv", "full_attention"] * 16}],
    "qwen2_moe": [{}, {"use_sliding_window": True}],
    "qwen3_moe": [{}, {"use_sliding_window": True, "decoder_sparse_step": 2}],
    "mixtral": [{}, {"sliding_window": 7}],
    "olmoe": [{}, {"tie_word_embeddings": True}],
}


def theirs(family, **values):
    """The configuration class's own dictionary, as transformers writes it."""
    return transformers.AutoConfig.for_model(family, **values).to_dict()


def fields_of(family):
    cls = type(transformers.AutoConfig.for_model(family))
    base = {f.name for f in dataclasses.fields(transformers.PreTrainedConfig)}
    return [f for f in dataclasses.fields(cls) if f.name not in base | UNREAD or f.name == "tie_word_embeddings"]


NO_CLASS = {"kimi_k2", "ernie4_5_moe_vl", "bailing_moe"}  # types that transformers has under another name


@pytest.fixture(params=[name for name in FAMILIES if name not in NO_CLASS])
def family(request):
    return request.param


def test_a_missing_key_is_the_classs_default_or_an_error_that_names_it(family):
    checked = 0
    for variant in VARIANTS.get(family, [{}]):
        whole = theirs(family, **variant)
        want = config_from(whole)
        for field in fields_of(family):
            if field.name in variant:
                continue
            raw = {key: value for key, value in whole.items() if key != field.name}
            try:
                assert config_from(raw) == want, field.name
            except ValueError as error:
                assert str(error) == f"missing key {field.name}", field.name
            checked += 1
    assert checked > 15


SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_experts_per_tok", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_k", "moe_topk"),
    "top_k_experts",
    *("enable_moe_block", "hidden_size_per_layer_input"),  # without which Gemma's models have no experts
}


def test_only_sizes_have_no_default(family):
    whole = theirs(family, **VARIANTS.get(family, [{}])[0])
    without = set()
    for field in fields_of(family):
        try:
            config_from({key: value for key, value in whole.items() if key != field.name})
        except ValueError:
            without.add(field.name)
    assert without <= SIZES | ({"layer_types"} if family == "lfm2_moe" else set())  # whose class has no default


def test_null_is_what_the_class_makes_of_none_or_an_error(family):
    for variant in VARIANTS.get(family, [{}]):
        whole = theirs(family, **variant)
        for field in fields_of(family):
            try:
                want = config_from(theirs(family, **(variant | {field.name: None})))
            except Exception:  # None is no value of this key, there or here
                continue
            assert config_from(whole | {field.name: None}) == want, field.name
