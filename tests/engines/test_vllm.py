"""vLLM's backend for TPUs with quantized models. What needs no engine is tested everywhere; the names of vLLM that we
use where it is installed; the server where ``vllm_on_cpu`` stands in for a TPU (``make vllm-test``)."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import types

import jax
import numpy as np
import pytest
from servers import Served
from small_models import CONFIGS, PROMPTS, own_texts, quantized_folders

from dynamo_jax.engines import vllm
from dynamo_jax.engines.variants import variants_of
from dynamo_jax.storage import checkpoint

engine = pytest.mark.skipif(importlib.util.find_spec("tpu_inference") is None, reason="tpu_inference is not installed")
on_cpu = pytest.mark.skipif(importlib.util.find_spec("vllm_on_cpu") is None, reason="make vllm-test")


@pytest.fixture(scope="module")
def folders(quantized, tmp_path_factory):
    """A model, and it at 2 bits."""
    folder, plan = tmp_path_factory.mktemp("variants"), quantized.plan
    low = dataclasses.replace(quantized, plan=dataclasses.replace(plan, widths=np.full_like(plan.widths, 2)))
    for name, model in (("base", quantized), ("low", low)):
        checkpoint.save(folder / name, model)
    return str(folder / "base"), str(folder / "low")


@pytest.fixture
def variants(folders):
    return variants_of(folders[0], folders[1:])


def asks(variant=None):
    return types.SimpleNamespace(extra_args=None if variant is None else {"variant": variant})


def config(folders, **changes):
    """Of vLLM, as far as it is looked at."""
    model = types.SimpleNamespace(
        model=folders[0], hf_config=types.SimpleNamespace(architectures=[vllm.ARCHITECTURE]), dtype=np.float32
    )
    given = {
        "additional_config": {"dynamo_jax": {"variants": list(folders[1:])}},
        "model_config": model,
        "load_config": types.SimpleNamespace(load_format="auto"),
        "cache_config": types.SimpleNamespace(cache_dtype="auto", enable_prefix_caching=True),
        **dict.fromkeys(("speculative_config", "lora_config", "kv_transfer_config")),
    }
    return types.SimpleNamespace(**given | changes)


# Without an engine


def test_a_request_names_a_variant_or_gets_the_baseline(variants):
    assert [vllm.number_of(variants, one) for one in (asks(), asks(0), asks(1), object())] == [0, 0, 1, 0]


@pytest.mark.parametrize("variant", [2, -1, "1", True, 1.0, [1], None])
def test_a_variant_that_there_is_not_says_which_there_are(variants, variant):
    params = types.SimpleNamespace(extra_args={"variant": variant})
    with pytest.raises(ValueError, match=r"variant .*: expected a whole number from 0 to 1"):
        vllm.number_of(variants, params)


def processed(folders, variant=None, salt=None, **changes):
    """What becomes of a request in vLLM's front end."""
    given = config(folders, **changes)
    processor = types.SimpleNamespace(vllm_config=given, model_config=given.model_config)
    return vllm._processed(
        lambda *_, **__: types.SimpleNamespace(cache_salt=salt), processor, "1", "Once", asks(variant), priority=0
    ).cache_salt


def test_prefixes_of_different_variants_are_apart(folders):
    salts = [processed(folders, n, salt) for n in (0, 1) for salt in (None, "a", "b")]
    assert len(set(salts)) == len(salts) and processed(folders) == salts[0]
    with pytest.raises(ValueError, match="variant 2"):
        processed(folders, 2)


def test_other_models_are_left_alone(folders):
    model = types.SimpleNamespace(model="x", hf_config=types.SimpleNamespace(architectures=["LlamaForCausalLM"]))
    assert processed(folders, 7, "a", model_config=model) == "a"


@pytest.mark.parametrize("options", [{"variant": []}, {"variants": "x"}, {"variants": [1]}, ["x"]])
def test_options_that_are_not_known_are_shown(folders, options):
    with pytest.raises(ValueError, match=r"additional_config: dynamo_jax is .*, expected"):
        vllm._folders(config(folders, additional_config={"dynamo_jax": options}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_config": object()}, "lora_config: not beside a model that dynamo-jax quantized"),
        ({"load_config": types.SimpleNamespace(load_format="dummy")}, "load_format dummy: "),
        ({"cache_config": types.SimpleNamespace(cache_dtype="fp8")}, "kv_cache_dtype fp8: "),
        ({"additional_config": {"enable_continue_decode": True}}, "enable_continue_decode: "),
    ],
)
def test_what_the_engine_can_and_we_cannot_is_refused(folders, changes, message):
    mesh = jax.make_mesh((1,), ("model",))
    vllm._check(config(folders), mesh)
    with pytest.raises(ValueError, match=message):
        vllm._check(config(folders, **changes), mesh)
    with pytest.raises(ValueError, match="a mesh of 2 devices: quantized models are served by one so far"):
        vllm._check(config(folders), types.SimpleNamespace(size=2))


def runner(**requests):
    """A runner of vLLM whose batch has these requests, as far as it is looked at."""
    return types.SimpleNamespace(
        model_fn=None,
        state={},
        model=types.SimpleNamespace(
            places=3, requests=types.SimpleNamespace(get_value=lambda: (np.zeros(3, int), None))
        ),
        input_batch=types.SimpleNamespace(req_ids=[*requests, None], num_reqs=len(requests)),
        requests={
            name: types.SimpleNamespace(sampling_params=asks(variant), num_computed_tokens=computed)
            for name, (variant, computed) in requests.items()
        },
    )


def test_a_step_is_told_of_each_row_its_place_and_variant(variants):
    steps = vllm.Steps(runner(a=(1, 0), b=(None, 16)), variants)  # b has its first tokens from the prefix cache
    assert steps.told().tolist() == [[0, 1, -1], [1, 0, 0], [1, 1, 0]]
    steps.runner = runner(b=(None, 20), c=(0, 0), a=(1, 5))
    assert steps.told().tolist() == [[1, 2, 0], [0, 0, 1], [0, 1, 0]]
    steps.runner = runner(a=(1, 0))  # preempted: it is read again
    assert steps.told().tolist() == [[0, -1, -1], [1, 0, 0], [1, 0, 0]]


def test_a_request_that_runs_is_switched_where_no_prefix_is_kept(folders, variants):
    worker = vllm.WorkerExtension()
    worker.model_runner, worker.vllm_config = runner(a=(0, 0)), config(folders)
    with pytest.raises(ValueError, match="the model is no DynamoJaxForCausalLM"):
        worker.dynamo_state()
    worker.model_runner.model_fn = steps = vllm.Steps(worker.model_runner, variants)
    steps.told()
    with pytest.raises(ValueError, match="needs --no-enable-prefix-caching"):
        worker.dynamo_switch("a", 1)
    worker.vllm_config.cache_config.enable_prefix_caching = False
    for name, number, message in (("b", 1, "no request 'b' runs"), ("a", 2, "variant 2: expected")):
        with pytest.raises(ValueError, match=message):
            worker.dynamo_switch(name, number)
    worker.dynamo_switch("a", 1)
    assert worker.dynamo_state() == {"a": {"variant": 1, "label": None, "score": None}}
    assert steps.told()[vllm.VARIANT].tolist() == [1, 0, 0]


def test_serve_gives_the_engine_the_model_and_its_variants():
    words = vllm.arguments("/base", ["/low"], ["--port", "7"])
    assert words[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", "/base"] and words[-2:] == ["--port", "7"]
    assert json.loads(words[words.index("--additional-config") + 1]) == {"dynamo_jax": {"variants": ["/low"]}}
    for option in ("--hf-overrides", "--additional_config={}", "--additional-config.x"):
        with pytest.raises(ValueError, match="dynamo-jax serve gives this option"):
            vllm.arguments("/base", [], [option, "{}"])


# The names of vLLM and tpu-inference that are used


def names(function):
    return list(inspect.signature(function).parameters)


@engine
def test_vllm_finds_the_plug_in():
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="dynamo_jax")
    assert [point.value for point in found] == ["dynamo_jax.engines.vllm:register"]


@engine
def test_the_model_is_registered_as_one_that_generates_text():
    from tpu_inference.models.common.model_loader import _MODEL_REGISTRY, _VLLM_PREFERRED_ARCHITECTURES
    from vllm.model_executor.models.interfaces_base import is_text_generation_model
    from vllm.model_executor.models.registry import ModelRegistry

    for _ in range(2):
        vllm.register()
    assert _MODEL_REGISTRY[vllm.ARCHITECTURE] is vllm.Served
    assert vllm.ARCHITECTURE not in _VLLM_PREFERRED_ARCHITECTURES  # else it would be built of torch
    assert is_text_generation_model(ModelRegistry._try_load_model_cls(vllm.ARCHITECTURE))


@engine
def test_wrapped_functions_take_what_their_wrappers_hand_on():
    from tpu_inference.runner.tpu_runner import TPUModelRunner
    from vllm.v1.engine.input_processor import InputProcessor

    assert vllm._hooks()[0][:2] == (InputProcessor, "process_inputs")
    original = inspect.unwrap(InputProcessor.process_inputs)
    if original.__module__ != "dynamo_jax.engines.steps":  # no test before has registered
        assert names(original)[:4] == ["self", "request_id", "prompt", "params"]
    assert callable(TPUModelRunner.load_model)


@engine
def test_what_is_read_of_a_request_and_of_a_batch_is_there():
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    from tpu_inference.runner.input_batch import CachedRequestState, InputBatch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    assert "extra_args" in SamplingParams.__struct_fields__ and "cache_salt" in EngineCoreRequest.__struct_fields__
    fields = {field.name for field in dataclasses.fields(CachedRequestState)}
    assert {"sampling_params", "num_computed_tokens"} <= fields
    assert {"input_positions", "query_start_loc"} <= {field.name for field in dataclasses.fields(AttentionMetadata)}
    assert isinstance(InputBatch.req_ids, property) and isinstance(InputBatch.num_reqs, property)


@engine
def test_attention_takes_what_we_give_it():
    from tpu_inference.layers.common.attention_interface import attention
    from tpu_inference.utils import get_padded_head_dim

    wanted = ["kv_cache", "q", "k", "v", "attention_metadata", "mesh", "head_dim_original", "sm_scale"]
    assert names(attention)[:8] == wanted and {"attention_chunk_size", "sinks"} <= set(names(attention))
    assert [get_padded_head_dim(size) for size in (32, 64, 128)] == [128, 64, 128]


@engine
def test_the_worker_has_room_for_what_we_add():
    from tpu_inference.worker.tpu_worker import TPUWorker

    assert not [name for name in dir(vllm.WorkerExtension) if not name.startswith("__") and hasattr(TPUWorker, name)]


# The server, on a CPU with stand-ins


ENGINE = """--engine vllm --requests 4 --dtype float32 --max-model-len 256 --max-num-batched-tokens 64 --block-size 16
--num-gpu-blocks-override 64""".split()
NEW = 12


class Server(Served):
    """``dynamo-jax serve --engine vllm`` on a free port of this machine."""

    def __init__(self, base, other, log):
        changes = {"VLLM_XLA_CHECK_RECOMPILATION": "1", "VLLM_NO_USAGE_STATS": "1"}
        super().__init__(base, other, log, ENGINE, changes)
        self.name = str(base)

    def wait(self, seconds=900):
        return super().wait(seconds)

    def post(self, prompt, variant=None, **body):
        """The status and what the server answers."""
        body = {"model": self.name, "prompt": prompt, "temperature": 0, "max_tokens": NEW, "ignore_eos": True, **body}
        if variant is not None:
            body["vllm_xargs"] = {"variant": variant}
        status, answer = self.completed(body, 300)
        return status, answer.decode()

    def texts(self, numbers):
        """Of all prompts, sent at once, each at its variant; None says nothing of it."""
        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = pool.map(lambda given: self.post(*given), zip(PROMPTS, numbers))
            return [json.loads(answer)["choices"][0]["text"] for _, answer in answers]


@pytest.fixture(scope="module", params=CONFIGS)
def served(request, texts, tmp_path_factory):
    """A running server, and what our own generation gives for each prompt at each variant."""
    folder = tmp_path_factory.mktemp(request.param)
    folders = quantized_folders(request.param, texts, folder)
    wanted = own_texts(*folders, NEW)
    server = Server(*folders, folder / "log")
    try:
        server.wait()
        yield server, wanted
    finally:
        server.stop()


@engine
@on_cpu
def test_each_request_of_a_batch_gets_the_tokens_of_its_variant(served):
    """And no step is compiled after the start, which VLLM_XLA_CHECK_RECOMPILATION makes an error."""
    server, wanted = served
    assert sum(a != b for a, b in zip(*wanted)) >= 3
    for numbers in ([0, 1, 1, 0], [1, 0, 0, 1], [None, None, 1, None]):  # the last ones from the prefix cache
        assert server.texts(numbers) == [wanted[n or 0][i] for i, n in enumerate(numbers)], numbers


@engine
@on_cpu
def test_an_unknown_variant_is_an_error_of_its_request_alone(served):
    server, wanted = served
    for more in ({}, {"prompt": PROMPTS[:2]}):
        status, answer = server.post(**{"prompt": PROMPTS[0], "variant": 2, **more})
        assert status == 400 and "variant 2: expected a whole number from 0 to 1" in answer, more
    status, answer = server.post(PROMPTS[0], 2, stream=True)
    assert status == 200 and answer.startswith("data: ") and "variant 2: expected a whole number" in answer
    assert server.texts([0, 0, 0, 0]) == wanted[0]
