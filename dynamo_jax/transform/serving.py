"""Somebody else's model with quantized experts: made, switched, watched and adapted.

    model, host = quantize(model, plan(analysis, bits=3.0), analysis, requests=8)

    @nnx.jit
    def step(model, tokens):
        with observe(model):              # what the router does, into the monitors
            logits = model(tokens)
        follow(model)                     # variant 1 where a request's text is novel
        return logits

    adapt(model, host, recent, forward)   # on the host, between two steps

The state is ``runtime.serving.State``, one for each part of the model, in variables that the part's experts share. The
first part's has the monitors, which look at the layers of all parts.

Axes: B requests, T tokens, N = B * T, k experts a token, L layers, E experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.knowledge import knowledge_of, noticed
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import Activation, ExpertBiases, ExpertForm
from dynamo_jax.models.routing import Routing
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes
from dynamo_jax.runtime import memory, serving
from dynamo_jax.runtime.adapt import Observation, check_limit, observe_planes
from dynamo_jax.runtime.quantized import Knowledge, QuantizedExperts
from dynamo_jax.runtime.store import page_counts, pages_of, quantize_experts
from dynamo_jax.transform.analysis import ModelAnalysis
from dynamo_jax.transform.found import Part, float_parts_of, modules_of, parts_of
from dynamo_jax.transform.plans import ModelPlan
from dynamo_jax.transform.served import LayerNumber, Served
from dynamo_jax.transform.taps import (
    Forward,
    Listener,
    Mask,
    Taken,
    Tapped,
    by_layer,
    counted,
    forget,
    listening,
    taken,
)

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartHost:
    """What stays in host memory of one part. layers: names of its layers; experts: planes, plan and knowledge; here:
    pages and where they lie."""

    layers: tuple[str, ...]
    sizes: ExpertSizes
    experts: QuantizedExperts
    here: serving.Host


@dataclasses.dataclass
class ModelHost:
    """What stays in host memory of a quantized model, in one pair with it: ``take`` and ``adapt`` change both. moves:
    how often pages were moved, which the model knows, too."""

    parts: list[PartHost]
    moves: int = 0

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the known datasets, in the order of the monitors' labels; none without an analysis."""
        knowledge = self.parts[0].experts.knowledge
        return () if knowledge is None else knowledge.names

    def blind(self) -> str | None:
        """Why nothing can be called novel, and what helps; None where text can."""
        knowledge = self.parts[0].experts.knowledge
        return "the model was quantized without an analysis" if knowledge is None else knowledge.blind()


def quantize(
    model: M,
    plan: ModelPlan,
    analysis: ModelAnalysis | None = None,
    *more: ModelPlan,
    requests: int = 1,
    variants: int = 2,
    spare: float | None = None,
    arrangement: str | None = None,
) -> tuple[M, ModelHost]:
    """A copy of ``model`` with quantized experts at the widths of ``plan``, and what stays in host memory.

    With the analysis its planes serve, and its knowledge the monitors and adaptation; without it weights are rounded to
    nearest, best at the widths of these plans, and nothing is watched. All variants are the baseline ``plan`` until
    ``adapt`` or ``take`` fills them; more plans fill variants 1, 2, .. at once, with as many slots as they need.
    requests: of the batch, each with its own variant. spare: slots beside the baseline's, as a share of its pages; by
    default that of the analysis. arrangement: as ``runtime.serving.init`` takes it; "planes" for gradients where a
    TPU's or GPU's kernel would be taken.

    The copy works under ``nnx.jit``, ``nnx.split`` and ``nnx.merge``; weights that are not experts' are shared with
    ``model``, which stays as it is. ValueError, which names it: no experts, a plan or analysis for another model,
    weights that are not finite.
    """
    parts = float_parts_of(model)
    names = tuple(part.names for part in parts)
    for each in (plan, *more):
        each.check(names)
    if analysis is not None:
        _check_analysis(analysis, parts)
    variants = max(variants, 1 + len(more))
    hosts, states = [], []
    share = memory.SPARE if analysis is None else analysis.config.spare
    known = None if analysis is None else _knowledge(analysis)
    for index, part in enumerate(parts):
        plans = [each.plans[index] for each in (plan, *more)]
        for own in plans:
            _check(own, part)
        experts = QuantizedExperts(
            store=_rounded(part, plans) if analysis is None else _analysed(analysis, index, plans[0]),
            plan=plans[0],
            knowledge=None if known is None else known[index],
            spare=share if spare is None else spare,
        )
        slots = slots_of(plans, experts.spare)
        here, state = serving.init(experts, requests, variants, slots, arrangement, plans[1:])
        if index:  # the monitors are the first part's
            state = state._replace(watch=None, signatures=None)
        hosts.append(PartHost(layers=part.names, sizes=part.sizes, experts=experts, here=here))
        states.append(state)
    return placed(model, names, states), ModelHost(hosts)


def placed(model: M, names: tuple[tuple[str, ...], ...], states: list[serving.State]) -> M:
    """A copy of the model whose experts are those of the states, by the names of their layers."""
    model = nnx.clone(model)
    numbers = {name: (index, layer) for index, part in enumerate(names) for layer, name in enumerate(part)}
    parts = parts_of(model)
    split = {part.layers[0].name: part.layers[0].module.split() for part in parts}
    served = [Served(state, split[own[0]]) for state, own in zip(states, names)]
    for part in parts:
        modules: dict[str, list[int]] = {}
        for layer in part.layers:
            modules.setdefault(layer.path, []).append(numbers[layer.name][1])
        for layer in part.layers:
            own = modules.pop(layer.path, None)
            if own is None:
                continue
            number: Any = own[0] if layer.place is None else LayerNumber(jnp.asarray(own, jnp.int32))
            layer.module.drop_weights(served[numbers[layer.name][0]], number)
    return model


def _check_analysis(analysis: ModelAnalysis, parts: tuple[Part, ...]) -> None:
    """ValueError: it is of other layers, other sizes or other weights."""
    if tuple(p.names for p in analysis.parts) != tuple(part.names for part in parts):
        raise ValueError("the analysis is of another model: its layers with experts are others")
    for part, own in zip(parts, analysis.parts):
        if part.sizes != own.sizes:
            raise ValueError(f"{part.names[0]}: the analysis is of experts {own.sizes}, the model has {part.sizes}")
        for layer, norms in zip(part.layers, own.down_norms):
            down = layer.module.one_layer(layer.place)[0].down
            if not np.allclose(np.square(np.asarray(down, np.float32)).sum(axis=-1), norms, rtol=1e-3):
                raise ValueError(f"{layer.name}: its weights are not those that were analysed")


def _check(plan: Plan, part: Part) -> None:
    found = (*plan.widths.shape[:2], plan.channels, plan.hidden_size)
    if found != tuple(part.sizes):
        raise ValueError(
            f"{part.names[0]}: the plan is for layers, experts, channels and hidden size {found}; "
            f"the model has {tuple(part.sizes)}"
        )


def _analysed(analysis: ModelAnalysis, index: int, plan: Plan) -> Planes:
    """The planes that the analysis made of a part. ValueError: they are in other groups or blocks than the plan's."""
    config = analysis.config
    made = config.group(plan.hidden_size), config.channel_block
    if plan.apart != config.per_projection:
        words = ("one width an expert", "two")
        raise ValueError(f"the plan has {words[plan.apart]}, the analysis was made for {words[not plan.apart]}")
    if (plan.group_size, plan.channel_block) != made:
        raise ValueError(
            f"the plan has groups of {plan.group_size} and blocks of {plan.channel_block}, the planes of the "
            f"analysis {made[0]} and {made[1]}"
        )
    return analysis.parts[index].planes


def _rounded(part: Part, plans: list[Plan]) -> Planes:
    """The planes of a part's float weights, which suit the widths of the plans."""
    layers = []
    for layer in part.layers:
        weights = layer.module.one_layer(layer.place)[0]
        if not all(np.isfinite(np.asarray(w, np.float32)).all() for w in weights):
            raise ValueError(f"{layer.name}: weights to quantize hold NaN or infinity")
        layers.append(weights)
    return quantize_experts(layers, plans[0].channel_block, plans[0].group_size, plans)


def slots_of(plans: list[Plan], spare: float) -> dict[int, int]:
    """What the baseline needs with spare ones, or all plans together if that is more."""
    slots = memory.slots(plans[0], spare)
    each = [pages_of(plan) for plan in plans]
    return {n: max(slots[n], int(np.logical_or.reduce([has[n] for has in each]).sum())) for n in page_counts(plans[0])}


def _knowledge(analysis: ModelAnalysis) -> list[Knowledge]:
    """Of each part; the signatures are of the layers of all parts together."""
    found = [knowledge_of(part.analyses, analysis.config, analysis.calibrated) for part in analysis.parts]
    most = max(part.sizes.experts for part in analysis.parts)

    def windows(name: str) -> np.ndarray:
        each = [part.analyses[name].windows for part in analysis.parts]
        return np.concatenate([np.pad(w, [(0, 0)] * 3 + [(0, most - w.shape[3])]) for w in each], axis=2)

    together = {
        name: Analysis(one.stats, one.sensitivity, windows(name)) for name, one in analysis.parts[0].analyses.items()
    }
    signatures, odd = noticed(together, analysis.piece)
    return [dataclasses.replace(each, signatures=signatures, odd=odd) for each in found]


def served_of(model: nnx.Module) -> list[Served]:
    """The states of a quantized model, in the order of its parts. ValueError: its experts are not quantized."""
    found: list[Served] = []
    for path, module in modules_of(model).items():
        if not module.is_quantized:
            raise ValueError(f"{path}: these experts are not quantized")
        if not any(module.served is other for other in found):
            found.append(module.served)
    return found


def switch(model: nnx.Module, number: Int[ArrayLike, "*B"]) -> None:
    """All requests at one variant from now on, or each at its own; inside jit and outside, where nothing compiles.
    ValueError: there is no such variant, or not one number for each request."""
    for served in served_of(model):
        served.put(serving.switch(served.state(), number))


def follow(model: nnx.Module, novel: int = 1) -> None:
    """Each request at variant ``novel`` where its monitor says novel, else at the baseline; inside jit, too.
    ValueError: nobody watches, since the model was quantized without an analysis."""
    switch(model, jnp.where(is_novel(model), novel, 0))


def is_novel(model: nnx.Module) -> Bool[Array, " B"]:
    """Which requests' text the monitor calls novel: twice in a row unlike every known dataset."""
    return serving.is_novel(served_of(model)[0].state())


def labels(model: nnx.Module) -> Int[Array, " B"]:
    """The number of the known dataset that each request's text is like (``ModelHost.datasets``); as many as there are
    for novel text, -1 before the first decision. ValueError: nobody watches."""
    watch = served_of(model)[0].state().watch
    if watch is None:
        raise ValueError("nobody watches this model: it was quantized without an analysis")
    return watch.label


@contextlib.contextmanager
def observe(model: nnx.Module, mask: Bool[Array, "B T"] | None = None) -> Iterator[None]:
    """What the router does in the pass of the model inside goes to the monitors; for use inside the caller's jit.

    The pass routes T tokens of each of the B requests, those of one request after those of another. mask: False where a
    token is padding; so is one whose ids are all -1. Source: docs/method.md. ValueError: experts that are not called,
    or called twice, in the pass.
    """
    first = served_of(model)[0]
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"the mask is {mask.dtype}: expected bool, False where a token is padding")
    listening(model)
    try:
        yield
        found = taken(model)
    finally:
        forget(model)
        listening(model, False)
    state = first.state()
    if state.watch is not None and state.signatures is not None:
        none = state.signatures.shares.shape[2]
        routings = _routings(model, found, none)
        tokens, requests = len(routings[0].experts), len(state.number)
        if tokens % requests or (mask is not None and mask.size != tokens):
            shape = "" if mask is None else f" and the mask is {mask.shape}"
            raise ValueError(f"the pass was of {tokens} tokens{shape}; the model serves {requests} requests")
        real = (routings[0].experts < none).any(axis=-1).reshape(requests, -1)
        first.put(serving.observe(state, routings, real if mask is None else real & mask.reshape(requests, -1)))


def _routings(model: nnx.Module, found: dict[str, Taken], none: int) -> list[Routing]:
    """Of each layer, those of one part after those of another; an id of no expert of its own is ``none``."""
    out = []
    for part in parts_of(model):
        for layer in part.layers:
            ids = found[layer.path].ids if layer.place is None else found[layer.path].ids[layer.place]
            flat = ids.reshape(-1, ids.shape[-1])
            real = (flat >= 0) & (flat < part.sizes.experts)
            out.append(Routing(flat, jnp.where(real, flat, none).astype(jnp.int32), flat))
    return out


def for_requests(model: nnx.Module, requests: int) -> None:
    """The model serves so many requests from now on, all at the baseline, with new monitors; as it is if it serves as
    many. The next step is compiled for their number. ValueError: no request."""
    for served in served_of(model):
        state = serving.for_requests(served.state(), requests)
        for name, leaf in zip(served.names, jax.tree.leaves(state)):
            getattr(served, name).set_value(leaf)


def take(model: nnx.Module, host: ModelHost, plan: ModelPlan, variant: int = 1, lend: bool = False) -> None:
    """``plan`` as a variant of the model from now on; its pages come from host memory. lend: the baseline's slots may
    serve too (``runtime.serving.begin``). ValueError: a plan for another model, no such variant, fewer free slots than
    it needs, or a host that is not of this model; nothing has changed then."""
    plan.check(tuple(part.layers for part in host.parts))
    served = pair(model, host)
    moves = [
        serving.begin(part.here, one.state(), own, variant, lend)
        for part, one, own in zip(host.parts, served, plan.plans)
    ]
    for index, (one, move) in enumerate(zip(served, moves)):
        _moved(host, served, index, *serving.finish(host.parts[index].here, one.state(), move))


def pair(model: nnx.Module, host: ModelHost) -> list[Served]:
    """The states of the model. ValueError: pages were moved for one of the two without the other."""
    served = served_of(model)
    found = int(served[0].moves[...])
    if len(served) != len(host.parts) or found != host.moves:
        raise ValueError(
            f"the model and what is in host memory are no pair: pages were moved {found} and {host.moves} times; "
            "both come from one call of quantize or load, and a clone of the model has no host of its own"
        )
    return served


def _moved(host: ModelHost, served: list[Served], index: int, here: serving.Host, state: serving.State) -> None:
    """Both know of the pages that were moved for one part."""
    served[index].put(state)
    host.parts[index] = dataclasses.replace(host.parts[index], here=here)
    host.moves += 1
    served[0].moves.set_value(jnp.asarray(np.int32(host.moves)))


def adapt(
    model: nnx.Module,
    host: ModelHost,
    batches: Iterable[Any],
    forward: Forward,
    *,
    mask: Mask | None = None,
    variant: int = 1,
    batch: int | None = None,
    reads: float = 1.0,
    lend: bool = False,
) -> None:
    """``variant`` adapted to data like ``batches``, within the slots that there are; requests stay at their variants.

    forward: runs the model, ``forward(model, batch)``; what it returns does not matter, and it stays compiled as long
    as it is the same function. No labels and no gradients are needed; 512 tokens in all do, 2,048 do better. mask: of a
    batch, which tokens count. batch, reads, lend: as ``runtime.serving.adapt`` takes them. It runs the baseline, and
    measures what each block's widths lose on what the experts are given. ValueError: no batch, an analysis is missing,
    no such variant, or a host that is not of this model; nothing has changed then.
    """
    served = pair(model, host)
    if not 1 <= variant < len(host.parts[0].here.plans):
        raise ValueError(f"variant {variant}: those that can change are 1..{len(host.parts[0].here.plans) - 1}")
    check_limit(served[0].requests if batch is None else batch, reads)
    seen = observations(model, host, batches, forward, mask)
    plans = [
        serving.adapted(part.experts, part.here, one.state(), own, variant, batch, reads, lend)
        for part, one, own in zip(host.parts, served, seen)
    ]
    if not lend:
        for index, one in enumerate(served):
            if serving.lent(host.parts[index].here):
                _moved(host, served, index, *serving.whole(host.parts[index].here, one.state()))
    take(model, host, ModelPlan(tuple(plans), tuple(part.layers for part in host.parts)), variant, lend)


def observations(
    model: nnx.Module, host: ModelHost, batches: Iterable[Any], forward: Forward, mask: Mask | None = None
) -> list[Observation]:
    """What the batches show of each part: errors at each width, and routed tokens of each batch. Batch after batch goes
    through the model, then one layer's planes after the other through the device."""
    at_baseline, fresh = nnx.clone(model), {}
    for module in modules_of(at_baseline).values():
        if id(module.served) not in fresh:
            one = jnp.zeros(1, jnp.int32)
            fresh[id(module.served)] = Served(module.served.state()._replace(number=one, watch=None, signatures=None))
        module.served = fresh[id(module.served)]
    listener, modules = Listener(at_baseline), modules_of(model)
    tapped = [counted(by_layer(modules, listener.forward(forward, given)), mask, given) for given in batches]
    if not tapped:
        raise ValueError("no batch to adapt to")
    tokens = np.array([len(next(iter(one.values())).gates) for one in tapped], np.float64)
    if not tokens.sum():
        raise ValueError("no token of the batches counts")
    exact = np.zeros((len(tapped), 0, 0), np.float32)
    out = []
    for part, own in zip(parts_of(model), host.parts):
        errors, counts = [], []
        for number, layer in enumerate(part.layers):
            planes = jax.tree.map(lambda a, i=number: jnp.asarray(a[i]), own.experts.store)
            biases = layer.module.biases_of_layer(layer.place)
            found = [_measured(own, part, planes, biases, one[layer.path, layer.place]) for one in tapped]
            each, rows = (np.stack(a).astype(np.float64) for a in zip(*found))
            errors.append(each.sum(axis=0))
            counts.append(rows)
        together = _with_exact(np.stack(errors), own)
        out.append(Observation(together, np.stack(counts, axis=1), tokens, exact))
    return out


def _with_exact(errors: np.ndarray, part: PartHost) -> np.ndarray:
    """The widest planes, and those that were left out, are taken as exact."""
    exactly = len(WIDTHS) - len(part.experts.store.widths) + 1
    return np.pad(errors, [(0, 0)] * 3 + [(0, exactly)])


def _measured(part: PartHost, own: Part, planes: Any, biases: ExpertBiases | None, tapped: Tapped) -> Any:
    size, k = tapped.kept.size, tapped.ids.shape[-1]  # one program for all batches of a shape, whatever counts in them
    x, gates = np.zeros((size, own.sizes.hidden_size), np.float32), np.zeros((size, k), np.float32)
    x[tapped.kept], gates[tapped.kept] = tapped.x, tapped.gates
    ids = tapped.ids.reshape(size, k)
    routing = Routing(jnp.asarray(gates), jnp.asarray(np.where(ids < 0, own.sizes.experts, ids)), jnp.asarray(gates))
    plan = part.experts.plan
    fixed = own.sizes._replace(layers=1), own.activation, plan.channel_block, plan.apart
    return jax.tree.map(np.asarray, _observed(*fixed, planes, x, routing, biases))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _observed(
    sizes: ExpertSizes,
    activation: Activation,
    channel_block: int,
    apart: bool,
    planes: Any,
    x: Array,
    routing: Routing,
    biases: ExpertBiases | None,
) -> Any:
    form = ExpertForm(activation, biases)
    return observe_planes(sizes, planes, x, routing, form, channel_block, apart)[1]
