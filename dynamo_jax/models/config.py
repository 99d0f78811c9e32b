"""The decoder's configuration: what all layers share, and each layer's specification.

It is hashable, so that it can be a static argument of ``jax.jit``. ``families/`` makes one from a config.json.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from dynamo_jax.models.specs import Dense, Grouped, Latent, LayerSpec, Mixture, Rope, check_fields


class ExpertSizes(NamedTuple):
    """Of routed experts that are alike, all that plans, budgets and planes need to know of a model."""

    layers: int
    experts: int
    channels: int
    hidden_size: int

    @property
    def weights(self) -> int:
        """Of all experts of all layers: gate, up and down."""
        return self.layers * self.experts * 3 * self.channels * self.hidden_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one decoder. Experts of all layers that have some are of one size."""

    family: str = "olmoe"
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    layer_norm: bool = False  # LayerNorm with bias in place of RMS norm
    zero_centred_norms: bool = False  # norms multiply by 1 + weight
    tie_word_embeddings: bool = False
    head_bias: bool = False
    initializer_range: float = 0.02
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it
    final_logit_softcapping: float = 0.0  # logits stay within it; 0: no such limit
    prefix: str = "model."  # of the tensors in files, but of the head, which has one of its own
    head_prefix: str = ""
    capped: str = ""  # why positions end earlier than config.json says
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.layers:
            raise ValueError("num_hidden_layers=0: expected a positive whole number")
        if not self.moe_layers:
            raise ValueError("every layer is dense: there is no expert to quantize")
        kinds = {_sizes(layer.channel) for layer in set(self.layers) if isinstance(layer.channel, Mixture)}
        if len(kinds) > 1:
            raise ValueError(f"experts of {len(kinds)} sizes in one decoder: {sorted(kinds)}")
        for rope in self.ropes:
            length = rope.scaling.original_max_position_embeddings or self.max_position_embeddings
            if rope.scaling.rope_type == "longrope" and length < 2:
                raise ValueError("original_max_position_embeddings=1: expected 2 or more for longrope")

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # of many layers, and asked for at each call of a jitted function
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def positions(self) -> int | str:
        """How many there are, with the reason where these are fewer than config.json says."""
        return f"{self.max_position_embeddings:,}: {self.capped}" if self.capped else self.max_position_embeddings

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.channel, Mixture))

    @functools.cached_property
    def dense_layers(self) -> tuple[int, ...]:
        """Those of the others."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.channel, Dense))

    @functools.cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each layer the first one that is like it."""
        first: dict[LayerSpec, int] = {}
        return tuple(first.setdefault(layer, i) for i, layer in enumerate(self.layers))

    @functools.cached_property
    def ropes(self) -> tuple[Rope, ...]:
        """The different ones of all layers, in order."""
        found = (layer.mixer.rope for layer in self.layers if isinstance(layer.mixer, Grouped | Latent))
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    @functools.cached_property
    def mixture(self) -> Mixture:
        """Of the first layer that has experts; all have experts of its sizes."""
        return self.mixture_of(self.moe_layers[0])

    def mixture_of(self, layer: int) -> Mixture:
        """Of a layer that has experts."""
        channel = self.layers[layer].channel
        if not isinstance(channel, Mixture):
            raise ValueError(f"layer {layer} has no experts")
        return channel

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_experts(self) -> int:
        return self.mixture.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        return self.mixture.num_experts_per_tok

    @property
    def intermediate_size(self) -> int:
        """Channels of one expert."""
        return self.mixture.intermediate_size

    @property
    def expert_sizes(self) -> ExpertSizes:
        return ExpertSizes(self.num_moe_layers, self.num_experts, self.intermediate_size, self.hidden_size)

    @property
    def num_expert_weights(self) -> int:
        """Weights in all routed experts of all layers: gate, up and down."""
        return self.expert_sizes.weights

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``specs`` has the different layers, and ``layers`` the number of each layer's among them."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "layers"}
        kinds = list(dict.fromkeys(self.layers))
        return own | {"specs": [kind.to_dict() for kind in kinds], "layers": [kinds.index(x) for x in self.layers]}


def _sizes(mixture: Mixture) -> tuple[int, int, int]:
    return mixture.num_experts, mixture.num_experts_per_tok, mixture.intermediate_size
