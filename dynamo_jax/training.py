"""Training of a small decoder on several kinds of text, with optax and Orbax.

Next-token cross-entropy, plus a load-balancing loss over the whole mixed batch (so that experts
may specialise by kind of text, arXiv 2501.11873) and the router z-loss (arXiv 2202.08906).
Matrices are updated by Muon, the rest by Adam; warm-up, then cosine decay. A run is a folder:
tokenizer.json, token files, checkpoints/; a run that was killed continues at its newest checkpoint.
A run begins at random weights, or at those of a checkpoint folder, whose tokenizer it then keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
from flax import nnx
from jaxtyping import Array, Float, Int

from dynamo_jax.files import shown, write_text, written
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters, with_parameters
from dynamo_jax.models.experts import float_experts
from dynamo_jax.models.families.table import config_from
from dynamo_jax.models.huggingface import load_decoder, olmoe_json, save_checkpoint
from dynamo_jax.models.loss import next_token_nll
from dynamo_jax.models.routing import Routing
from dynamo_jax.models.specs import NUMBER_LIMIT, check_number
from dynamo_jax.models.tokenizer import TOKENIZER, load_tokenizer

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The keys of an ``olmoe`` config.json that say what is trained."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    norm_topk_prob: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        self.decoder  # noqa: B018 (checks itself)

    @functools.cached_property
    def decoder(self) -> ModelConfig:
        return config_from({"model_type": "olmoe"} | dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Learning rates are peaks; ``steps`` is the cosine's end. ValueError: a number out of its range,
    shares of the batch that are no shares, windows longer than the model can be given."""

    model: Sizes
    corpus: dict[str, float]  # kind of text -> share of the batch, in any unit
    steps: int
    batch_size: int
    window: int
    warmup_steps: int
    learning_rate: float
    adam_learning_rate: float
    final_learning_rate: float
    weight_decay: float
    balance_loss: float
    z_loss: float
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "window", "log_every", "checkpoint_every"):
            check_number(name, getattr(self, name), low=1)
        for name in ("warmup_steps", "seed"):
            check_number(name, getattr(self, name))
        for name in ("learning_rate", "adam_learning_rate", "final_learning_rate"):
            check_number(name, getattr(self, name), sys.float_info.min, NUMBER_LIMIT, whole=False)
        for name in ("weight_decay", "balance_loss", "z_loss"):
            check_number(name, getattr(self, name), 0, NUMBER_LIMIT, whole=False)
        for kind, share in self.corpus.items():
            check_number(f"corpus: {shown(kind)}", share, 0, NUMBER_LIMIT, whole=False)
        if not sum(self.corpus.values()) > 0:
            raise ValueError("corpus: no kind of text has a share of the batch")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: expected fewer than the {self.steps} steps")
        if self.window > self.model.max_position_embeddings:
            raise ValueError(f"window={self.window} is past the model's {self.model.max_position_embeddings} positions")


def token_files(config: TrainConfig, corpus: Path, run: Path) -> list[np.ndarray]:
    """The tokens of each kind's KIND.train.txt, made once and then memory-mapped from the run's folder."""
    if config.model.vocab_size > 2**16:
        raise ValueError(f"vocab_size {config.model.vocab_size} is past the 65536 that token files hold")
    texts = {kind: corpus / f"{kind}.train.txt" for kind in config.corpus}
    if missing := [str(p) for p in texts.values() if not p.is_file()]:
        raise ValueError(f"no such file: {', '.join(missing)}")
    if not (run / "tokenizer.json").exists():
        with written(run / "tokenizer.json") as partial:
            tokenizer_from_texts(list(texts.values()), config.model.vocab_size).save(str(partial))
    tokenizer = load_tokenizer(run)
    tokens = []
    for kind, path in texts.items():
        file = run / f"{kind}.tokens.npy"
        if not file.exists():
            documents = path.read_text(encoding="utf-8").split("\n\n")
            chunks = tokenizer.encode_batch(["\n\n".join(documents[i : i + 64]) for i in range(0, len(documents), 64)])
            with written(file) as partial, partial.open("wb") as out:
                np.save(out, np.concatenate([np.asarray(c.ids, np.uint16) for c in chunks]))
        tokens.append(np.load(file, mmap_mode="r"))
    return tokens


def sample_batch(config: TrainConfig, tokens: list[np.ndarray], step: int) -> Int[np.ndarray, "B T1"]:
    """The batch of one step: a function of (seed, step), so a resumed run sees what it would have seen."""
    rng = np.random.default_rng((config.seed, step))
    share = np.array(list(config.corpus.values()))
    kinds = rng.choice(len(tokens), size=config.batch_size, p=share / share.sum())
    starts = [rng.integers(0, len(tokens[k]) - config.window) for k in kinds]
    return np.stack([tokens[k][s : s + config.window + 1] for k, s in zip(kinds, starts)]).astype(np.int32)


def router_losses(routing: Routing) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Load balance (1 at uniform use) over all tokens of the batch, and mean squared log-sum-exp."""
    num_experts = routing.logits.shape[-1]
    share = jnp.bincount(routing.experts.reshape(-1), length=num_experts) / routing.experts.size
    probability = jax.nn.softmax(routing.logits, axis=-1).mean(axis=0)
    z = jax.nn.logsumexp(routing.logits, axis=-1)
    return num_experts * jnp.sum(share * probability), jnp.mean(z * z)


def loss_and_metrics(model: Decoder, tokens: Int[Array, "B T1"], config: TrainConfig) -> tuple[Array, dict[str, Array]]:
    hidden, routings = model.hidden_states(tokens[:, :-1], experts=float_experts, dtype=jnp.bfloat16)
    nll = next_token_nll(hidden, model.head_weights(), tokens[:, 1:], *model.logit_form()).mean()
    balance, z = (jnp.mean(jnp.stack(x)) for x in zip(*map(router_losses, routings)))
    loss = nll + config.balance_loss * balance + config.z_loss * z
    return loss, {"nll": nll, "balance": balance, "z": z}


def make_optimizer(config: TrainConfig, params: dict[str, Array]) -> optax.GradientTransformation:
    """Muon for matrices inside of layers, Adam for all else. ValueError: an optax that lacks what Muon is told."""
    if "consistent_rms" not in inspect.signature(optax.contrib.muon).parameters:
        raise ValueError(f"training needs optax 0.2.8 or later, found {optax.__version__}: pip install 'optax>=0.2.8'")

    def schedule(peak: float) -> optax.Schedule:
        end = peak * config.final_learning_rate / config.learning_rate
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, config.steps, end)

    # Matrices inside the layers are Muon's; embeddings, norms and routers are Adam's.
    matrices = {
        name: None
        if leaf.ndim < 2 or name in ("embed", "head") or name.endswith("router")
        else optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)
        for name, leaf in params.items()
    }
    muon = optax.contrib.muon(
        schedule(config.learning_rate),
        weight_decay=config.weight_decay,
        adam_b2=0.95,
        adam_learning_rate=schedule(config.adam_learning_rate),
        muon_weight_dimension_numbers=lambda _: matrices,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def first_parameters(config: TrainConfig, start: Path | None) -> dict[str, Array]:
    """Random parameters, or those of the checkpoint folder ``start`` in the float32 that training works in."""
    if start is None:
        return parameters(Decoder(config.model.decoder, rngs=nnx.Rngs(config.seed)))
    decoder = load_decoder(start)
    if decoder.config != config.model.decoder:
        found, wanted = (olmoe_json(of, "float32") for of in (decoder.config, config.model.decoder))
        wrong = {key for key in wanted if found[key] != wanted[key]}
        raise ValueError(f"{start}: the model differs from the preset's [model] in {', '.join(sorted(wrong))}")
    return {name: a.astype(jnp.float32) for name, a in parameters(decoder).items()}


def keep_tokenizer(start: Path, run: Path) -> None:
    """Weights mean something only with the tokenizer that they were trained with: the run gets a copy of it."""
    theirs, ours = (start / TOKENIZER).read_bytes(), run / TOKENIZER
    if ours.exists() and ours.read_bytes() != theirs:
        raise ValueError(f"{ours}: not the tokenizer of {start}; choose another --out")
    write_text(ours, theirs.decode())


def train(
    config: TrainConfig, corpus: Path, run: Path, log: Callable[[str], None] = print, start: Path | None = None
) -> Path:
    """Train, or continue, the run in folder ``run``; returns the folder of the finished checkpoint.

    ``start`` is a checkpoint folder whose weights and tokenizer a new run begins with; the optimizer's state
    begins anew. A run that has a checkpoint of its own continues at that one, with or without ``start``.
    """
    run.mkdir(parents=True, exist_ok=True)
    params = first_parameters(config, start)
    if start is not None:
        keep_tokenizer(start, run)
    tokens = token_files(config, corpus, run)
    optimizer = make_optimizer(config, params)

    @jax.jit
    def step_fn(params, opt_state, batch):
        grad_fn = jax.value_and_grad(
            lambda p: loss_and_metrics(with_parameters(config.model.decoder, p), batch, config), has_aux=True
        )
        (_, metrics), grads = grad_fn(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    opt_state = optimizer.init(params)
    with ocp.CheckpointManager(
        (run / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        first = 0
        if (newest := manager.latest_step()) is not None:
            restored = manager.restore(newest, args=ocp.args.StandardRestore({"params": params, "opt": opt_state}))
            params, opt_state, first = restored["params"], restored["opt"], newest
            log(f"continuing at step {first}")
        begin = time.perf_counter()
        for step in range(first, config.steps):
            params, opt_state, metrics = step_fn(params, opt_state, sample_batch(config, tokens, step))
            if (step + 1) % config.log_every == 0:
                values = {k: round(float(v), 4) for k, v in metrics.items()}  # waits for the step: then the clock
                rate = (step + 1 - first) * config.batch_size * config.window / (time.perf_counter() - begin)
                log(json.dumps({"step": step + 1, "tokens_per_s": round(rate)} | values))
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                manager.save(step + 1, args=ocp.args.StandardSave({"params": params, "opt": opt_state}))
                manager.wait_until_finished()
    save_checkpoint(run / "model", with_parameters(config.model.decoder, params), run / "tokenizer.json")
    return run / "model"


def tokenizer_from_texts(paths: list[Path], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on the files: digits one by one, so that arithmetic has regular tokens."""
    pre, models, trainers = tokenizers.pre_tokenizers, tokenizers.models, tokenizers.trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in paths], trainer)
    return tokenizer
