"""Quantized models in sglang-jax: our decoder over its attention, each request at its own variant.

    register(variants_of("quantized", ["quantized-2.5"]))   # before an engine or a server of sglang_jax is made

The engine schedules, keeps keys and values, samples and talks to clients; it knows the model by its architecture, for
which ``register`` puts ``Served`` into its table. Planes and parameters are leaves of the module, arguments of the
engine's jitted step. The variant and the monitor of each request are a pool beside that of keys and values: the engine
gives it to each step for good, and takes what comes back. Which variant a request asks for, and whether it has just
come, travels with its tokens, so that a step is never at odds with what was scheduled.

All names of the engine that are used stand here. Of 0.1.0rc0 it has no official place for any but the model's class
(``ModelRegistry``, ``RadixAttention``, ``LogitsProcessor``); ten functions are wrapped (``_HOOKS``):

- ``ModelRunner._init_pools``: one pool more, and what follows the requests (``following.py``);
- ``ModelRunner.forward``: between two steps pages that have come become leaves of the model;
- ``ScheduleBatch._merge_multimodal``: what a request asks for, in the place of positions in pictures
  (``mrope_positions``), which the engine sends along where a model has ``mrope_position_axes``;
- ``Req.__init__``: the key of its prefix, which says the variant, and the plan where that changes;
- ``ReqToTokenPool.free``: a request leaves its place;
- ``Scheduler.get_internal_state``: what ``GET /dynamo/state`` answers;
- ``TokenizerManager._validate_one_request`` and ``OpenAIServingBase.handle_request``: a request for a variant that
  there is not is an error of its own, of a stream before it begins;
- ``GenerateReqInput.__getitem__``: of a body with several prompts, which loses ``extra_key``;
- ``ScheduleBatch._merge_cache_loc``: it fills one buffer again for each step, which the step before may still read
  where arrays on the device share memory with the host's, as on a CPU.

Axes: N tokens of a step, R requests of it, B places for requests, H query heads, J heads of keys and values.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int
from sgl_jax.srt.entrypoints import http_server
from sgl_jax.srt.entrypoints.openai.serving_base import OpenAIServingBase
from sgl_jax.srt.layers.logits_processor import LogitsProcessor
from sgl_jax.srt.layers.radix_attention import RadixAttention
from sgl_jax.srt.managers.io_struct import GenerateReqInput
from sgl_jax.srt.managers.schedule_batch import Req, ScheduleBatch
from sgl_jax.srt.managers.scheduler import Scheduler
from sgl_jax.srt.managers.tokenizer_manager import TokenizerManager
from sgl_jax.srt.mem_cache.memory_pool import MemoryPools, ReqToTokenPool
from sgl_jax.srt.model_executor.model_runner import ModelRunner
from sgl_jax.srt.models.registry import ModelRegistry
from sgl_jax.srt.server_args import ServerArgs
from sgl_jax.srt.utils import kill_process_tree

from dynamo_jax.engines.following import Following, report_of
from dynamo_jax.engines.steps import asked, form_of, place_of_tokens, wrap
from dynamo_jax.engines.variants import AUTO, Variants, architectures_of
from dynamo_jax.files import read_json
from dynamo_jax.models.attention import Attends
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.adapt import check_limit
from dynamo_jax.runtime.mesh import DATA, MODEL, Placement
from dynamo_jax.runtime.monitor import Watch
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.storage import checkpoint

WHOLE, TOKENS, HEADS = P(), P("data", None), P("data", "tensor", None)


class Running(NamedTuple):
    """What the scheduler of this process serves."""

    variants: Variants
    following: Following
    figures: Any  # ``figures.Figures``, None where the engine gives no metrics


VARIANT, COMES = range(2)  # what travels with a token: its request's variant, and 1 where that takes a place anew
POOL = "requests"
ENGINE = "sglang-jax"
_served: dict[str, Variants] = {}  # by architecture
_limits: dict[str, Any] = {}  # of what adaptation may read
_loaded: dict[Path, tuple[QuantizedModel, serving.Host, serving.State]] = {}  # until there are pools
_running: Running | None = None


def register(variants: Variants, batch: int | None = None, reads: float = 1.0) -> None:
    """Have the engines of this process serve these variants, whenever one is asked for the model's architecture.

    batch, reads: as ``online.Follower`` takes them. A server runs its scheduler in a process of its own, which needs
    this, too (``sglang_server``).
    """
    check_limit(1 if batch is None else batch, reads)
    _limits.update(batch=batch, reads=reads)
    for name in architectures_of(variants, read_json(variants.folder / "config.json")):
        ModelRegistry.models[name] = Served
        _served[name] = variants
    for owner, name, hook in _HOOKS:
        wrap(owner, name, hook)


def launch(variants: Variants, options: list[str]) -> None:
    """Run the engine's OpenAI server with its own command-line options until it is stopped. ValueError: a model or an
    option that this module cannot serve."""
    ours = ["--model-path", str(variants.folder), "--disable-hybrid-swa-memory"]  # one pool for all windows
    given = ServerArgs.from_cli([*ours, *options])
    _check_options(given)
    form_of(checkpoint.read_description(variants.folder).config, ENGINE)
    http_server.app.add_api_route("/dynamo/state", _state, methods=["GET"])
    try:
        http_server.launch(given)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


@jax.tree_util.register_pytree_node_class
class Requests:
    """The pool of the monitors of requests, one for each place; none where no dataset is known."""

    def __init__(self, watch: Watch | None):
        self.watch = watch

    def replace_buffer(self, after: Watch | None) -> None:
        """Take what a step gave back."""
        self.watch = after

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return (self.watch,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Requests:
        return cls(*children)


class Logits(LogitsProcessor):
    """The engine's, with the logits of our decoder."""

    def _get_logits(self, hidden_states: Array, lm_head: Any) -> Array:
        logits = lm_head.logits(_on(self.mesh, hidden_states, WHOLE)[None])[0]
        return _on(self.mesh, logits, P("data", "tensor"))


class Served(nnx.Module):
    """A quantized model as the engine runs one."""

    def __init__(self, config: Any, mesh: Mesh, dtype: Any = jnp.bfloat16):
        self.mesh, self.dtype = mesh, dtype
        self.variants = _served[config.architectures[0]]
        self.mrope_position_axes = 2

    def load_weights(self, model_config: Any) -> None:
        """Fill this with the model of the folder. Experts, or their channel blocks, are split over the devices;
        everything else is whole on each. ValueError: the folder is damaged, has attention that the engine's pool of
        keys and values cannot hold, or does not divide over the devices."""
        model, variants = checkpoint.load(self.variants.folder), self.variants
        pool = model_config.get_total_num_kv_heads(), model_config.head_dim
        if (form := form_of(model.config, ENGINE)) != pool:
            raise ValueError(f"layers have {form} heads of keys and their size, the engine's pool {pool}")
        _, tensor = self.mesh.devices.shape
        for what, count in (("heads of keys", form[0]), ("token ids", model.config.vocab_size)):
            if count % tensor:
                raise ValueError(f"{count} {what} do not divide over {tensor} devices")
        own = Placement.of(Mesh(self.mesh.devices, (DATA, MODEL)), model.config.num_experts, model.plan.blocks)
        self.placement = own and dataclasses.replace(
            own, mesh=self.mesh, experts=_renamed(own.experts), blocks=_renamed(own.blocks)
        )
        slots, others = variants.slots(model.plan, model.spare, own), variants.plans(model.plan)
        many = 1 + len(others)
        host, state = serving.init(model, variants=many, slots=slots, others=others, placement=own)
        if not variants.watched:
            state = state._replace(signatures=None, watch=None)
        parameters = model.device_parameters(self.dtype)
        if own is None:  # what measures a text takes the same arrays
            model = dataclasses.replace(model, parameters=parameters)
        _loaded[variants.folder] = model, host, state
        self.config = model.config
        self.parameters = nnx.Variable(self.shown(parameters))
        self.experts = nnx.Variable(self.shown(_of_experts(state)))
        self.number = nnx.Variable(self.shown(jnp.zeros(1, jnp.int32)))  # of as many as there are places
        self.logits = Logits(model.config.vocab_size, mesh=self.mesh)

    def shown(self, tree: Any) -> Any:
        """Arrays as the engine's steps take them; they are the same bytes."""

        def sharding(a: Array) -> NamedSharding:
            spec = a.sharding.spec if isinstance(a.sharding, NamedSharding) else WHOLE
            return NamedSharding(self.mesh, P(*map(_renamed, spec)))

        return jax.tree.map(lambda a: jax.device_put(a, sharding(a)), tree)

    def monitors(self, watch: Watch | None) -> Requests:
        """The pool, placed as steps give it back, else the second one is compiled again."""
        return Requests(jax.tree.map(lambda a: jax.device_put(a, NamedSharding(self.mesh, P(*[None] * a.ndim))), watch))

    def __call__(self, batch: Any, pools: Any, logits_metadata: Any) -> tuple[Any, dict[str, Any], Any, list[Any]]:
        """A step of the engine: its output, the pools after it, what it says of the requests, where the engine's own
        models say nothing that it reads, and the experts of each token in each layer."""
        resident, tables, signatures = self.experts.get_value()
        watch = getattr(pools, POOL).watch
        tokens, place_of, told = _on(self.mesh, batch.input_ids, WHOLE), _place_of(self.mesh, batch), self._told(batch)
        state = serving.State(resident, tables, self.number.get_value(), signatures, watch)
        state, comes = asked(state, place_of, told[VARIANT], told[COMES] == 1)
        decoder = with_parameters(self.config, self.parameters.get_value())
        caches = [self._attends(index, batch, pools) for index in range(len(self.config.layers))]
        hidden, routings, keys_and_values = decoder.ragged_states(
            tokens,
            _on(self.mesh, batch.positions, WHOLE),
            caches,
            experts=serving.experts(state._replace(placement=self.placement), request_of=place_of),
            dtype=self.dtype,
        )
        state = serving.observe(state, routings, request_of=place_of)
        output = self.logits(_on(self.mesh, hidden, TOKENS), decoder, logits_metadata)
        after = {"token_to_kv_pool": list(keys_and_values), POOL: state.watch}
        chosen = iter(routings)
        experts = [next(chosen).experts if i in self.config.moe_layers else None for i in range(len(caches))]
        return output, after, report_of(state, place_of, tokens, comes), experts

    def _told(self, batch: Any) -> Int[Array, "2 N"]:
        return _on(self.mesh, batch.mrope_positions, WHOLE)

    def _attends(self, index: int, batch: Any, pools: Any) -> Attends:
        """The engine's attention, of layer ``index``."""

        def attend(q: Array, k: Array, v: Array, scale: float, window: int, sinks: Array | None) -> tuple[Array, Array]:
            heads, size, of_values = q.shape[2], q.shape[3], v.shape[3]
            v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, size - of_values)))  # its pool has one size for both
            q, k, v = (_on(self.mesh, a[0], HEADS) for a in (q, k, v))
            layer = RadixAttention(heads, size, scale, k.shape[1], index, sliding_window_size=window)
            own = {} if sinks is None else {"attention_sink": sinks.astype(jnp.float32)}
            out, after = layer(q, k, v, batch, pools.token_to_kv_pool, **own)
            out = _on(self.mesh, out, WHOLE).reshape(1, len(q), heads, -1)
            return out[..., :of_values].astype(self.dtype), after

        return attend


def _on(mesh: Mesh, a: Array, spec: P) -> Array:
    """The array as the engine's functions, which run under explicit sharding, want it."""
    return jax.sharding.reshard(a, NamedSharding(mesh, spec))


def _check_options(given: Any) -> None:
    """ValueError for what the engine can do and this module not yet."""
    for name in ("dp_size", "ep_size", "nnodes"):
        if (found := getattr(given, name)) != 1:
            raise ValueError(f"{name} {found}: tp_size alone splits a quantized model, its experts and its attention")
    for name in ("speculative_algorithm", "enable_lora", "multimodal", "quantization_config_path"):
        if getattr(given, name):
            raise ValueError(f"{name}: not beside a model that dynamo-jax quantized")


def _place_of(mesh: Mesh, batch: Any) -> Int[Array, " N"]:
    """The place of the request that each token is of, -1 for padding."""
    places = _on(mesh, batch.req_pool_indices, WHOLE)
    if batch.forward_mode.is_decode():
        return jnp.where(_on(mesh, batch.seq_lens, WHOLE) > 0, places, -1)
    ends = jnp.cumsum(_on(mesh, batch.extend_seq_lens, WHOLE))
    return place_of_tokens(jnp.concatenate([jnp.zeros(1, ends.dtype), ends]), places, batch.input_ids.shape[0])


def _renamed(axes: Any) -> Any:
    """Axes of our mesh by the engine's names; a name, several, or None."""
    if isinstance(axes, tuple):
        return tuple(map(_renamed, axes))
    return "tensor" if axes == MODEL else axes


def _of_experts(state: serving.State) -> tuple[Any, ...]:
    """What of the state is the same in each step until pages move."""
    return state.resident, state.tables, state.signatures


def _pools(original: Callable[..., None], runner: Any, *given: Any) -> None:
    global _running
    original(runner, *given)
    if not isinstance(served := runner.model, Served):
        return
    model, host, state = _loaded.pop(served.variants.folder)
    state = serving.begun(state, runner.req_to_token_pool.size)
    served.number.set_value(served.shown(state.number))
    pool = {POOL: served.monitors(state.watch)}
    runner.memory_pools = MemoryPools(token_to_kv_pool=runner.token_to_kv_pool, **pool)
    following = Following(model, host, state._replace(watch=None), served.variants.adapts, **_limits)
    _running = Running(served.variants, following, _figures() if runner.server_args.enable_metrics else None)
    following.warm()
    _show(runner, following.state)
    step = runner.jitted_run_model

    def told(*given: Any) -> Any:
        output, after, report, experts = step(*given)
        if report is not None:
            following.told(report)
        return output, after, True, experts

    runner.jitted_run_model = told


def _figures() -> Any:
    from dynamo_jax.engines.figures import Figures  # the engine has said by now where several processes meet

    return Figures()


def _show(runner: Any, state: serving.State) -> None:
    """Give the next steps the experts of this state."""
    runner.model.experts.set_value(runner.model.shown(_of_experts(state)))
    runner.model_state_leaves = jax.tree.leaves(nnx.split(runner.model)[1])


def _forward(original: Callable[..., Any], runner: Any, *given: Any, **named: Any) -> Any:
    if _running is not None and isinstance(runner.model, Served):
        if _running.following.between():
            _show(runner, _running.following.state)
        if _running.figures is not None:
            _running.figures.told(_running.following)
    return original(runner, *given, **named)


def _told_of(original: Callable[..., dict[str, Any]], batch: Any, stride: int, total: int) -> dict[str, Any]:
    out = original(batch, stride, total)
    if batch.model_config.hf_config.architectures[0] not in _served or _running is None:
        return out
    following = _running.following
    told = np.zeros((2, total), np.int32)
    owners = batch.req_to_token_pool.__dict__.setdefault("of_dynamo_jax", {})
    (info,) = batch.reqs_info
    running, begin = info.reqs or [], 0
    lengths = [1] * len(running) if batch.forward_mode.is_decode() else info.extend_lens
    for request, place, length in zip(running, map(int, info.req_pool_indices), lengths):
        wanted = request.of_dynamo_jax
        if comes := owners.get(place) != request.rid:
            owners[place] = request.rid
            following.comes(place, wanted == AUTO)
        told[VARIANT, begin : begin + length] = following.number_at(place) if wanted == AUTO else wanted
        told[COMES, begin : begin + length] = comes
        begin += length
    return {**out, "mrope_positions": told}


def _comes(original: Callable[..., None], request: Any, *given: Any, **named: Any) -> None:
    original(request, *given, **named)
    if _running is not None:
        try:
            number = _running.variants.asked(request.extra_key)
        except ValueError as error:  # of a body that came another way than those that are checked before
            request.set_finish_with_abort(str(error))
            number = 0
        if _running.figures is not None:
            _running.figures.asked(number, _running.following)
        request.of_dynamo_jax = number
        request.extra_key = _running.following.prefix_key(None if number == AUTO else number)


def _leaves(original: Callable[..., None], pool: Any, request: Any) -> None:
    if _running is not None and pool.__dict__.get("of_dynamo_jax", {}).pop(request.req_pool_idx, None):
        _running.following.leaves(request.req_pool_idx)
    original(pool, request)


def _internal(original: Callable[..., Any], scheduler: Any, question: Any) -> Any:
    answer = original(scheduler, question)
    if _running is not None:
        answer.internal_state["dynamo"] = _running.following.described()
    return answer


async def _state() -> dict[str, Any]:
    """``GET /dynamo/state``."""
    found = await http_server._global_state.tokenizer_manager.get_internal_state()
    return found[0]["dynamo"]


def _validated(original: Callable[..., None], manager: Any, request: Any, *given: Any) -> None:
    if variants := _served.get(manager.model_config.hf_config.architectures[0]):
        variants.asked(getattr(request, "extra_key", None))
    original(manager, request, *given)


async def _answered(original: Callable[..., Any], client: Any, request: Any, raw: Any) -> Any:
    if variants := _served.get(client.tokenizer_manager.model_config.hf_config.architectures[0]):
        try:
            variants.asked(getattr(request, "extra_key", None))
        except ValueError as error:
            return client.create_error_response(str(error))
    return await original(client, request, raw)


def _one_of(original: Callable[..., Any], body: Any, number: int) -> Any:
    one = original(body, number)
    one.extra_key = body.extra_key[number] if isinstance(body.extra_key, list) else body.extra_key
    return one


def _copied(original: Callable[..., np.ndarray], *given: Any) -> np.ndarray:
    return original(*given).copy()


_HOOKS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (ModelRunner, "_init_pools", _pools),
    (ModelRunner, "forward", _forward),
    (Req, "__init__", _comes),
    (ReqToTokenPool, "free", _leaves),
    (Scheduler, "get_internal_state", _internal),
    (ScheduleBatch, "_merge_multimodal", _told_of),
    (TokenizerManager, "_validate_one_request", _validated),
    (OpenAIServingBase, "handle_request", _answered),
    (GenerateReqInput, "__getitem__", _one_of),
    (ScheduleBatch, "_merge_cache_loc", _copied),
)
