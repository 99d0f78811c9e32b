"""How much memory quantizing a checkpoint larger than memory takes, against what it is allowed.

    python benchmarks/streaming_memory.py --model FOLDER [--out OUT] [--windows 8] [--json PATH]

Runs ``dynamo-jax quantize`` on FOLDER (benchmarks/synthetic_checkpoint.py makes one) and watches its peak
resident memory. Allowed are the weights of one layer, the activations, and 2 GB. Activations are
seven arrays of one residual stream: what the downward sweep holds at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from dynamo_jax.models.huggingface import Source

ROOT = Path(__file__).parent.parent
STREAMS = 7


def texts(folder: Path) -> dict[str, Path]:
    """Two kinds of text that every clone has: this project's code and its prose."""
    kinds = {"code": sorted(ROOT.glob("dynamo_jax/**/*.py")), "prose": sorted(ROOT.glob("**/*.md"))}
    out = {}
    for kind, files in kinds.items():
        out[kind] = folder / f"{kind}.txt"
        out[kind].write_text("\n\n".join(f.read_text(encoding="utf-8") for f in files if ".venv" not in f.parts))
    return out


def peak_resident(process: subprocess.Popen) -> int:
    """Bytes, the process's own high-water mark, read until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        except OSError:
            break
        time.sleep(0.1)
    return peak


def layer_bytes(source: Source) -> int:
    """Bytes of the largest layer in the file."""
    sizes: dict[str, int] = {}
    for name, header in source.files.headers.items():
        if name.startswith("model.layers."):
            layer = name.split(".")[2]
            sizes[layer] = sizes.get(layer, 0) + header.nbytes
    return max(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="keep the quantized model here")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = Source(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent if arguments.out else None) as folder:
        known = texts(Path(folder))
        command = [sys.executable, "-m", "dynamo_jax", "quantize", "--model", str(arguments.model)]
        command += [part for name, path in known.items() for part in ("--known", f"{name}={path}")]
        command += ["--out", str(arguments.out or Path(folder) / "quantized")]
        command += ["--windows", str(arguments.windows), "--window", str(arguments.window)]
        begin = time.perf_counter()
        process = subprocess.Popen(command)
        peak = peak_resident(process)
        seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"quantize ended with {process.returncode}")
    tokens = len(known) * arguments.windows * arguments.window
    activations = STREAMS * tokens * source.config.hidden_size * 4
    allowed = layer_bytes(source) + activations + 2_000_000_000
    row = {
        "model": str(arguments.model.name),
        "checkpoint_bytes": source.files.nbytes(),
        "layer_bytes": layer_bytes(source),
        "activation_bytes": activations,
        "allowed_bytes": allowed,
        "peak_resident_bytes": peak,
        "peak_over_allowed": peak / allowed,
        "tokens": tokens,
        "seconds": seconds,
    }
    for name, value in row.items():
        print(f"{name:22}{value / 1e9:10.2f} GB" if name.endswith("_bytes") else f"{name:22}{value}")
    if arguments.json:
        facts = {"date": str(datetime.date.today()), "jax": jax.__version__, "python": platform.python_version()}
        arguments.json.write_text(json.dumps({**facts, "results": [row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
