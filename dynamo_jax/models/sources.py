"""Where sweeps over a model get it from, a layer and an expert at a time; a model in memory as such a source."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters, without_experts
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.models.formats.expert_files import Triple
from dynamo_jax.models.rest import FLOAT, quantized, stored_bytes


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

    def other_bytes(self, rest: int = FLOAT) -> int:
        """Of all but the routed experts' weights, where the rest has so many bits (``models.rest``)."""
        own = without_experts(self.config, self._arrays)
        return stored_bytes({n: a.nbytes for n, a in own.items()}, {n: a.shape for n, a in own.items()}, rest)

    def release(self) -> None:
        pass


class QuantizedRest:
    """A source whose parameters have the rest at 8 or 4 bits, so that whatever runs behind it sees what will run:
    ``models.rest.quantized`` of what ``source`` gives. Experts are as they are there."""

    def __init__(self, source: LayerSource, bits: int):
        self.config, self._source, self._bits = source.config, source, bits

    def top(self) -> dict[str, np.ndarray]:
        return quantized(self._source.top(), self._bits)

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        try:
            return quantized(self._source.layer(layer), self._bits)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from None

    def expert(self, layer: int, expert: int) -> Triple:
        return self._source.expert(layer, expert)

    def release(self) -> None:
        self._source.release()


def with_rest(source: LayerSource, bits: int) -> LayerSource:
    """The source with its rest at so many bits; itself for 16. ValueError: other bits than ``rest.REST_BITS``."""
    return source if bits == FLOAT else QuantizedRest(source, bits)


def layer_weights(model: Decoder, layer: int) -> ExpertWeights:
    """Weights of the experts of the ``layer``-th layer that has some."""
    weights = model.moe_layers()[layer].expert_weights()
    assert weights is not None
    return weights
