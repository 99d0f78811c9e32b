"""Several devices and processes: what needs them runs in processes of its own, which emulate them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import free_port

HERE = Path(__file__).parent


def environment(devices, **more):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags} | more


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["eight_devices.py", "tpu_devices.py"])
def test_eight_devices(file, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, HERE / file]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:]
    assert " passed" in done.stdout


def started(tmp_path, tokenizer_file, ranks, *words, **more):
    processes, port = {}, free_port()
    for rank in ranks:
        command = [sys.executable, HERE / "two_processes.py", tmp_path / f"{rank}.json", tokenizer_file, rank, port]
        command += words
        log = (tmp_path / f"{rank}.log").open("w")
        processes[rank] = subprocess.Popen([*map(str, command)], env=environment(2, **more), stdout=log, stderr=log)
    return processes


def found_by(tmp_path, tokenizer_file, *words):
    """Of one process alone, of process 0 of 2, and of process 1."""
    for rank, process in started(tmp_path, tokenizer_file, (-1, 0, 1), *words).items():
        assert process.wait(600) == 0, (tmp_path / f"{rank}.log").read_text()[-5000:]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (-1, 0, 1)]


def check_alike(one, first, second):
    assert any(what == "adapted" for _, _, what, _, _ in first["events"])
    for name in ("tokens", "events", "widths"):
        assert first[name] == second[name]
    assert first["tokens"] == one["tokens"]
    assert [e[:4] for e in first["events"]] == [e[:4] for e in one["events"]]


@pytest.mark.slow
def test_two_processes_generate_and_adapt_as_one(tokenizer_file, tmp_path):
    """The same texts, events and plans, and each holds the planes of its own experts alone; what is wrong on one is an
    error on both, after which they go on."""
    one, first, second = found_by(tmp_path, tokenizer_file)
    check_alike(one, first, second)
    assert first["experts"] == [*range(8)] and second["experts"] == [*range(8, 16)]
    told, own = first["faults"], second["faults"]
    for fault, words in {"damaged page": "is damaged in host memory", "damaged file": "layer-001.safetensors"}.items():
        assert words in own[fault]
        assert told[fault] == own[fault].replace("OnAllError: ", "OnAllError: process 1: ")
    assert all("files of process 1 are not those of process 0" in of["other folder"] for of in (told, own))
    assert all("prompts and settings of process 1 are not" in of["other prompt"] for of in (told, own))
    assert "the planes of 8 of 16 experts are here and not those of expert 8" in told["no mesh"]
    assert "the planes of 8 of 16 experts are here and not those of expert 0" in own["save"]
    assert "devices of processes 0 of 2, on process 1" in own["some processes"] and told["some processes"] == ""


@pytest.mark.slow
def test_two_processes_share_the_blocks_of_experts(tokenizer_file, tmp_path):
    """A prompt alone, which every device has."""
    one, first, second = found_by(tmp_path, tokenizer_file, "blocks")
    check_alike(one, first, second)
    assert first["experts"] == second["experts"] == [*range(6)]


@pytest.mark.slow
def test_the_command_line_of_two_processes(tokenizer_file, tmp_path):
    """The first writes; where a file of one is damaged, both end with an error."""
    made = [sys.executable, HERE / "two_processes.py", tmp_path / "alone.json", tokenizer_file, "-1", "0", "folder"]
    subprocess.run([*map(str, made)], check=True, env=environment(2))

    def ran():
        hosts, processes = f"localhost:{free_port()},2,", []
        for rank in (0, 1):
            command = [sys.executable, "-c", "from dynamo_jax.commands.app import script; script()", "generate"]
            command += ["--model", tmp_path / f"{rank}", "--mesh", "2x2", "--hosts", f"{hosts}{rank}"]
            command += ["--prompt", "w5 w6 w7", "--prompt", "w8", "--max-tokens", "4", "--dtype", "float32"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen([*map(str, command)], env=environment(2), **pipes))
        return [(*process.communicate(timeout=600), process.returncode) for process in processes]

    for rank in (0, 1):
        shutil.copytree(tmp_path / "alone", tmp_path / f"{rank}")
    (written, _, code), (nothing, _, other) = ran()
    assert (code, other) == (0, 0) and written.count("w") >= 4 and nothing == ""
    path = tmp_path / "1" / "layer-000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (_, told, code), (_, own, other) = ran()
    assert (code, other) == (2, 2)
    assert "dynamo-jax: error: process 1: " in told and "layer-000.safetensors: damaged" in own


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_with_a_message(tokenizer_file, tmp_path):
    processes = started(tmp_path, tokenizer_file, (0, 1), THEN_WAIT="1")
    begin = time.monotonic()
    while not all((tmp_path / f"{rank}.ready").exists() for rank in (0, 1)):
        assert time.monotonic() - begin < 600 and all(p.poll() is None for p in processes.values())
        time.sleep(0.2)
    processes[1].kill()
    assert processes[0].wait(60) != 0
    words = (tmp_path / "0.log").read_text()
    assert any(said in words for said in ("Connection closed by peer", "heartbeat", "connection reset", "unhealthy"))
