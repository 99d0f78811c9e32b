"""A server of sglang-jax under load: what monitors, switching and mixed variants cost there, and what switching wins.

    python benchmarks/serving.py --model quantized --variant quantized-low --reference FOLDER \\
        --text prose=PROSE.txt --text german=GERMAN.txt [--rounds 3] [--soak MINUTES] [--json PATH]

The engine's own client (``sgl_jax.bench_serving``) sends the texts in turn, as prompts of --prompt tokens, --concurrent
of them at a time, for --new tokens each. Four servers of the same folder take turns in one run, so that they meet the
same machine; those whose turn it is not are stopped, since an idle scheduler of the engine keeps a core busy:

    off       no monitor, one variant
    watched   monitors; nothing adapts
    switched  requests name no variant: monitors, and a variant that is adapted to what is novel
    mixed     every second request at the other variant

1. Tokens a second of all requests, time to the first token and between two tokens, medians over rounds, and the ratio
   of each to "off". In the first round, which is not counted, "switched" adapts; it is printed by itself, since on a
   CPU what measures a text takes processors from the steps. Rounds that adapt again are counted, and said.
2. With --reference, the loss of the served model on its prompts above the unquantized one's: 384 tokens and more into
   each text, where a monitor has had time to decide. Read from the server ("switched" after the load, and "off").
3. With --soak, mixed load on the "switched" server for so many minutes, the text changing each second, and the memory
   of the server's processes at each half minute.

It needs Python 3.12 and the extra ``sglang``; servers listen on free ports of the loopback interface.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynamo_jax.files import write_json
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer

MODES = {"off": ["--no-monitor"], "watched": ["--no-adapt"], "switched": [], "mixed": []}
TIMES = ("ttft", "itl", "p99_itl")
DECIDED = 384  # tokens of a prompt, before which a monitor has not decided or pages have not come


class Server:
    """``dynamo-jax serve`` on a free port."""

    def __init__(self, model: Path, variant: Path | None, mode: str, options: list[str], log: Path):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url, self.mode, self.log = f"http://127.0.0.1:{port}", mode, log
        words = ["serve", "--model", str(model), "--port", str(port), *MODES[mode], *options]
        words += ["--variant", str(variant)] if variant and mode == "mixed" else []
        with open(log, "w") as out:
            command = [sys.executable, "-m", "dynamo_jax", *words]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def wait(self) -> None:
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            time.sleep(1)
        raise RuntimeError(f"the server has ended: {self.log.read_text()[-2000:]}")

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        given = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(given, timeout=600) as answer:
            return json.load(answer)

    def memory(self) -> int:
        """Resident bytes of all processes of the server."""
        children = subprocess.run(["ps", "-o", "pid=", "-g", str(self.process.pid)], capture_output=True, text=True)
        pages = 0
        for pid in children.stdout.split():
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """It runs meanwhile, and not before and after."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)
        os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def servers(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Server]]:
    """One for each mode, one after the other started, all ready."""
    found: dict[str, Server] = {}
    try:
        for mode in MODES:
            if mode == "mixed" and arguments.variant is None:
                continue
            options = [*options_of(arguments), *arguments.engine.split()]
            found[mode] = Server(arguments.model, arguments.variant, mode, options, folder / f"{mode}.log")
            found[mode].wait()
            os.killpg(found[mode].process.pid, signal.SIGSTOP)
            print(f"{mode}: a server is ready", flush=True)
        yield found
    finally:
        for server in found.values():
            server.stop()


def options_of(arguments: argparse.Namespace) -> list[str]:
    """Of the engine: few shapes, so that they are compiled in a minute on a CPU."""
    tokens, batch = arguments.chunk, arguments.concurrent
    context = arguments.prompt + arguments.new + 8
    return [
        *("--requests", str(batch), "--context-length", str(context), "--chunked-prefill-size", str(tokens)),
        *("--max-prefill-tokens", str(tokens), "--precompile-token-paddings", str(tokens)),
        *("--precompile-bs-paddings", str(batch), "--max-total-tokens", str(batch * (context + 64))),
        *("--skip-server-warmup", "--dtype", arguments.dtype),
    ]


def prompts_of(tokenizer: Any, text: str, tokens: int, count: int) -> list[list[int]]:
    """The first ``count`` stretches of so many tokens. ValueError: too few of them."""
    ids = tokenizer.encode(text).ids
    found = [ids[begin : begin + tokens] for begin in range(0, len(ids) - tokens + 1, tokens)][:count]
    if len(found) < count:
        raise ValueError(f"a text has {len(ids):,} tokens: {count} prompts of {tokens} need {count * tokens:,}")
    return found


def load(server: Server, prompts: list[str], arguments: argparse.Namespace, key: str | None, share: int = 1) -> Any:
    """One run of the engine's client; its own figures. share: of how many that run at once this is one."""
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.jsonl", Path(folder) / "out.jsonl"
        turns = [{"conversations": [{"content": p}, {"content": "."}]} for p in prompts]
        rows.write_text("\n".join(map(json.dumps, turns)))
        words = ["--backend", "sglang-oai", "--base-url", server.url, "--dataset-name", "custom", "--output-details"]
        words += ["--dataset-path", str(rows), "--sharegpt-output-len", str(arguments.new), "--output-file", str(out)]
        words += ["--num-prompts", str(len(prompts)), "--max-concurrency", str(arguments.concurrent // share)]
        words += ["--model", str(arguments.model), "--tokenizer", str(arguments.model), "--disable-tqdm"]
        words += ["--warmup-requests", "0", "--seed", "1"]
        words += ["--extra-request-body", json.dumps({"extra_key": key})] if key else []
        command = [sys.executable, "-m", "sgl_jax.bench_serving", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the client failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        found = json.loads(out.read_text())
    if failed := [error for error in found["errors"] if error]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0][:500]}")
    return found


def measured(server: Server, prompts: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens a second and times in milliseconds, of all requests of one text."""
    keys = ["variant=0", "variant=1"] if server.mode == "mixed" else [None]
    before = plans_made(server)
    parts = [prompts[number :: len(keys)] for number in range(len(keys))]
    with concurrent.futures.ThreadPoolExecutor(len(keys)) as pool:
        runs = [pool.submit(load, server, part, arguments, key, len(keys)) for key, part in zip(keys, parts)]
        found = [run.result() for run in runs]
    gaps = [gap for one in found for each in one["itls"] for gap in each]
    made = plans_made(server) - before
    while server.ask("/dynamo/state")["measures"]:  # else it takes time from the next server
        time.sleep(1)
        load(server, prompts[:1], arguments, None)  # pages come between steps
    return {
        "plans_made": made,
        "tokens_per_s": sum(one["total_output_tokens"] for one in found) / max(one["duration"] for one in found),
        "ttft": 1e3 * statistics.median([t for one in found for t in one["ttfts"]]),
        "itl": 1e3 * statistics.median(gaps),
        "p99_itl": 1e3 * float(np.quantile(gaps, 0.99)),
    }


def plans_made(server: Server) -> int:
    """How many plans were judged so far, or are being made."""
    state = server.ask("/dynamo/state")
    judged = sum(state["totals"].get(what, 0) for what in ("adapted", "not better", "gains", "not sure", "failed"))
    return judged + state["measures"]


def served_losses(server: Server, prompts: list[list[int]], concurrent_requests: int) -> np.ndarray:
    """Nats of each token after ``DECIDED`` of each prompt, as it is served."""

    def one(prompt: list[int]) -> list[float]:
        body = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": 0}
        answer = server.ask("/generate", **body, sampling_params={"max_new_tokens": 1, "temperature": 0})
        return [-value for value, *_ in answer["meta_info"]["input_token_logprobs"][DECIDED:]]

    with concurrent.futures.ThreadPoolExecutor(concurrent_requests) as pool:
        return np.array(list(pool.map(one, prompts)))


def exact_losses(reference: Path, prompts: list[list[int]]) -> np.ndarray:
    """The same of the unquantized model."""
    decoder, out = load_decoder(reference), []
    for prompt in prompts:
        logits = np.asarray(decoder(jnp.asarray([prompt]))[0][0, :-1], np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(prompt) - 1), prompt[1:]] - np.log(np.exp(logits).sum(axis=-1))
        out.append(-chosen[DECIDED - 1 :])
    return np.array(out)


def soak(server: Server, texts: dict[str, list[list[int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests without an end, of another text each second; the server's memory meanwhile."""
    end, begun = time.monotonic() + 60 * arguments.soak, time.monotonic()
    kinds = list(itertools.chain.from_iterable(zip(*texts.values())))
    memory, counts = [], {"requests": 0, "failed": 0}

    def client(number: int) -> None:
        for turn in itertools.count(number):
            if time.monotonic() > end:
                return
            second = int(time.monotonic() - begun)
            prompt = kinds[(second + len(texts) * turn) % len(kinds)]
            sampling = {"max_new_tokens": arguments.new, "temperature": 0, "ignore_eos": True}
            try:
                server.ask("/generate", input_ids=prompt, sampling_params=sampling)
                counts["requests"] += 1
            except OSError:
                counts["failed"] += 1

    with concurrent.futures.ThreadPoolExecutor(arguments.concurrent) as pool:
        clients = [pool.submit(client, number) for number in range(arguments.concurrent)]
        while not all(one.done() for one in clients):
            memory.append(server.memory())
            time.sleep(30)
        for one in clients:
            one.result()
    half = memory[len(memory) // 2 :]
    print(f"soak: {counts['requests']} requests, {counts['failed']} failed; resident MB at each half minute: ", end="")
    print(*(round(m / 1e6) for m in memory))
    return {**counts, "resident_bytes": memory, "growth_of_second_half": half[-1] / half[0] - 1}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Medians over rounds of each text and mode, in Markdown."""
    out = ["| text | mode | tokens a second | of off | first token, ms | between two, ms | 99th percentile | plans |"]
    out.append(f"| --- | --- |{' ---: |' * 6}")
    for text in dict.fromkeys(r["text"] for r in rows):
        own = {r["mode"]: r for r in medians(rows) if r["text"] == text}
        for mode, row in own.items():
            speed, off = row["tokens_per_s"], own["off"]["tokens_per_s"]
            times = " | ".join(f"{row[name]:.0f}" for name in TIMES)
            out.append(f"| {text} | {mode} | {speed:.1f} | {speed / off:.3f} | {times} | {row['plans_made']} |")
    return out


def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of all rounds but the first."""
    return [row for row in rows if row["round"] > 0]


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for text, mode in dict.fromkeys((r["text"], r["mode"]) for r in rows):
        own = [r for r in rows if (r["text"], r["mode"]) == (text, mode)]
        names, made = ("tokens_per_s", *TIMES), sum(r["plans_made"] for r in own)
        middle = {n: statistics.median([r[n] for r in own]) for n in names}
        out.append({"text": text, "mode": mode, "plans_made": made} | middle)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder that dynamo-jax quantize wrote")
    parser.add_argument("--variant", type=Path, help="another of the same model, for the mode mixed")
    parser.add_argument("--reference", type=Path, help="the unquantized model's folder: loss above it")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="in the order of the load")
    parser.add_argument("--prompt", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens that are asked for")
    parser.add_argument("--requests", type=int, default=16, help="of each text and round")
    parser.add_argument("--concurrent", type=int, default=8, help="requests at a time")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prompt in one step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--soak", type=float, default=0, help="minutes")
    parser.add_argument("--engine", default="--device cpu", help="more options of the engine, in one word")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    count = arguments.requests * (arguments.rounds + 2)
    texts = {
        name: prompts_of(tokenizer, Path(file).read_text(), arguments.prompt, count)
        for name, file in (word.split("=", 1) for word in arguments.text)
    }
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder, servers(arguments, Path(folder)) as running:
        for number in range(arguments.rounds + 1):
            for text, prompts in texts.items():
                own = [tokenizer.decode(p) for p in prompts[number * arguments.requests :][: arguments.requests]]
                for mode in sorted(running, key=lambda mode: (list(running).index(mode) - number) % len(running)):
                    rows.append({"text": text, "mode": mode, "round": number})
                    with running[mode].awake():
                        rows[-1] |= measured(running[mode], own, arguments)
                    print(json.dumps(rows[-1]), flush=True)
        with running["switched"].awake():
            found |= {"results": rows, "state": running["switched"].ask("/dynamo/state")}
        if arguments.reference:
            found["quality"] = quality = []
            for text, prompts in texts.items():
                own_ids = prompts[-arguments.requests :]
                exact = exact_losses(arguments.reference, own_ids)
                for mode in ("off", "switched"):
                    with running[mode].awake():
                        above = served_losses(running[mode], own_ids, arguments.concurrent) - exact
                    quality.append({"text": text, "mode": mode, "excess_nll": float(above.mean())})
                    print(json.dumps(quality[-1]), flush=True)
        if arguments.soak:
            with running["switched"].awake():
                found["soak"] = soak(running["switched"], texts, arguments)
    for what, some in (("first round", rows[: len(rows) // (arguments.rounds + 1)]), ("later rounds", counted(rows))):
        print(f"\n{what}:\n")
        print("\n".join(table(some)))
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
