"""Decoders of a few small layers by the names of their parts' fields: what a test varies in one line."""

from __future__ import annotations

import dataclasses

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.specs import DeltaNet, Dense, Grouped, Latent, LayerSpec, Mixture, Rope, Router

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=5,
    num_experts_per_tok=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)  # of a decoder that compiles in no time


def fields(kind):
    return {f.name for f in dataclasses.fields(kind)}


def decoder_config(*, windows=(), dense_layers=(), delta_layers=(), **given) -> ModelConfig:
    """OLMoE's parts, all layers alike but for ``windows``, and ``dense_layers`` and ``delta_layers``, numbers of layers
    with another part; ``given``: fields of any part."""
    given = {"qk_norm": "vector", "num_hidden_layers": 2} | given

    def of(kind, **own):
        return kind(**own, **{k: given[k] for k in fields(kind) & given.keys() - own.keys()})

    count = given["num_hidden_layers"]
    given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    rope = of(Rope, dim=given.get("qk_rope_head_dim", given["head_dim"]))
    mixers = [of(Latent if "kv_lora_rank" in given else Grouped, rope=rope, window=w) for w in windows or [0] * count]
    mixers = [of(DeltaNet) if i in delta_layers else mixer for i, mixer in enumerate(mixers)]
    experts = of(Mixture, router=of(Router))
    layers = tuple(
        LayerSpec(mixer=mixer, channel=of(Dense) if i in dense_layers else experts) for i, mixer in enumerate(mixers)
    )
    unknown = given.keys() - set.union(
        *map(fields, (ModelConfig, Grouped, Latent, Rope, Router, Mixture, Dense, DeltaNet))
    )
    assert unknown <= {"num_hidden_layers", "qk_rope_head_dim"}, unknown
    return of(ModelConfig, layers=layers)


def with_mixture(config: ModelConfig, **changes) -> ModelConfig:
    """The same with other experts in all layers that have some."""
    layers = [
        dataclasses.replace(layer, channel=dataclasses.replace(layer.channel, **changes))
        if isinstance(layer.channel, Mixture)
        else layer
        for layer in config.layers
    ]
    return dataclasses.replace(config, layers=tuple(layers))
