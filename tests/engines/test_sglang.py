"""The server of sglang-jax with quantized models: every request gets the tokens of its own variant."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import time
import types
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sgl_jax")

from servers import Served
from sgl_jax.srt.model_executor.forward_batch_info import ForwardMode
from sgl_jax.srt.server_args import ServerArgs
from small_models import CONFIGS, PROMPTS, own_texts, quantized_folders

from dynamo_jax.engines import sglang
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.tokenizer import load_tokenizer

ENGINE = """--requests 4 --dtype float32 --device cpu --max-total-tokens 2048 --context-length 512
--max-prefill-tokens 64 --chunked-prefill-size 64 --precompile-bs-paddings 4 --precompile-token-paddings 64
--skip-server-warmup --enable-metrics""".split()
NEW = 12


class Server(Served):
    """``dynamo-jax serve`` on a free port of this machine."""

    def __init__(self, base, other, log, devices=1):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        super().__init__(base, other, log, [*ENGINE, "--tp-size", devices], {"XLA_FLAGS": flags})

    def wait(self, seconds=240):
        return super().wait(seconds)

    def post(self, **body):
        """The status and what the server answers."""
        body = {"model": "base", "temperature": 0, "max_tokens": NEW, "ignore_eos": True, **body}
        status, answer = self.completed(body, 120)
        return status, json.loads(answer)

    def state(self):
        with urllib.request.urlopen(f"{self.url}/dynamo/state", timeout=60) as answer:
            return json.load(answer)

    def texts(self, numbers, prompts=PROMPTS):
        """Of all prompts, sent at once, each at its variant; None says nothing of it."""
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            bodies = [
                {"prompt": prompt} | ({} if number is None else {"extra_key": f"variant={number}"})
                for prompt, number in zip(prompts, numbers)
            ]
            return [answer["choices"][0]["text"] for _, answer in pool.map(lambda body: self.post(**body), bodies)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ep-size 2", "ep_size 2: tp_size alone splits a quantized model"),
        ("--enable-lora", "enable_lora: not beside a model that dynamo-jax quantized"),
    ],
)
def test_what_the_engine_can_and_we_cannot_is_refused_before_the_start(words, message):
    options = ServerArgs.from_cli(["--model-path", "x", "--device", "cpu", *words.split()])
    with pytest.raises(ValueError, match=message):
        sglang._check_options(options)


@pytest.fixture
def mesh():
    """Of one device, as the engine makes it."""
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def test_a_token_is_of_the_place_of_its_request(mesh):
    places = jnp.array([2, 0, -1])
    chunk = types.SimpleNamespace(
        req_pool_indices=places,
        input_ids=jnp.zeros(6, int),
        extend_seq_lens=jnp.array([3, 1, 0]),
        forward_mode=ForwardMode.EXTEND,
    )
    assert sglang._place_of(mesh, chunk).tolist() == [2, 2, 2, 0, -1, -1]
    decode = types.SimpleNamespace(
        req_pool_indices=places,
        input_ids=jnp.zeros(3, int),
        seq_lens=jnp.array([4, 9, 0]),
        forward_mode=ForwardMode.DECODE,
    )
    assert sglang._place_of(mesh, decode).tolist() == [2, 0, -1]


@contextlib.contextmanager
def running(folders, folder, devices=1):
    """A server, and what our own generation gives."""
    server = Server(*folders, folder / "log", devices)
    try:
        wanted = own_texts(*folders, NEW)
        server.wait()
        yield server, wanted
    finally:
        server.stop()


SERVED = [*((family, 1) for family in CONFIGS), ("qwen3_moe", 2)]


@pytest.fixture(scope="module", params=SERVED, ids=lambda p: f"{p[0]} on {p[1]}")
def served(request, texts, tmp_path_factory):
    family, devices = request.param
    folder = tmp_path_factory.mktemp(family)
    with running(quantized_folders(family, texts, folder), folder, devices) as found:
        yield found


def test_each_request_of_a_batch_gets_the_tokens_of_its_variant(served):
    server, wanted = served
    assert sum(a != b for a, b in zip(*wanted)) >= 3
    for numbers in ([0, 1, 1, 0], [1, 0, 0, 1], [None, None, 1, None]):
        assert server.texts(numbers) == [wanted[n or 0][i] for i, n in enumerate(numbers)], numbers


def check_nothing_compiled(server):
    log = server.log.read_text()
    steps = [line for line in log.splitlines() if re.search("(Prefill|Decode) batch", line)]
    assert steps and not [line for line in steps if "cache_miss" in line]


def test_no_step_is_compiled_after_the_start(served):
    server, wanted = served
    assert server.texts([1, 1, 0, 0]) == [*wanted[1][:2], *wanted[0][2:]]
    check_nothing_compiled(server)


def test_a_body_of_several_prompts_keeps_its_variant(served):
    server, wanted = served
    status, answer = server.post(prompt=PROMPTS[:2], extra_key="variant=1")
    assert status == 200 and [choice["text"] for choice in answer["choices"]] == wanted[1][:2]


def test_an_unknown_variant_is_an_error_of_its_request_alone(served):
    server, wanted = served
    for more in ({}, {"stream": True}, {"prompt": PROMPTS[:2]}):
        status, answer = server.post(**{"prompt": PROMPTS[0], "extra_key": "variant=2", **more})
        assert status == 400 and 'expected "variant=N", N from 0 to 1' in answer["message"], more
    assert server.texts([0, 0, 0, 0]) == wanted[0]


@pytest.fixture(scope="module", params=[1, 2])
def restless(request, texts, tmp_path_factory):
    """A server whose monitors call any text novel, on so many devices."""
    folder = tmp_path_factory.mktemp("restless")
    with running(quantized_folders("qwen3_moe", texts, folder, all_novel=True), folder, request.param) as found:
        yield found


def test_adaptation_under_load_changes_nothing_for_requests_that_name_their_variant(restless):
    """Long requests that name none are novel, and a variant is adapted to them, meanwhile others go on."""
    server, wanted = restless
    long = np.random.default_rng(1).integers(10, 8000, 400).tolist()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            novel = pool.submit(server.post, prompt=[*long[::-1]], max_tokens=60)
            while not novel.done():
                assert server.texts([0, 1, 0, 1]) == [wanted[n][i] for i, n in enumerate([0, 1, 0, 1])]
            assert novel.result()[0] == 200
            found = server.state()
            if found["totals"].get("adapted", 0) + found["totals"].get("not better", 0):
                break
    assert found["totals"]["novel"] and found["plans"] and found["adapts"], found
    happened = {event["what"] for event in found["events"]}  # "known": a short request may be said to be that again
    assert "failed" not in found["totals"] and happened <= {"novel", "known", "adapted", "not better"}
    check_nothing_compiled(server)


def test_two_hundred_requests_get_their_tokens_from_a_server_that_was_killed_before(texts, tmp_path):
    """Of different lengths, kinds and variants, all at once; the first server dies with requests in it."""
    random = np.random.default_rng(3)
    kinds = [load_tokenizer(BUNDLED).encode(text).ids for text in texts.values()]
    prompts = []
    for number, length in enumerate(random.integers(1, 120, 200)):
        kind = kinds[number % len(kinds)]
        begin = random.integers(0, len(kind) - length)
        prompts.append(kind[begin : begin + length])
    numbers = random.integers(0, 2, len(prompts)).tolist()
    folders = quantized_folders("qwen3_moe", texts, tmp_path)
    wanted = own_texts(*folders, NEW, prompts)
    first = Server(*folders, tmp_path / "log")
    first.wait()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        lost = pool.submit(first.texts, numbers[:50], prompts[:50])
        time.sleep(2)
        first.stop()
        with pytest.raises(OSError):
            lost.result()
    again = Server(*folders, tmp_path / "log again")
    try:
        again.wait()
        assert again.texts(numbers, prompts) == [wanted[number][i] for i, number in enumerate(numbers)]
        check_nothing_compiled(again)
    finally:
        again.stop()
