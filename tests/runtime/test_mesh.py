"""Several devices and processes: what needs them runs in processes of its own, which emulate them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def started(tmp_path, tokenizer_file, ranks, **more):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    processes = {}
    for rank in ranks:
        command = [sys.executable, HERE / "two_processes.py", tmp_path / f"{rank}.json", tokenizer_file, rank, port]
        log = (tmp_path / f"{rank}.log").open("w")
        processes[rank] = subprocess.Popen([*map(str, command)], env=environment(2, **more), stdout=log, stderr=log)
    return processes


def test_two_processes_generate_and_adapt_as_one(tokenizer_file, tmp_path):
    """The same texts, events and plans, and each holds the planes of its own experts alone; a page that is damaged on
    one is an error on both, at once."""
    for rank, process in started(tmp_path, tokenizer_file, (-1, 0, 1)).items():
        assert process.wait(600) == 0, (tmp_path / f"{rank}.log").read_text()[-5000:]
    one, first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (-1, 0, 1))
    assert any(what == "adapted" for _, _, what, _, _ in first["events"])
    for name in ("tokens", "events", "widths"):
        assert first[name] == second[name]
    assert first["tokens"] == one["tokens"]
    assert first["experts"] == [True] * 8 + [False] * 8 and second["experts"] == [False] * 8 + [True] * 8
    assert [e[:4] for e in first["events"]] == [e[:4] for e in one["events"]]
    (told, _), (own, seconds) = first["damaged"], second["damaged"]
    assert "is damaged in host memory" in own and told == f"process 1: {own}" and seconds < 10


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
