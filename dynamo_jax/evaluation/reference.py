"""What a reference model predicts, and how far other predictions are from that.

The reference need not fit memory: its layers are read and run one after the other. What is kept of it are the hidden
states before its head, from which every probability follows; or, in a file, its likeliest tokens alone.

Divergence is the Kullback-Leibler divergence of a model's next-token distribution from the reference's, in nats. From a
file it is that of the likeliest tokens and of all others as one, which is a lower bound.

Axes: S windows of T tokens (T1 = T + 1), B windows of a batch, D hidden, V vocabulary, M likeliest tokens, K pieces of
a window, L layers with experts, E experts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.evaluation.errors import mean_and_error
from dynamo_jax.files import check_readable, written
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.experts import ExpertWeights, piece_counts
from dynamo_jax.models.layerwise import embedded, finished, whole_layer
from dynamo_jax.models.loss import Head, next_token_changes, next_token_nll, top_token_changes, top_tokens
from dynamo_jax.models.rest import assembled
from dynamo_jax.models.sources import LayerSource
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.monitor import HOP
from dynamo_jax.texts.windows import batches

LIKELIEST = 256  # tokens that a file keeps of each distribution
FORMAT = "dynamo_jax reference logits 1"


class Apart(NamedTuple):
    """Of each token. divergence: from the reference, in nats; agrees: whether the likeliest token is the reference's;
    more: nats of the next token beyond the reference's."""

    divergence: Float[np.ndarray, "S T"]
    agrees: Bool[np.ndarray, "S T"]
    more: Float[np.ndarray, "S T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergences:
    """Of a row, over its tokens, in nats; agreement: share of tokens whose likeliest is the reference's; ratio: of the
    perplexities. Standard errors are by window, None of one window."""

    mean: float
    standard_error: float | None
    median: float
    p90: float
    p99: float
    p999: float
    largest: float
    agreement: float
    agreement_error: float | None
    ratio: float
    ratio_error: float | None


class Exact(NamedTuple):
    """A reference on some windows. hidden: what its head takes; counts: its routed tokens, as ``perplexity.Losses`` has
    them; nll: of the next tokens; expert_weights: how many the model has."""

    hidden: Float[np.ndarray, "S T D"]
    counts: Float[np.ndarray, "S K L E"]
    nll: Float[np.ndarray, "S T"]
    expert_weights: int
    head: Head

    def part(self, at: slice) -> Exact:
        """Of some of the windows."""
        return self._replace(hidden=self.hidden[at], counts=self.counts[at], nll=self.nll[at])

    def apart(self, own: Float[Array, "B T D"], head: Head, tokens: Int[Array, "B T1"], at: slice) -> Apart:
        """Of a batch of windows, those ``at``, which may end before the batch does."""
        exact = _filled(self.hidden[at], len(tokens))
        found = _changes(exact, own, self.head, head, tokens[:, 1:])
        return Apart(*(np.asarray(a)[: at.stop - at.start] for a in found))


class Likeliest(NamedTuple):
    """The same from a file: log-probabilities of the likeliest tokens, and of all others together."""

    tokens: Int[np.ndarray, "S T M"]
    values: Float[np.ndarray, "S T M"]
    rest: Float[np.ndarray, "S T"]
    counts: Float[np.ndarray, "S K L E"]
    nll: Float[np.ndarray, "S T"]
    expert_weights: int

    def apart(self, own: Float[Array, "B T D"], head: Head, tokens: Int[Array, "B T1"], at: slice) -> Apart:
        """As ``Exact.apart``."""
        kept = [_filled(a[at], len(tokens)) for a in (self.tokens, self.values, self.rest, self.nll)]
        found = _top_changes(*kept, own, head, tokens[:, 1:])
        return Apart(*(np.asarray(a)[: at.stop - at.start] for a in found))


def _filled(array: np.ndarray, count: int) -> Array:
    return jnp.asarray(np.concatenate([array, np.repeat(array[:1], count - len(array), axis=0)]))


_changes, _top_changes = jax.jit(next_token_changes), jax.jit(top_token_changes)
_top = jax.jit(top_tokens, static_argnums=2)


@jax.jit
def _nll(hidden, head, targets):
    return next_token_nll(hidden, head.weights, targets, head.bias, head.cap)


def exact_states(
    source: LayerSource,
    windows: Int[np.ndarray, "S T1"],
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> Exact:
    """What a model makes of windows, a layer of it in memory at a time."""
    config = source.config
    top = {name: jnp.asarray(a) for name, a in source.top().items()}
    source.release()
    parts = [tokens for tokens, _ in batches(windows, batch_size)]
    states = [np.asarray(embedded(config, top, jnp.asarray(tokens[:, :-1]))) for tokens in parts]
    counts = []
    for layer in range(config.num_hidden_layers):
        arrays = {name: jnp.asarray(a) for name, a in source.layer(layer).items()}
        if layer in config.moe_layers:
            triples = [source.expert(layer, expert) for expert in range(config.num_experts)]
            arrays |= {name: jnp.asarray(np.stack(w)) for name, w in zip(ExpertWeights._fields, zip(*triples))}
            del triples
        seen = []
        for index, x in enumerate(states):
            out, routing = whole_layer(config, config.kinds[layer], arrays, jnp.asarray(x))
            states[index] = np.asarray(out)
            if routing is not None:
                seen.append(np.asarray(piece_counts([routing], len(x), config.num_experts, HOP)))
        if seen:
            counts.append(np.concatenate(seen)[: len(windows), :, 0])
        source.release()
        progress("reference", layer + 1, config.num_hidden_layers)
    head = head_of(config, top)
    hidden = [np.asarray(finished(config, top, jnp.asarray(x))) for x in states]
    nll = [np.asarray(_nll(jnp.asarray(x), head, jnp.asarray(tokens[:, 1:]))) for x, tokens in zip(hidden, parts)]
    of_windows = (np.concatenate(a)[: len(windows)] for a in (hidden, nll))
    last, losses = of_windows
    return Exact(last, np.stack(counts, axis=2).astype(np.float64), losses, config.num_expert_weights, head)


def head_of(config: ModelConfig, parameters: dict[str, Any]) -> Head:
    """What turns a model's last hidden states into logits."""
    weights = assembled(parameters)["embed" if config.tie_word_embeddings else "head"]
    return Head(jax.tree.map(jnp.asarray, weights), parameters.get("head_bias"), config.final_logit_softcapping)


def likeliest(exact: Exact, batch_size: int = 8) -> Likeliest:
    """The part of a reference that a file keeps."""
    found = []
    for start in range(0, len(exact.hidden), batch_size):
        some = exact.hidden[start : start + batch_size]
        count = min(LIKELIEST, exact.head.weights.shape[0] - 1)
        top = _top(_filled(some, batch_size), exact.head, count)
        found.append([np.asarray(a)[: len(some)] for a in top])
    tokens, values, rest = (np.concatenate(a) for a in zip(*found))
    return Likeliest(tokens, values, rest, exact.counts, exact.nll, exact.expert_weights)


def windows_digest(windows: Int[np.ndarray, "S T1"]) -> str:
    return hashlib.sha256(f"{windows.shape}".encode() + np.ascontiguousarray(windows, np.int32).tobytes()).hexdigest()


def write_references(path: Path, kept: dict[str, Likeliest], windows: dict[str, np.ndarray], vocab_size: int) -> None:
    """What references predict of each dataset's windows, into one safetensors file, whole or not at all."""
    arrays = {f"{name}/{field}": a for name, one in kept.items() for field, a in one._asdict().items()}
    digests = {f"windows {name}": windows_digest(of) for name, of in windows.items()}
    meta = {"format": FORMAT, "vocab_size": str(vocab_size)} | digests
    with written(path) as partial:
        safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, str(partial), meta)


def read_references(path: Path, windows: dict[str, np.ndarray], vocab_size: int) -> dict[str, Likeliest]:
    """What ``write_references`` wrote.

    ValueError, which names the file: it is damaged or another kind of file, of other windows than these, or of another
    vocabulary.
    """
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ValueError(f"{path}: not a file that --reference-logits wrote")
            if meta.get("vocab_size") != str(vocab_size):
                raise ValueError(
                    f"{path}: of a vocabulary of {meta.get('vocab_size')} tokens, where the model has {vocab_size}"
                )
            found = {}
            for name, of in windows.items():
                if meta.get(f"windows {name}") != windows_digest(of):
                    raise ValueError(f"{path}: has not the windows of {name} that are evaluated; write it anew")
                own = {field: file.get_tensor(f"{name}/{field}") for field in Likeliest._fields}
                found[name] = Likeliest(**own | {"expert_weights": int(own["expert_weights"].reshape(-1)[0])})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a file that --reference-logits wrote: {error}") from error
    for name, one in found.items():
        shape = windows[name][:, 1:].shape
        fits = one.nll.shape == one.rest.shape == shape and one.tokens.shape == one.values.shape
        if not fits or one.tokens.shape[:2] != shape or not np.isfinite(one.values).all():
            raise ValueError(f"{path}: damaged: arrays of {name} do not fit")
        if one.tokens.min() < 0 or one.tokens.max() >= vocab_size:
            raise ValueError(f"{path}: damaged: token ids of {name} past the vocabulary")
    return found


def divergences(apart: Apart) -> Divergences:
    """Means, quantiles and errors over a row's windows."""
    each = apart.divergence.astype(np.float64)
    more, error = _by_window(apart.more)
    agreement, agreement_error = _by_window(apart.agrees)
    median, p90, p99, p999 = (float(q) for q in np.quantile(each, (0.5, 0.9, 0.99, 0.999)))
    mean, mean_error = _by_window(each)
    ratio = math.exp(min(more, 700.0))
    return Divergences(
        mean=mean,
        standard_error=mean_error,
        median=median,
        p90=p90,
        p99=p99,
        p999=p999,
        largest=float(each.max()),
        agreement=agreement,
        agreement_error=agreement_error,
        ratio=ratio,
        ratio_error=None if error is None else ratio * error,
    )


def _by_window(each: np.ndarray) -> tuple[float, float | None]:
    """The mean, and its standard error from the means of windows."""
    return mean_and_error(each.astype(np.float64).mean(axis=1))
