"""Where sweeps over a model get it from, a layer and an expert at a time; a model in memory as such a source."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.models.formats.expert_files import Triple


class LayerSource(Protocol):
    """A model whose layers and experts can be had one by one, as ``models.huggingface.Source`` gives them."""

    config: ModelConfig

    def top(self) -> dict[str, np.ndarray]: ...

    def layer(self, layer: int) -> dict[str, np.ndarray]: ...

    def expert(self, layer: int, expert: int) -> Triple: ...

    def release(self) -> None: ...


class DecoderSource:
    """A decoder in memory, layer by layer: see ``LayerSource``."""

    def __init__(self, model: Decoder):
        self.config = model.config
        self._arrays = {name: np.asarray(a) for name, a in parameters(model).items()}

    def top(self) -> dict[str, np.ndarray]:
        return {name: a for name, a in self._arrays.items() if not name.startswith("layers.")}

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): a for name, a in self._arrays.items() if name.startswith(prefix)}
        return {name: a for name, a in own.items() if name not in ExpertWeights._fields}

    def expert(self, layer: int, expert: int) -> Triple:
        gate, up, down = (self._arrays[f"layers.{layer}.{part}"][expert] for part in ExpertWeights._fields)
        return gate, up, down

    def other_bytes(self) -> int:
        """Of all but the routed experts' weights."""
        return sum(a.nbytes for n, a in self._arrays.items() if n.rpartition(".")[2] not in ExpertWeights._fields)

    def release(self) -> None:
        pass


def layer_weights(model: Decoder, layer: int) -> ExpertWeights:
    """Weights of the experts of the ``layer``-th layer that has some."""
    weights = model.moe_layers()[layer].expert_weights()
    assert weights is not None
    return weights
