"""Faults of processes, disks and folders: each run ends whole, or goes on to the same bits, and leaves nothing else.

Every case runs the command line in processes of its own and compares the result's digests with those of a run that
nothing happened to. Cases that need a disk of their own make one in a namespace (``unshare``), for which no rights are
needed; they are skipped where the system does not allow that. ``make faults`` runs them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KILLED = Path(__file__).with_name("killed.py")
NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]


def _may_mount():
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True).returncode == 0


needs_disks = pytest.mark.skipif(not _may_mount(), reason="no namespace with disks of its own")


class Runs:
    """The command ``quantize`` on a small model, and what it makes when nothing happens to it."""

    def __init__(self, folder, model, text):
        self.folder, self.model = folder, model
        (folder / "words.txt").write_text(text)
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.whole = {}
        for bits in (3.5, 4.5):
            assert self(*self.quantize(folder / str(bits), bits)).returncode == 0
            self.whole[bits] = digests(folder / str(bits))
        assert self("export", "--model", str(folder / "3.5"), "--out", str(folder / "exported")).returncode == 0
        self.exported = digests(folder / "exported")

    def quantize(self, out, bits=3.5, *more, model=None):
        arguments = ["quantize", "--model", model or self.model, "--known", f"words={self.folder / 'words.txt'}"]
        return [*map(str, arguments), "--windows", "1", "--window", "32", "--bits", str(bits), "--out", str(out), *more]

    def command(self, *arguments, killed=()):
        program = [str(KILLED), *map(str, killed)] if killed else ["-m", "dynamo_jax"]
        return [sys.executable, *program, *map(str, arguments)]

    def __call__(self, *arguments, **options):
        command = self.command(*arguments, killed=options.pop("killed", ()))
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, **options)

    def start(self, *arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(*arguments), env=self.environment, **pipes)

    def on_disks(self, script):
        """``script``, lines of sh, in a namespace in which it may mount disks."""
        return subprocess.run([*NAMESPACE, script], env=self.environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(small_folder, words, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("faults"), small_folder, words(0))


def digests(folder):
    """Of all files; hidden ones too."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def one_line(failed, said=""):
    errors = [line for line in failed.stderr.splitlines() if "error" in line.lower()]
    assert failed.returncode == 2 and len(errors) == 1 and errors[0].startswith("dynamo-jax: error"), failed.stderr
    assert said in errors[0]


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_in_every_file_that_a_run_writes(runs, tmp_path, earlier):
    """Each process is killed a file later than the one before it, or, where that one got on, two files further. (A
    file is synced, gets its name, its folder is synced: so before it has its name, or before its digest is noted.)"""
    out = tmp_path / "out"
    command = runs.quantize(out)
    if earlier:
        shutil.copytree(runs.folder / "4.5", out)
        command.append("--overwrite")
    kills, number, reached = 0, 5, 0
    while True:
        finished = runs(*command, killed=("sync", number))
        if finished.returncode != -signal.SIGKILL:
            break
        kills += 1
        steps = len((out / "unfinished" / "digests").read_bytes().splitlines())
        number, reached = (5 + kills % 2, steps) if steps > reached else (number + 1, reached)
        whole = {name: digest for name, digest in digests(out).items() if not name.startswith("unfinished/")}
        assert (
            whole in ([runs.whole[4.5], runs.whole[3.5]] if earlier else [{}, runs.whole[3.5]])
            or (out / "unfinished" / "SHA256SUMS").exists()
        )
    assert kills > 10 and finished.returncode == 0, finished.stderr
    assert digests(out) == runs.whole[3.5] and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_between_any_two_files_that_get_their_places(runs, tmp_path, earlier):
    """Whatever is there in between loads, where there is a result; and the same command ends it."""
    out, command = tmp_path / "out", runs.quantize(tmp_path / "out", 3.5, *(["--overwrite"] if earlier else []))
    for number in range(1, 100):
        if earlier:
            shutil.copytree(runs.folder / "4.5", out)
        shutil.copytree(runs.folder / "3.5", out / "unfinished") if number > 1 else None
        if number == 1:  # how many renames a whole run has
            finished = runs(*command)
            assert finished.returncode == 0
            shutil.rmtree(out)
            continue
        (out / "unfinished" / "lock").touch()
        job = json.loads((out / "unfinished" / "dynamo_jax.json").read_text())["job"]
        (out / "unfinished" / "job.json").write_text(json.dumps(job))
        finished = runs(*command, killed=("replace", number - 1))
        if finished.returncode != -signal.SIGKILL:
            break
        read = runs("inspect", "--model", out)
        assert read.returncode == 0 and "finished" not in read.stderr
        assert runs(*command).returncode == 0
        assert digests(out) == runs.whole[3.5], number
        shutil.rmtree(out)
    assert number > 8 and finished.returncode == 0, finished.stderr
    assert digests(out) == runs.whole[3.5] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_killed_in_every_file(runs, tmp_path):
    out = tmp_path / "out"
    for number in range(1, 200):
        finished = runs("export", "--model", runs.folder / "3.5", "--out", out, killed=("sync", number))
        if finished.returncode != -signal.SIGKILL:
            break
    assert number > 10 and finished.returncode == 0
    assert digests(out) == runs.exported and [p.name for p in tmp_path.iterdir()] == ["out"]


def locks(process):
    """Whether the process holds a lock: it works on a folder then."""
    with open("/proc/locks") as held:
        return any(line.split()[4] == str(process.pid) for line in held)


def test_interrupted_it_says_how_to_go_on(runs, tmp_path):
    """SIGINT at three times, then the end."""
    rng = random.Random(seed := random.SystemRandom().randrange(10**6))
    said = []
    for _ in range(3):
        process = runs.start(*runs.quantize(tmp_path / "out"))
        unfinished = tmp_path / "out" / "unfinished"
        while not (list(unfinished.glob("*.safetensors")) and locks(process)) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1 * rng.random())  # all of it takes a second or two
        process.send_signal(signal.SIGINT)
        said.append(process.communicate()[1])
        assert process.returncode in (130, 0) and "Traceback" not in said[-1], f"seed {seed}: {said[-1]}"
    assert f"is kept in {tmp_path / 'out' / 'unfinished'}; the same command goes on there" in said[0], f"seed {seed}"
    finished = runs(*runs.quantize(tmp_path / "out"))
    assert finished.returncode == 0 and digests(tmp_path / "out") == runs.whole[3.5], f"seed {seed}"


def test_two_runs_at_once(runs, tmp_path):
    """The later one, of the same job or another, is one line; the earlier one ends as if alone."""
    process = runs.start(*runs.quantize(tmp_path / "out"))
    while not (tmp_path / "out" / "unfinished" / "lock").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    try:
        for bits in (3.5, 4.5):
            one_line(runs(*runs.quantize(tmp_path / "out", bits)), "another run is working here")
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0 and digests(tmp_path / "out") == runs.whole[3.5]


@pytest.mark.parametrize("what", ["the result's folder", "unfinished work", "the model"])
def test_folders_that_vanish_meanwhile(runs, tmp_path, what):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(runs.model, model)
    gone = {"the result's folder": out, "unfinished work": out / "unfinished", "the model": model}[what]
    command = runs.quantize(out, model=model)
    process = runs.start(*command)
    while not list((out / "unfinished").glob("hidden-002*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    shutil.rmtree(gone, ignore_errors=True)
    process.send_signal(signal.SIGCONT)
    errors = process.communicate()[1]
    assert process.returncode in (0, 2) and "Traceback" not in errors, errors
    if what == "the model":
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(runs.model, model)
    finished = runs(*command)
    assert finished.returncode == 0, finished.stderr
    assert digests(out) == runs.whole[3.5]


@needs_disks
@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 128, 160, 192, 224, 256])
def test_a_full_disk(runs, tmp_path, size):
    """kB of a disk on which OUT lies; it grows, and the same command ends the job."""
    quantize = shlex.join(runs.command(*runs.quantize(tmp_path / "disk" / "out")))
    (tmp_path / "disk").mkdir()
    found = runs.on_disks(f"""
        mount -t tmpfs -o size={size}k none {tmp_path}/disk
        {quantize} 2> {tmp_path}/first && exit 3
        ls -A {tmp_path}/disk > {tmp_path}/left
        mount -o remount,size=64M {tmp_path}/disk
        {quantize} > /dev/null 2> {tmp_path}/second
        cp -r {tmp_path}/disk/out {tmp_path}/out
    """)
    first = (tmp_path / "first").read_text()
    if found.returncode == 3:
        pytest.skip(f"{size} kB are enough")
    assert found.returncode == 0, found.stderr + first
    errors = [line for line in first.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("dynamo-jax: error") and "pace left" in errors[0], first
    assert (tmp_path / "left").read_text() in ("", "out\n")
    assert digests(tmp_path / "out") == runs.whole[3.5]


@needs_disks
def test_a_disk_that_may_only_be_read(runs, tmp_path):
    (tmp_path / "disk").mkdir()
    command = shlex.join(runs.command(*runs.quantize(tmp_path / "disk" / "out")))
    found = runs.on_disks(f"mount -t tmpfs -o ro none {tmp_path}/disk; {command}")
    one_line(found, "Read-only file system")
    assert not list((tmp_path / "disk").iterdir())


@needs_disks
def test_a_result_on_a_disk_that_may_only_be_read_is_served_and_done(runs, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.copytree(runs.folder / "3.5", tmp_path / "disk" / "out")
    out = tmp_path / "disk" / "out"
    again = shlex.join(runs.command(*runs.quantize(out)))
    inspect = shlex.join(runs.command("inspect", "--model", out))
    found = runs.on_disks(f"""
        mount --bind {tmp_path}/disk {tmp_path}/disk
        mount -o remount,ro,bind {tmp_path}/disk
        {inspect} > /dev/null
        {again}
    """)
    assert found.returncode == 0 and "done already" in found.stderr, found.stderr
    assert digests(out) == runs.whole[3.5]


@needs_disks
@pytest.mark.parametrize("place", ["a mount point", "a link to another disk", "the current folder", "a closed parent"])
def test_places_that_cannot_be_renamed(runs, tmp_path, place):
    """OUT is a folder of its own disk, whose parent may not be written where that is possible."""
    (tmp_path / "closed" / "out").mkdir(parents=True)
    out = tmp_path / "closed" / "out"
    given = {"a link to another disk": tmp_path / "link", "the current folder": "."}.get(place, out)
    (tmp_path / "link").symlink_to(out)
    command = shlex.join(runs.command(*runs.quantize(given)))
    closed = f"mount --bind {out.parent} {out.parent}; mount -o remount,ro,bind {out.parent}"
    found = runs.on_disks(f"""
        {closed if place == "a closed parent" else ":"}
        mount -t tmpfs none {out}
        cd {out if place == "the current folder" else "/"}
        {command} > /dev/null
        pwd > /dev/null
        cp -r {out} {tmp_path}/copy
    """)
    assert found.returncode == 0, found.stderr
    assert digests(tmp_path / "copy") == runs.whole[3.5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closed", "copy", "link"]
    assert (tmp_path / "link").is_symlink() and not list(out.iterdir())
