"""Calibration by several processes: the bits of one, however many there are, and one end for all."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import free_port

HERE = Path(__file__).parent


class Run:
    """Processes of one command, and what they write."""

    def __init__(self, folder, arguments, count, mark="none"):
        port = free_port()
        self.logs = [folder / f"{count}-{number}.log" for number in range(count)]
        self.processes = []
        for number, log in enumerate(self.logs):
            command = [sys.executable, HERE / "processes.py", port, count, number, mark, *arguments]
            with log.open("w") as file:
                self.processes.append(subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=os.environ))

    def codes(self, seconds=600):
        return [process.wait(seconds) for process in self.processes]

    def words(self):
        return [log.read_text()[-3000:] for log in self.logs]


@pytest.fixture
def arguments(small_folder, words, tmp_path):
    """Of ``quantize``, but where to: two texts, a part batch of windows."""
    known = []
    for name in (0, 1):
        (tmp_path / f"{name}.txt").write_text(words(name))
        known += ["--known", f"{name}={tmp_path / f'{name}.txt'}"]
    sizes = ["--windows", "5", "--window", "32", "--bits", "3.5"]
    return ["quantize", "--model", small_folder, *known, *sizes, "--out"]


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def quantized(tmp_path, arguments, count):
    out = tmp_path / f"by-{count}"
    run = Run(tmp_path, [*arguments, out], count)
    assert run.codes() == [0] * count, run.words()
    return digests(out), run.words()


def test_two_processes_quantize_as_one_and_one_of_them_writes(arguments, tmp_path):
    one, _ = quantized(tmp_path, arguments, 1)
    two, (first, second) = quantized(tmp_path, arguments, 2)
    assert one == two and len(one) > 5
    assert "quantize layers: 6 of 6" in first and "checkpoint" in first
    assert "layers" not in second and "checkpoint" not in second


@pytest.mark.slow
def test_three_processes_analyze_and_quantize_as_one(arguments, tmp_path):
    assert quantized(tmp_path, arguments, 1)[0] == quantized(tmp_path, arguments, 3)[0]
    found = []
    for count in (1, 3):
        path = tmp_path / f"{count}.json"
        run = Run(tmp_path, ["analyze", *arguments[1:-3], "--json", path], count)
        assert run.codes() == [0] * count, run.words()
        found.append(path.read_bytes())
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_another_number_of_processes(arguments, tmp_path):
    """All are killed at random steps, twice."""
    whole, _ = quantized(tmp_path, arguments, 1)
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    up, down = [f"hidden-{i:03d}" for i in range(1, 6)], [f"sensitivity-{i:03d}" for i in range(4, 0, -1)]
    steps = [*up, *down, "emphasis", *(f"stats-{i:03d}" for i in range(1, 5))]
    out = tmp_path / "killed"
    for count, at in zip((2, 3), sorted(rng.sample(range(len(steps)), 2))):
        run = Run(tmp_path, [*arguments, out], count)
        while not (out / "unfinished" / f"{steps[at]}.safetensors").exists():
            assert all(p.poll() is None for p in run.processes), (seed, run.words())
            time.sleep(0.005)
        for process in run.processes:
            process.send_signal(signal.SIGKILL)
        run.codes()
    run = Run(tmp_path, [*arguments, out], 2)
    assert run.codes() == [0, 0], (seed, run.words())
    assert "goes on in" in run.words()[0]
    assert digests(out) == whole, f"seed {seed}"


@pytest.mark.slow
def test_what_fails_on_one_process_is_an_error_on_all(arguments, tmp_path):
    run = Run(tmp_path, [*arguments, tmp_path / "out"], 2, "damaged")
    assert run.codes() == [2, 2], run.words()
    first, second = run.words()
    assert "dynamo-jax: error: process 1: model.safetensors: holds NaN" in first
    assert "dynamo-jax: error: model.safetensors: holds NaN" in second


@pytest.mark.slow
@pytest.mark.parametrize(("gone", "by"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_process_that_is_killed_ends_the_other(arguments, tmp_path, gone, by):
    run = Run(tmp_path, [*arguments, tmp_path / "out"], 2)
    while not (tmp_path / "out" / "unfinished" / "hidden-002.safetensors").exists():
        assert all(p.poll() is None for p in run.processes), run.words()
        time.sleep(0.005)
    run.processes[gone].send_signal(by)
    codes = run.codes(60)
    assert codes[gone] == -by and codes[1 - gone] != 0
    said = run.words()[1 - gone]
    if gone == 1:  # the first process, without which JAX aborts the others
        assert codes[0] == 2 and "dynamo-jax: error: another process is gone" in said
        assert "what is finished is kept in" in said
    assert any(words in said for words in ("another process is gone", "unhealthy", "UNAVAILABLE", "CANCELLED")), said


@pytest.mark.slow
def test_processes_that_were_given_other_texts_say_so(arguments, tmp_path):
    other = list(arguments)
    other[other.index("--windows") + 1] = "4"
    port = free_port()
    processes = [
        subprocess.Popen(
            [*map(str, [sys.executable, HERE / "processes.py", port, 2, number, "none", *given, tmp_path / "out"])],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, given in enumerate((arguments, other))
    ]
    for process in processes:
        assert "process 1 was given other settings than process 0" in process.communicate(timeout=300)[1]
        assert process.returncode == 2
