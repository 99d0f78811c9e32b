"""How fast and how surely the monitor notices that the text has changed, and how often it is wrong.

    python benchmarks/shift_detection.py --texts FOLDER [--corpus FOLDER] [--streams 16] [--tokens 100000] [--json PATH]

Two deployments: one calibrated on English prose (encyclopedic, stories, medical), one on code, sums and encyclopedic
text; each is met by the demo's other kinds and by those of ``--corpus``, a folder of KIND.heldout.txt. Each is learned
from 32 calibration windows of each known kind, once as they are and once with a foreign stretch: 12 windows of each
are a table of contents or text of another kind. Limits come from calibration windows alone; the constants of
``runtime.signatures`` were chosen on these known texts and most of these kinds. That is done at ``--places``
places of the known texts, and all the rest of them is watched as known text.

1. False alarms: how often text of a known kind begins to be called novel, per 100,000 tokens; and how often it takes
   another known kind's name, which switches nothing.
2. Changes from each known kind to each novel kind: the share that is called novel within 512 tokens, and the median of
   tokens until then. A kind is far where ``FAR`` says so: other languages, source code, formulas, verse, drama.
3. Known kinds that take turns every 128 tokens: changes of label per 100,000 tokens.

Each text is routed once, by the bundled model in windows of 256 tokens; a stream joins two of them at a random multiple
of 32 tokens. FOLDER holds the packages of the demo's texts, as for ``dynamo-jax demo --texts``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import parameters, with_parameters
from dynamo_jax.models.experts import routing_counts
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.runtime.monitor import HOP, start, watch
from dynamo_jax.runtime.signatures import Signatures, learn, spans
from dynamo_jax.texts.demo import collect

TEXT_BYTES = 450_000  # of each kind
WINDOW, BATCH, PIECE = 256, 8, 32
EACH = WINDOW // PIECE
WINDOWS, FOREIGN = 32, 12  # calibration windows; those of them that are a foreign stretch
BETWEEN = 8  # windows from one place of calibration to the next
BEFORE, PIECES = 16, 88  # pieces of a stream before its change, at least, and in all
IN_TIME = 512
CONTENTS = "table of contents"
DEPLOYMENTS = {  # known kind -> its foreign stretch
    "prose": {"encyclopedic": CONTENTS, "stories": "python", "medical": "java"},
    "code": {"python": "stories", "arithmetic": CONTENTS, "encyclopedic": "latex-math"},
}
FAR = {
    *("german", "french", "spanish", "italian", "dutch", "swedish", "portuguese", "polish", "russian"),
    *("java", "c", "rust", "go", "javascript", "scripting", "sql", "python", "arithmetic"),
    *("latex", "latex-math", "drama", "scripture"),
}


@functools.partial(jax.jit, static_argnames="config")
def _pieces(config, params, tokens):
    _, routings = with_parameters(config, params).hidden_states(tokens)
    return routing_counts(routings, tokens.size // PIECE, config.num_experts)


def routed(config: Any, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Routed tokens of every PIECE tokens (K, L, E) of a text that is cut into windows."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    filled = np.concatenate([windows, np.zeros((-len(windows) % BATCH, WINDOW), windows.dtype)])
    parts = [np.asarray(_pieces(config, params, jnp.asarray(part))) for part in np.split(filled, len(filled) // BATCH)]
    return np.concatenate(parts)[: len(windows) * EACH].astype(np.float32)


@jax.jit
def labels(signatures: Signatures, pieces: jax.Array) -> jax.Array:
    """The label (B, K) after each piece (B, K, L, E) of streams."""
    size = jnp.full((len(pieces), 1), float(PIECE))

    def one(state, counts):
        state = watch(signatures, state, counts[:, None], size)
        return state, state.label

    return jax.lax.scan(one, start(signatures, len(pieces)), jnp.moveaxis(pieces, 1, 0))[1].T


def contents() -> str:
    """As the head of an old novel."""
    ones, tens = " I II III IV V VI VII VIII IX".split(" "), " X XX XXX XL".split(" ")
    chapters = [f"CHAPTER {tens[n // 10]}{ones[n % 10]}" for n in range(1, 40)]
    return "\n\n".join(f"BOOK {book}: 18{book:02d}\n\n" + "\n\n".join(chapters) for book in range(1, 18))


def texts_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Every kind's text; a kind that the demo and the corpus have is the demo's."""
    texts = {CONTENTS: contents()}
    for path in sorted(arguments.corpus.glob("*.heldout.txt")) if arguments.corpus else ():
        texts[path.name.split(".")[0]] = path.read_text(encoding="utf-8")
    return texts | {name: collect(parts(arguments.texts), TEXT_BYTES) for name, parts in {**KNOWN, **NOVEL}.items()}


def begins(found: np.ndarray, to: np.ndarray) -> int:
    """How often a label that is not among ``to`` changes to one that is."""
    among = np.isin(found, to)
    return int((among[1:] & ~among[:-1]).sum())


def delays(
    signatures: Signatures, old: np.ndarray, new: np.ndarray, count: int, rng: np.random.Generator
) -> list[int | None]:
    """Tokens of the new kind until it is called novel, None where it is not; without streams that were called novel
    before the change."""
    sizes = BEFORE + rng.integers(HOP // PIECE, size=count)
    streams = []
    for size in sizes:
        begin, after = int(rng.integers(len(old) - size)), int(rng.integers(len(new) - (PIECES - size)))
        streams.append(np.concatenate([old[begin : begin + size], new[after : after + PIECES - size]]))
    out: list[int | None] = []
    for found, size in zip(np.asarray(labels(signatures, jnp.asarray(np.stack(streams)))), sizes):
        novel = np.flatnonzero(found[size:] == len(signatures.limit))
        if found[size - 1] < len(signatures.limit):
            out.append((int(novel[0]) + 1) * PIECE if len(novel) else None)
    return out


def measured(
    pieces: dict[str, np.ndarray], foreign: dict[str, str], with_foreign: bool, arguments: argparse.Namespace
) -> dict[str, Any]:
    known = list(foreign)
    novel = [name for name in pieces if name not in (*known, CONTENTS)]
    wrong, renamed, watched, odd = *(dict.fromkeys(known, 0) for _ in range(3)), []
    late: dict[str, list[int | None]] = {name: [] for name in novel}
    for place in range(arguments.places):
        first = place * (WINDOWS + BETWEEN) * EACH
        last = first + WINDOWS * EACH
        calibration = [spans(pieces[name][first:last], EACH).astype(np.float64) for name in known]
        if with_foreign:
            for name, own in zip(known, calibration):
                own[:FOREIGN] = spans(pieces[foreign[name]], EACH)[-FOREIGN:]
        signatures, kept = learn(calibration)
        odd.append({name: (np.flatnonzero(~main) + 1).tolist() for name, main in zip(known, kept)})
        rng = np.random.default_rng(place)
        for number, name in enumerate(known):
            rest = np.concatenate([pieces[name][:first], pieces[name][last:]])[: arguments.tokens // PIECE]
            found = np.asarray(labels(signatures, jnp.asarray(rest[None]))[0])
            wrong[name] += begins(found, np.array([len(known)]))
            renamed[name] += begins(found, np.setdiff1d(np.arange(len(known)), [number]))
            watched[name] += len(rest) * PIECE
            for other in novel:
                late[other] += delays(signatures, rest, pieces[other], arguments.streams, rng)
    kinds = {}
    for name, each in late.items():
        in_time = float(np.mean([d is not None and d <= IN_TIME for d in each]))
        median = float(np.median([np.inf if d is None else d for d in each]))
        kinds[name] = {"far": name in FAR, "streams": len(each), "in_time": in_time, "median": median}
    return {
        "alarms_per_100k": 1e5 * sum(wrong.values()) / sum(watched.values()),
        "alarms": wrong,
        "renamed": renamed,
        "tokens": watched,
        "left_out": odd,
        "kinds": kinds,
        "far_in_time": float(np.mean([d is not None and d <= IN_TIME for n in novel if n in FAR for d in late[n]])),
    }


def show(name: str, stretch: str, found: dict[str, Any]) -> None:
    said = ", ".join(f"{kind} {count}" for kind, count in found["alarms"].items())
    print(f"\ncalibrated on {name}, {stretch}")
    print(f"false alarms per 100,000 tokens of known text: {found['alarms_per_100k']:.2f} ({said})")
    print(f"took another known kind's name: {', '.join(f'{kind} {count}' for kind, count in found['renamed'].items())}")
    print(f"windows left out, of {WINDOWS}: {[{k: len(v) for k, v in o.items()} for o in found['left_out']]}")
    print(f"{'kind':16s} {'':5s} {'streams':>7s} {'in time':>8s} {'median':>8s}")
    for kind, row in sorted(found["kinds"].items(), key=lambda one: (not one[1]["far"], -one[1]["in_time"])):
        far = "far" if row["far"] else ""
        print(f"{kind:16s} {far:5s} {row['streams']:7d} {row['in_time']:8.0%} {row['median']:8.0f}")
    print(f"far kinds called novel within {IN_TIME} tokens: {found['far_in_time']:.1%}", flush=True)


def by_turns(pieces: dict[str, np.ndarray], known: list[str]) -> dict[str, float]:
    """Changes of label per 100,000 tokens of two kinds that take turns every hop."""
    last = WINDOWS * EACH
    signatures, _ = learn([spans(pieces[name][:last], EACH).astype(np.float64) for name in known])
    out, each = {}, HOP // PIECE
    for a, b in itertools.combinations(known, 2):
        size = min(len(pieces[a]), len(pieces[b]), last + 25_000 // PIECE) // each * each
        parts = [pieces[name][last:size].reshape(-1, each, *pieces[name].shape[1:]) for name in (a, b)]
        stream = np.stack(parts, axis=1).reshape(1, -1, *pieces[a].shape[1:])
        found = np.asarray(labels(signatures, jnp.asarray(stream))[0])[WINDOW // PIECE :]
        out[f"{a} and {b}"] = 1e5 * int((np.diff(found) != 0).sum()) / (stream.shape[1] * PIECE)
        print(f"{a} and {b} by turns: {out[f'{a} and {b}']:.0f} changes of label per 100,000 tokens")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--corpus", type=Path, help="folder of KIND.heldout.txt, more novel kinds")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="folder of the model that routes")
    parser.add_argument("--streams", type=int, default=16, help="changes of each pair of kinds at each place")
    parser.add_argument("--tokens", type=int, default=100_000, help="of known text of each kind and place at most")
    parser.add_argument("--places", type=int, default=3, help="where calibration windows are taken from known texts")
    parser.add_argument("--keep", type=Path, help="folder for what was routed, so that another run need not do it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_decoder(arguments.model), load_tokenizer(arguments.model)
    params = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in parameters(model).items()}
    pieces = {}
    for name, text in texts_of(arguments).items():
        kept = arguments.keep / f"{name}.npy" if arguments.keep else None
        if kept is None or not kept.is_file():
            pieces[name] = routed(model.config, params, np.asarray(tokenizer.encode(text).ids, np.int32))
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                np.save(kept, pieces[name].astype(np.uint8))
        else:
            pieces[name] = np.load(kept).astype(np.float32)
        print(f"routed {name}: {len(pieces[name]) * PIECE:,} tokens", flush=True)
    results = []
    for name, foreign in DEPLOYMENTS.items():
        for with_foreign in (False, True):
            found = measured(pieces, foreign, with_foreign, arguments)
            show(name, f"with {FOREIGN} foreign windows in each" if with_foreign else "as they are", found)
            results.append({"deployment": name, "foreign": with_foreign} | found)
    print()
    mixed = {name: by_turns(pieces, list(foreign)) for name, foreign in DEPLOYMENTS.items()}
    if arguments.json:
        write_json(arguments.json, {"results": results, "mixed": mixed, "jax": jax.__version__})


if __name__ == "__main__":
    main()
