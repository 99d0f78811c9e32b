"""Quantized, switchable experts in a Flax NNX model that is not ours.

A module takes part if it follows this protocol (``ExpertsModule``): Params ``gate`` and ``up`` of shape
(E, D, F) and ``down`` of shape (E, F, D); ``route(router_logits)``, which gives the experts (N, k) and gates
(N, k) of each token; and ``__call__(x, router_logits)``, which maps (N, D) and (N, E) to (N, D). A method
``activation(gate, up)``, elementwise and finite at zeros, is used where there is one, else SiLU(gate) * up. Nothing is
inherited or registered.

Axes: N tokens, D hidden, E experts, k experts a token, F channels, B channel blocks, L such modules.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.layout import LEVELS, BasePlanes, Pages, PageTable, Resident
from dynamo_jax.models.experts import ExpertForm, ExpertWeights, silu_gated
from dynamo_jax.models.routing import Routing
from dynamo_jax.precision.plan import Plan, expert_plan
from dynamo_jax.runtime.residency import levels_of, residency, table_of
from dynamo_jax.runtime.store import host_pages, quantize_experts
from dynamo_jax.runtime.switch import switched_experts

M = TypeVar("M", bound=nnx.Module)


@runtime_checkable
class ExpertsModule(Protocol):
    """What a module must have to be quantized; shapes in the module's docstring."""

    gate: Any
    up: Any
    down: Any

    def route(self, router_logits: Float[Array, "N E"]) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]: ...

    def __call__(self, x: Float[Array, "N D"], router_logits: Float[Array, "N E"]) -> Float[Array, "N D"]: ...


class Plane(nnx.Variable):
    """Stored planes, pages and page tables: not trained."""


class VariantNumber(nnx.Variable):
    """Which variant all quantized experts of a model run at: one shared int32 scalar."""


class SwitchedExperts(nnx.Module):
    """Stands where the user's experts stood, and is called as they were. ``inner`` is the user's module without
    its three weights: it still routes."""

    def __init__(
        self, inner: Any, hidden_size: int, resident: Resident, tables: list[PageTable], number: VariantNumber
    ):
        self.inner = inner
        self.hidden_size = hidden_size
        self.number = number
        self.variants = len(tables)
        self.base_codes, self.base_scales = Plane(resident.base.codes), Plane(resident.base.scales)
        for level, pages in resident.pages.items():
            self._keep(f"pages_to{level}_codes", pages.codes)
            self._keep(f"pages_to{level}_ratios", pages.ratios)
            for index, table in enumerate(tables):
                self._keep(f"variant{index}_to{level}", table.get(level))

    def _keep(self, name: str, array: Array | None) -> None:
        if array is not None:
            setattr(self, name, Plane(array))

    def _kept(self, name: str) -> Any:
        found = getattr(self, name, None)
        return None if found is None else found[...]

    def __call__(self, x: Float[Array, "N D"], router_logits: Float[Array, "N E"]) -> Float[Array, "N D"]:
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"inputs {x.shape} for experts of hidden size {self.hidden_size}")
        experts, gates = self.inner.route(router_logits)
        routing = Routing(router_logits, experts.astype(jnp.int32), gates)
        form = ExpertForm(getattr(self.inner, "activation", silu_gated))
        run = switched_experts(self.resident(), tuple(map(self.table, range(self.variants))), self.number[...])
        return run(0, x, routing, None, form)[0]

    def resident(self) -> Resident:
        pages = {
            level: Pages(self._kept(f"pages_to{level}_codes"), self._kept(f"pages_to{level}_ratios"))
            for level in LEVELS
        }
        return Resident(BasePlanes(self.base_codes[...], self.base_scales[...]), pages)

    def table(self, variant: int) -> PageTable:
        found = {level: self._kept(f"variant{variant}_to{level}") for level in LEVELS}
        return {level: table for level, table in found.items() if table is not None}


def experts_modules(model: nnx.Module) -> dict[tuple[Any, ...], ExpertsModule]:
    """The modules of ``model`` that follow the protocol, by path, in the order of a plan's layers."""
    found = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, ExpertsModule)}
    if not found:
        raise ValueError("no module of the model has gate, up, down and route: see dynamo_jax.transform")
    for path, module in found.items():
        gate, up, down = (getattr(module, part).shape for part in ExpertWeights._fields)
        if len(gate) != 3 or gate != up or down != (gate[0], gate[2], gate[1]):
            where = ".".join(map(str, path)) or "the model"
            raise ValueError(
                f"{where}: gate {gate}, up {up} and down {down} are not (E, D, F), (E, D, F) and (E, F, D)"
            )
    return dict(sorted(found.items(), key=lambda item: tuple(map(_order, item[0]))))


def _order(part: Any) -> tuple[int, int, str]:
    """Layer 10 after layer 9."""
    return (0, part, "") if isinstance(part, int) else (1, 0, str(part))


def uniform_plan(model: nnx.Module, width: int, channel_block: int = 16, group_size: int = 64) -> Plan:
    """The plan that gives every expert of ``model`` the same ``width`` (2, 3, 4 or 8 bits).

    channel_block: channels that share a width, at most an expert's; group_size: weights that share a scale. ValueError:
    sizes that the model does not have, or no module that follows the protocol.
    """
    modules = list(experts_modules(model).values())
    experts, hidden, channels = modules[0].gate.shape
    if not 1 <= channel_block <= channels:
        raise ValueError(f"channel_block {channel_block} is not in 1..{channels}, the channels")
    widths = np.full((len(modules), experts), width, np.int8)
    return expert_plan(widths, channels, channel_block, group_size, hidden)


def quantize_model(model: M, plan: Plan, *more: Plan) -> M:
    """A copy of ``model`` with quantized experts at the widths of ``plan``; ``model`` itself stays as it is.

    ``plan.widths`` is (L, E, B), L being the number of modules that follow the protocol. More plans are
    further variants, which ``switch_model`` chooses between. The result works under ``nnx.jit``, ``nnx.split``
    and ``nnx.merge``, and its state is plain arrays for Orbax. ValueError, which names the module: none follows the
    protocol (this module's docstring), a plan of other sizes, weights that are not finite.
    """
    model = nnx.clone(model)
    modules = experts_modules(model)
    for index, each in enumerate((plan, *more)):
        _check(each, index, modules)
        for field in ("channel_block", "group_size", "apart"):  # variants share pages
            if getattr(each, field) != getattr(plan, field):
                raise ValueError(f"plan {index} has {field} {getattr(each, field)}, plan 0 {getattr(plan, field)}")
    number = VariantNumber(jnp.zeros((), jnp.int32))
    for layer, (path, module) in enumerate(modules.items()):
        weights = ExpertWeights(*(_channel_major(module, part) for part in ExpertWeights._fields))
        try:
            store = quantize_experts([weights], plan.channel_block, plan.group_size)
        except ValueError as error:
            raise ValueError(f"{'.'.join(map(str, path))}: {error}") from error
        plans = [_one_layer(each, layer) for each in (plan, *more)]
        here = residency(host_pages(store, plans[0]), plans)
        tables = [table_of(here, p, levels_of(p)) for p in plans]
        for part in ExpertWeights._fields:
            delattr(module, part)
        assert isinstance(here.resident, Resident)
        switched = SwitchedExperts(module, plan.hidden_size, here.resident, tables, number)
        if not path:
            return switched  # type: ignore[return-value]
        _replace(model, path, switched)
    return model


def switch_model(model: nnx.Module, number: int) -> None:
    """Run all quantized experts of ``model`` at variant ``number`` from now on. Compiles nothing. ValueError: there is
    no such variant."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, SwitchedExperts):
            if not 0 <= number < module.variants:
                raise ValueError(f"variant {number}: the model has 0..{module.variants - 1}")
            module.number[...] = jnp.asarray(number, jnp.int32)


def _check(plan: Plan, index: int, modules: dict[tuple[Any, ...], ExpertsModule]) -> None:
    layers = len(modules)
    for path, module in modules.items():
        experts, hidden, channels = module.gate.shape
        found = (*plan.widths.shape[:2], plan.channels, plan.hidden_size)
        expected = (layers, experts, channels, hidden)
        if found != expected:
            raise ValueError(
                f"plan {index} is for layers, experts, channels and hidden size {found}; "
                f"{'.'.join(map(str, path)) or 'the model'} has {expected}"
            )


def _channel_major(module: Any, part: str) -> Float[Array, "E F D"]:
    weights = getattr(module, part)[...]
    return weights if part == "down" else weights.swapaxes(1, 2)


def _one_layer(plan: Plan, layer: int) -> Plan:
    return dataclasses.replace(plan, widths=plan.widths[layer : layer + 1])


def _replace(model: Any, path: tuple[Any, ...], module: nnx.Module) -> None:
    parent = model
    for part in path[:-1]:
        parent = parent[part] if isinstance(part, int) or isinstance(parent, dict) else getattr(parent, part)
    if isinstance(path[-1], int) or isinstance(parent, dict):
        parent[path[-1]] = module
    else:
        setattr(parent, path[-1], module)
