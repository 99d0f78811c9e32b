"""Which experts a model has: every layer with experts, those of the same sizes together.

A model may have experts of several sizes. Those of one size, with the same activation, are a part: a part has one
array of planes, one plan and one state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx

from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import Activation
from dynamo_jax.transform.experts import Experts


class Layer(NamedTuple):
    """One layer with experts. path: of its module; module: the experts; place: in a module of stacked layers."""

    path: str
    module: Experts
    place: int | None

    @property
    def name(self) -> str:
        return self.path if self.place is None else f"{self.path}, layer {self.place}"


class Part(NamedTuple):
    """Layers whose experts are alike, in the order of their paths; sizes: of all of them."""

    sizes: ExpertSizes
    activation: Activation
    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


def modules_of(model: nnx.Module) -> dict[str, Experts]:
    """All ``Experts`` of a model by path, layer 10 after layer 9. ValueError, which lists the modules that look as if
    they had experts: there are none."""
    found = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Experts)}
    if not found:
        raise ValueError(f"the model has no dynamo_jax.Experts{_lookalikes(model)}")
    ordered = sorted(found.items(), key=lambda item: tuple(map(_order, item[0])))
    return {dotted(path): module for path, module in ordered}


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "the model"


def _order(part: Any) -> tuple[int, int, str]:
    return (0, part, "") if isinstance(part, int) else (1, 0, str(part))


def _lookalikes(model: nnx.Module) -> str:
    """The modules with weights of three axes, and what each lacks, in words."""
    lines = []
    for path, module in nnx.iter_modules(model):
        own = {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}
        wide = [f"{name} {tuple(v.shape)}" for name, v in own.items() if getattr(v, "ndim", 0) >= 3]
        if wide:
            lines.append(
                f"  {dotted(path)} ({type(module).__name__}) has {', '.join(wide)}: call an Experts there, "
                "or name it in an ExpertsRule (dynamo_jax.transform.with_experts)"
            )
    if not lines:
        return ", and no module of it has weights of three axes"
    return "; modules with weights of three axes:\n" + "\n".join(lines)


def layers_of(path: str, module: Experts) -> Iterator[Layer]:
    for place in range(module.layers or 1):
        yield Layer(path, module, None if module.layers is None else place)


def parts_of(model: nnx.Module) -> tuple[Part, ...]:
    """The model's layers with experts. ValueError: it has none."""
    groups: dict[Any, list[Layer]] = {}
    for path, module in modules_of(model).items():
        groups.setdefault((module.sizes, _code(module.activation)), []).extend(layers_of(path, module))
    return tuple(
        Part(layers[0].module.sizes._replace(layers=len(layers)), layers[0].module.activation, tuple(layers))
        for layers in groups.values()
    )


def _code(activation: Activation) -> Any:
    """What tells activations apart: a lambda in the ``__init__`` of a block is the same one in each block."""
    if not hasattr(activation, "__code__"):
        return activation
    held = tuple(cell.cell_contents for cell in activation.__closure__ or ())
    key = (activation.__code__, held, activation.__defaults__, getattr(activation, "__self__", None))
    try:
        hash(key)
    except TypeError:
        return activation
    return key


def float_parts_of(model: nnx.Module) -> tuple[Part, ...]:
    """``parts_of`` a model whose experts are float. ValueError: they are quantized already."""
    parts = parts_of(model)
    for layer in (layer for part in parts for layer in part.layers):
        if layer.module.is_quantized:
            raise ValueError(f"{layer.name}: these experts are quantized already")
    return parts
