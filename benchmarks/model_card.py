"""The figures of the bundled model's card: held-out loss beside xz, cost of uniform rounding, routing.

For each KIND.heldout.txt of the corpus (docs/training.md says how to build it): perplexity and bits
per byte over all full windows, what ``xz -9`` needs for the same bytes, and the loss that uniform
round-to-nearest at 4, 3 and 2 bits adds, with its standard error paired by window. For each layer:
the mean Jensen-Shannon divergence of routing between kinds, and the busiest expert's share.

    python benchmarks/model_card.py --corpus corpus/ --json card.json --card card.md
"""

from __future__ import annotations

import argparse
import itertools
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dynamo_jax.analysis.dynamics import busiest_share, routing_divergence
from dynamo_jax.evaluation.perplexity import Dataset, EvalConfig, Reference, Row
from dynamo_jax.evaluation.uniform import evaluate_uniform
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.texts.reading import read_text
from dynamo_jax.texts.windows import token_windows

BATCH = 16


def predicted_bytes(windows: np.ndarray, tokenizer: tokenizers.Tokenizer) -> bytes:
    """The bytes that the predicted tokens stand for: all but the first token of the text."""
    ids = windows[:, 1:].reshape(-1).tolist()
    vocabulary = {i: piece for piece, i in tokenizer.get_vocab().items()}
    return b"".join(_piece_bytes(vocabulary[i]) for i in ids)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2, encoder.py's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(shifted)}


ALPHABET = _byte_alphabet()


def _piece_bytes(piece: str) -> bytes:
    return bytes(ALPHABET[c] for c in piece)


def kind_figures(data: Dataset, rows: dict[str, Row], tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    raw = predicted_bytes(data.rest, tokenizer)
    bits = rows["bf16"].nll * rows["bf16"].tokens / math.log(2)
    return {
        "tokens": rows["bf16"].tokens,
        "bytes": len(raw),
        "perplexity": rows["bf16"].perplexity,
        "bits_per_byte": bits / len(raw),
        "xz_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
        "added": {name: (rows[name].difference, rows[name].standard_error) for name in ("rtn4", "rtn3", "rtn2")},
    }


def layer_figures(references: dict[str, Reference]) -> list[dict[str, float]]:
    """Divergence between kinds (mean over pairs) and busiest share (mean and most over kinds), by layer."""
    counts = [losses.counts.sum(axis=(0, 1)) for _, losses in references.values()]
    shares = np.stack([busiest_share(c) for c in counts])
    pairs = list(itertools.combinations(counts, 2))
    return [
        {
            "divergence_bits": float(np.mean([routing_divergence(a[i], b[i]) for a, b in pairs])),
            "busiest_share_mean": float(shares[:, i].mean()),
            "busiest_share_most": float(shares[:, i].max()),
        }
        for i in range(shares.shape[1])
    ]


def tables(kinds: dict[str, dict[str, Any]], layers: list[dict[str, float]]) -> str:
    lines = [
        "| held-out text | tokens | perplexity | bits per byte | `xz -9` | 4 bits adds | 3 bits adds | 2 bits adds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, f in kinds.items():
        added = " | ".join(f"{d:+.4f} ± {e:.4f}" for d, e in f["added"].values())
        lines.append(
            f"| {kind} | {f['tokens']:,} | {f['perplexity']:.2f} | {f['bits_per_byte']:.3f} | "
            f"{f['xz_bits_per_byte']:.3f} | {added} |"
        )
    lines += [
        "",
        "| layer | routing divergence between kinds, bits | busiest expert's share, mean over kinds | most |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for index, f in enumerate(layers):
        mean, most = f["busiest_share_mean"], f["busiest_share_most"]
        lines.append(f"| {index} | {f['divergence_bits']:.3f} | {mean:.1f} x | {most:.1f} x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with KIND.heldout.txt files")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="Hugging Face folder; default: the bundled model")
    parser.add_argument("--limit", type=int, help="windows of a kind at most")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--card", type=Path, help="also write the tables to this Markdown file")
    args = parser.parse_args()
    model, tokenizer = load_decoder(args.model), load_tokenizer(args.model)
    window = model.config.max_position_embeddings
    data = []
    for path in sorted(args.corpus.glob("*.heldout.txt")):
        name = path.name.removesuffix(".heldout.txt")
        windows = token_windows(read_text(path), tokenizer, window, name, args.limit)
        data.append(Dataset(name, "known", windows[:0], windows))
    if not data:
        raise SystemExit(f"{args.corpus}: no KIND.heldout.txt files")
    rows, references = evaluate_uniform(model, data, EvalConfig(window=window, batch_size=BATCH))
    by_kind = {d.name: {r.variant: r for r in rows if r.dataset == d.name} for d in data}
    kinds = {d.name: kind_figures(d, by_kind[d.name], tokenizer) for d in data}
    layers = layer_figures(references)
    text = tables(kinds, layers)
    print(text)
    if args.card:
        args.card.write_text(text, encoding="utf-8")
    if args.json:
        write_json(args.json, {"kinds": kinds, "layers": layers})


if __name__ == "__main__":
    main()
