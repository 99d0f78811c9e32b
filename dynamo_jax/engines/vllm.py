"""Quantized models in vLLM on TPUs: our decoder over its paged attention, each request at its own variant.

    vllm serve quantized --hf-overrides '{"architectures": ["DynamoJaxForCausalLM"]}' \
        --additional-config '{"dynamo_jax": {"variants": ["quantized-2.5"]}}' \
        --worker-extension-cls dynamo_jax.engines.vllm.WorkerExtension

vLLM calls ``register`` in each of its processes, by the entry point ``vllm.general_plugins`` of this package. A model
is ours where its architecture is ``ARCHITECTURE``; no other model is touched. Planes, parameters, and the variants and
monitors of requests are leaves of the module, arguments of the engine's jitted step. Before each step the rows of its
batch are looked up on the host: a request's variant is what its ``vllm_xargs`` say, which vLLM keeps as
``SamplingParams.extra_args``. The variant is also put into the request's ``cache_salt``, so that no prefix that was
computed at one variant serves another.

All names of the engine that are used stand here, of vllm-tpu and tpu-inference 0.26.0. The model's class is
registered as tpu-inference documents it (``register_model``), the worker extension as vLLM does
(``worker_extension_cls``); ``attention`` of ``layers.common.attention_interface`` is what its own models call. Two
functions are wrapped (``_hooks``):

- ``InputProcessor.process_inputs`` of vLLM: a request for a variant that there is not is an error of its own; others
  get their salt;
- ``TPUModelRunner.load_model`` of tpu-inference: the runner's ``model_fn`` becomes ``Steps``. That reads
  ``input_batch.req_ids`` and ``num_reqs``, ``requests``, ``mesh`` and ``state``.

Axes: N tokens of a step, R rows of a batch, B places for requests, H query heads, J heads of keys and values.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dynamo_jax.engines.steps import Places, asked, form_of, place_of_tokens, wrap
from dynamo_jax.engines.variants import Variants, variants_of
from dynamo_jax.files import shown
from dynamo_jax.models.attention import Attends
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.runtime import serving
from dynamo_jax.storage import checkpoint

ARCHITECTURE = "DynamoJaxForCausalLM"
EXTENSION = f"{__name__}.WorkerExtension"
OPTIONS = "dynamo_jax"  # our part of vLLM's additional_config
KEY = "variant"  # of a request's vllm_xargs
PLACE, VARIANT, COMES = range(3)  # of each row of a batch: its place, its variant, and 1 where it takes the place anew


def register() -> None:
    """Have vLLM know our models, in the process that calls this. Nothing happens where its backend for TPUs is not
    installed, since that alone runs JAX models."""
    if importlib.util.find_spec("tpu_inference") is None:
        return
    from tpu_inference.models.common.model_loader import register_model

    register_model(ARCHITECTURE, Served)
    for owner, name, hook in _hooks():
        wrap(owner, name, hook)


def arguments(folder: str, others: Sequence[str], options: Sequence[str]) -> list[str]:
    """Of Python, to run the engine's OpenAI server with this model and its variants. options: the server's own.

    ValueError: an option among these that says what is said here.
    """
    own = {
        "--hf-overrides": json.dumps({"architectures": [ARCHITECTURE]}),
        "--additional-config": json.dumps({OPTIONS: {"variants": list(others)}}),
        "--worker-extension-cls": EXTENSION,
    }
    for option in options:
        if (name := re.split("[=.]", option.replace("_", "-"))[0]) in own:
            raise ValueError(f"{name}: dynamo-jax serve gives this option; start vllm serve to give another")
    words = [word for pair in own.items() for word in pair]
    return ["-m", "vllm.entrypoints.cli.main", "serve", folder, *words, *options]


class Served(nnx.Module):
    """A quantized model as tpu-inference runs one."""

    def __init__(self, vllm_config: Any, rng_key: Any, mesh: Mesh):
        _check(vllm_config, mesh)
        self.mesh, self.dtype = mesh, vllm_config.model_config.dtype
        self.folder, self.others = _folders(vllm_config)
        self.places = vllm_config.scheduler_config.max_num_seqs
        self.pool = vllm_config.model_config.get_total_num_kv_heads(), vllm_config.model_config.get_head_size()

    def load_weights(self, rng_key: Any) -> None:
        """Fill this with the model of the folder. ValueError: it is damaged, or has attention that the engine's pool of
        keys and values cannot hold."""
        model, variants = checkpoint.load(self.folder), _variants(self.folder, self.others)
        if (form := form_of(model.config, "vLLM")) != self.pool:
            raise ValueError(f"layers have {form} heads of keys and their size, the engine's pool {self.pool}")
        slots, others = variants.slots(model.plan, model.spare), variants.others
        many = 1 + len(others)
        _, state = serving.init(model, requests=self.places, variants=many, slots=slots, others=others)
        state = serving.begun(state, self.places)
        self.config = model.config
        kept = model.device_parameters(self.dtype), state._replace(number=jnp.zeros(0, jnp.int32), watch=None)
        self.kept = nnx.Variable(self._placed(kept))
        self.requests = nnx.Variable(self._placed((state.number, state.watch)))
        self.told = nnx.Variable(self._placed(nothing_told(self.places)))

    def __call__(
        self, kv_caches: list[Array], input_ids: Int[Array, " N"], attention_metadata: Any, *given: Any
    ) -> tuple[list[Array], Float[Array, "N D"], list[Array], Any]:
        """A step of the engine: keys and values, hidden states, nothing, and variants and monitors after it."""
        parameters, state = self.kept.get_value()
        number, watch = self.requests.get_value()
        told = self.told.get_value()
        state = state._replace(number=number, watch=watch)
        state, _ = asked(state, told[PLACE], told[VARIANT], told[COMES] == 1)
        place_of = place_of_tokens(attention_metadata.query_start_loc, told[PLACE], len(input_ids))
        decoder = with_parameters(self.config, parameters)
        at = {name: index for name, index in given[2]}  # of each layer, its keys and values
        order = [at[f"layer.{index}"] for index in range(len(self.config.layers))]
        hidden, routings, after = decoder.ragged_states(
            input_ids,
            attention_metadata.input_positions,
            [self._attends(kv_caches[index], attention_metadata) for index in order],
            experts=serving.experts(state, request_of=place_of),
            dtype=self.dtype,
        )
        state = serving.observe(state, routings, request_of=place_of)
        caches = list(kv_caches)
        for index, cache in zip(order, after):
            caches[index] = cache
        whole = NamedSharding(self.mesh, P())
        return caches, hidden, [], jax.lax.with_sharding_constraint((state.number, state.watch), whole)

    def compute_logits(self, hidden_states: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Logits, float32, of hidden states that a step gave."""
        return with_parameters(self.config, self.kept.get_value()[0]).logits(hidden_states[None])[0]

    def modules(self) -> list[Any]:
        """None: vLLM asks when it ends."""
        return []

    def _placed(self, arrays: Any) -> Any:
        return jax.device_put(arrays, NamedSharding(self.mesh, P()))

    def _attends(self, cache: Array, metadata: Any) -> Attends:
        """The engine's attention to the keys and values of one layer."""
        from tpu_inference.layers.common import attention_interface
        from tpu_inference.utils import get_padded_head_dim

        def attend(q: Array, k: Array, v: Array, scale: float, window: int, sinks: Array | None) -> tuple[Array, Array]:
            size, of_values = q.shape[3], v.shape[3]
            full = get_padded_head_dim(size)
            q, k, v = (jnp.pad(a[0], ((0, 0), (0, 0), (0, full - a.shape[3]))) for a in (q, k, v))
            after, out = attention_interface.attention(
                cache,
                q,
                k,
                v,
                metadata,
                self.mesh,
                head_dim_original=size,
                sm_scale=scale,
                attention_chunk_size=window or None,
                sinks=None if sinks is None else sinks.astype(jnp.float32),
            )
            return out.reshape(1, *q.shape)[..., :of_values].astype(self.dtype), after

        return attend


class Steps:
    """What a runner calls for a step: it tells the model which requests are in the batch, and keeps their variants and
    monitors from step to step. chosen: variants that ``dynamo_switch`` gave."""

    def __init__(self, runner: Any, variants: Variants):
        self.runner, self.variants, self.step = runner, variants, runner.model_fn
        self.places, self.chosen = Places(runner.model.places), dict[str, int]()
        paths, _ = jax.tree_util.tree_flatten_with_path(runner.state)
        at: dict[str, list[int]] = {"kept": [], "requests": [], "told": []}
        for index, (path, _) in enumerate(paths):
            at[path[0].key].append(index)
        self.at = at
        self.requests = runner.model.requests.get_value()

    def __call__(self, leaves: tuple[Any, ...], *given: Any, **named: Any) -> tuple[Any, Any, Any, None]:
        """A step with the leaves of the model, of which those that change from step to step are put in here."""
        told = jax.device_put(self.told(), NamedSharding(self.runner.mesh, P()))
        changed = {**dict(zip(self.at["requests"], jax.tree.leaves(self.requests))), self.at["told"][0]: told}
        leaves = tuple(changed.get(index, leaf) for index, leaf in enumerate(leaves))
        caches, hidden, beside, self.requests = self.step(leaves, *given, **named)
        return caches, hidden, beside, None

    def told(self) -> Int[np.ndarray, "3 B"]:
        """Of each row of the batch that comes its place, its variant, and whether it takes the place anew."""
        told, alive = nothing_told(self.runner.model.places), self.runner.requests
        present = self.runner.input_batch.req_ids[: self.runner.input_batch.num_reqs]
        for row, (name, (place, comes)) in enumerate(zip(present, self.places.take(present, alive))):
            again = alive[name].num_computed_tokens == 0  # it was preempted, and begins anew
            told[:, row] = place, self.variant_of(name), comes or again
        self.chosen = {name: number for name, number in self.chosen.items() if name in alive}
        return told

    def variant_of(self, name: str) -> int:
        """The variant of a request that runs."""
        params = self.runner.requests[name].sampling_params
        return self.chosen[name] if name in self.chosen else number_of(self.variants, params)


class WorkerExtension:
    """What ``collective_rpc`` offers of our models, in addition to vLLM's own: ``--worker-extension-cls``."""

    model_runner: Any
    vllm_config: Any

    def dynamo_state(self) -> dict[str, dict[str, Any]]:
        """Of each request that has a place: its variant, and the label and the score of its monitor, None where nobody
        watches. ValueError: the model is not ours."""
        steps = self._dynamo_steps()
        watch = jax.device_get(steps.requests[1])
        return {
            name: {
                "variant": steps.variant_of(name),
                "label": None if watch is None else int(watch.label[place]),
                "score": None if watch is None else float(watch.score[place]),
            }
            for name, place in steps.places.of.items()
            if name in steps.runner.requests
        }

    def dynamo_switch(self, request: str, variant: int) -> None:
        """Have a request that runs, named as ``dynamo_state`` names it, go on at another variant.

        ValueError: no such request or variant, or the prefix cache is on, in which what follows would lie under the
        variant that the request began with; or the model is not ours.
        """
        steps = self._dynamo_steps()
        if self.vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("dynamo_switch: needs --no-enable-prefix-caching, since a prefix is of one variant")
        if request not in steps.runner.requests:
            raise ValueError(f"dynamo_switch: no request {shown(request)} runs")
        steps.chosen[request] = _checked(steps.variants, variant)

    def _dynamo_steps(self) -> Steps:
        steps = self.model_runner.model_fn
        if not isinstance(steps, Steps):
            raise ValueError(f"the model is no {ARCHITECTURE}")
        return steps


def nothing_told(places: int) -> Int[np.ndarray, "3 B"]:
    """What a step is told of an empty batch."""
    told = np.zeros((3, places), np.int32)
    told[PLACE] = -1
    return told


def number_of(variants: Variants, params: Any) -> int:
    """The variant that a request's parameters name; the baseline where they name none. ValueError: no such variant."""
    return _checked(variants, (getattr(params, "extra_args", None) or {}).get(KEY, 0))


def _checked(variants: Variants, number: Any) -> int:
    last = len(variants.others)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= last:
        raise ValueError(f"{KEY} {shown(number)}: expected a whole number from 0 to {last}")
    return number


def _folders(vllm_config: Any) -> tuple[str, tuple[str, ...]]:
    """The model's folder, and those of its other variants. ValueError: options that are not known."""
    options = (vllm_config.additional_config or {}).get(OPTIONS, {})
    others = options.get("variants", []) if isinstance(options, dict) else None
    if not isinstance(others, list) or set(options) - {"variants"} or not all(isinstance(o, str) for o in others):
        raise ValueError(f'additional_config: {OPTIONS} is {shown(options)}, expected {{"variants": [FOLDER, ..]}}')
    return vllm_config.model_config.model, tuple(others)


@functools.lru_cache
def _variants(folder: str, others: tuple[str, ...]) -> Variants:
    return variants_of(folder, others, adapts=False)


def _check(vllm_config: Any, mesh: Mesh) -> None:
    """ValueError for what the engine can do and this module not yet."""
    if mesh.size > 1:
        raise ValueError(f"a mesh of {mesh.size} devices: quantized models are served by one so far")
    for name in ("speculative_config", "lora_config", "kv_transfer_config"):
        if getattr(vllm_config, name):
            raise ValueError(f"{name}: not beside a model that dynamo-jax quantized")
    if vllm_config.load_config.load_format == "dummy":
        raise ValueError("load_format dummy: a quantized model is read from its folder")
    if (found := vllm_config.cache_config.cache_dtype) != "auto":
        raise ValueError(f"kv_cache_dtype {found}: keys and values are of the model's dtype so far (auto)")
    if (vllm_config.additional_config or {}).get("enable_continue_decode"):
        raise ValueError("enable_continue_decode: variants are told to each step, so not yet")


def _hooks() -> tuple[tuple[type, str, Callable[..., Any]], ...]:
    from tpu_inference.runner.tpu_runner import TPUModelRunner
    from vllm.v1.engine.input_processor import InputProcessor

    return (InputProcessor, "process_inputs", _processed), (TPUModelRunner, "load_model", _loaded)


def _processed(original: Callable[..., Any], processor: Any, name: str, prompt: Any, params: Any, **named: Any) -> Any:
    if ARCHITECTURE not in (processor.model_config.hf_config.architectures or []):
        return original(processor, name, prompt, params, **named)
    number = number_of(_variants(*_folders(processor.vllm_config)), params)
    request = original(processor, name, prompt, params, **named)
    request.cache_salt = f"{KEY}={number} {request.cache_salt or ''}"
    return request


def _loaded(original: Callable[..., None], runner: Any, *given: Any, **named: Any) -> None:
    original(runner, *given, **named)
    if isinstance(runner.model, Served):
        runner.model_fn = Steps(runner, _variants(runner.model.folder, runner.model.others))
