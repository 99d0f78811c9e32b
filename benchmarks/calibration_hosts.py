"""How much sooner several processes calibrate than one, each on a core of its own with one thread.

    python benchmarks/synthetic_checkpoint.py FOLDER --shape small-olmoe
    python benchmarks/calibration_hosts.py [--model FOLDER] [--processes 2] [--windows 32] [--json PATH]

Runs ``dynamo-jax quantize`` on the bundled model, or on FOLDER, with one process and with several, and compares all
files that they write. Each process compiles its programs itself, as in a first run; that time is not shared out, so
that a model of few layers gains less.
seconds: from the start of the processes to the end of the last one, with nothing else running meanwhile. busiest: the
processor time of the process that takes most, which says nearly the same on a machine that has other work.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from streaming_memory import texts

THREADS = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}


def seconds(command: list[str], processes: int, log: Path) -> tuple[float, float]:
    """Until all have ended, and of processor time of the busiest."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    environment = {name: value for name, value in (os.environ | THREADS).items() if "COMPILATION_CACHE" not in name}
    begin, started = time.perf_counter(), []
    for number in range(processes):
        hosts = ["--hosts", f"localhost:{port},{processes},{number}"] if processes > 1 else []
        pin = functools.partial(os.sched_setaffinity, 0, {cores[number]})
        with log.open("a") as file:
            options = {"env": environment, "stdout": file, "stderr": file, "preexec_fn": pin}
            started.append(subprocess.Popen([*command, *hosts], **options))
    ended = [os.wait4(process.pid, 0) for process in started]
    took = time.perf_counter() - begin
    if any(status for _, status, _ in ended):
        raise SystemExit(f"quantize ended with {[status for _, status, _ in ended]}: {log.read_text()[-2000:]}")
    return took, max(usage.ru_utime + usage.ru_stime for *_, usage in ended)


def digest(folder: Path) -> str:
    """Of all files, by name."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-moe")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.processes > len(os.sched_getaffinity(0)):
        raise SystemExit(f"{arguments.processes} processes need as many cores")
    rows: list[dict[str, float]] = []
    outputs = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "dynamo_jax", "quantize", "--model", arguments.model]
        command += [part for kind, path in texts(folder).items() for part in ("--known", f"{kind}={path}")]
        command += ["--windows", str(arguments.windows), "--quantizer", "gptq", "--out"]
        for processes in (1, arguments.processes):
            out = folder / str(processes)
            took, busiest = seconds([*command, str(out)], processes, folder / "log")
            outputs.add(digest(out))
            rows.append({"processes": processes, "seconds": took, "busiest": busiest})
    print(f"{'processes':>10}{'seconds':>10}{'of one':>8}{'busiest':>10}{'of one':>8}")
    for row in rows:
        row |= {f"{name}_of_one": row[name] / rows[0][name] for name in ("seconds", "busiest")}
        shown = "".join(f"{row[name]:10.1f}{row[f'{name}_of_one']:8.3f}" for name in ("seconds", "busiest"))
        print(f"{row['processes']:10}{shown}", flush=True)
    print(f"files: {'the same bits' if len(outputs) == 1 else 'DIFFER'}")
    if arguments.json:
        facts = {"date": str(datetime.date.today()), "jax": jax.__version__, "python": platform.python_version()}
        facts |= {"model": Path(arguments.model).name, "windows": arguments.windows, "same_bits": len(outputs) == 1}
        arguments.json.write_text(json.dumps({**facts, "results": rows}, indent=2) + "\n")
    if len(outputs) != 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
