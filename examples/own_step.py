"""Your own jitted step: two requests of one batch, each at its own precision, and a switch that compiles nothing.

    python examples/own_step.py --model quantized     # a folder that `dynamo-jax quantize` wrote

Without a model it quantizes the bundled one first, by rounding. The first request's text is of a known kind, the
second one's is novel: when its monitor says so, a variant is adapted to it, and it alone is switched.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

import dynamo_jax as dj
from dynamo_jax.texts.demo import KINDS, collect

WINDOW = 64


@functools.partial(jax.jit, static_argnames="config")
def step(config, parameters, state, tokens):
    """Logits of the next tokens, and the state with what the monitors saw."""
    decoder = dj.with_parameters(config, parameters)
    logits, routings = decoder(tokens[:, :-1], experts=dj.experts(state))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)
    return losses.mean(axis=(1, 2)), dj.observe(state, routings)


def small_quantized(windows: int) -> dj.QuantizedModel:
    known = {name: collect(KINDS[name](None)) for name in ("encyclopedic", "stories")}
    settings = dj.QuantizeConfig(bits=2.5, quantizer="rtn", calibration_windows=windows)
    return dj.quantize(dj.load_decoder(dj.BUNDLED), dj.load_tokenizer(dj.BUNDLED), known, settings)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder that quantize wrote")
    parser.add_argument("--windows", type=int, default=32, help="of calibration, where there is no --model")
    parser.add_argument("--texts", nargs=2, metavar="FILE", help="a text of a known kind and a novel one")
    given = parser.parse_args()

    model = dj.load(given.model) if given.model else small_quantized(given.windows)
    if given.texts:
        read = [open(file, encoding="utf-8").read() for file in given.texts]
    else:
        read = [collect(KINDS[name](None)) for name in ("stories", "python")]
    streams = [model.tokenizer.encode(text).ids for text in read]
    count = min(32, *(len(ids) // (WINDOW + 1) for ids in streams))
    windows = np.array([ids[: count * (WINDOW + 1)] for ids in streams], np.int32).reshape(2, count, WINDOW + 1)

    host, state = dj.init(model, requests=2)
    names = [*model.knowledge.names, "novel", "not known yet"]
    parameters = model.device_parameters()
    adapted = False
    for number in range(count):
        losses, state = step(model.config, parameters, state, windows[:, number])
        labels = [names[int(label)] for label in state.watch.label]
        print(f"step {number:2}: {np.round(losses, 3)} nats a token at variants {state.number}, the texts are {labels}")
        if not adapted and bool(dj.is_novel(state)[1]):
            host, state = dj.adapt(model, host, state, windows[1, : number + 1])
            adapted = True
        if adapted:
            state = dj.follow(state)  # variant 1 where the monitor says novel
    print(f"the step was compiled {step._cache_size()} time(s)")


if __name__ == "__main__":
    main()
