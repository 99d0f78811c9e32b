"""Other projects' quantizers, run by their own packages, beside dynamo_jax: same model, calibration and evaluation.

    python3 -m venv PEERS
    PEERS/bin/pip install -r benchmarks/peers_torch.txt
    PEERS/bin/pip install --no-deps llmcompressor==0.9.0 compressed-tensors==0.13.0 auto-round==0.16.1
    python benchmarks/peers_torch.py --python PEERS/bin/python [--texts FOLDER] [--keep FOLDER] [--json PATH]

llm-compressor's GPTQ, auto-round's AutoRound and llm-compressor's rounding to nearest (``peers_torch_side.py``, in the
environment PEERS, which has torch) write weights of all experts; so does dynamo_jax at several budgets
(``peers_own.py``), without switching and adapted to 2,048 tokens of each novel kind. This script gives all of them the
same calibration windows, puts their weights in turn into the same float32 model and compares its predictions with
those of the model's own weights, by the code of quality.py (``float_changes.py``). Nothing but experts is changed.

Texts are those of ``texts.py`` as quality.py takes them, or with ``--corpus FOLDER`` KIND.heldout.txt of the kinds
that ``--known`` and ``--novel`` name (docs/training.md). Of a known kind the first windows calibrate and later ones are
evaluated; of a novel kind the first 8 are what dynamo_jax may adapt to.

bits: a weight of the experts. Of the others codes, scales and zero points; of dynamo_jax all that the device holds of
the experts, spare slots and page tables too. Excess: nats a token above the unquantized model, mean over the kinds;
divergence from its predictions likewise; ±: standard error by window. Processor time and peak memory are of the
quantization alone, each in a process of one thread on one core: threads that wait for each other would count as
processor time. Compiled programs are there, but for the row "nothing compiled".
Differences are paired by window: the other's minus dynamo_jax's with the most bits that are no more than the other's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from adaptation import DEPLOYMENTS
from calibration_hosts import THREADS
from deployments import heldout_windows
from float_changes import changes, predictions
from peers_own import FOUND, digest_of
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED, BUNDLED_NAME
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.families.names import expert_names
from dynamo_jax.models.formats.expert_files import read_expert
from dynamo_jax.models.formats.tensor_files import TensorFiles
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.texts.demo import collect
from dynamo_jax.texts.windows import token_windows

HERE = Path(__file__).parent
METHODS = (
    *(f"gptq-{bits}-{kind}" for bits in (4, 3, 2) for kind in ("sym", "asym")),
    *(f"autoround-{bits}-sym" for bits in (4, 3, 2)),
    *(f"rtn-{bits}-{kind}" for bits in (4, 3, 2) for kind in ("sym", "asym")),
)
NAMES = {"gptq": "GPTQ (llm-compressor)", "autoround": "AutoRound", "rtn": "rounding (llm-compressor)"}
BUDGETS = (3.0, 4.125, 3.125, 2.5, 2.1667)
FAR = ("german", "russian", "python", "sql", "latex", "drama")  # of a corpus
WINDOW, SEEN = 256, 8
KINDS = ("known", "novel")


class Text(NamedTuple):
    """first: windows (S, T1) to calibrate on or to adapt to; rest: those that are evaluated."""

    kind: str
    first: np.ndarray
    rest: np.ndarray


class Method(NamedTuple):
    """What was made. facts: what the process that made it found. folders: of the weights, by text; "" for any other."""

    name: str
    bits: float
    facts: dict[str, Any]
    folders: dict[str, Path]


def texts_of(a: argparse.Namespace, tokenizer: Any) -> dict[str, Text]:
    if a.corpus:
        names = {"known": a.known or DEPLOYMENTS["prose"], "novel": a.novel or FAR}
        windows = {n: heldout_windows(a.corpus, n, tokenizer, WINDOW) for n in (*names["known"], *names["novel"])}
    else:
        if a.known or a.novel:
            raise SystemExit("error: --known and --novel name kinds of --corpus")
        names = {"known": tuple(KNOWN), "novel": tuple(NOVEL)}
        parts = {**KNOWN, **NOVEL}
        windows = {n: token_windows(collect(of(a.texts)), tokenizer, WINDOW, n) for n, of in parts.items()}
    found = {}
    for kind in KINDS:
        count = a.calibration_windows if kind == "known" else SEEN
        for name in names[kind]:
            own = windows[name]
            if len(own) < count + 2:
                raise SystemExit(f"error: {name}: {len(own)} windows of {WINDOW} tokens, expected {count + 2} or more")
            found[name] = Text(kind, own[:count], own[count : count + a.limit])
    return found


def run(command: list[str], log: Path, environment: dict[str, str]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        ended = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise SystemExit(f"error: {' '.join(command)}: ended with {ended.returncode}: {log.read_text()[-2000:]}")


def made(a: argparse.Namespace, folder: Path, texts: dict[str, Text]) -> Iterator[Method]:
    """All methods, each made unless an earlier run left it in ``folder``."""
    known = np.concatenate([t.first for t in texts.values() if t.kind == "known"])[:, :-1].astype(np.int32)
    np.save(folder / "windows.npy", known)
    of_texts = {f"{'known' if t.kind == 'known' else 'first'}/{name}": t.first for name, t in texts.items()}
    np.savez(folder / "windows.npz", **of_texts)
    plain = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name} | THREADS
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    compiled["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    (folder / "compiled").mkdir(exist_ok=True)

    def found(name: str, program: list[str], environment: dict[str, str]) -> dict[str, Any]:
        out = folder / name
        if not (out / FOUND).exists():
            print(f"{name} ..", flush=True)
            run([*program, "--model", str(a.model), "--out", str(out)], folder / f"{name}.log", environment)
        facts = json.loads((out / FOUND).read_text())
        if facts["windows"] != digest_of(known):
            raise SystemExit(f"error: {out}: made from other windows; choose another --keep")
        return facts

    own = [sys.executable, str(HERE / "peers_own.py"), "--windows", str(folder / "windows.npz"), "--bits"]
    budgets = a.budget or BUDGETS
    cold = found(f"dynamo-{budgets[0]:g}-cold", [*own, str(budgets[0])], plain | compiled)
    yield Method("dynamo, nothing compiled", cold["bits"], cold, {})
    for budget in budgets:
        name = f"dynamo-{budget:g}"
        facts = found(name, [*own, str(budget)], plain | compiled)
        yield Method("dynamo", facts["bits"], facts, {"": folder / name})
        taken = {n: folder / name / n for n, about in facts["texts"].items() if about["taken"]}
        yield Method("dynamo, adapted", facts["bits"], facts, {"": folder / name} | taken)
    theirs = [str(a.python), str(HERE / "peers_torch_side.py"), "--windows", str(folder / "windows.npy")]
    for method in a.method or METHODS:
        options = ["--method", method, "--iterations", str(a.iterations)]
        facts = found(method, [*theirs, *options], plain)
        name, bits, kind = method.split("-")
        yield Method(f"{NAMES[name]}, {bits} bits, {kind}.", facts["bits"], facts, {"": folder / method})


def experts_in(folder: Path, config: ModelConfig) -> np.ndarray:
    """(L, E, P, F, D) float32, from a file that has the experts of a checkpoint."""
    tensors, layers = TensorFiles(folder), []
    for layer in config.moe_layers:
        of = expert_names(config, layer)
        experts = [np.stack(read_expert(tensors, of, e)) for e in range(config.num_experts)]
        layers.append(np.stack(experts).astype(np.float32))
    return np.stack(layers)


class Measure:
    """Evaluates weights on the texts. exact: what the model's own weights do on each, ``changes`` of (3, S)."""

    def __init__(self, model: Decoder, texts: dict[str, Text]):
        self.model, self.texts = model, texts
        self.params = {n: jnp.asarray(np.asarray(p), jnp.float32) for n, p in parameters(model).items()}
        own = self.params
        self.reference = {name: predictions(model.config, own, t.rest) for name, t in texts.items()}
        self.exact = {n: changes(model.config, own, t.rest, self.reference[n]) for n, t in texts.items()}

    def of(self, method: Method) -> dict[str, np.ndarray]:
        """Excess loss and divergence of each window, (2, S), by text."""
        found = {}
        for where, names in itertools.groupby(
            sorted(self.texts, key=lambda n: str(place(method, n))), lambda n: place(method, n)
        ):
            params = peers.with_experts(self.model, self.params, experts_in(where, self.model.config))
            for name in names:
                own = changes(self.model.config, params, self.texts[name].rest, self.reference[name])
                found[name] = np.stack([own[0] - self.exact[name][0], own[2]])
        return found


def place(method: Method, text: str) -> Path:
    return method.folders.get(text, method.folders[""])


def mean_and_error(each: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of values (2, S) of several texts: the mean of their means, and its standard error by window."""
    errors = np.stack([e.std(axis=1, ddof=1) / math.sqrt(e.shape[1]) for e in each])
    return np.mean([e.mean(axis=1) for e in each], axis=0), np.linalg.norm(errors, axis=0) / len(each)


def summary(method: Method, found: dict[str, np.ndarray], texts: dict[str, Text]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method.name, "bits": method.bits, "facts": method.facts, "texts": {}}
    for kind in KINDS if found else ():
        (excess, kl), (error, kl_error) = mean_and_error([w for n, w in found.items() if texts[n].kind == kind])
        row[kind] = {"excess_nll": excess, "standard_error": error, "kl": kl, "kl_standard_error": kl_error}
    for name, windows in found.items():
        (excess, kl), (error, kl_error) = mean_and_error([windows])
        row["texts"][name] = {"excess_nll": excess, "standard_error": error, "kl": kl, "kl_standard_error": kl_error}
    return row


def pairs(
    methods: list[Method], found: list[dict[str, np.ndarray]], texts: dict[str, Text]
) -> Iterator[dict[str, Any]]:
    """Each other's method minus ours, with as many bits or fewer."""
    own = {name: [i for i, m in enumerate(methods) if m.name == name] for name in ("dynamo", "dynamo, adapted")}
    for i, method in enumerate(methods):
        for name, indices in own.items():
            fits = [j for j in indices if methods[j].bits <= method.bits]
            if method.name.startswith("dynamo") or not fits:
                continue
            best = max(fits, key=lambda j: methods[j].bits)
            row: dict[str, Any] = {
                "method": method.name,
                "bits": method.bits,
                "ours": name,
                "our_bits": methods[best].bits,
            }
            for kind in KINDS:
                both = [found[i][n] - found[best][n] for n, t in texts.items() if t.kind == kind]
                (excess, kl), (error, kl_error) = mean_and_error(both)
                row[kind] = {"excess_nll": excess, "standard_error": error, "kl": kl, "kl_standard_error": kl_error}
            yield row


def cells(found: dict[str, float]) -> str:
    excess = f"{found['excess_nll']:+.4f} ± {found['standard_error']:.4f}"
    return f"{excess} | {found['kl']:.4f} ± {found['kl_standard_error']:.4f}"


def tables(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> Iterator[str]:
    yield "| method | bits | known, excess | divergence | novel, excess | divergence | processor s | peak MB |"
    yield f"| --- |{' ---: |' * 7}"
    for row in sorted(rows, key=lambda r: -r["bits"]):
        facts = row["facts"]
        cost = f"{facts['cpu_seconds']:.0f} | {facts['peak_bytes'] / 1e6:.0f}"
        both = " | ".join(cells(row[kind]) if kind in row else " | " for kind in KINDS)
        yield f"| {row['method']} | {row['bits']:.3f} | {both} | {cost} |"
    yield "\n| minus ours | bits | ours | bits | known, excess | divergence | novel, excess | divergence |"
    yield f"| --- | ---: | --- |{' ---: |' * 5}"
    for row in differences:
        both = " | ".join(cells(row[kind]) for kind in KINDS)
        yield f"| {row['method']} | {row['bits']:.3f} | {row['ours']} | {row['our_bits']:.3f} | {both} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, help="of the environment with torch")
    parser.add_argument("--rows", type=Path, help="print the tables of an earlier run's JSON, and do nothing else")
    add_texts(parser)
    parser.add_argument("--corpus", type=Path, help="folder with KIND.heldout.txt, instead of --texts")
    parser.add_argument("--known", action="append", help="a kind of the corpus to calibrate on")
    parser.add_argument("--novel", action="append", help="a kind of the corpus that is not calibrated on")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint folder; the bundled model by default")
    parser.add_argument("--method", action="append", help=f"of {', '.join(METHODS)}; all by default")
    parser.add_argument("--budget", type=float, action="append", help=f"bits a weight, ours; {BUDGETS} by default")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--calibration-windows", type=int, default=32, help="of each known kind")
    parser.add_argument("--limit", type=int, default=32, help="evaluated windows of each kind at most")
    parser.add_argument("--keep", type=Path, help="a folder for what was made, from which a stopped run goes on")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.rows:
        kept = json.loads(a.rows.read_text())
        print("\n".join(tables(kept["results"], kept["differences"])))
        return
    if not a.python:
        parser.error("--python PATH or --rows PATH")
    model = load_decoder(a.model)
    texts = texts_of(a, load_tokenizer(a.model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        methods = list(made(a, folder, texts))
        measure = Measure(model, texts)
        found = []
        for method in methods:
            found.append(measure.of(method) if method.folders else {})
            print(f"evaluated: {method.name}, {method.bits:.3f} bits", flush=True)
    rows = [summary(m, f, texts) for m, f in zip(methods, found)]
    differences = list(pairs(methods, found, texts))
    print("\n".join(tables(rows, differences)))
    if a.json:
        name = BUNDLED_NAME if a.model == BUNDLED else a.model.name
        kinds = {n: {"kind": t.kind, "windows": len(t.rest)} for n, t in texts.items()}
        about = {"model": name, "calibration_windows": a.calibration_windows, "texts": kinds, "jax": jax.__version__}
        write_json(a.json, {**about, "results": rows, "differences": differences})


if __name__ == "__main__":
    main()
