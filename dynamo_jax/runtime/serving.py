"""The run time as a functional core: a state of arrays, and functions from state to state.

    host, state = init(model, requests=4)           # planes, pages, page tables, a monitor for each request
    out, routings = decoder(.., experts=experts(state))   # in the user's own jit, scan or shard_map
    state = observe(state, routings)                # what the router did, into the monitors
    state = switch(state, 1)                        # or one number for each request; nothing compiles
    state = renew(state, ended)                     # requests whose place another one takes
    host, state = adapt(model, host, state, windows)      # on the host, between two steps

``state`` is a pytree of arrays: its shapes never change, so a function that takes it compiles once, and may be given it
for good (``donate_argnums``). An engine whose batches are ragged says of each token which request it is of
(``request_of``), and renews a request's place when another one takes it. ``host`` is what stays in host memory: all
pages with their checksums, the plans of the variants, and which page lies where. Variant 0 is the baseline, whose plan
never changes; adaptation fills another. While no request needs the baseline, its slots may be lent to the other: nested
planes are valid without those that refine them.

Axes: B requests, T tokens of each, N tokens of all, k experts a token, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.kernels.arrangements import ARRANGEMENTS, AnyResident, arrangement_for
from dynamo_jax.kernels.layout import PageTable
from dynamo_jax.models.experts import ExpertsFn, piece_counts
from dynamo_jax.models.routing import Routing
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.adapt import Observation, adapted_plan, observe_windows
from dynamo_jax.runtime.mesh import (
    Placement,
    check_same,
    constrained,
    fetch,
    of_first,
    on_all,
    own_experts,
    put,
    put_by,
)
from dynamo_jax.runtime.monitor import HOP, Watch, start, watch, watch_tokens
from dynamo_jax.runtime.quantized import QuantizedExperts, QuantizedModel
from dynamo_jax.runtime.residency import (
    Residency,
    Staged,
    commit,
    levels_of,
    residency,
    shards_of,
    stage,
    table_of,
)
from dynamo_jax.runtime.signatures import Signatures
from dynamo_jax.runtime.store import HostPages, host_pages, pages_of, places
from dynamo_jax.runtime.switch import switched_divergence, switched_experts


class State(NamedTuple):
    """All that a jitted step needs beside the model's own parameters, a pytree of arrays.

    resident: base planes and slots of pages; tables: the page table of each variant; number: the variant of each of B
    requests; signatures: of the known datasets, which the monitors compare with, None where none are known; watch: the
    monitors, None where nobody watches; placement: of all this on several devices, no array.
    """

    resident: AnyResident
    tables: tuple[PageTable, ...]
    number: Int[Array, " B"]
    signatures: Signatures | None
    watch: Watch | None
    placement: Placement | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """What stays in host memory. pages: all refinement pages of all experts, with their checksums; plans: of the
    variants; slots: of each level, the slot of each page, or -1."""

    pages: HostPages
    plans: tuple[Plan, ...]
    slots: dict[int, np.ndarray]


class Move(NamedTuple):
    """Pages on their way to make ``plan`` the ``variant``. before: where pages lay when they were sent."""

    plan: Plan
    variant: int
    staged: Staged
    before: dict[int, np.ndarray]


def spare(host: Host, state: State, variant: int = 1) -> dict[int, Int[np.ndarray, " n"]]:
    """Slots of each level, on each device, that neither the baseline nor another variant than ``variant`` needs."""
    others = [pages_of(plan) for index, plan in enumerate(host.plans) if index != variant]
    here, free = Residency(state.resident, host.slots, state.placement), {}
    for level in others[0]:
        used = np.logical_or.reduce([has[level] for has in others]).sum(axis=0)
        owners, shards = here.owners(host.pages, level), shards_of(state.placement)
        free[level] = here.capacity(level) - np.bincount(owners.reshape(-1), used.reshape(-1), shards).astype(int)
    return free


def init(
    model: QuantizedExperts,
    requests: int = 1,
    variants: int = 2,
    slots: dict[int, int] | None = None,
    arrangement: str | None = None,
    others: Sequence[Plan] = (),
    placement: Placement | None = None,
) -> tuple[Host, State]:
    """The model on the device: all ``variants`` are the baseline until ``finish`` or ``adapt`` fills them.

    others: plans that fill variants 1, 2, .. from the start, within the slots. slots: the page budget of each
    refinement level, at least the baseline's pages; by default those and the spare ones that the model's budget counts.
    placement: on several devices (``mesh.Placement``); slots are then those of each device.
    arrangement: of the planes on the device, "planes", "tiles" (of the TPU kernel) or "fragments" (of the GPU kernels);
    by default that of the fastest kernel that takes them there. ValueError: no request or variant, no such arrangement,
    or fewer slots than the baseline has pages.
    """
    if arrangement is not None and arrangement not in ARRANGEMENTS:
        raise ValueError(f"arrangement {arrangement!r}: known are {', '.join(ARRANGEMENTS)}")
    if requests < 1 or variants < 1:
        raise ValueError(f"{requests} requests, {variants} variants: expected one or more")
    if len(others) >= variants:
        raise ValueError(f"{variants} variants: fewer than the {1 + len(others)} plans")
    if slots is None:
        slots = memory.slots(model.plan, model.spare, placement, others)
    if arrangement is None:
        arrangement = arrangement_for(model.store.scales.shape[3], model.plan.channel_block, model.plan.group_size)
    experts = model.plan.widths.shape[1]
    place = places(experts, model.held, own_experts(placement, experts))
    plans = (model.plan, *others, *(model.plan,) * (variants - 1 - len(others)))

    def on_device() -> tuple[HostPages, Residency]:
        pages = host_pages(model.store, model.plan, arrangement, place)
        return pages, residency(pages, list(plans[: 1 + len(others)]), slots, placement)

    pages, here = on_all(placement, on_device)
    tables = tuple(table_of(here, plan, levels_of(plan)) for plan in plans)
    signatures = None if model.knowledge is None else jax.tree.map(jnp.array, model.knowledge.signatures)
    state = State(here.resident, tables, jnp.zeros(requests, jnp.int32), signatures, None, placement)
    if placement is not None and signatures is not None:
        state = state._replace(signatures=jax.tree.map(lambda a: put(placement, a), signatures))
    return Host(pages=pages, plans=plans, slots=here.slots), begun(state, requests)


def begun(state: State, requests: int) -> State:
    """All of so many requests at the baseline, with new monitors if there are signatures."""
    fresh = jnp.zeros(requests, jnp.int32), None if state.signatures is None else start(state.signatures, requests)
    if (placement := state.placement) is not None:
        fresh = jax.tree.map(lambda a: put(placement, a, placement.rows(requests)), fresh)
    return state._replace(number=fresh[0], watch=fresh[1])


def for_requests(state: State, requests: int) -> State:
    """The state for as many requests: as it is if it is of as many, so that monitors go on from one text of a client to
    the next; else all at the baseline, with new monitors. ValueError: no request."""
    if requests < 1:
        raise ValueError(f"{requests} requests: expected one or more")
    if state.number.shape[0] == requests:
        return state
    fresh = begun(state, requests)
    return fresh._replace(watch=None) if state.watch is None else fresh


def experts(state: State, form: str = "bf16", request_of: Int[Array, " N"] | None = None) -> ExpertsFn:
    """The experts of ``dynamo_jax.models.decoder`` at each request's variant, for use inside the caller's own jit.

    What a layer calls with its inputs (N, D) and their routing, and gets outputs (N, D) and the routing from.
    request_of: the request, 0 to B - 1, that each token is of, in any order; -1 for padding, which goes to no expert.
    Where it is not given N = B * T, one request after the other. A single request runs ``lax.switch``. form: of
    activations in the TPU kernel, "bf16", "int8" or "fp8"; it says nothing elsewhere.
    """
    requests = state.number.shape[0]
    alone = requests == 1 or (len(state.tables) == 1 and request_of is None)
    number = state.number[0] if alone and state.placement is None else state.number
    return switched_experts(state.resident, state.tables, number, form, state.placement, request_of)


def observe(
    state: State,
    routings: list[Routing],
    mask: Bool[Array, "B T"] | None = None,
    request_of: Int[Array, " N"] | None = None,
) -> State:
    """The state after a step that routed tokens of its requests, the monitors having seen them; for use inside jit.

    routings: of each layer with experts, as ``experts`` gave it back. mask: False where one of T tokens of each request
    is padding. request_of: as ``experts`` takes it, instead; the tokens of a request in their order, any number of
    them. A state that nobody watches stays as it is. ValueError: routings of another number of layers, or both mask and
    request_of. Source: docs/method.md.
    """
    if state.watch is None or state.signatures is None:
        return state
    requests, (num_layers, num_experts) = state.number.shape[0], state.signatures.shares.shape[1:]
    if len(routings) != num_layers:
        raise ValueError(f"routings of {len(routings)} layers; the monitor knows {num_layers}")
    if request_of is not None:
        if mask is not None:
            raise ValueError("mask and request_of: a token of no request is padding, so give one of the two")
        after = watch_tokens(state.signatures, state.watch, jnp.stack([r.experts for r in routings]), request_of)
        return state._replace(watch=_as_watch(state, after))
    tokens = routings[0].experts.shape[0] // requests
    size = min(HOP, tokens)  # of a piece: one token, where a step decodes
    counts = piece_counts(routings, requests, num_experts, size, mask)
    real = jnp.ones((requests, tokens)) if mask is None else mask.astype(jnp.float32)
    seen = jnp.pad(real, ((0, 0), (0, -tokens % size))).reshape(requests, -1, size).sum(axis=2)
    return state._replace(watch=_as_watch(state, watch(state.signatures, state.watch, counts, seen)))


def _as_watch(state: State, watch: Watch) -> Watch:
    """Where the monitors of the state lie, so that a step gives what it takes."""
    if (placement := state.placement) is None:
        return watch
    rows = P(placement.rows(state.number.shape[0]))
    return constrained(placement, watch, jax.tree.map(lambda _: rows, watch))


def renew(state: State, ended: Bool[ArrayLike, " B"], monitors: Watch | None = None) -> State:
    """Others take the places of the requests that have ``ended``, at the baseline; for use inside jit and outside.

    monitors: of B requests, whose rows go on there, such as those that ``state.watch`` had when a client's last request
    ended; by default new ones. ValueError: not one truth value for each request.
    """
    given: Any = ended if isinstance(ended, jax.Array) else np.asarray(ended)
    if given.dtype != bool or given.shape != state.number.shape:
        raise ValueError(
            f"ended is {given.dtype} of the shape {given.shape}: expected a truth value for each of "
            f"{state.number.shape[0]} requests"
        )
    state = switch(state, jnp.where(given, 0, state.number))
    if state.watch is None or state.signatures is None:
        return state

    def chosen(new: Array, now: Array) -> Array:
        return jnp.where(jnp.reshape(given, (-1, *[1] * (now.ndim - 1))), new, now)

    fresh = start(state.signatures, len(given)) if monitors is None else monitors
    return state._replace(watch=_as_watch(state, jax.tree.map(chosen, fresh, state.watch)))


def switch(state: State, number: Int[ArrayLike, "*B"]) -> State:
    """All requests at one variant, or each at its own; for use inside jit and outside, where it compiles nothing.

    ValueError: no whole number or one for each of B requests, or no such variant. In an array of JAX's a number out of
    range is clipped to the nearest variant instead, since a jitted step cannot look at it.
    """
    on_device, last = isinstance(number, jax.Array), len(state.tables) - 1
    given: Any = number if on_device else np.asarray(number)
    if not np.issubdtype(given.dtype, np.integer) or given.shape not in ((), state.number.shape):
        raise ValueError(
            f"variants are {given.dtype} of the shape {given.shape}: expected a whole number, or one for each of "
            f"{state.number.shape[0]} requests"
        )
    if not on_device and not ((given >= 0) & (given <= last)).all():
        raise ValueError(f"variant {given}: there are 0..{last}")
    xp = jnp if on_device else np
    clipped = xp.clip(xp.broadcast_to(given, state.number.shape), 0, last).astype(np.int32)
    return state._replace(number=_as_number(state, clipped))


def _as_number(state: State, number: Any) -> Array:
    """Where the numbers of the state lie, so that a step that takes them is the same program."""
    placement = state.placement
    if placement is None:
        return jnp.asarray(number)
    sharding = placement.sharding(P(placement.rows(number.shape[0])))
    if isinstance(number, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(number, sharding)
    return put_by(placement, number, sharding.spec)


def follow(state: State, novel: int = 1) -> State:
    """Each request at variant ``novel`` where its monitor says novel, else at the baseline; for use inside jit, too.

    ValueError: nobody watches this state.
    """
    return switch(state, jnp.where(is_novel(state), novel, 0))


def is_novel(state: State) -> Bool[Array, " B"]:
    """Which requests' text the monitor calls novel: twice in a row unlike every known dataset. It says nothing before
    256 tokens. ValueError: nobody watches this state."""
    if state.watch is None or state.signatures is None:
        raise ValueError("nobody watches this state: it has no monitor")
    return state.watch.label == len(state.signatures.limit)


def begin(host: Host, state: State, plan: Plan, variant: int = 1, lend: bool = False) -> Move:
    """Send the pages that ``plan`` needs for ``variant`` on their way; steps may go on meanwhile.

    lend: the slots of the baseline and of other variants may take them too. What these lose they are read without from
    ``finish`` on, at lower precision, until ``whole`` brings it back: for when no request needs them.

    ValueError: too few free slots, a page that is damaged in host memory, a level that the variant's program does not
    read (of most, that is what the baseline reads), a plan of another model or of other blocks, no such variant, or
    another plan for the baseline.
    """
    for name in ("channel_block", "group_size", "hidden_size", "channels", "apart"):
        if (here := getattr(plan, name)) != (there := getattr(host.plans[0], name)):
            raise ValueError(f"the plan has {name} {here}, the model's baseline {there}")
    if plan.widths.shape != host.plans[0].widths.shape:
        raise ValueError(f"the plan has widths {plan.widths.shape}, the model's baseline {host.plans[0].widths.shape}")
    if not 0 <= variant < len(host.plans) or (variant == 0 and plan is not host.plans[0]):
        raise ValueError(f"variant {variant}: those that can change are 1..{len(host.plans) - 1}")
    if more := set(levels_of(plan)) - set(state.tables[variant]):
        raise ValueError(
            f"the plan reads pages of {max(more)} bits, which the program of variant {variant} does not read "
            f"(it reads those of {', '.join(map(str, state.tables[variant])) or 'no level'})"
        )
    keep = [] if lend else [p for index, p in enumerate(host.plans) if index != variant]
    here = Residency(state.resident, host.slots, state.placement)
    staged = on_all(state.placement, lambda: stage(host.pages, here, plan, keep))
    return Move(plan, variant, staged, host.slots)


def finish(host: Host, state: State, move: Move) -> tuple[Host, State]:
    """Wait for the pages, take them in and make their plan the variant. The given state's pages are given up: use the
    one returned. ValueError: another move was finished since this one began."""
    rest: Move | None = move
    while rest is not None:
        host, state, rest = advance(host, state, rest)
    return host, state


def advance(host: Host, state: State, move: Move) -> tuple[Host, State, Move | None]:
    """As ``finish``, of one chunk of the pages, so that no step waits for more; and what is left of the move, until its
    plan is the variant. Until then pages that have to go are missing, and what they refine is read at lower precision.
    """
    if host.slots is not move.before:
        raise ValueError("pages were moved since this move began; begin it again")
    check_same(state.placement, "pages and plan", *move.staged.slots.values(), move.plan.widths)
    on_all(state.placement, move.staged.wait)  # a transfer that failed fails here, before anything is written
    here = Residency(state.resident, host.slots, state.placement)
    chunk, others = move.staged.parted(here)
    here = commit(here, chunk)
    last = others is None
    plans = tuple(move.plan if last and index == move.variant else plan for index, plan in enumerate(host.plans))
    tables = tuple(
        table_of(here, plan, tuple(table), partly=not last or index != move.variant)
        if (last and index == move.variant) or _lost(move.before, here.slots, plan)
        else table
        for index, (plan, table) in enumerate(zip(plans, state.tables))
    )
    host = dataclasses.replace(host, plans=plans, slots=here.slots)
    rest = None if others is None else move._replace(staged=others, before=host.slots)
    return host, state._replace(resident=here.resident, tables=tables), rest


def _lost(before: dict[int, np.ndarray], after: dict[int, np.ndarray], plan: Plan) -> bool:
    """Whether pages of the plan lie elsewhere than before, or nowhere."""
    return any((before[level] != after[level])[has].any() for level, has in pages_of(plan).items())


def lent(host: Host) -> bool:
    """Whether pages of the baseline are missing on the device."""
    return any((host.slots[level] < 0)[has].any() for level, has in pages_of(host.plans[0]).items())


def whole(host: Host, state: State) -> tuple[Host, State]:
    """The baseline with all of its pages, after it has lent slots; a variant that took them is read without what it had
    there from then on, at lower precision. The given state's pages are given up. ValueError: a page of the baseline is
    damaged in host memory; it stays without that one."""
    return finish(host, state, begin(host, state, host.plans[0], 0, lend=True)) if lent(host) else (host, state)


def divergence(
    model: QuantizedModel, state: State, windows: Int[np.ndarray, "S T1"], seen: Observation, variant: int
) -> Float[np.ndarray, " S"]:
    """Nats, summed over each window, by which what ``variant`` predicts differs from what the largest width does.

    A plan is better where that is less than the baseline's. Next tokens play no part: on few tokens, whether a plan
    predicts them better is chance.
    """
    parameters = model.device_parameters(placement=state.placement)
    fixed = (model.config, parameters, state.resident, state.tables, put(state.placement, np.int32(variant)))
    pairs = zip(windows[:, None, :-1], seen.exact[:, None])
    found = [
        switched_divergence(*fixed, *(put(state.placement, a) for a in pair), placement=state.placement)
        for pair in pairs
    ]
    return np.array([float(fetch(one)[0]) for one in found])


def adapted(
    model: QuantizedExperts,
    host: Host,
    state: State,
    seen: Observation,
    variant: int = 1,
    batch: int | None = None,
    reads: float = 1.0,
    lend: bool = False,
) -> Plan:
    """The plan for what was seen that the slots of ``variant`` have room for; arguments as ``adapt`` takes them."""
    if not 0 <= variant < len(state.tables):
        raise ValueError(f"variant {variant}: those that can change are 1..{len(state.tables) - 1}")
    read = state.tables[variant]  # the levels that the compiled steps read there
    shards = shards_of(state.placement)
    slots = {level: len(pages.codes) // shards * (level in read) for level, pages in state.resident.pages.items()}
    free = None if lend else spare(host, state, variant)
    batch = state.number.shape[0] if batch is None else batch
    if model.knowledge is None:
        raise ValueError("these experts were quantized without an analysis: what a text loses is not known")
    fixed = (model.plan, model.knowledge, seen, free, batch, reads, slots, state.placement)
    plan = on_all(state.placement, lambda: adapted_plan(*fixed))
    return dataclasses.replace(plan, widths=of_first(state.placement, plan.widths))


def adapt(
    model: QuantizedModel,
    host: Host,
    state: State,
    windows: Int[np.ndarray, "S T1"],
    variant: int = 1,
    batch: int | None = None,
    reads: float = 1.0,
    lend: bool = False,
) -> tuple[Host, State]:
    """``variant`` adapted to data like ``windows``, within the page budget; the numbers stay as they are.

    windows: token ids, each predicting T of them; 512 tokens in all do, 2,048 do better. batch: requests that a decode
    step serves together, by default those of the state; reads: how many times the baseline's bytes a step may read.
    lend: the baseline's slots may serve too (``begin``): for when no request needs the baseline. The given state's
    pages are given up. ValueError: no tokens, ids or positions that the model does not have, no such variant, the
    baseline itself, a damaged page, a batch below 1, reads that no plan meets. Source: docs/design.md, "Adaptation".
    """
    seen = observe_windows(model, windows, state.placement)
    if not lend:
        host, state = whole(host, state)
    plan = adapted(model, host, state, seen, variant, batch, reads, lend)
    return finish(host, state, begin(host, state, plan, variant, lend))
